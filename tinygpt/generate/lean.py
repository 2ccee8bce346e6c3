"""The forward pass of a GPT in few operations, for tokens at any positions: it makes decoding fast.

It computes what the model's own forward pass does. A token of a small model takes about a millisecond, a module call
five microseconds, an operation one or two. So this pass calls no module that has a faster form, and leaves out
operations that another can do on the way. tests/test_lean.py keeps the two passes equal: it compares their logits for
every switch, kind of weights and number of rows.

M tokens, C n_embd, V vocab_size, H query heads, G key/value heads, D head_dim; in a product I inputs, O outputs, N
slices of the weights.
"""

import math
from collections.abc import Callable, Sequence
from functools import partial, wraps
from typing import Any, TypeGuard, TypeVar, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tinygpt.model.config import GPTConfig
from tinygpt.model.gpt import GPT, Block
from tinygpt.model.layers import MLP, RMSNorm, first_room, more_room
from tinygpt.model.products import FEW_ROWS, fast_products
from tinygpt.model.quantize import Int8Linear

FEW = 64  # rows; above this, reading the weights costs so little per row that the plain product will do
TokenMap = Callable[[Tensor], Tensor]  # maps each token by itself, such as a norm or a product: (M, I) -> (M, O)
TokenMaps = Callable[[Tensor], Sequence[Tensor]]  # several maps of the same input: (M, I) -> an (M, O) of each
# Layer, queries (M, H, D), keys and values (M, G, D) -> what each query read, (M, H·D).
Attend = Callable[[int, Tensor, Tensor, Tensor], Tensor]
AnyModule = TypeVar("AnyModule", bound=nn.Module)


class LeanBlock:
    """The parts of one block as functions of (M, …)."""

    def __init__(self, block: Block, config: GPTConfig) -> None:
        attn = block.attn
        self.attn_norm = lean_norm(block.attn_norm)
        self.qkv = products(attn.q_proj, attn.k_proj, attn.v_proj)
        self.qk_norm = lean_qk_norm(attn.q_norm, attn.k_norm, config) if config.qk_norm else None
        self.out = product(attn.o_proj)
        # None: the MLP has the same input as attention
        self.mlp_norm = None if block.mlp_norm is None else lean_norm(block.mlp_norm)
        self.mlp = lean_mlp(block.mlp)


class LeanGPT:
    """The parts of a model as functions, which use the model's own weights."""

    def __init__(self, model: GPT) -> None:
        config = model.config
        self.n_head, self.n_kv_head, self.head_dim = config.n_head, config.n_kv_head, config.head_dim
        self.embedding = model.tok_emb.weight.detach()
        self.positions = None if model.pos_emb is None else model.pos_emb.weight.detach()
        self._rope, self._block_size = model.rope, config.block_size
        self._turns = self.embedding.new_empty(0, 2 * self.head_dim)
        self.blocks = [LeanBlock(cast(Block, block), config) for block in model.blocks]
        self.norm = lean_norm(model.norm)
        self.lm_head = product(model.lm_head)

    def turns(self, n: int) -> Tensor | None:
        """Rope's cosines and signed sines of the first n positions or more, (S, 2·D); None with learned positions."""
        if self._rope is not None and n > len(self._turns):
            cos, sin = self._rope(max(first_room(self._block_size), more_room(n, self._block_size)))
            first, second = sin.chunk(2, -1)
            self._turns = torch.cat((cos, -first, second), -1)
        return None if self._rope is None else self._turns

    def logits(
        self, ids: Tensor, positions: Tensor, turns: Tensor | None, attend: Attend, wanted: Tensor | None = None
    ) -> Tensor:
        """Logits after each of the M tokens, or of the `wanted` ones by index.  (M,), (M,) int64 -> (M, V) float32

        `turns` is the table of `turns()`. With `wanted`, the last layer's `attend` returns only those tokens' rows.
        """
        x = F.embedding(ids, self.embedding)
        if self.positions is not None:
            x = x + F.embedding(positions, self.positions)
        rope = None if turns is None else F.embedding(positions, turns).view(-1, 2, 1, self.head_dim).unbind(1)
        for layer, block in enumerate(self.blocks):
            normed = block.attn_norm(x)
            q, k, v = self._heads(block, normed, rope)
            if wanted is not None and layer == len(self.blocks) - 1:
                x, normed = x[wanted], normed[wanted]
            attended = x + block.out(attend(layer, q, k, v))
            x = attended + block.mlp(normed if block.mlp_norm is None else block.mlp_norm(attended))
        return self.lm_head(self.norm(x)).float().contiguous()

    def _heads(self, block: LeanBlock, x: Tensor, rope: tuple[Tensor, ...] | None) -> tuple[Tensor, Tensor, Tensor]:
        """(M, C) -> queries (M, H, D), keys and values (M, G, D)"""
        q, k, v = block.qkv(x)
        qk = torch.cat((q, k), -1).view(len(x), -1, self.head_dim)
        if block.qk_norm is not None:
            qk = block.qk_norm(qk)
        if rope is not None:
            qk = self._turned(qk, rope)
        q, k = qk.split((self.n_head, self.n_kv_head), 1)
        return q, k, v.unflatten(-1, (-1, self.head_dim))

    def _turned(self, x: Tensor, rope: tuple[Tensor, ...]) -> Tensor:
        """Rotate the pairs (i, i + D/2) by the position's angle: roll() swaps the halves.  (M, …, D)"""
        return torch.addcmul(x * rope[0], x.roll(self.head_dim // 2, -1), rope[1])


def is_plain(module: nn.Module, cls: type[AnyModule]) -> TypeGuard[AnyModule]:
    """Whether a module has this class's own forward(); a subclass that overrides it does not."""
    return isinstance(module, cls) and type(module).forward is cls.forward


def lean_norm(norm: nn.Module) -> TokenMap:
    """LayerNorm without its module, RMSNorm in four operations instead of PyTorch's eight; other norms unchanged."""
    if is_plain(norm, nn.LayerNorm):
        weights = {name: weight.detach() for name, weight in norm.named_parameters()}
        return partial(F.layer_norm, normalized_shape=norm.normalized_shape, eps=norm.eps, **weights)
    return lean_rms_norm(norm.weight.detach(), norm.eps) if is_plain(norm, RMSNorm) else norm


def lean_rms_norm(weight: Tensor, eps: float) -> TokenMap:
    """x / √(mean(x²) + eps) · weight over the last dimension of length C, as x / √(|x|² + C·eps) · √C·weight."""
    size = weight.size(-1)
    scale, floor = weight * math.sqrt(size), weight.new_tensor(math.sqrt(size * eps))
    return lambda x: x / torch.linalg.vector_norm(x, dim=-1, keepdim=True).hypot(floor) * scale


def lean_qk_norm(q_norm: nn.Module, k_norm: nn.Module, config: GPTConfig) -> TokenMap:
    """The norms of queries and keys in one: (M, H + G, D) -> (M, H + G, D)."""
    sizes = (config.n_head, config.n_kv_head)
    if is_plain(q_norm, RMSNorm) and is_plain(k_norm, RMSNorm):
        weights = [norm.weight.detach().expand(n, -1) for norm, n in zip((q_norm, k_norm), sizes, strict=True)]
        return lean_rms_norm(torch.cat(weights), q_norm.eps)
    norms = lean_norm(q_norm), lean_norm(k_norm)
    return lambda x: torch.cat([norm(part) for norm, part in zip(norms, x.split(sizes, 1), strict=True)], 1)


def lean_mlp(mlp: nn.Module) -> TokenMap:
    """An MLP with the fastest products; one of another class unchanged."""
    if not is_plain(mlp, MLP):
        return mlp
    down, activation = product(mlp.down_proj), mlp.activation
    if mlp.gate_proj is None:
        up = product(mlp.up_proj)
        return lambda x: down(activation(up(x)))
    both = products(mlp.gate_proj, mlp.up_proj)

    def gated(x: Tensor) -> Tensor:
        gate, up = both(x)
        return down(activation(gate) * up)

    return gated


def product(layer: nn.Module) -> TokenMap:
    """What a linear layer computes, as fast as memory delivers its weights; a layer of another class unchanged.

    The weights may change afterwards.
    """
    if is_plain(layer, nn.Linear) and layer.weight.device.type == "cpu":
        return FastProduct(layer)
    return Int8Product([layer]) if is_plain(layer, Int8Linear) else layer


def products(*layers: nn.Module) -> TokenMaps:
    """What several linear layers compute from the same input."""
    bytes_ = [layer for layer in layers if is_plain(layer, Int8Linear)]
    if len(bytes_) == len(layers):  # their weights are small enough to be copied into one matrix
        joined, sizes = Int8Product(bytes_), [len(layer.step) for layer in bytes_]
        return lambda x: joined(x).split(sizes, -1)
    each = [product(layer) for layer in layers]
    return lambda x: [multiply(x) for multiply in each]


def with_fast_library(multiply: Callable[[Any, Tensor], Tensor]) -> Callable[[Any, Tensor], Tensor]:
    """A decorator for products, a method each.  Compiled code uses the library that is set when it runs."""

    @wraps(multiply)
    def faster(self: Any, x: Tensor) -> Tensor:
        if torch.compiler.is_compiling() or len(x) <= FEW_ROWS:  # in this order: compiled code is for any number
            return multiply(self, x)
        with fast_products(x.device):
            return multiply(self, x)

    return faster


class FastProduct:
    """x Wᵀ + b, above all for few rows.

    Libraries read the weights faster when they are on the left. MKL multiplies them by one row on one thread only, but
    the matrices of a batch on all threads: then each gets a slice of W's rows.
    """

    def __init__(self, linear: nn.Linear) -> None:
        n_thread = torch.get_num_threads()
        self.weight = linear.weight.detach()  # (O, I)
        n = n_thread if len(self.weight) % n_thread == 0 else 1
        self.slices = self.weight.unflatten(0, (n, -1))  # (N, O / N, I)
        self.bias = None if linear.bias is None else linear.bias.detach()

    @with_fast_library
    def __call__(self, x: Tensor) -> Tensor:
        """(M, I) -> (M, O)"""
        if len(x) > FEW:
            return F.linear(x, self.weight, self.bias)
        if len(x) > 1:
            y = torch.mm(self.weight, x.mT).mT
        elif torch.compiler.is_compiling():
            y = (self.weight * x).sum(-1)[None]  # becomes a loop that all threads share
        else:
            y = torch.bmm(self.slices, x.mT.expand(len(self.slices), -1, -1)).view(1, -1)
        return y if self.bias is None else y + self.bias


class Int8Product:
    """What Int8Linear layers compute from the same input, side by side, in few operations."""

    def __init__(self, layers: Sequence[Int8Linear]) -> None:
        biases = [layer.bias for layer in layers if layer.bias is not None]
        self.q, self.step = _joined([layer.q for layer in layers]), _joined([layer.step for layer in layers])
        self.bias = _joined(biases) if biases else None
        self.ones = torch.ones(len(self.step), dtype=torch.bfloat16, device=self.step.device)

    @with_fast_library
    def __call__(self, x: Tensor) -> Tensor:
        """(M, I) -> (M, O)"""
        if x.device.type == "cpu" and len(x) <= FEW:
            y = torch._weight_int8pack_mm(x.bfloat16().contiguous(), self.q, self.ones)
        else:
            y = F.linear(x, self.q.to(x.dtype))
        y = (y * self.step).to(x.dtype)
        return y if self.bias is None else y + self.bias


def _joined(tensors: Sequence[Tensor]) -> Tensor:
    """The tensors one below the other; a single one is not copied."""
    return torch.cat(list(tensors)) if len(tensors) > 1 else tensors[0].detach()
