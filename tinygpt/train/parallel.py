"""How the processes of a run share a model: each has all of it, or a part of every weight, which it saves itself.

What splits weights is imported where it is used: it takes as long as half of PyTorch.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, TypeGuard, cast

import torch
from safetensors import SafetensorError
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from tinygpt.errors import UserError
from tinygpt.model.gpt import GPT

if TYPE_CHECKING:
    from torch.distributed.checkpoint.metadata import TensorStorageMetadata
    from torch.distributed.fsdp import FSDPModule
    from torch.distributed.tensor import DTensor


class Alone:
    """One process."""

    def split(self, model: GPT) -> None:
        """Leave to this process its part of the weights, before its optimizers are built."""

    def wrap(self, loss: nn.Module, example: Tensor) -> nn.Module:
        """A module whose backward pass leaves the mean of all processes' gradients; `example` is what it is for."""
        return loss

    def apart(self) -> AbstractContextManager[None]:
        """A context in which backward passes add up in this process alone: of all micro-batches but the last."""
        return nullcontext()

    def whole_model(self, model: GPT, build: Callable[[], GPT]) -> GPT:
        """One with all weights here; `build` makes another of its kind."""
        return model


class Replicas(Alone):
    """Each process has the whole model (Li et al., https://arxiv.org/abs/2006.15704)."""

    def wrap(self, loss: nn.Module, example: Tensor) -> nn.Module:
        """Gradients are summed in buckets while the backward pass goes on.

        After the first pass the buckets are laid out anew, by the order in which gradients came, and of three
        processes or more another bucket is another order of summing. So that pass is made here: a resumed run gets
        the buckets that it had.
        """
        self.module = DistributedDataParallel(loss, forward_sync_buffers=False, gradient_as_bucket_view=True)
        self.module(example).backward()
        self.module.zero_grad()
        return self.module

    def apart(self) -> AbstractContextManager[None]:
        """No bucket is sent."""
        context: AbstractContextManager[None] = self.module.no_sync()
        return context


class Shards(Alone):
    """Each process has a part of every weight, its gradient and its optimizer's state, and fetches a block's when it
    is the block's turn (Zhao et al., https://arxiv.org/abs/2304.11277)."""

    def split(self, model: GPT) -> None:
        """The unit is a block; what stands before and behind them is one more."""
        from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method

        for block in model.blocks:
            fully_shard(block)
        self.model: FSDPModule = fully_shard(model)
        register_fsdp_forward_method(model, "hidden")  # which the loss calls

    @contextmanager
    def apart(self) -> Iterator[None]:
        """Gradients stay whole and here."""
        self.model.set_requires_gradient_sync(False)
        yield
        self.model.set_requires_gradient_sync(True)

    def whole_model(self, model: GPT, build: Callable[[], GPT]) -> GPT:
        """A copy, as modules in parts can only train."""
        copy = build()
        for name, weight in copy.named_parameters():
            put(weight, whole(model.get_parameter(name)))
        return copy


PARALLEL: dict[str, type[Alone]] = {"ddp": Replicas, "fsdp": Shards}


def is_split(tensor: Tensor) -> TypeGuard[DTensor]:
    """Whether this process has a part of it."""
    return hasattr(tensor, "full_tensor")


def whole(tensor: Tensor) -> Tensor:
    """All of a tensor of which this process may have a part; all processes must ask."""
    return tensor.full_tensor() if is_split(tensor) else tensor


def part_of(tensor: Tensor, like: Tensor) -> Tensor:
    """What this process has of a whole tensor that is split like another."""
    tensor = tensor.to(like.device)
    if not is_split(like):
        return tensor
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(tensor, like.device_mesh, like.placements, src_data_rank=None)


@torch.no_grad()
def put(target: Tensor, value: Tensor) -> None:
    """Copy a whole tensor into one of which this process may have a part."""
    target.copy_(part_of(value, target))


def save_split(folder: Path, tensors: dict[str, Tensor]) -> None:
    """Write what this process has of tensors, some of them split, to a safetensors file of its own; all must ask.

    With https://docs.pytorch.org/docs/stable/distributed.checkpoint.html, whose own format has a pickle in it.
    Raises in every process what went wrong in one.
    """
    from torch.distributed.checkpoint.api import CheckpointException  # a BaseException, which `Exception` misses
    from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageWriter
    from torch.distributed.checkpoint.state_dict_saver import save

    try:
        save(dict(tensors), storage_writer=HuggingFaceStorageWriter(str(folder), save_distributed=True))
    except CheckpointException as error:
        first, _ = next(iter(error.failures.values()))
        if isinstance(first, OSError):
            raise first from None
        raise RuntimeError(str(error)) from None  # it tells where in the other process


def check_split(folder: Path, tensors: dict[str, Tensor]) -> None:
    """Raises UserError where the files of `save_split` that are seen here are not all of the tensors."""
    kinds = _kinds(folder)
    for name, tensor in tensors.items():
        chunks = kinds[name].chunks if name in kinds else []
        if sum(chunk.sizes.numel() for chunk in chunks) != tensor.numel():
            raise UserError(f"{folder} has not all that the processes wrote: their machines must share the folder")


def load_split(folder: Path) -> dict[str, Tensor]:
    """What any number of processes wrote there: whole tensors on the CPU.  Raises UserError where it cannot be read."""
    from torch.distributed.checkpoint.api import CheckpointException
    from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader
    from torch.distributed.checkpoint.state_dict_loader import load

    try:
        tensors = {name: torch.empty(kind.size, dtype=kind.properties.dtype) for name, kind in _kinds(folder).items()}
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="torch.distributed is disabled")  # as it is asked to do without
            load(tensors, storage_reader=HuggingFaceStorageReader(str(folder)), no_dist=True)
    except (CheckpointException, SafetensorError) as error:
        raise UserError(f"{folder} cannot be read ({str(error).splitlines()[0]})") from None
    return tensors


def _kinds(folder: Path) -> dict[str, TensorStorageMetadata]:
    """Of each tensor in the files of a folder: its type, size and chunks."""
    from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader

    return cast(
        "dict[str, TensorStorageMetadata]", HuggingFaceStorageReader(str(folder)).read_metadata().state_dict_metadata
    )
