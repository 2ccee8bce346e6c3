"""Where and how fast things run: the one group of params.yaml that changes no result and that no stage tracks."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal

from tinygpt.params import Count, Within, require


@dataclass(frozen=True, kw_only=True)
class RuntimeParams:
    """The machine."""

    group: ClassVar[str] = "runtime"

    device: Literal["auto", "cpu", "cuda", "mps"]  # auto = the first of cuda, mps and cpu that is there
    n_thread: Annotated[int, Within("[0, 1024]")]  # CPU threads for PyTorch and llama.cpp: 0 = all cores
    n_process: Annotated[int, Within("[1, 1024]")]  # that train together, a GPU each where there are: 1 = just this one
    parallel: Literal["ddp", "fsdp"]  # each of them has all weights, or a part of each weight and its state
    n_worker: Annotated[int, Within("[0, 1024]")]  # processes that clean, count and encode text: 0 = one a core
    engine: Literal["process", "ray"]  # who runs them: this machine, or a Ray cluster
    ray_address: str | None  # host:port of a running cluster's head: null = a local one for the time of a stage
    micro_batch_size: Count | Literal["auto"] | None  # sequences in one forward pass: null = all of train.batch_size
    gradient_checkpointing: bool  # keep each block's input alone and compute the rest again in the backward pass
    compile: bool  # training steps by torch.compile: an eighth less time for each, seconds to begin with
    cuda_graphs: bool  # on a GPU the compiled forward and backward pass, recorded once and replayed
    log_every: Count  # steps between two lines of the training log
    log_to: tuple[
        Literal["tensorboard", "wandb", "mlflow", "dvclive"], ...
    ]  # programs that show the curve; [] for none

    def __post_init__(self) -> None:
        alone = self.n_process == 1 and self.micro_batch_size is None  # else gradients outlive the pass they are of
        require(
            (len(set(self.log_to)) == len(self.log_to), f"runtime.log_to={list(self.log_to)} names one twice"),
            (
                not self.cuda_graphs or (self.compile and alone),
                "runtime.cuda_graphs=true needs compile=true, n_process=1 and micro_batch_size=null",
            ),
            (
                not self.cuda_graphs or self.device in ("auto", "cuda"),
                f"runtime.cuda_graphs=true works on a GPU, not on runtime.device={self.device}: set it to false",
            ),
            (
                self.n_process == 1 or self.device != "mps",
                "runtime.device=mps works with one process only: set runtime.n_process=1",
            ),
        )
