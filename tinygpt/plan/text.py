"""What a plan needs to know of the text: how hard it is to learn, from the losses of small models."""

import dataclasses
import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from tinygpt.corpus.folders import cut_lines, shard_texts, split_file, thin
from tinygpt.encode import BulkEncoder
from tinygpt.errors import UserError
from tinygpt.model.config import ModelParams
from tinygpt.model.gpt import GPT
from tinygpt.plan.measure import between
from tinygpt.plan.recipe import LAW, LAYERS, Recipe, Size
from tinygpt.runtime import RuntimeParams
from tinygpt.tokenizer.kinds import TokenizerParams, learn_tokenizer, take_tokenizer
from tinygpt.tokenizer.pretokenize import count_pretokens, iter_blocks
from tinygpt.tokenizer.tokenizer import Tokenizer
from tinygpt.tokens import TokenIds
from tinygpt.train.batches import Batches, on_device, validation_sequences
from tinygpt.train.config import TrainParams
from tinygpt.train.first_weights import set_first_weights
from tinygpt.train.learner import Learner

VOCAB_SIZES = (512, 1024, 2048, 4096, 8192)  # the plan chooses from these, from 512 only for a tiny text
SAMPLE = 9_000_000  # characters of the training text to learn from, and of the validation text
PIECE = 30_000  # characters of a text that are taken together
READ_BYTES = 30_000_000  # of a split, to take pieces from
COPY, NEAR = 12, 800  # bytes that must be equal for a copy, and how far back it may be: about a context
COPIES_IN = 300_000  # bytes of validation text to look for copies in
PROBE_SIZES = (1024, 4096)  # vocabularies of the small models: some texts prefer small ones, others large ones
PROBE_STEPS = 800  # of each; from one after 200 steps, forecasts are 1.6 times as far off
WIDER, LONGER = 128, 4  # n_embd of a third one, and times as many steps of a fourth: what more brings on this text
MOST_EPOCHS = 2  # of the fourth
FARTHEST = 2.0  # a trend is taken to go on for as far again as it was measured, in logarithms


@dataclass(frozen=True)
class Trend:
    """How the losses of a text depart from the law as a run grows, seen from two small models."""

    first: float = 1.0  # weights of these models, or tokens seen
    second: float = 2.0
    change: float = 1.0  # factor on the law for the second, when the law is right about the first

    def at(self, size: float) -> float:
        """The factor for a run of this size."""
        way = math.log(size / self.first) / math.log(self.second / self.first)
        return self.change ** min(FARTHEST, way)


@dataclass(frozen=True)
class Text:
    """What the plan knows about the text."""

    train_bytes: int
    val_bytes: int
    bytes_per_token: Mapping[int, float]  # by vocab_size
    copied: float  # share that repeats what stands shortly before it
    difficulty: Mapping[int, float]  # a factor in the law of the loss, by vocab_size
    by_weights: Trend = Trend()
    by_tokens: Trend = Trend()

    def loss(self, size: Size, vocab_size: int) -> float:
        """Bits per byte of its validation text to expect of a run."""
        trends = self.by_weights.at(size.n_weights) * self.by_tokens.at(LAW.seen(size))
        return between(self.difficulty, vocab_size) * trends * LAW.loss(size)


@dataclass(frozen=True, kw_only=True)
class Probe:
    """A small model after its training."""

    size: Size
    bpb: float

    @property
    def excess(self) -> float:
        """Its loss over the law's for a text of difficulty 1."""
        return self.bpb / LAW.loss(self.size)


@dataclass(frozen=True, kw_only=True)
class Prober:
    """Trains small models on one text with one vocabulary."""

    ids: TokenIds
    val_ids: TokenIds
    vocab_size: int
    n_unique: float  # tokens of the whole training text
    bytes_per_token: float
    copied: float
    model: ModelParams
    train: TrainParams
    runtime: RuntimeParams
    device: torch.device

    def probe(self, *, n_embd: int = min(LAYERS), max_steps: int | None = None) -> Probe:
        """Train a model by the recipe, for PROBE_STEPS or as given.  Raises UserError if the text is too small."""
        recipe = Recipe(n_embd=n_embd, vocab_size=self.vocab_size, max_steps=max_steps or PROBE_STEPS, epochs=0.0)
        recipe = dataclasses.replace(recipe, epochs=recipe.n_tokens / self.n_unique)
        if min(len(self.ids), len(self.val_ids)) <= recipe.block_size:
            raise UserError(
                f"the text gives {len(self.ids):,} tokens to learn from and {len(self.val_ids):,} to measure on, but a "
                f"sequence has {recipe.block_size}: use more text"
            )
        new = GPT(recipe.config(self.model), generator=torch.Generator().manual_seed(self.train.seed))
        learner = Learner(new, recipe.training(self.train), self.runtime, device=self.device)
        bpb = _loss_after(learner, self.ids, self.val_ids) / math.log(2) / self.bytes_per_token
        return Probe(
            size=recipe.size(learner.config, bytes_per_token=self.bytes_per_token, copied=self.copied), bpb=bpb
        )

    def trends(self, small: Probe) -> tuple[Trend, Trend]:
        """What more weights and what more tokens bring on this text, from a wider and a longer run than the small one.

        Of a small text nothing is said about more tokens.
        """
        wider = self.probe(n_embd=WIDER)
        by_weights = Trend(small.size.n_weights, wider.size.n_weights, wider.excess / small.excess)
        times = min(LONGER, MOST_EPOCHS * self.n_unique / small.size.n_tokens)
        if times < 2:
            return by_weights, Trend()
        longer = self.probe(max_steps=int(times * PROBE_STEPS))
        change = min(1.0, longer.excess / small.excess)  # more tokens never harm
        return by_weights, Trend(LAW.seen(small.size), LAW.seen(longer.size), change)


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
    sample_bytes, val_bytes = (sum(len(text.encode()) for text in texts) for texts in (sample, val))
    val_ids = {size: _ids(each, val) for size, each in tokenizers.items()}
    per_token = {size: val_bytes / len(ids) for size, ids in val_ids.items()}
    copied = copied_share(val)
    probers = {}
    for vocab_size in sorted({min(tokenizers, key=lambda size: abs(size - near)) for near in PROBE_SIZES}):
        ids = _ids(tokenizers[vocab_size], sample)
        probers[vocab_size] = Prober(
            ids=ids,
            val_ids=val_ids[vocab_size],
            vocab_size=vocab_size,
            n_unique=len(ids) * n_bytes / sample_bytes,
            bytes_per_token=per_token[vocab_size],
            copied=copied,
            model=model,
            train=train,
            runtime=runtime,
            device=device,
        )
    small = {vocab_size: prober.probe() for vocab_size, prober in probers.items()}
    first = min(probers)
    trends = probers[first].trends(small[first])
    text = Text(n_bytes, n_val, per_token, copied, dict.fromkeys(small, 1.0), *trends)
    return dataclasses.replace(
        text, difficulty={size: each.bpb / text.loss(each.size, size) for size, each in small.items()}
    )


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
