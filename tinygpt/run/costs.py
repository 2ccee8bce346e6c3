"""The memory of a run, counted before it starts, and the size of a micro-batch, found by trying sizes.

T tokens, C n_embd, V vocab_size. Sizes are bytes.
"""

import dataclasses
import resource
import sys
import time
from collections.abc import Callable, Iterable
from functools import partial

import psutil
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from tinygpt.errors import UserError
from tinygpt.model.attention import attention_mask
from tinygpt.model.config import GPTConfig
from tinygpt.model.gpt import GPT
from tinygpt.model.lora import add_lora, trained_tensors
from tinygpt.model.products import fast_products
from tinygpt.runtime import RuntimeParams, wait_for
from tinygpt.train.config import LoRAParams, TrainParams
from tinygpt.train.learner import Learner, recompute_blocks
from tinygpt.train.loss import CHUNK, autocast, pick_precision
from tinygpt.train.optim import state_bytes

LESS_MEMORY = (
    "lower runtime.micro_batch_size or set runtime.gradient_checkpointing=true; if that is not enough, lower "
    "model.block_size or use a smaller model"
)
NONE_FITS = (
    "not even the smallest micro-batch fits into the memory: set runtime.gradient_checkpointing=true, raise "
    "train.batch_size to a power of two, lower model.block_size, or use a smaller model"
)
FLOAT = 4  # bytes of a float32, the type of weights and gradients


@dataclasses.dataclass(frozen=True)
class Memory:
    """Memory of one training step, and of generation with one sequence."""

    weights: int  # adapters included
    gradients: int  # of what is trained
    optimizer: int  # state for what is trained, and its average
    activations: int  # kept for the backward pass of one micro-batch, and the logits computed at a time
    kv_cache: int  # of a full context

    @property
    def training(self) -> int:
        """Everything a training step holds."""
        return self.weights + self.gradients + self.optimizer + self.activations


def memory_of(
    config: GPTConfig, params: TrainParams, runtime: RuntimeParams, micro_batch_size: int, device: torch.device
) -> Memory:
    """What a step will hold, counted without running it: fake tensors use the device's kernels but no memory."""
    with (
        fast_products(device),  # training computes attention as it does there
        FakeTensorMode(),
        torch.device(device),
        autocast(pick_precision(params.precision, device, config.n_embd), device),
    ):
        ids = torch.zeros(micro_batch_size, config.block_size + 1, dtype=torch.long)
        model = build_trained(config, params.lora)
        activations = _loss_bytes(model, ids[:, 1:].numel())
        if runtime.gradient_checkpointing:
            x = torch.zeros(micro_batch_size, config.block_size, config.n_embd)
            rope = None if model.rope is None else model.rope(config.block_size)
            masks = {window: attention_mask(len(x[0]), window, device) for window in model.windows}
            activations += _kept_bytes(model, lambda: model.blocks[0](x, rope, masks))
            recompute_blocks(model)  # so that the next count has only their inputs
        activations += _kept_bytes(model, lambda: model.hidden(ids[:, :-1]))
        gradients, optimizer = _learning_bytes(model, params)
    windows = (config.window_of(layer) or config.block_size for layer in range(config.n_layer))
    kept = [min(window, config.block_size) for window in windows]  # tokens of each layer in the cache
    return Memory(
        weights=FLOAT * model.n_params(),
        gradients=gradients,
        optimizer=optimizer,
        activations=activations,
        kv_cache=2 * FLOAT * config.n_kv_head * config.head_dim * sum(kept),
    )


def fits(learner: Learner, size: int) -> bool:
    """Whether a step in micro-batches of this size fits into the free memory; the weights are there already."""
    model, params, free = learner.model, learner.params, available_memory(learner.device)
    if sum(_learning_bytes(model, params)) + most_activations(model, size) < free:  # counting exactly takes seconds
        return True
    needed = memory_of(model.config, params, learner.runtime, size, learner.device)
    return needed.training - needed.weights < free


def most_activations(model: GPT, size: int) -> int:
    """An upper bound on the activations of a step in micro-batches of this size, for any switches of the model.

    Besides its linear layers, a block keeps few tensors, none wider than the inputs and outputs of those layers.
    Attention may keep four matrices of scores (T, T). Short products keep a copy of the weights.
    """
    config = model.config
    linear = [module for module in model.blocks.modules() if isinstance(module, nn.Linear)]
    width = sum(layer.in_features + layer.out_features for layer in linear)
    scores = config.n_layer * config.n_head * config.block_size
    n_tokens = size * config.block_size
    return FLOAT * (n_tokens * (3 * width + 4 * scores) + model.n_params()) + _loss_bytes(model, n_tokens)


def build_trained(config: GPTConfig, lora: LoRAParams | None) -> GPT:
    """A model with random weights, built as for training, with adapters if there are any."""
    model = GPT(config)
    if lora is not None:
        add_lora(model, **dataclasses.asdict(lora), generator=None)
    return model


def _learning_bytes(model: GPT, params: TrainParams) -> tuple[int, int]:
    """Bytes of the gradients; bytes of the optimizer state and the average of the weights."""
    gradients = FLOAT * sum(tensor.numel() for tensor in trained_tensors(model).values())
    return gradients, state_bytes(model, params) + (gradients if params.ema else 0)


def _loss_bytes(model: GPT, n_tokens: int) -> int:
    """What `next_token_loss` allocates: gradients of the hidden states and the head, logits and log-probabilities."""
    c, v, chunk = model.config.n_embd, model.config.vocab_size, CHUNK[next(model.parameters()).device.type]
    n_head = sum(weight.requires_grad for weight in model.lm_head.parameters())  # A and B: the product, its gradient
    return FLOAT * (n_tokens * c + n_head * v * c + 2 * v * min(max(1, chunk // v), n_tokens))


def _kept_bytes(model: GPT, forward: Callable[[], Tensor]) -> int:
    """What a forward pass keeps for the backward pass, besides the weights."""
    kept: dict[int, int] = {}

    def count(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        kept[storage._cdata] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(count, lambda tensor: tensor):
        result = forward()  # its graph must live until all is counted
    weights = {parameter.untyped_storage()._cdata for parameter in model.parameters()}
    n_bytes = sum(size for storage, size in kept.items() if storage not in weights)
    del result
    return n_bytes


def available_memory(device: torch.device) -> int:
    """Memory that is available on the device."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    return int(psutil.virtual_memory().available)


def peak_memory() -> int:
    """Peak memory of this process: on the current GPU if it uses one, else in RAM."""
    if torch.cuda.is_initialized():
        return torch.cuda.max_memory_allocated()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 2**10)  # else kB


# ---- the size of a micro-batch, found by trying it out ----

N_SIZES = 5  # sizes that a CPU tries, the largest that fit
N_ROUNDS = 3  # timings of each size; the first is a warm-up
TRIAL_S = 20.0  # after which no new round begins


def find_micro_batch_size(learner: Learner, *, known: int | None = None) -> int:
    """The largest size that fits into a GPU, or the fastest on a CPU: the batch, half of it, a quarter …  Prints it.

    It changes neither weights nor the random state. `known` is what the run found before: a CPU takes it as it is, a
    GPU nothing larger. Sizes are tried without torch.compile, which would compile each of them.
    """
    batch_size, device = learner.params.batch_size, learner.device
    if known is not None and device.type != "cuda":
        return known
    sizes = [size for size in halves(batch_size) if size <= (known or batch_size)]
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(0)
        if device.type == "cuda":
            size, why = largest(sizes, partial(_try, learner)), "the largest that fits"
        else:
            sizes = [size for size in sizes if fits(learner, size)][:N_SIZES]
            size, why = fastest(sizes, partial(_try, learner)), f"the fastest of {', '.join(map(str, sizes))}"
    print(f"micro-batches of {size} of the {batch_size} sequences of a step: {why}")
    return size


def halves(n: int) -> list[int]:
    """n, n/2, n/4 … while they are whole: 12, 6, 3."""
    sizes = [n]
    while sizes[-1] % 2 == 0:
        sizes.append(sizes[-1] // 2)
    return sizes


def fastest(sizes: Iterable[int], attempt: Callable[[int], None]) -> int:
    """The size with the least time per sequence, each at its best of several interleaved rounds."""
    times: dict[int, list[float]] = {size: [] for size in sizes}
    if not times:
        raise UserError(NONE_FITS)
    began = time.perf_counter()
    for number in range(N_ROUNDS):
        for size, taken in times.items():
            start = time.perf_counter()
            attempt(size)
            taken.append((time.perf_counter() - start) / size)
        if number and time.perf_counter() - began > TRIAL_S:
            break
    return min(times, key=lambda size: min(times[size][1:]))


def largest(sizes: Iterable[int], attempt: Callable[[int], None]) -> int:
    """The first size, in descending order, that does not run out of GPU memory."""
    for size in sizes:
        try:
            attempt(size)
            return size
        except torch.OutOfMemoryError:
            continue
    raise UserError(NONE_FITS)


def _try(learner: Learner, size: int) -> None:
    """On a GPU, reserve what the optimizer will take, and run twice: the second time, gradients are already there."""
    reserved = None
    try:
        if learner.device.type == "cuda":
            torch.cuda.empty_cache()
            known = any(optimizer.state for optimizer in learner.optimizers)
            n_bytes = 0 if known else state_bytes(learner.model, learner.params)
            reserved = torch.empty(n_bytes, dtype=torch.uint8, device=learner.device)
            learner.rehearse(size)
        learner.rehearse(size)
        wait_for(learner.device)
    finally:
        del reserved
        learner.model.zero_grad()
