"""How the model is trained: the `train` group of params.yaml."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal

from tinygpt.model.config import MLPS
from tinygpt.params import Count, Fraction, Within, require

Positive = Annotated[float, Within("(0, inf)")]
Rate = Annotated[float, Within("(0, 100]")]  # a learning rate
Target = Literal["tok_emb", "q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj", "lm_head"]
UNSPLIT = ("adamw8bit",)  # optimizers that need whole weights in each process (not runtime.parallel=fsdp)


@dataclass(frozen=True, kw_only=True)
class LoRAParams:
    """Adapters that are trained instead of the weights."""

    rank: Annotated[int, Within("[1, 65536]")]  # of the two-matrix product that is added to a weight
    alpha: Positive  # the product is scaled by alpha / rank
    dropout: Fraction  # share of an adapter's input set to zero in training, in blocks alone
    targets: tuple[Target, ...] | None  # matrices that get adapters; null = all but positions and a tied embedding

    def __post_init__(self) -> None:
        require((self.targets != (), "train.lora.targets is empty: add a matrix, such as q_proj, or set it to null"))


@dataclass(frozen=True, kw_only=True)
class EMAParams:
    """A moving average of the weights, which is evaluated and published in their place."""

    decay: Fraction  # share of the average that each step keeps
    start: Annotated[int, Within("[0, inf)")]  # steps done before the average begins


@dataclass(frozen=True, kw_only=True)
class ContextWarmup:
    """Shorter sequences in the first steps, doubled at even intervals until they are as long as model.block_size.

    Doubling keeps the lengths few, because torch.compile compiles for each of them.
    """

    start: Count  # tokens of a sequence in the first steps: model.block_size halved once or more
    steps: Count  # until sequences have their full length


@dataclass(frozen=True, kw_only=True)
class TrainParams:
    """Everything that decides the trained weights, besides the model and the tokens."""

    group: ClassVar[str] = "train"

    seed: Annotated[int, Within("[0, 4294967295]")]  # of random initial weights, the order of the data, and dropout
    init_from: Literal["scratch", "base"]  # new weights, or those of data/base
    lora: LoRAParams | None  # adapters that are trained instead of the weights of the base; null = all weights
    max_steps: Count  # optimizer steps
    batch_size: Count  # sequences of model.block_size tokens in one step, over all processes and micro-batches
    context_warmup: ContextWarmup | None  # the same tokens in shorter sequences at first; null = block_size always
    shuffle_documents: bool  # reorder the documents each epoch; false = always the file's order
    optimizer: Literal["adamw", "adamw8bit", "lion", "muon"]
    lr: Rate  # learning rate at its peak
    embedding_lr: Rate | None  # learning rate of the embeddings; null = lr
    head_lr: Rate | None  # learning rate of an untied head; null = lr
    vector_lr: Rate | None  # learning rate of norms and biases; null = lr
    min_lr_frac: Annotated[float, Within("[0, 1]")]  # learning rate at the last step, as a share of the peak
    warmup_steps: Annotated[int, Within("[0, inf)")]  # steps over which the learning rate rises to its peak
    schedule: Literal["cosine", "linear", "wsd", "constant"]  # the learning rate after the warmup
    decay_frac: Annotated[float, Within("(0, 1]")]  # wsd falls over this last share of the steps after the warmup
    weight_decay: Annotated[float, Within("[0, inf)")]  # of matrices, including the head; norms and biases have none
    embedding_weight_decay: Annotated[float, Within("[0, inf)")]  # of embeddings, also when tied to the head
    betas: tuple[Fraction, Fraction]  # how slowly AdamW and Lion forget: the mean, and the mean square of gradients
    momentum: Fraction  # how slowly Muon forgets the mean of gradients
    grad_clip: Positive  # largest 2-norm of the whole gradient; a larger gradient is scaled down
    label_smoothing: Fraction  # share of the target's probability that is spread over all tokens
    z_loss: Annotated[float, Within("[0, inf)")]  # weight of the squared logarithm of the sum of exp(logits)
    ema: EMAParams | None  # a moving average used in place of the weights; null = the weights themselves
    patience: Count | None  # the run ends after so many evaluations without a lower loss; null = never
    anneal_dropout: bool  # model.dropout falls linearly to zero over the run
    precision: Literal["auto", "fp32", "tf32", "bf16", "fp16"]  # of products: auto = bf16 where it is faster, else fp32
    eval_every: Count  # steps between two evaluations on the validation split
    eval_tokens: Count  # validation tokens of each evaluation, at most; evenly spaced
    save_every: Count  # steps between two checkpoints
    sample_tokens: Annotated[int, Within("[0, inf)")]  # tokens of the text written at each evaluation, 0 = none

    def __post_init__(self) -> None:
        require(
            (
                self.warmup_steps < self.max_steps,
                f"train.warmup_steps={self.warmup_steps} must be below train.max_steps={self.max_steps}: "
                f"set train.warmup_steps={self.max_steps // 10}, say",
            ),
            (
                self.ema is None or self.ema.start < self.max_steps,
                f"train.ema.start must be below train.max_steps={self.max_steps}, or there is no average: lower it",
            ),
            (
                self.lora is None or self.init_from == "base",
                "train.lora trains adapters of a base: set train.init_from=base, or train.lora=null",
            ),
        )

    def rules_with(self, groups: Mapping[str, Any]) -> Iterable[tuple[bool, str]]:
        """Rules between this group of params.yaml and other loaded groups, by name: (whether it holds, message)."""
        if "model" in groups:
            yield from self._rules_with_model(groups["model"])
        if "runtime" in groups:
            yield from self._rules_with_runtime(groups["runtime"])
        if {"model", "runtime"} <= groups.keys():
            yield (
                not (groups["runtime"].compile and self.anneal_dropout and groups["model"].dropout),
                "runtime.compile=true would compile each step anew with train.anneal_dropout=true: "
                "set one of them to false",
            )
        if "clean" in groups:
            yield (
                groups["clean"].val_fraction > 0 or groups["clean"].split == "source",
                "clean.val_fraction=0 leaves no validation text, which train needs: set it to 0.05, say",
            )

    def _rules_with_model(self, model: Any) -> Iterable[tuple[bool, str]]:
        targets = self.lora.targets or () if self.lora else ()
        yield (
            "gate_proj" not in targets or MLPS[model.mlp].gated,
            f"train.lora.targets names gate_proj, which model.mlp={model.mlp} does not have: remove it from the list",
        )
        tied = [name for name in targets if name in ("tok_emb", "lm_head")] if model.tie_weights else []
        yield (
            not tied,
            f"train.lora.targets names {' and '.join(tied)}, but with model.tie_weights=true embedding and head are "
            "one matrix, which gets no adapter: remove it, or set train.lora.targets=null",
        )
        rank = self.lora.rank if self.lora else 1
        yield (
            rank <= model.n_embd,
            f"train.lora.rank={rank} must be at most model.n_embd={model.n_embd}: a larger one adds nothing",
        )
        if self.context_warmup is None:
            return
        full, start, steps = model.block_size, self.context_warmup.start, self.context_warmup.steps
        halves = [full // 2**i for i in range(1, full.bit_length()) if full % 2**i == 0]
        choices = f"one of {', '.join(map(str, halves))}" if halves else "it is odd: set train.context_warmup to null"
        yield (
            start in halves,
            f"train.context_warmup.start={start} must be model.block_size={full} halved once or more: {choices}",
        )
        yield (
            steps < self.max_steps,
            f"train.context_warmup.steps={steps} must be below train.max_steps={self.max_steps}: lower it",
        )

    def _rules_with_runtime(self, runtime: Any) -> Iterable[tuple[bool, str]]:
        splits = runtime.n_process > 1 and runtime.parallel == "fsdp"
        yield (
            self.batch_size % runtime.n_process == 0,
            f"train.batch_size={self.batch_size} must be a multiple of the {runtime.n_process} processes that share "
            "it: set train.batch_size or runtime.n_process",
        )
        yield (
            not (splits and self.optimizer in UNSPLIT),
            f"train.optimizer={self.optimizer} cannot be split among processes: set runtime.parallel=ddp",
        )
        yield (
            not (splits and self.precision == "fp16"),
            f"train.precision={self.precision} cannot be split, as each process would scale its own part: "
            "set runtime.parallel=ddp",
        )
        yield (
            not (splits and self.lora and {*(self.lora.targets or ())} == {"lm_head"}),  # a list may name it twice
            "train.lora.targets=[lm_head] alone cannot be split among processes: add a matrix to it, or set "
            "runtime.parallel=ddp",
        )
        yield (
            runtime.n_process == 1 or runtime.micro_batch_size != "auto",
            "runtime.micro_batch_size=auto works with one process only: give a number",
        )
