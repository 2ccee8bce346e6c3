"""What a plan needs to know: the operations, how fast the machine does them, and how hard the text is."""

import dataclasses
import math
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import psutil
import torch
from torch import nn

from tinygpt.corpus.folders import cut_lines, shard_texts, split_file, thin
from tinygpt.encode import BulkEncoder
from tinygpt.errors import UserError, is_out_of_memory
from tinygpt.model.config import GPTConfig, ModelParams
from tinygpt.model.gpt import GPT
from tinygpt.model.inside import attention_operations
from tinygpt.plan.recipe import LAW, LAYERS, Recipe, linear_weights
from tinygpt.run.costs import build_trained
from tinygpt.runtime import RuntimeParams, wait_for
from tinygpt.tokenizer.kinds import TokenizerParams, learn_tokenizer, take_tokenizer
from tinygpt.tokenizer.pretokenize import count_pretokens, iter_blocks
from tinygpt.tokenizer.tokenizer import Tokenizer
from tinygpt.tokens import TokenIds
from tinygpt.train.batches import Batches, on_device, validation_sequences
from tinygpt.train.config import LoRAParams, TrainParams
from tinygpt.train.first_weights import set_first_weights
from tinygpt.train.learner import Learner
from tinygpt.train.loss import PRECISIONS

VOCAB_SIZES = (512, 1024, 2048, 4096, 8192)  # the plan chooses from these, from 512 only for a tiny text
SAMPLE = 3_000_000  # characters of the training text to learn tokenizers from, and of the validation text
PIECE = 30_000  # characters of a text that are taken together
READ_BYTES = 30_000_000  # of a split, to take pieces from
COPY, NEAR = 12, 800  # bytes that must be equal for a copy, and how far back it may be: about a context
COPIES_IN = 300_000  # bytes of validation text to look for copies in
PROBE_SIZES = (1024, 4096)  # vocabularies of the small models: some texts prefer small ones, others large ones
PROBE_STEPS = 800  # of each; from one after 200 steps, forecasts are 1.6 times as far off
MOST_S = 12.0  # after which no other width is measured
MATMUL_SIZE = {"cpu": 2048, "cuda": 8192, "mps": 4096}  # rows of the square matrices that measure a device's peak
MEASURE_S = 1.0  # seconds of a measurement, at least
BUSY = 0.3  # the plan says so if other programs use more cores than this


def flops_per_token(config: GPTConfig, lora: LoRAParams | None = None) -> float:
    """Floating-point operations of training on one token of a full context: three times those of a forward pass.

    That is two per weight of a matrix, and two per multiplication of queries with keys and of attention weights with
    values. A token sees half a context on average, or less with a window (Kaplan et al.,
    https://arxiv.org/abs/2001.08361). A frozen matrix needs no gradient of its own and counts two times; a head with
    an adapter is one matrix for the loss.
    """
    matrices = 3 * linear_weights(config)
    if lora is not None:
        with torch.device("meta"):
            model = build_trained(config, lora)
            modules = [*model.tok_emb.modules(), *model.blocks.modules()]
            linear = [module.weight for module in modules if isinstance(module, nn.Linear)] + [model.lm_head.weight]
        matrices = sum(weight.numel() * (3 if weight.requires_grad else 2) for weight in linear)
    return 2 * matrices + 3 * attention_operations(config)


def step_seconds(learner: Learner, batch_size: int) -> float:
    """Seconds of the fastest of several training steps on random tokens, after one to warm up."""
    config = learner.model.config
    ids = torch.randint(config.vocab_size, (batch_size, config.block_size + 1), device=learner.device)
    return _least_seconds(lambda: learner.learn(0, ids), learner.device)


def tokens_per_second(learner: Learner) -> float:
    """Training speed in tokens per second, at the run's own batch size."""
    batch_size = learner.params.batch_size
    return batch_size * learner.model.config.block_size / step_seconds(learner, batch_size)


def peak_flops(device: torch.device, precision: str) -> float:
    """Operations per second of a large matrix product in a run's precision (not auto), the best of several."""
    size = MATMUL_SIZE[device.type]
    a = torch.randn(size, size, device=device, dtype=PRECISIONS[precision])
    return 2 * size**3 / _least_seconds(lambda: a @ a, device)


def _least_seconds(action: Callable[[], object], device: torch.device) -> float:
    """Seconds of the fastest of several calls, after one to warm up."""
    times: list[float] = []
    while len(times) < 2 or sum(times[1:]) < MEASURE_S:
        began = time.perf_counter()
        action()
        wait_for(device)
        times.append(time.perf_counter() - began)
    return min(times[1:])


@dataclass(frozen=True)
class Text:
    """What the plan knows about the text."""

    train_bytes: int
    val_bytes: int
    bytes_per_token: Mapping[int, float]  # by vocab_size
    copied: float  # share that repeats what stands shortly before it
    difficulty: Mapping[int, float]  # a factor in the law of the loss, by vocab_size


@dataclass(frozen=True)
class Speeds:
    """How fast the machine trains, by n_embd."""

    operations: Mapping[int, float]  # per second, in the forward and backward passes
    per_weight: Mapping[int, float]  # seconds per weight of the rest of a step: the optimizer
    busy: float  # cores that other programs used meanwhile

    def step(self, config: GPTConfig, batch_size: int) -> float:
        """Seconds of a training step."""
        n_operations = flops_per_token(config) * batch_size * config.block_size
        beside = between(self.per_weight, config.n_embd) * config.n_weights(config.vocab_size)
        return beside + n_operations / between(self.operations, config.n_embd)


def between(points: Mapping[int, float], at: int) -> float:
    """The value at a width or vocabulary, interpolated between measured ones in logarithms; beyond, the nearest."""
    sizes = sorted(points)
    logs = [math.log(points[size]) for size in sizes]
    return math.exp(np.interp(math.log(at), [math.log(size) for size in sizes], logs))


def measure_speeds(
    model: ModelParams, train: TrainParams, runtime: RuntimeParams, device: torch.device, *, vocab_size: int
) -> Speeds:
    """Time steps of two batch sizes at every second width, from the narrowest up, for about MOST_S at most."""
    began, before = time.perf_counter(), _others_busy()
    operations, per_weight = dict[int, float](), dict[int, float]()
    few, many = (1, 4) if device.type == "cpu" else (8, 64)
    for n_embd in [*LAYERS][::2]:
        recipe = Recipe(n_embd=n_embd, vocab_size=vocab_size, max_steps=1000, epochs=1)
        config = recipe.config(model)
        learner = Learner(GPT(config), recipe.training(train), runtime, device=device)
        try:
            first, second = (step_seconds(learner, size) for size in (few, many))
        except (MemoryError, RuntimeError) as error:
            if not operations or not is_out_of_memory(error):
                raise
            break  # wider ones are judged by the widest that fits
        slope = max(1e-9, (second - first) / (many - few))  # seconds per additional sequence
        operations[n_embd] = flops_per_token(config) * config.block_size / slope
        per_weight[n_embd] = max(1e-12, first - few * slope) / config.n_weights(vocab_size)
        taken = time.perf_counter() - began
        if taken + 16 * second > MOST_S:  # the next one is about four times as much work
            break
    return Speeds(operations, per_weight, (_others_busy() - before) / (time.perf_counter() - began))


def _others_busy() -> float:
    """Seconds of processor time that all other programs have used so far."""
    mine, machine = psutil.Process().cpu_times(), psutil.cpu_times()
    return machine.user + machine.system + machine.nice - mine.user - mine.system


def measure_text(
    clean: Path,
    tokenizer: TokenizerParams,
    model: ModelParams,
    train: TrainParams,
    runtime: RuntimeParams,
    device: torch.device,
) -> Text:
    """Learn tokenizers from a sample, and train small models for some steps: their losses say how hard the text is.

    Raises UserError if the text is too small for that.
    """
    files = {split: split_file(clean, split) for split in ("train", "val")}
    (sample, n_bytes), (val, n_val) = (sample_of(file) for file in files.values())
    tokenizers = {each.vocab_size: each for each in _tokenizers(tokenizer, sample)}
    n_val_bytes = sum(len(text.encode()) for text in val)
    per_token = {size: n_val_bytes / len(_ids(each, val)) for size, each in tokenizers.items()}
    copied, difficulty = copied_share(val), dict[int, float]()
    for vocab_size in {min(tokenizers, key=lambda size: abs(size - near)) for near in PROBE_SIZES}:
        ids, val_ids = (_ids(tokenizers[vocab_size], texts) for texts in (sample, val))
        n_unique = len(ids) * n_bytes / sum(len(text.encode()) for text in sample)
        recipe = Recipe(n_embd=min(LAYERS), vocab_size=vocab_size, max_steps=PROBE_STEPS, epochs=0.0)
        recipe = dataclasses.replace(recipe, epochs=recipe.n_tokens / n_unique)
        if min(len(ids), len(val_ids)) <= recipe.block_size:
            raise UserError(
                f"the text gives {len(ids):,} tokens to learn from and {len(val_ids):,} to measure on, but a sequence "
                f"has {recipe.block_size}: use more text"
            )
        smallest = GPT(recipe.config(model), generator=torch.Generator().manual_seed(train.seed))
        learner = Learner(smallest, recipe.training(train), runtime, device=device)
        bpb = _loss_after(learner, ids, val_ids) / math.log(2) / per_token[vocab_size]
        size = recipe.size(learner.config, bytes_per_token=per_token[vocab_size], copied=copied)
        difficulty[vocab_size] = bpb / LAW.loss(size)
    return Text(train_bytes=n_bytes, val_bytes=n_val, bytes_per_token=per_token, copied=copied, difficulty=difficulty)


def sample_of(file: Path) -> tuple[list[str], int]:
    """Texts of a split or, if they have more than SAMPLE characters, evenly spaced pieces: one part may be harder.

    Also how many bytes all of its texts have, without what JSON adds to them.
    """
    shards = thin(cut_lines(file), READ_BYTES)
    texts = [text for shard in shards for text in shard_texts(shard)]
    of_texts = sum(len(text.encode()) for text in texts) / max(1, sum(shard.size for shard in shards))
    n_bytes = round(min(1.0, of_texts) * file.stat().st_size)  # texts end a little after a thin shard
    share = SAMPLE / max(SAMPLE, sum(map(len, texts)))
    if share == 1:
        return texts, n_bytes
    pieces = [text[start : start + PIECE] for text in texts for start in range(0, len(text), PIECE)]
    return [pieces[i] for i in np.linspace(0, len(pieces) - 1, round(share * len(pieces))).astype(int)], n_bytes


def copied_share(texts: Iterable[str]) -> float:
    """The share of bytes that follow the same COPY bytes as shortly before: a model learns to copy there."""
    data = "\n".join(texts).encode()
    if len(data) > COPIES_IN:
        starts = np.linspace(0, len(data) - PIECE, COPIES_IN // PIECE).astype(int)
        data = b"".join(data[start : start + PIECE] for start in starts)
    last, n_copied = dict[bytes, int](), 0
    for at in range(COPY, len(data)):
        before = last.get(data[at - COPY : at], -NEAR)
        n_copied += at - before <= NEAR and data[before] == data[at]
        last[data[at - COPY : at]] = at
    return n_copied / max(1, len(data))


def _loss_after(learner: Learner, ids: TokenIds, val_ids: TokenIds) -> float:
    """Train a new model -> its validation loss after the last step, in nats per token."""
    set_first_weights(learner.model, ids)
    seq_len, params = learner.config.block_size, learner.params
    batches = Batches(ids, seq_len=seq_len, batch_size=params.batch_size, seed=params.seed)
    for step in range(params.max_steps):
        learner.learn(step, on_device(batches.batch_at(step), learner.device))
    val = torch.from_numpy(validation_sequences(val_ids, seq_len, params.eval_tokens))
    with learner.evaluated() as model:
        return learner.loss_of(model, val.to(learner.device))


def _tokenizers(params: TokenizerParams, texts: Iterable[str]) -> Iterator[Tokenizer]:
    """The one that the params name; for BPE one per size, as a larger one's merges begin with a smaller one's."""
    if params.from_file:
        yield take_tokenizer(params)
        return
    counts = count_pretokens(texts)
    if params.kind != "bpe":
        yield learn_tokenizer(counts, params)
        return
    n_first = 257 + len(params.special_tokens)
    largest = None
    for size in (size for size in VOCAB_SIZES[::-1] if size > n_first):
        try:
            largest = largest or learn_tokenizer(counts, dataclasses.replace(params, vocab_size=size))
        except UserError:  # the text is too small for this size
            continue
        yield Tokenizer.from_merges(largest.merges[: size - n_first], params.special_tokens)
    if largest is None:
        yield learn_tokenizer(counts, dataclasses.replace(params, vocab_size=n_first))


def _ids(tokenizer: Tokenizer, texts: Iterable[str]) -> TokenIds:
    encoder = BulkEncoder(tokenizer)
    return np.concatenate([encoder.encode(block) for block in iter_blocks(texts)])
