"""One decoding step, of one sequence or of several together, compiled into machine code by torch.compile.

With one sequence, the whole step becomes a few loops over memory, which take little longer than reading the weights.
With several, products and attention remain library calls, and the operations between them become loops.

B rows, H query heads, G key/value heads, D head_dim, S slots of a layer, n of them read, V vocab_size.
"""

import math
from collections.abc import Sequence
from itertools import chain
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tinygpt.generate.decoder import STEPS, KVCache, slot_mask
from tinygpt.generate.lean import FEW, LeanBlock, LeanGPT
from tinygpt.model.gpt import GPT
from tinygpt.model.layers import first_room
from tinygpt.model.products import FEW_ROWS, onednn_is_faster
from tinygpt.runtime import compiling

# Buffers are written once, not recomputed wherever they are read: a step takes a quarter less time.  The sizes of
# compiled code's own buffers are not checked at each call.
OPTIONS: dict[str, Any] = {"realize_opcount_threshold": 5, "size_asserts": False}


class CompiledStep(LeanGPT):
    """A model that reads one token per row, for one row or for up to `n_row` together."""

    def __init__(self, model: GPT, n_row: int) -> None:
        super().__init__(model)
        config, self.n_row = model.config, n_row
        self.windows = [config.window_of(layer) for layer in range(config.n_layer)]
        self.block_size, self.room = config.block_size, first_room(config.block_size)
        self.places = torch.arange(self.room, device=self.embedding.device)
        self._compiled = torch.compile(  # type: ignore[call-overload]  # its types lack isolate_recompiles
            self._logits,
            fullgraph=True,
            dynamic=False,  # except for marked sizes: one that differed in another model is not a variable here
            isolate_recompiles=True,
            options=OPTIONS | {"guard_filter_fn": of_sizes},
        )

    def __call__(self, ids: Sequence[int], at: Sequence[int], cache: KVCache) -> Tensor | None:
        """Read one token per row, at position 1 or later, and write it into the cache -> logits (B, V) float32.

        None for more than `n_row` rows, or at the context's last position, which would need another compilation.
        """
        n = max(at) + 1
        if len(at) > self.n_row or n > self.block_size - 1:
            return None
        cache.reserve(n + 1)  # reading all of its slots would need another compilation
        if n >= len(self.places):
            with torch.inference_mode(mode=False):  # as in __init__: an inference tensor would need another compilation
                self.places = torch.arange(cache.room, device=self.places.device)
        turns, filled = self.turns(n + 1), self.places[:n]
        tokens = [torch.tensor(values, device=filled.device) for values in (ids, at)]
        changing = [filled] if len(ids) == 1 else [filled, *tokens, *chain.from_iterable(cache.layers)]
        for tensor in changing:
            torch._dynamo.maybe_mark_dynamic(tensor, 0)  # same code for all lengths and numbers of rows
        if self.room < self.block_size:  # and for tables and caches of all lengths
            for layer, window in zip(cache.layers, self.windows, strict=True):
                for tensor in layer if cache.n_slots[window] > self.room else ():
                    torch._dynamo.maybe_mark_dynamic(tensor, 2)
            if turns is not None:
                torch._dynamo.maybe_mark_dynamic(turns, 0)
        logits: Tensor = self._compiled(*tokens, filled, turns, cache.layers)
        return logits

    def _logits(
        self, ids: Tensor, at: Tensor, filled: Tensor, turns: Tensor | None, layers: Sequence[tuple[Tensor, Tensor]]
    ) -> Tensor:
        rows = torch.arange(ids.size(0), device=ids.device)
        n_slots = {window: keys.size(2) for window, (keys, _) in zip(self.windows, layers, strict=True)}
        read = {
            window: filled if window is None else torch.arange(n_slot, device=at.device)
            for window, n_slot in n_slots.items()
        }
        masks = {window: self._mask(at, read[window], n_slot, window) for window, n_slot in n_slots.items()}

        def attend(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            (keys, values), window = layers[layer], self.windows[layer]
            n = read[window].size(0)
            keys[rows, :, at % n_slots[window]] = k
            values[rows, :, at % n_slots[window]] = v
            q = q.unflatten(1, (self.n_kv_head, -1))  # (B, G, H / G, D): the heads of a group read the same keys
            attention = F.scaled_dot_product_attention if q.size(0) > 1 else attention_of_one
            return attention(q, keys[:, :, :n], values[:, :, :n], masks[window]).reshape(q.size(0), -1)

        return self.logits(ids, at, turns, attend)

    def _mask(self, at: Tensor, slots: Tensor, n_slot: int, window: int | None) -> Tensor | None:
        """The mask of the slots that each row sees.  -> (B, 1, 1, n), or None where it sees all"""
        if window is None and at.size(0) == 1:
            return None
        at = at[:, None, None, None]
        return slot_mask(at, at, slots, n_slot, window, dtype=self.embedding.dtype)

    def _heads(self, block: LeanBlock, x: Tensor, rope: tuple[Tensor, ...] | None) -> tuple[Tensor, Tensor, Tensor]:
        """(B, C) -> queries (B, H, D), keys and values (B, G, D); queries and keys are joined only for their norm."""
        q, k, v = (y.unflatten(-1, (-1, self.head_dim)) for y in block.qkv(x))
        if block.qk_norm is not None:
            q, k = block.qk_norm(torch.cat((q, k), 1)).split((self.n_head, self.n_kv_head), 1)
        if rope is not None:
            q, k = self._turned(q, rope), self._turned(k, rope)
        return q, k, v


def attention_of_one(q: Tensor, keys: Tensor, values: Tensor, mask: Tensor | None) -> Tensor:
    """Attention that compiles to loops.  (1, G, H / G, D), (1, G, n, D) twice, (1, 1, 1, n) -> (1, G, H / G, D)"""
    q = (q / math.sqrt(q.size(-1)))[..., None, :]
    scores = (q * keys[:, :, None]).sum(-1)  # (1, G, H / G, n)
    if mask is not None:
        scores = scores + mask
    # softmax with the division last: the weights are then computed within the product, and not stored before it
    weights = (scores - scores.amax(-1, keepdim=True)).exp()
    return (weights[..., None] * values[:, :, None]).sum(-2) / weights.sum(-1, keepdim=True)


def of_sizes(guards: Sequence[Any]) -> list[bool]:
    """Which of torch.compile's checks before each call to keep: those of arguments whose sizes change.

    The others check the model itself, which has compiled code of its own (isolate_recompiles). They take as long as a
    layer.
    """
    return [guard.guard_type == "SHAPE_ENV" or guard.name.startswith(("filled", "layers")) for guard in guards]


def compile_step(model: GPT, *, n_row: int = 1, room: int = 0) -> None:
    """Compile the step with which a model continues one sequence, or up to `n_row` together; new decoders use it.

    With float32 weights on a CPU where oneDNN is faster, it is FEW_ROWS together at most: oneDNN's products save more
    time than compiled code, which cannot use them, because its fused attention would be slow then. docs/generation.md
    says how long this takes. Call it again after the weights have changed: scales of norms are copied. Where layers
    have windows, `room` should be that of the decoders: with another, the step is compiled again.
    Raises UserError when it cannot be compiled.
    """
    dtype, device = model.tok_emb.weight.dtype, model.tok_emb.weight.device
    is_float32 = dtype == torch.float32 and isinstance(model.lm_head, nn.Linear)  # not quantized
    if device.type == "cpu" and is_float32 and onednn_is_faster():
        n_row = min(n_row, FEW_ROWS)
    step = CompiledStep(model, n_row)
    late = first_room(model.config.block_size) - 2  # a late position: only long loops are shared among threads
    if late < 1:
        return
    with compiling("leave out --compile"), torch.inference_mode():
        for n in sorted({1, min(n_row, FEW), n_row}):  # one for each way to multiply
            step([0] * n, [late] * n, KVCache(model.config, n, dtype=dtype, device=device, room=room))
    STEPS[model] = step
