"""`python -m tinygpt serve`, `attention`, `import-hf`, `promote`, `profile`: what is done with models."""

from __future__ import annotations

import dataclasses
import importlib.util
import sys
from argparse import Namespace
from pathlib import Path

import torch

from tinygpt import paths
from tinygpt.cli.engine import compile_if_asked, is_gguf, place
from tinygpt.cli.flags import DeviceOptions, read
from tinygpt.errors import UserError
from tinygpt.export.folders import open_model, read_hf_pair, tokenizer_of, use_of, write_base
from tinygpt.files import human_bytes
from tinygpt.model.config import GPTConfig, ModelParams, config_fields
from tinygpt.model.gpt import GPT
from tinygpt.model.inside import parts_of
from tinygpt.model.weights import load_pair, model_tensors
from tinygpt.options import Limits
from tinygpt.params import load_params
from tinygpt.plan.measure import flops_per_token, peak_flops, tokens_per_second
from tinygpt.run.costs import LESS_MEMORY, available_memory, build_trained, find_micro_batch_size, halves, memory_of
from tinygpt.runtime import RuntimeParams, find_device, open_device
from tinygpt.tokenizer import load_tokenizer
from tinygpt.tokenizer.kinds import TokenizerParams
from tinygpt.tokenizer.tokenizer import tokenizer_file
from tinygpt.train.config import LoRAParams, TrainParams
from tinygpt.train.learner import Learner


def serve(args: Namespace) -> None:
    """Serve models by OpenAI's API until Ctrl-C."""
    for package in ("fastapi", "uvicorn", "jinja2"):
        if importlib.util.find_spec(package) is None:
            raise UserError(f"serve needs {package}: run  pip install -r requirements-serve.txt")
    from tinygpt.serve.request import Served
    from tinygpt.serve.server import listen, serve
    from tinygpt.serve.service import Service
    from tinygpt.serve.template import load_template

    if not 0 <= args.port <= 65535:
        raise UserError(f"--port {args.port} must be within 0 and 65535")
    limits, options = read(Limits, args), read(DeviceOptions, args)
    find_device(options.device, "--device")
    listener = listen(args.host, args.port)
    models = []
    for name, folder in named(args.model or [str(paths.MODEL)]).items():
        if is_gguf(folder):
            raise UserError(f"--model {folder}: serve does not read .gguf files: name the folder that it was made from")
        model, tokenizer = open_model(folder, args.tokenizer)
        n_weight = model.n_params()  # quantized ones are not counted
        place(model, options)
        compile_if_asked(model, options, n_row=limits.max_rows)
        models.append(Served(name, model, tokenizer, n_weight, load_template(args.tokenizer or tokenizer_of(folder))))
    host = f"[{args.host}]" if ":" in args.host else args.host
    print(f"{', '.join(served.name for served in models)} at http://{host}:{listener.getsockname()[1]}", flush=True)
    serve(Service(models, limits), listener, [args.host, *args.allow_host])


def named(given: list[str]) -> dict[str, Path]:
    """Folders by name: what comes before "=", or the path as it is given."""
    found: dict[str, Path] = {}
    for each in given:
        name, equals, folder = each.partition("=")
        if not name or name in found:
            raise UserError(
                f"--model {each}: " + ("its name is taken: give NAME=FOLDER" if name else "its name is empty")
            )
        found[name] = Path(folder if equals else name)
    return found


def import_hf(args: Namespace) -> None:
    """Make a folder of transformers the model that training can start from."""
    config, tensors, tokenizer = read_hf_pair(args.folder)
    write_base(args.to, config, tensors, tokenizer)
    n_weights = sum(tensor.numel() for tensor in tensors.values())
    print(f"{args.to}: {n_weights:,} weights; {use_of(args.to)}")


def promote(args: Namespace) -> None:
    """Make the trained model the one that training can start from."""
    model, tokenizer = load_pair(args.model, args.tokenizer)
    write_base(args.to, model.config, model_tensors(model), tokenizer)
    print(f"{args.to}: {model.n_params():,} weights; {use_of(args.to)}")


def profile(args: Namespace) -> None:
    """Print the costs; leave with status 1 when the run will not fit."""
    params = load_params(ModelParams, TrainParams, RuntimeParams, TokenizerParams)
    model_params, train, runtime, tokenizer = params
    learned = tokenizer.kind == "bpe" and tokenizer.from_file is None  # then it has as many tokens as params.yaml says
    is_there = tokenizer_file(paths.TOKENIZER).exists() and not learned
    vocab_size = load_tokenizer(paths.TOKENIZER).vocab_size if is_there else tokenizer.vocab_size
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
        learner = Learner(GPT(config), train, runtime, device=device)
        speed, peak = tokens_per_second(learner), peak_flops(device, learner.precision)
        print(f"speed       {speed:,.0f} tokens a second, so about {duration(n_tokens / speed)}")
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
    return find_micro_batch_size(Learner(GPT(config), train, runtime, device=device))


def _print_weights(config: GPTConfig, lora: LoRAParams | None) -> None:
    with torch.device("meta"):
        model, adapted = GPT(config), build_trained(config, lora)
    parts = ", ".join(f"{name} {part.n_weights:,}" for name, part in parts_of(model).items() if part.n_weights)
    print(f"weights     {model.n_params():,}: {parts}")
    if lora is not None:
        print(f"adapters    {adapted.n_params() - model.n_params():,} weights, which alone are trained")


def duration(seconds: float) -> str:
    """75 -> 75 s, 150 -> 2.5 min, 3600 -> 60 min, 9000 -> 2.5 h"""
    if seconds < 90:
        return f"{seconds:.0f} s"
    if seconds < 5400:
        return f"{seconds / 60:.{seconds < 600:d}f} min"
    return f"{seconds / 3600:.1f} h"
