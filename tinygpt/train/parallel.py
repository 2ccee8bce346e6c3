"""How the processes of a run share a model: each has all of it, or a part of every weight.

The modules that split weights are imported where they are used: they take half as long to import as PyTorch.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeGuard, TypeVar, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from tinygpt.errors import UserError
from tinygpt.model.gpt import GPT

if TYPE_CHECKING:
    from torch.distributed.fsdp import FSDPModule
    from torch.distributed.tensor import DTensor


T = TypeVar("T")


@dataclass(frozen=True)
class World:
    """The processes of one run, seen from one of them: number `rank` of `size`, counted from 0."""

    rank: int = 0
    size: int = 1
    local_rank: int = 0  # the same among the processes on this machine
    local_size: int = 1

    def share(self, rows: Tensor) -> Tensor:
        """The part of a batch for this process; each process gets the same number of rows."""
        return rows.tensor_split(self.size)[self.rank]

    def max(self, number: int) -> int:
        """The largest of all processes' numbers."""
        if self.size == 1:
            return number
        largest = torch.tensor(number)  # on the CPU, so it does not wait for a GPU
        dist.all_reduce(largest, dist.ReduceOp.MAX)
        return int(largest)

    def sum(self, numbers: Tensor) -> Tensor:
        """The sum over all processes."""
        if self.size > 1:
            dist.all_reduce(numbers)
        return numbers

    def first(self, action: Callable[[], T]) -> T:
        """Run `action` in the first process while the others wait; all return its result.

        If it raises, all raise: the first process the error itself, the others FromFirst with its message.
        """
        result, failure = cast(T, None), None
        if self.rank == 0:
            try:
                result = action()
            except Exception as error:
                failure = error
        if self.size > 1:
            sent: list[Any] = [result, str(failure) if failure else None]
            dist.broadcast_object_list(sent, src=0)
            result, message = sent
            if self.rank and message is not None:
                raise FromFirst(message)
        if failure:
            raise failure
        return result

    @contextmanager
    def together(self) -> Iterator[None]:
        """If the block raises UserErrors in some processes, the first raises them all, and the others FromFirst."""
        failure = None
        try:
            yield
        except UserError as error:
            failure = error
        found: list[str | None] = [None] * self.size
        if self.size > 1:
            dist.all_gather_object(found, str(failure) if failure else None)
        messages = [*dict.fromkeys(filter(None, found))]  # each once
        if messages and self.rank:
            raise FromFirst(messages)
        if failure and len(messages) < 2:
            raise failure
        if messages:
            raise UserError(messages)


ALONE = World()


class FromFirst(UserError):
    """An error of the first process, which reports it."""


class Parallel:
    """How processes share a model.  This base class is for a single process, which has all of it."""

    def split(self, model: GPT) -> None:
        """Leave only this process's part of the weights in the model; called before the optimizers are built."""

    def wrap(self, loss: nn.Module, example: Tensor) -> nn.Module:
        """A module whose backward pass leaves the mean of all processes' gradients; `example` is a sample batch."""
        return loss

    def apart(self) -> AbstractContextManager[None]:
        """A context in which gradients add up in this process only, for all micro-batches but the last."""
        return nullcontext()

    def whole_model(self, model: GPT, build: Callable[[], GPT]) -> GPT:
        """A model with all weights in this process; `build` makes another of its kind."""
        return model


class Replicas(Parallel):
    """Each process has the whole model (Li et al., https://arxiv.org/abs/2006.15704)."""

    def wrap(self, loss: nn.Module, example: Tensor) -> nn.Module:
        """Gradients are summed in buckets during the backward pass.

        After the first pass, PyTorch rebuilds the buckets in the order in which gradients arrived. With three or more
        processes, other buckets mean another order of summation. So the first pass is made here, and a resumed run
        gets the same buckets as before.
        """
        self.module = DistributedDataParallel(loss, forward_sync_buffers=False, gradient_as_bucket_view=True)
        self.module(example).backward()
        self.module.zero_grad()
        return self.module

    def apart(self) -> AbstractContextManager[None]:
        """Buckets are not sent."""
        return self.module.no_sync()


class SplitWeights(Parallel):
    """Each process has a part of every weight, with its gradient and optimizer state, and fetches a block's weights
    when it is the block's turn (Zhao et al., https://arxiv.org/abs/2304.11277)."""

    def split(self, model: GPT) -> None:
        """Each block is a unit; everything before and after the blocks is one more."""
        from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method

        for block in model.blocks:
            fully_shard(block)
        self.model: FSDPModule = fully_shard(model)
        register_fsdp_forward_method(model, "hidden")  # the loss calls it

    @contextmanager
    def apart(self) -> Iterator[None]:
        """Gradients stay whole, in this process."""
        self.model.set_requires_gradient_sync(False)
        yield
        self.model.set_requires_gradient_sync(True)

    def whole_model(self, model: GPT, build: Callable[[], GPT]) -> GPT:
        """A copy, because a split model can only train."""
        copy = build()
        for name, weight in copy.named_parameters():
            put(weight, whole(model.get_parameter(name)))
        return copy


PARALLEL: dict[str, type[Parallel]] = {"ddp": Replicas, "fsdp": SplitWeights}


def is_split(tensor: Tensor) -> TypeGuard[DTensor]:
    """Whether this process has only a part of the tensor."""
    return hasattr(tensor, "full_tensor")


def whole(tensor: Tensor) -> Tensor:
    """The whole of a tensor that may be split; all processes must call it."""
    return tensor.full_tensor() if is_split(tensor) else tensor


def gathered(tensor: Tensor) -> Tensor:
    """The same, on the CPU if it was split."""
    return whole(tensor).cpu() if is_split(tensor) else tensor


def part_of(tensor: Tensor, like: Tensor) -> Tensor:
    """This process's part of a whole tensor, split like another tensor."""
    tensor = tensor.to(like.device)
    if not is_split(like):
        return tensor
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(tensor, like.device_mesh, like.placements, src_data_rank=None)


@torch.no_grad()
def put(target: Tensor, value: Tensor) -> None:
    """Copy a whole tensor into one that may be split."""
    target.copy_(part_of(value, target))
