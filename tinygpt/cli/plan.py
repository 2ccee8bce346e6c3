"""`python -m tinygpt profile`, `plan`: what a training costs on this machine, and what to train in a given time."""

import dataclasses
import os
import subprocess
import sys
import time
from argparse import Namespace
from contextlib import suppress
from pathlib import Path

import torch

from tinygpt import paths
from tinygpt.cli.project import write_values
from tinygpt.errors import UserError
from tinygpt.export.config import ExportParams
from tinygpt.export.gguf_types import bits_per_weight, tensor_types
from tinygpt.files import human_bytes
from tinygpt.model.config import GPTConfig, ModelParams, config_fields
from tinygpt.model.gpt import GPT
from tinygpt.model.inside import part_of, parts_of
from tinygpt.model.lora import trained_tensors
from tinygpt.params import load_params, require
from tinygpt.plan.measure import BUSY, flops_per_token, measure_speeds, peak_flops, tokens_per_second
from tinygpt.plan.plan import Plan, Planner
from tinygpt.plan.recipe import BATCH_SIZES, spread
from tinygpt.plan.text import measure_text
from tinygpt.report.config import EvaluateParams
from tinygpt.run.costs import (
    LESS_MEMORY,
    Memory,
    available_memory,
    build_trained,
    find_micro_batch_size,
    halves,
    memory_of,
)
from tinygpt.runtime import RuntimeParams, open_device, out_of_memory
from tinygpt.tokenizer.kinds import TokenizerParams, expected_size
from tinygpt.train.config import TrainParams
from tinygpt.train.learner import Learner

N_STAGES = 11
START_TIMES = 2.2  # seconds of a stage per second that it takes to start: 41 of the default run's 250 s
PROCESS_BYTES = 320e6  # of a training process, besides its step; measured in the default run


# ---- what the run of params.yaml costs ----


def profile(args: Namespace) -> None:
    """Print the costs; exit with status 1 if the run will not fit."""
    model_params, train, runtime = load_params(ModelParams, TrainParams, RuntimeParams)
    n_tokens, n_process = train.max_steps * train.batch_size * model_params.block_size, runtime.n_process
    train = dataclasses.replace(train, batch_size=max(1, train.batch_size // n_process))
    vocab_size = expected_size(load_params(TokenizerParams), paths.TOKENIZER)
    config = GPTConfig(**config_fields(model_params), vocab_size=vocab_size)
    is_split = n_process > 1 and runtime.parallel == "fsdp"
    measure = not args.no_measure and not is_split  # one process alone would hold all weights
    device = open_device(runtime, of=n_process)
    micro = _micro_batch_size(config, train, runtime, device, measure=measure)
    with torch.device("meta"):
        model, adapted = GPT(config), build_trained(config, train.lora)
    parts = ", ".join(f"{name} {part.n_weights:,}" for name, part in parts_of(model).items() if part.n_weights)
    print(f"weights     {model.n_params():,}: {parts}")
    if train.lora is not None:
        of = ", ".join({part_of(name): None for name in trained_tensors(adapted)})
        print(f"adapters    {adapted.n_params() - model.n_params():,} weights of {of}; only these are trained")
    flops = flops_per_token(config, train.lora)
    print(f"operations  {flops / 1e6:,.1f} million a token, {flops * n_tokens:.2e} in {n_tokens:,} tokens")
    whole, free = memory_of(config, train, runtime, micro, device), available_memory(device)
    memory = _in_each(whole, runtime)
    if n_process > 1:
        print(f"processes   {n_process}: what follows is for each of them")
    print(
        f"training    {human_bytes(memory.training)}: weights {human_bytes(memory.weights)}, gradients "
        f"{human_bytes(memory.gradients)}, {train.optimizer} {human_bytes(memory.optimizer)}, activations "
        f"{human_bytes(memory.activations)} of {micro} sequences; {human_bytes(free)} are free on {device}"
    )
    print(
        f"generation  {human_bytes(whole.weights + whole.kv_cache)}: weights, and keys and values of "
        f"{config.block_size:,} tokens {human_bytes(memory.kv_cache)}"
    )
    if memory.training * (n_process if device.type == "cpu" else 1) > free:
        sys.stdout.flush()
        raise UserError(f"the run will not fit: {LESS_MEMORY}")
    if is_split and not args.no_measure:
        print("speed       not measured: with runtime.parallel=fsdp, no process holds all weights")
    if measure:
        sys.stdout.flush()
        tokens = train.batch_size * config.block_size
        steps = f"at least two training steps of {tokens:,} tokens"
        print(f"profile: timing {steps}, which --no-measure skips", file=sys.stderr)
        if runtime.micro_batch_size is not None:
            runtime = dataclasses.replace(runtime, micro_batch_size=micro)
        learner = Learner(GPT(config), train, runtime, device=device)
        speed, peak = tokens_per_second(learner), peak_flops(device, learner.precision)
        print(f"speed       {speed:,.0f} tokens a second, so about {duration(n_tokens / n_process / speed)}")
        print(
            f"            {speed * flops / 1e9:,.1f} billion operations a second, {speed * flops / peak:.0%} of the "
            f"{peak / 1e9:,.1f} of a large matrix product in {learner.precision} (MFU)"
        )


def _in_each(whole: Memory, runtime: RuntimeParams) -> Memory:
    """What each process holds: with fsdp, a part of the weights, the gradients and the optimizer's state."""
    n = runtime.n_process if runtime.parallel == "fsdp" else 1
    return dataclasses.replace(
        whole, weights=whole.weights // n, gradients=whole.gradients // n, optimizer=whole.optimizer // n
    )


def _micro_batch_size(
    config: GPTConfig, train: TrainParams, runtime: RuntimeParams, device: torch.device, *, measure: bool
) -> int:
    """Sequences in a forward pass; for "auto" these are the most that fit when nothing is measured."""
    if runtime.micro_batch_size != "auto":
        return min(runtime.micro_batch_size or train.batch_size, train.batch_size)
    sizes, free = halves(train.batch_size), available_memory(device)
    fitting = [size for size in sizes if memory_of(config, train, runtime, size, device).training <= free]
    if measure and fitting:
        return find_micro_batch_size(Learner(GPT(config), train, runtime, device=device))
    return [*fitting, sizes[-1]][0]  # without building the model


# ---- what to train in a given time ----


def plan(args: Namespace) -> None:
    """Print the plan; with --write, also put it into params.yaml."""
    is_one = (args.minutes is None) != (args.bpb is None)
    require((is_one, "give either --minutes 30, how long it may take, or --bpb 1.9, the target loss"))
    seconds = None if args.minutes is None else 60 * args.minutes
    planner, device, runtime = build_planner(seconds)
    chosen = planner.reach(args.bpb) if seconds is None else planner.best(seconds)
    print_plan(chosen, planner, runtime, device, seconds=seconds)
    if args.write:
        values, tokenizer = chosen.recipe.values(), load_params(TokenizerParams)
        if tokenizer.kind != "bpe" or tokenizer.from_file:
            del values["tokenizer"]  # it stays as it is
        evaluate, most = load_params(EvaluateParams), chosen.recipe.block_size
        longer = {key: None for key in ("context", "stride") if (getattr(evaluate, key) or 0) > most}
        values |= {"evaluate": longer} if longer else {}
        write_values("plan", values)


def build_planner(seconds: float | None = None) -> tuple[Planner, torch.device, RuntimeParams]:
    """Read the text and measure the machine, unless the stages besides training alone take these seconds."""
    model, train, tokenizer = load_params(ModelParams, TrainParams, TokenizerParams)
    runtime = dataclasses.replace(load_params(RuntimeParams), compile=False, cuda_graphs=False)
    if train.init_from == "base":
        raise UserError(
            "plan is for training from scratch: set train.init_from=scratch, and train.lora and tokenizer.from_file to "
            "null, or use `preset base` or `preset lora`"
        )
    n, most = runtime.n_process, BATCH_SIZES[-1]
    require((most % n == 0, f"runtime.n_process={n} must be 1, 2, 4, … or {most}: a plan's batches are powers of two"))
    if Path(".dvc").exists():
        print("plan: running `dvc repro clean`, which gets and cleans the text unless that is done", file=sys.stderr)
        path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"  # for the `python` of dvc.yaml
        command = [sys.executable, "-m", "dvc", "repro", "--quiet", "clean"]
        done = subprocess.run(command, env=os.environ | {"PATH": path}, check=False)
        if done.returncode:
            raise UserError("there is no text to plan for: see the error of `dvc repro clean` above")
    start_s = time.process_time()  # so far Python has imported PyTorch, as each stage does
    others_s = START_TIMES * N_STAGES * start_s
    if seconds is not None and seconds <= others_s:
        raise UserError(f"--minutes {seconds / 60:g} is too short: the other stages alone need {duration(others_s)}")
    began = time.perf_counter()
    device = open_device(runtime)
    print("plan: training small models of the text, and timing steps of larger ones", file=sys.stderr)
    with out_of_memory(f"{device} has too little for the small models: stop other programs that use it"):
        text = measure_text(paths.CLEAN, tokenizer, model, train, runtime, device)
        speeds = measure_speeds(model, train, runtime, device, vocab_size=min(text.bytes_per_token))
    taken, widths = time.perf_counter() - began, ", ".join(map(str, speeds.operations))
    print(f"plan: measured the text and models of width {widths} on {device} in {taken:.0f} s", file=sys.stderr)
    if speeds.busy > BUSY:
        print(
            f"warning: other programs kept {speeds.busy:.1f} cores busy, so this plan is for a slower machine: "
            "run it again without them",
            file=sys.stderr,
        )
    planner = Planner(
        text=text, speeds=speeds, model=model, train=train, others_s=others_s, n_process=runtime.n_process
    )
    return planner, device, runtime


def print_plan(
    plan: Plan, planner: Planner, runtime: RuntimeParams, device: torch.device, *, seconds: float | None
) -> None:
    """Print a row for each thing to know about a plan.  Raises UserError if the run will not fit."""
    recipe, config = plan.recipe, plan.config
    params = recipe.training(planner.train)
    with torch.device("meta"):
        model = GPT(config)
    print(
        f"model       {model.n_params():,} weights: {config.n_layer} layers of {config.n_embd}, {config.n_head} heads, "
        f"vocabulary {config.vocab_size:,}, context {config.block_size}"
    )
    print(
        f"training    {recipe.max_steps:,} steps of {recipe.batch_size} sequences: {recipe.n_tokens:,} tokens, "
        f"the text {recipe.epochs:.1f} times"
    )
    print(f"rates       lr {params.lr:g}, embedding_lr {params.embedding_lr:g}, dropout {config.dropout:g}")
    print(f"expected    {expected(plan, planner)} bits per byte of validation text")
    print(
        f"time        {duration(plan.seconds)}: train {duration(plan.train_s)}, evaluate {duration(plan.evaluate_s)}, "
        f"all others {duration(plan.others_s)}"
    )
    if seconds is not None and plan.seconds < 0.8 * seconds:
        spare = duration(seconds - plan.seconds)
        print(f"to spare    {spare}, which would bring next to nothing with so little text")
    n = runtime.n_process
    share = dataclasses.replace(params, batch_size=recipe.batch_size // n)
    micro = _micro_batch_size(config, share, runtime, device, measure=False)
    memory = _in_each(memory_of(config, share, runtime, micro, device), runtime).training + int(PROCESS_BYTES)
    memory, free = memory * (n if device.type == "cpu" else 1), available_memory(device)
    where = "" if n == 1 else ", all processes together" if device.type == "cpu" else ", in each process"
    print(f"memory      {human_bytes(memory)} in training{where}; {human_bytes(free)} are free on {device}")
    if memory > free:
        raise UserError(f"the run will not fit: plan for fewer --minutes, or {LESS_MEMORY}")
    shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    files = []
    for kind in load_params(ExportParams).gguf:
        bits = model.n_params() * bits_per_weight(shapes, tensor_types(shapes, config, kind))
        files.append(f"{kind} {human_bytes(int(bits / 8))}")
    print(f"files       {', '.join(files)}")
    for name, times in (("half", 0.5), ("double", 2.0)):
        with suppress(UserError):
            other = planner.best(times * plan.seconds)
            what = f"{other.config.n_layer} layers of {other.config.n_embd}, vocabulary {other.config.vocab_size:,}"
            print(f"{name:<12}{duration(other.seconds)} would bring {expected(other, planner)}: {what}")
    print(f"lever       {planner.lever(plan)}")


def expected(plan: Plan, planner: Planner) -> str:
    """The expected bits per byte and their likely range."""
    off = spread(planner.text.copied) * plan.bpb
    return f"{plan.bpb:.2f} ({plan.bpb - off:.2f} to {plan.bpb + off:.2f})"


def duration(seconds: float) -> str:
    """75 -> 75 s, 150 -> 2.5 min, 3600 -> 60 min, 9000 -> 2.5 h"""
    if seconds < 90:
        return f"{seconds:.0f} s"
    if seconds < 5400:
        return f"{seconds / 60:.{seconds < 600:d}f} min"
    return f"{seconds / 3600:.1f} h"
