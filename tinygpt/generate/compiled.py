"""The step of one sequence as one piece of machine code, by torch.compile.

All of the step's operations become a few loops over memory, so that little more than reading the weights is left.

H query heads, G key/value heads, D head_dim, S slots of a layer, n slots that are filled, V vocab_size.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from tinygpt.errors import UserError
from tinygpt.generate.lean import LeanBlock, LeanGPT
from tinygpt.generate.slots import Slots
from tinygpt.model import GPT

# Buffers are written once and not computed again where they are read: a quarter less time for a step.  The sizes of
# what it made itself are not checked at each call.
OPTIONS: dict[str, Any] = {"realize_opcount_threshold": 5, "size_asserts": False}


class StepOfOne(LeanGPT):
    """A model that reads one token of one sequence."""

    def __init__(self, model: GPT) -> None:
        super().__init__(model)
        config = model.config
        self.windows = [config.window_of(layer) for layer in range(config.n_layer)]
        self.places = torch.arange(config.block_size, device=self.embedding.device)
        self._compiled = torch.compile(  # type: ignore[call-overload]  # its types lack isolate_recompiles
            self._logits,
            fullgraph=True,
            dynamic=False,  # but for `filled`: a size that another model had otherwise is no variable here
            isolate_recompiles=True,
            options=OPTIONS | {"guard_filter_fn": of_sizes},
        )

    def __call__(self, next_id: int, position: int, slots: Slots) -> Tensor:
        """Write a token at its position, from 1 to block_size - 2, into the one row of `slots` -> (1, V) float32, of
        the token that follows.  (The last position of all would be compiled anew.)
        """
        filled = self.places[: position + 1]
        torch._dynamo.maybe_mark_dynamic(filled, 0)  # one piece of code for all lengths
        ids, at = (torch.tensor([value], device=filled.device) for value in (next_id, position))
        return self._compiled(ids, at, filled, slots.layers)

    def _logits(self, ids: Tensor, at: Tensor, filled: Tensor, layers: Sequence[tuple[Tensor, Tensor]]) -> Tensor:
        def attend(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            keys, values = layers[layer]
            window, n_slot = self.windows[layer], keys.size(2)  # S
            keys[:, :, at % n_slot] = k[:, :, None]
            values[:, :, at % n_slot] = v[:, :, None]
            n = filled.size(0) if window is None else n_slot
            q = (q / math.sqrt(self.head_dim)).view(self.n_kv_head, -1, 1, self.head_dim)
            scores = (q * keys[0, :, None, :n]).sum(-1)  # (G, H / G, n): a group of heads reads the same keys
            if window is not None:
                behind = (at - self.places[:n]) % n_slot  # how many tokens ago each slot was written
                scores = scores.masked_fill((behind > at) | (behind >= window), -torch.inf)
            # a softmax that divides last: what the product with the values needs is less, and so not stored before it
            weights = (scores - scores.amax(-1, keepdim=True)).exp()
            read = (weights[..., None] * values[0, :, None, :n]).sum(-2)
            return (read / weights.sum(-1, keepdim=True)).view(1, -1)

        return self.logits(ids, at, attend)

    def _heads(self, block: LeanBlock, x: Tensor, rope: tuple[Tensor, Tensor] | None) -> tuple[Tensor, Tensor, Tensor]:
        """(1, C) -> queries (1, H, D), keys and values (1, G, D), joined no longer than their norm needs them so."""
        q, k, v = (y.view(1, -1, self.head_dim) for y in block.qkv(x))
        if block.qk_norm is not None:
            q, k = block.qk_norm(torch.cat((q, k), 1)).split((self.n_head, self.n_kv_head), 1)
        if rope is not None:
            q, k = self._turned(q, rope), self._turned(k, rope)
        return q, k, v


def of_sizes(guards: Sequence[Any]) -> list[bool]:
    """Which of torch.compile's checks before each call remain: those of arguments whose sizes change.

    All others are of this model, whose code is its own (isolate_recompiles), and take as long as a layer.
    """
    return [guard.guard_type == "SHAPE_ENV" or guard.name.startswith(("filled", "layers")) for guard in guards]


_STEPS: WeakKeyDictionary[GPT, StepOfOne] = WeakKeyDictionary()


def compile_step(model: GPT, *, room: int = 0) -> None:
    """Let everything that continues one sequence of a model do it by compiled steps.

    It takes some 15 seconds, and 3 where it was done on this machine before. After weights have changed, call it again:
    scales of norms are copied. `room` is that of the decoders, where layers have windows: with another it is compiled
    again. Raises UserError where there is no compiler.
    """
    step, dtype, device = StepOfOne(model), model.tok_emb.weight.dtype, model.tok_emb.weight.device
    try:
        with torch.inference_mode():
            # a late position: only long loops are shared by the threads
            step(0, max(1, model.config.block_size - 2), Slots(model.config, 1, dtype=dtype, device=device, room=room))
    except torch._dynamo.exc.TorchDynamoException as error:
        cause, *_ = str(getattr(error, "inner_exception", error)).splitlines() or [type(error).__name__]
        cure = "install g++, or name yours in CXX, or leave --compile out"
        raise UserError(f"the step cannot be compiled ({cause}): {cure}") from error
    _STEPS[model] = step


def compiled_step(model: GPT) -> StepOfOne | None:
    """What `compile_step` made; None where it was not called."""
    return _STEPS.get(model)
