"""Optimizers whose state is named tensors."""

from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any

import torch
from torch import Tensor

from tinygpt.errors import UserError
from tinygpt.model.gpt import GPT
from tinygpt.model.lora import trained_tensors
from tinygpt.train.config import TrainParams
from tinygpt.train.parallel import is_split, part_of, put, whole

WeightGroup = dict[str, Any]  # weights of one kind, and how an optimizer trains them
Begin = Callable[[Tensor], Tensor]  # a weight -> its initial state


class Optimizer:
    """Groups of weights, and a state for each weight, under the same names as in PyTorch's optimizers.

    PyTorch's base class is not used: its first instance imports the compiler, which takes more than a second.
    """

    def __init__(self, groups: Iterable[WeightGroup], **settings: Any) -> None:
        """`settings` are defaults for the groups."""
        self.param_groups = [settings | group for group in groups]
        self.state: dict[Tensor, dict[str, Tensor]] = defaultdict(dict)

    @torch.no_grad()
    def step(self) -> None:
        """Update each weight that has a gradient."""
        for group in self.param_groups:
            weights = [weight for weight in group["params"] if weight.grad is not None]
            if weights:
                self.change(weights, group)

    def change(self, weights: list[Tensor], group: WeightGroup) -> None:
        """Update weights with their gradients, which it may overwrite, and the settings of their group."""
        raise NotImplementedError

    def states(self, weights: Sequence[Tensor], name: str, begin: Begin = torch.zeros_like) -> list[Tensor]:
        """The tensor `name` of each weight's state; `begin` makes it the first time."""
        for weight in weights:
            if name not in self.state[weight]:
                self.state[weight][name] = begin(weight)
        return [self.state[weight][name] for weight in weights]

    def zero_grad(self) -> None:
        """Clear the gradients."""
        for group in self.param_groups:
            for weight in group["params"]:
                weight.grad = None


AnyOptimizer = Optimizer | torch.optim.Optimizer  # ours, or a package's


def build_optimizers(model: GPT, params: TrainParams) -> list[AnyOptimizer]:
    """The optimizers of a run.  Each group of weights has its `kind` and its `peak_lr`."""
    lrs = {"embedding": params.embedding_lr, "head": params.head_lr, "vector": params.vector_lr}
    decays = {"matrix": params.weight_decay, "head": params.weight_decay, "embedding": params.embedding_weight_decay}
    kinds: dict[str, list[Tensor]] = defaultdict(list)
    for name, parameter in trained_tensors(model).items():
        kinds[kind_of(model, name)].append(parameter)
    groups = []
    for kind, weights in kinds.items():
        lr, decay = lrs.get(kind) or params.lr, decays.get(kind, 0.0)
        groups.append({"params": weights, "kind": kind, "peak_lr": lr, "weight_decay": decay})
    return OPTIMIZERS[params.optimizer].build(groups, params)


def kind_of(model: GPT, name: str) -> str:
    """What a weight, or an adapter's, is part of: a matrix of a block, an embedding, the head, or a vector."""
    if name.startswith(("tok_emb.", "pos_emb.")):
        return "embedding"
    if name.startswith("lm_head."):
        return "head"
    return "matrix" if model.get_parameter(name).ndim == 2 else "vector"


def set_lr(optimizers: Iterable[AnyOptimizer], share: float) -> None:
    """Set each group's learning rate to this share of its peak."""
    for group in chain.from_iterable(optimizer.param_groups for optimizer in optimizers):
        lr = group["peak_lr"] * share
        if isinstance(group["lr"], Tensor):  # torchao's, whose step is compiled
            group["lr"].fill_(lr)
        else:
            group["lr"] = lr


def state_bytes(model: GPT, params: TrainParams) -> int:
    """About how many bytes the optimizers will keep for a model."""
    matrix, other = OPTIMIZERS[params.optimizer].state_bytes
    sizes = ((kind_of(model, name), tensor.numel()) for name, tensor in trained_tensors(model).items())
    return sum(n * (matrix if kind == "matrix" else other) for kind, n in sizes)


def optimizer_tensors(model: GPT, optimizers: Iterable[AnyOptimizer]) -> dict[str, Tensor]:
    """The optimizers' state as "<weight>/<what>": tensor; empty before the first step."""
    states = {weight: state for optimizer in optimizers for weight, state in optimizer.state.items()}
    tensors: dict[str, Tensor] = {}
    for name, weight in trained_tensors(model).items():
        for key, value in states.get(weight, {}).items():
            if is_split(value) or not hasattr(value, "__tensor_flatten__"):
                tensors[f"{name}/{key}"] = value
            else:  # a packed tensor, such as torchao's
                inner, _ = value.__tensor_flatten__()
                tensors |= {f"{name}/{key}.{part}": getattr(value, part) for part in inner}
    return tensors


def load_optimizer_tensors(model: GPT, optimizers: list[AnyOptimizer], tensors: dict[str, Tensor]) -> None:
    """Restore what `optimizer_tensors` returned, into optimizers that have not made a step."""
    kept = {name.rpartition("/")[0] for name in tensors}  # a weight whose gradients all overflowed has no state
    set_lr(optimizers, 0.0)
    for name, weight in trained_tensors(model).items():
        weight.grad = torch.zeros_like(weight) if name in kept else None
    for optimizer in optimizers:
        optimizer.step()  # creates the state; at a learning rate of 0 no weight changes
        optimizer.zero_grad()
    for name, tensor in optimizer_tensors(model, optimizers).items():
        put(tensor, tensors[name])


# ---- the choices of train.optimizer ----


@dataclass(frozen=True)
class OptimizerKind:
    """One choice of train.optimizer, and what other code needs to know about it."""

    build: Callable[[list[WeightGroup], TrainParams], list[AnyOptimizer]]
    state_bytes: tuple[int, int]  # per weight: in a matrix of a block, and elsewhere
    package: str | None = None  # needed besides PyTorch; its name in Python and for pip


def _adamw(groups: list[WeightGroup], params: TrainParams) -> list[AnyOptimizer]:
    return [AdamW(groups, lr=params.lr, betas=params.betas)]


def _adamw8bit(groups: list[WeightGroup], params: TrainParams) -> list[AnyOptimizer]:
    """AdamW with its state in 8 bits (Dettmers et al., https://arxiv.org/abs/2110.02861), from torchao."""
    try:
        from torchao.optim import AdamW8bit
    except ImportError:
        raise UserError("train.optimizer=adamw8bit needs torchao: pip install torchao, or use adamw") from None
    return [AdamW8bit(groups, lr=params.lr, betas=params.betas)]


def _lion(groups: list[WeightGroup], params: TrainParams) -> list[AnyOptimizer]:
    return [Lion(groups, lr=params.lr, betas=params.betas)]


def _muon(groups: list[WeightGroup], params: TrainParams) -> list[AnyOptimizer]:
    """Muon for the matrices inside the blocks, AdamW for all other weights."""
    inner, outer = ([group for group in groups if (group["kind"] == "matrix") is which] for which in (True, False))
    muon = [Muon(inner, lr=params.lr, momentum=params.momentum)] if inner else []
    return [*muon, *(_adamw(outer, params) if outer else [])]


OPTIMIZERS = {
    "adamw": OptimizerKind(_adamw, (8, 8)),
    "adamw8bit": OptimizerKind(_adamw8bit, (2, 2), package="torchao"),
    "lion": OptimizerKind(_lion, (4, 4)),
    "muon": OptimizerKind(_muon, (4, 8)),
}


class AdamW(Optimizer):
    """Loshchilov and Hutter, https://arxiv.org/abs/1711.05101, with PyTorch's fused kernel."""

    def change(self, weights: list[Tensor], group: WeightGroup) -> None:
        """Move each weight by the mean of its gradients over the root of their mean square."""
        means, squares = self.states(weights, "exp_avg"), self.states(weights, "exp_avg_sq")
        counts = self.states(weights, "step", lambda weight: torch.zeros((), device=weight.device))
        torch._foreach_add_(counts, 1)
        torch._fused_adamw_(
            weights,
            _gradients(weights),
            means,
            squares,
            [],
            counts,
            lr=group["lr"],
            beta1=group["betas"][0],
            beta2=group["betas"][1],
            weight_decay=group["weight_decay"],
            eps=1e-8,
            amsgrad=False,
            maximize=False,
        )


NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)  # Keller Jordan's, https://kellerjordan.github.io/posts/muon/
N_ITERATIONS = 5
# Weights of one shape in one product, at most: 2 MiB keep a CPU busy; a GPU takes as many as there are.
TOGETHER = {"cpu": 2**19, "mps": 2**19, "cuda": 2**26}
RMS_OF_ADAMW = 0.2  # root mean square of AdamW's updates; Muon's are scaled to it (https://arxiv.org/abs/2502.16982)


class Muon(Optimizer):
    """Momentum, with every matrix made orthogonal (Jordan et al., https://kellerjordan.github.io/posts/muon/).

    Updates are scaled to the size of AdamW's, so both take the same learning rates. Matrices of one shape are processed
    together, because the products of one small matrix do not keep a processor busy.
    """

    def change(self, weights: list[Tensor], group: WeightGroup) -> None:
        """Move each matrix by the orthogonal matrix nearest to its momentum."""
        self.states(weights, "momentum")  # allocate all before the first product, or its buffers lie between them
        for same in _by_shape(weights):
            momenta, gradients = self.states(same, "momentum"), _gradients(same)
            torch._foreach_lerp_(momenta, gradients, 1 - group["momentum"])
            torch._foreach_lerp_(gradients, momenta, group["momentum"])  # Nesterov's; not read after this
            updates = orthogonalized(torch.stack([whole(matrix) for matrix in gradients]))
            scale = RMS_OF_ADAMW * max(same[0].shape) ** 0.5
            torch._foreach_mul_(same, 1 - group["lr"] * group["weight_decay"])
            torch._foreach_add_(same, [*map(part_of, updates, same)], alpha=-group["lr"] * scale)


def orthogonalized(matrices: Tensor) -> Tensor:
    """Approximately the nearest (semi-)orthogonal matrices, by Newton-Schulz iteration.  (N, R, C) -> (N, R, C)

    Singular values above 0.002 of the norm come out between 0.7 and 1.2. A GPU computes in bfloat16, which is accurate
    enough and twice as fast.
    """
    x = matrices.to(torch.bfloat16 if matrices.is_cuda else matrices.dtype)
    tall = x.size(1) > x.size(2)
    x = x.mT if tall else x
    x = x / (torch.linalg.vector_norm(x, dim=(1, 2), keepdim=True) + 1e-7)
    a, b, c = NEWTON_SCHULZ
    for _ in range(N_ITERATIONS):
        square = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(square, square, square, beta=b, alpha=c), x, beta=a)
    return (x.mT if tall else x).to(matrices.dtype)


def _by_shape(matrices: Iterable[Tensor]) -> Iterator[list[Tensor]]:
    """Matrices of one shape, at most TOGETHER weights at a time, or a single larger matrix."""
    shapes: dict[torch.Size, list[Tensor]] = defaultdict(list)
    for matrix in matrices:
        shapes[matrix.shape].append(matrix)
    for shape, same in shapes.items():
        n = max(1, TOGETHER[same[0].device.type] // shape.numel())
        yield from (same[start : start + n] for start in range(0, len(same), n))


class Lion(Optimizer):
    """Moves by the sign of a momentum (Chen et al., https://arxiv.org/abs/2302.06675).  Needs a third of AdamW's lr."""

    def change(self, weights: list[Tensor], group: WeightGroup) -> None:
        """Move each weight by the sign of its momentum."""
        momenta, gradients = self.states(weights, "momentum"), _gradients(weights)
        updates = torch._foreach_lerp(gradients, momenta, group["betas"][0])
        torch._foreach_sign_(updates)
        torch._foreach_lerp_(momenta, gradients, 1 - group["betas"][1])
        torch._foreach_mul_(weights, 1 - group["lr"] * group["weight_decay"])
        torch._foreach_add_(weights, updates, alpha=-group["lr"])


def _gradients(weights: Iterable[Tensor]) -> list[Tensor]:
    return [weight.grad for weight in weights if weight.grad is not None]
