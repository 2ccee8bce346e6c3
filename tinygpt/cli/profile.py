"""`python -m tinygpt profile`: what the run of params.yaml will cost, and whether it fits into this machine."""

from __future__ import annotations

import argparse
import dataclasses
import sys
from pathlib import Path

import torch

from tinygpt.device import open_device
from tinygpt.errors import UserError
from tinygpt.files import human_bytes
from tinygpt.model.config import GPTConfig, ModelParams, config_fields
from tinygpt.model.gpt import GPT
from tinygpt.params import load_params
from tinygpt.run.costs import flops_per_token, peak_flops, tokens_per_second, weights_by_part
from tinygpt.run.memory import LESS_MEMORY, available_memory, build_trained, find_micro_batch_size, halves, memory_of
from tinygpt.runtime import RuntimeParams
from tinygpt.tokenizer import load_tokenizer
from tinygpt.tokenizer.config import TokenizerParams
from tinygpt.train.config import LoRAParams, TrainParams
from tinygpt.train.learner import Learner

TOKENIZER_FILE = Path("data/tokenizer/tokenizer.json")


def add_options(command: argparse.ArgumentParser) -> None:
    """What the command takes."""
    command.add_argument("--no-measure", action="store_true", help="count only, compute nothing")


def run(args: argparse.Namespace) -> None:
    """Print the costs; leave with status 1 when the run will not fit."""
    params = load_params(ModelParams, TrainParams, RuntimeParams, TokenizerParams)
    model_params, train, runtime, tokenizer = params
    learned = tokenizer.kind == "bpe" and tokenizer.from_file is None  # then it has as many tokens as params.yaml says
    found = TOKENIZER_FILE.exists() and not learned
    vocab_size = load_tokenizer(TOKENIZER_FILE).vocab_size if found else tokenizer.vocab_size
    config = GPTConfig(**config_fields(model_params), vocab_size=vocab_size)
    device = open_device(runtime)
    micro = _micro_batch_size(config, train, runtime, device, measure=not args.no_measure)
    _print_weights(config, train.lora)
    flops = flops_per_token(config, train.lora)
    n_tokens = train.max_steps * train.batch_size * config.block_size
    print(f"operations  {flops / 1e6:,.1f} million a token, {flops * n_tokens:.2e} in {n_tokens:,} tokens")
    memory, free = memory_of(config, train, runtime, micro, device), available_memory(device)
    print(
        f"training    {human_bytes(memory.training)}: weights {human_bytes(memory.weights)}, gradients "
        f"{human_bytes(memory.gradients)}, {train.optimizer} {human_bytes(memory.optimizer)}, activations "
        f"{human_bytes(memory.activations)} of {micro} sequences; {human_bytes(free)} are free on {device}"
    )
    print(
        f"generation  {human_bytes(memory.generation)}: weights, and keys and values of {config.block_size:,} tokens "
        f"{human_bytes(memory.kv_cache)}"
    )
    if memory.training > free:
        sys.stdout.flush()
        raise UserError(f"the run will not fit: {LESS_MEMORY}")
    if not args.no_measure:
        sys.stdout.flush()
        tokens = train.batch_size * config.block_size
        steps = f"at least two training steps of {tokens:,} tokens"
        print(f"profile: measures {steps}, which --no-measure leaves out", file=sys.stderr)
        if runtime.micro_batch_size is not None:
            runtime = dataclasses.replace(runtime, micro_batch_size=micro)
        learner = Learner(config, train, runtime, device=device)
        speed, peak = tokens_per_second(learner), peak_flops(device, learner.precision)
        print(f"speed       {speed:,.0f} tokens a second, so about {_duration(n_tokens / speed)}")
        print(
            f"            {speed * flops / 1e9:,.1f} billion operations a second, {speed * flops / peak:.0%} of the "
            f"{peak / 1e9:,.1f} of a large matrix product in {learner.precision} (MFU)"
        )


def _micro_batch_size(
    config: GPTConfig, train: TrainParams, runtime: RuntimeParams, device: torch.device, *, measure: bool
) -> int:
    """Sequences in a forward pass; what is yet to be found counts as all of the batch when nothing is measured."""
    if runtime.micro_batch_size != "auto":
        return min(runtime.micro_batch_size or train.batch_size, train.batch_size)
    if not measure:
        return train.batch_size
    smallest = halves(train.batch_size)[-1]
    if memory_of(config, train, runtime, smallest, device).training > available_memory(device):
        return smallest  # the model is not even built
    return find_micro_batch_size(Learner(config, train, runtime, device=device))


def _print_weights(config: GPTConfig, lora: LoRAParams | None) -> None:
    with torch.device("meta"):
        model, adapted = GPT(config), build_trained(config, lora)
    parts = ", ".join(f"{part} {n:,}" for part, n in weights_by_part(model).items())
    print(f"weights     {model.n_params():,}: {parts}")
    if lora is not None:
        print(f"adapters    {adapted.n_params() - model.n_params():,} weights, which alone are trained")


def _duration(seconds: float) -> str:
    minutes = seconds / 60
    return f"{seconds:.0f} s" if minutes < 1.5 else f"{minutes:.0f} min" if minutes < 90 else f"{minutes / 60:.1f} h"
