"""The model's sizes and switches: the `model` group of params.yaml, and the same with the vocabulary size."""

from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal, NamedTuple

from tinygpt.params import DERIVED, Count, CountOrDerived, Fraction, Within, require


class MLPKind(NamedTuple):
    """How the MLP of a block is computed."""

    activation: str  # a key of ACTIVATIONS in layers.py
    gated: bool  # a third matrix, through the activation, scales the output of the first


# A new kind of MLP needs a row here and a choice of `model.mlp` below.
MLPS = {
    "gelu": MLPKind("gelu", gated=False),
    "swiglu": MLPKind("silu", gated=True),
    "relu2": MLPKind("relu2", gated=False),
}
DERIVE: Any = None  # `__post_init__` replaces it with the derived number
HIDDEN_MULTIPLE = 32  # a derived n_hidden is a multiple of this, the block length of llama.cpp's q8_0


@dataclass(frozen=True, kw_only=True)
class ModelParams:
    """Sizes and switches of one GPT.

    `n_kv_head`, `head_dim` and `n_hidden` may be None; `__post_init__` then derives them. The defaults are for Python
    code such as `GPT(GPTConfig(n_layer=8))`; they are those of params.yaml, which must name every key.
    """

    group: ClassVar[str] = "model"

    n_layer: Annotated[int, Within("[1, 1000]")] = 4  # transformer blocks
    n_head: Annotated[int, Within("[1, 4096]")] = 4  # query heads in each block
    n_kv_head: CountOrDerived = DERIVE  # key/value heads: null = n_head, 1 = MQA, a divisor of n_head between = GQA
    n_embd: Annotated[int, Within("[1, 131072]")] = 128  # width of the residual stream
    head_dim: Annotated[int, Within("[1, 65536]"), DERIVED] = DERIVE  # width of one head: null = n_embd / n_head
    # width inside the MLP: null = 4·n_embd, 8/3·n_embd if gated
    n_hidden: Annotated[int, Within("[1, 1048576]"), DERIVED] = DERIVE
    block_size: Annotated[int, Within("[1, 1073741824]")] = 256  # most tokens of context
    position: Literal["learned", "rope"] = "rope"  # a learned vector per position, or rotated queries and keys
    rope_theta: Annotated[float, Within("[1, 1000000000000]")] = 10000.0  # base of rope's wavelengths
    norm: Literal["layernorm", "rmsnorm"] = "rmsnorm"
    norm_eps: Annotated[float, Within("(0, 1)")] = 1e-5  # added to the variance
    mlp: Literal["gelu", "swiglu", "relu2"] = "swiglu"  # gelu is the tanh approximation, relu2 the square of relu
    parallel_block: bool = False  # attention and MLP read the same norm and are added together, not one after the other
    window: Count | None = None  # a token sees itself and the window - 1 tokens before it; null = all before it
    full_every: Count | None = None  # with a window: every n-th layer sees all tokens before; null = none does
    bias: Literal["none", "qkv", "all"] = "none"  # which linear layers have one; "all" also gives layernorm its bias
    qk_norm: bool = True  # normalize each head's queries and keys before the rotation
    tie_weights: bool = False  # the output head shares the token embedding's matrix
    dropout: Fraction = 0.0  # share of embedding and residual values set to zero in training
    attention: Literal["explicit", "sdpa"] = "sdpa"  # written out, or PyTorch's fused kernels: same result

    def __post_init__(self) -> None:
        if self.n_kv_head is None:
            object.__setattr__(self, "n_kv_head", self.n_head)
        if self.n_hidden is None:
            object.__setattr__(self, "n_hidden", derived_hidden(self.n_embd, self.mlp))
        derived = self.head_dim is None
        if derived:
            object.__setattr__(self, "head_dim", max(1, self.n_embd // self.n_head))
        require(
            (
                not derived or self.n_embd % self.n_head == 0,
                f"model.n_embd={self.n_embd} must be a multiple of model.n_head={self.n_head}, or set model.head_dim",
            ),
            (
                self.n_head % self.n_kv_head == 0,
                f"model.n_head={self.n_head} must be a multiple of model.n_kv_head={self.n_kv_head}",
            ),
            (
                self.position != "rope" or self.head_dim % 2 == 0,
                f"model.position=rope needs an even model.head_dim, found {self.head_dim}",
            ),
            (
                self.window is None or self.window <= self.block_size,
                f"model.window={self.window} is longer than model.block_size={self.block_size}: set it to null",
            ),
            (
                self.full_every is None or (self.window is not None and 1 < self.full_every <= self.n_layer),
                f"model.full_every={self.full_every} needs model.window and a value from 2 to "
                f"model.n_layer={self.n_layer}: set it to null",
            ),
        )

    def n_weights(self, vocab_size: int) -> int:
        """How many weights the matrices have, counted without building them."""
        attention = 2 * self.head_dim * (self.n_head + self.n_kv_head)
        mlp = self.n_hidden * (3 if MLPS[self.mlp].gated else 2)
        rows = vocab_size * (1 if self.tie_weights else 2) + (self.block_size if self.position == "learned" else 0)
        return self.n_embd * (rows + self.n_layer * (attention + mlp))

    @property
    def windows(self) -> set[int | None]:
        """The different windows of the layers."""
        return {self.window_of(0), self.window_of((self.full_every or 1) - 1)}

    def window_of(self, layer: int) -> int | None:
        """The window of one layer, counted from 0; None where a token sees all tokens before it."""
        return None if self.full_every and (layer + 1) % self.full_every == 0 else self.window


@dataclass(frozen=True, kw_only=True)
class GPTConfig(ModelParams):
    """Everything that GPT() needs: the model group and the number of tokens."""

    vocab_size: Count = 1024  # ids of the tokenizer, special tokens included


def derived_hidden(n_embd: int, mlp: str) -> int:
    """MLP width with about as many weights for every kind: 4·n_embd for two matrices, 8/3·n_embd for three (gated)."""
    return -(-8 * n_embd // (3 * HIDDEN_MULTIPLE)) * HIDDEN_MULTIPLE if MLPS[mlp].gated else 4 * n_embd


def config_fields(config: ModelParams) -> dict[str, Any]:
    """The config as a JSON mapping, derived values resolved."""
    return {name: getattr(config, name) for name in type(config).__dataclass_fields__ if name != "group"}
