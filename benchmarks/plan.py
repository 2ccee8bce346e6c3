"""Planned runs next to random runs of equal duration: does `python -m tinygpt plan` choose well, and predict the loss?

    python -m benchmarks.plan --out FOLDER --text kjv=kjv.txt --text headers=FOLDER [...] [--minutes 2 8]

Speeds are measured first and kept in FOLDER/speeds.json; nothing else should run meanwhile. The runs themselves have as
many steps as this machine can do in the time, so they may run in the background, one thread each. Runs that are in the
table, benchmarks/plan.csv, are not repeated; stopped ones continue.

Random runs draw width, layers, vocabulary, context, batch and dropout; their rates follow the recipe's rules. The law
was not fitted on these texts: kjv, the King James Bible as Debian's bible-kjv 4.38 prints gen1:1-rev22:21; spanish,
Debian's handbook in Spanish (debian-handbook 11.20220922) as plain text; headers, torch/include/c10 and
torch/include/torch of PyTorch 2.13.0.
"""

import argparse
import csv
import dataclasses
import json
import random
import statistics
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Lock
from typing import Any

import torch

from benchmarks.scaling import bits, prepare, train_in
from tinygpt import paths
from tinygpt.errors import program
from tinygpt.files import write_json
from tinygpt.model.config import GPTConfig, ModelParams, config_fields
from tinygpt.params import PARAMS_FILE, load_params
from tinygpt.plan.measure import Speeds, measure_speeds
from tinygpt.plan.plan import FORWARD, Plan, Planner
from tinygpt.plan.recipe import LAYERS, N_EVALUATIONS, Recipe
from tinygpt.plan.text import VOCAB_SIZES, measure_text
from tinygpt.runtime import RuntimeParams, open_device
from tinygpt.tokenizer.kinds import TokenizerParams
from tinygpt.tokens import load_meta
from tinygpt.train.config import TrainParams

TABLE = Path(__file__).with_name("plan.csv")
MAX_BYTES = 10_000_000  # of a text
EVAL_BYTES = 100_000  # of validation text to measure losses on
Values = dict[str, Any]  # of params.yaml, by "group.key"


def speeds_of(out: Path) -> Speeds:
    """The speeds of this machine, measured once."""
    file = out / "speeds.json"
    if not file.exists():
        model, train, runtime = load_params(ModelParams, TrainParams, RuntimeParams)
        found = measure_speeds(model, train, runtime, open_device(runtime), vocab_size=1024)
        write_json(file, dataclasses.asdict(found))
    kept = json.loads(file.read_text())
    operations, per_weight = ({int(n): value for n, value in kept[key].items()} for key in ("operations", "per_weight"))
    return Speeds(operations, per_weight, kept["busy"])


def planner_of(folder: Path, speeds: Speeds) -> Planner:
    """The planner that the command `plan` would use for the text in a folder."""
    model, train, tokenizer = load_params(ModelParams, TrainParams, TokenizerParams, path=folder / PARAMS_FILE)
    runtime = load_params(RuntimeParams, path=folder / PARAMS_FILE)
    val = load_meta(folder / paths.TOKENS).val
    train = dataclasses.replace(train, eval_tokens=EVAL_BYTES * val.tokens // val.bytes)
    text = measure_text(folder / paths.CLEAN, tokenizer, model, train, runtime, torch.device("cpu"))
    return Planner(text=text, speeds=speeds, model=model, train=train, others_s=0.0)


def drawn(planner: Planner, seconds: float, seed: int) -> Values:
    """The params of a random run that takes this time."""
    rng = random.Random(seed)
    while True:
        n_embd = rng.choice([width for width in LAYERS if width <= 384])
        vocab_size = rng.choice(VOCAB_SIZES)
        recipe = Recipe(
            n_embd=n_embd,
            vocab_size=vocab_size,
            batch_size=rng.choice((4, 8, 16, 32)),
            max_steps=1,
            epochs=1,
        )
        chosen = {
            "n_layer": rng.randint(2, 8),
            "block_size": rng.choice((64, 128, 256)),
            "dropout": rng.choice((0.0, 0.1, 0.2)),
        }
        model = recipe.model() | chosen
        config = GPTConfig(**config_fields(planner.model) | model, vocab_size=vocab_size)
        step_s = planner.speeds.step(config, recipe.batch_size)
        per_token = step_s / recipe.batch_size / config.block_size * FORWARD
        looks_s = (N_EVALUATIONS + 1) * per_token * planner.train.eval_tokens  # as often as a plan
        max_steps = int((seconds - looks_s) / step_s)
        if vocab_size in planner.text.bytes_per_token and max_steps >= 50:
            return flat(dataclasses.replace(recipe, max_steps=max_steps).values() | {"model": model})


def flat(values: dict[str, dict[str, Any]]) -> Values:
    """{"model": {"n_embd": 64}} -> {"model.n_embd": 64}"""
    return {f"{group}.{key}": value for group, keys in values.items() for key, value in keys.items()}


def runs(text: str, source: str, minutes: list[float], n_random: int, speeds: Speeds, out: Path) -> Iterator[Values]:
    """Rows of the table as known before training, with the params under `values`."""
    planner = planner_of(prepare(text, MAX_BYTES, 1024, source, out), speeds)
    for each in minutes:
        plan: Plan = planner.best(60 * each)
        row = {"text": text, "copied": round(planner.text.copied, 4), "minutes": each}
        yield {**row, "run": "plan", "foretold": plan.bpb, "values": flat(plan.recipe.values())}
        for number in range(1, n_random + 1):
            values = drawn(planner, plan.train_s, seed=number)
            yield {**row, "run": f"random {number}", "foretold": "", "values": values}


def measure(row: Values, source: str, out: Path) -> Values:
    """Train, and complete the row."""
    values = row.pop("values")
    tokens = prepare(row["text"], MAX_BYTES, values["tokenizer.vocab_size"], source, out)
    val = load_meta(tokens / paths.TOKENS).val
    eval_tokens = EVAL_BYTES * val.tokens // val.bytes  # the same text for all
    folder = out / f"{row['text']}-{row['minutes']:g}-{row['run'].replace(' ', '')}"
    fixed = {"train.eval_tokens": eval_tokens, "train.sample_tokens": 0, "train.precision": "fp32"}
    report = train_in(folder, tokens, {**values, **fixed})
    names = "n_layer n_embd block_size dropout".split()
    return row | {
        **{name: values[f"model.{name}"] for name in names},
        "vocab_size": values["tokenizer.vocab_size"],
        "batch_size": values["train.batch_size"],
        "max_steps": values["train.max_steps"],
        "epochs": round(report["epochs"], 2),
        "best_step": report["best_step"],
        "val_bpb": round(report["val_loss"] * bits(val), 4),
        "foretold": row["foretold"] and round(row["foretold"], 4),
    }


def summary(rows: list[dict[str, str]]) -> Iterator[str]:
    """A line for each text and time whose planned run is done."""
    yield "| text | minutes | planned | reached | best random | median random |"
    yield "|---|---|---|---|---|---|"
    for text, minutes in dict.fromkeys((row["text"], row["minutes"]) for row in rows):
        mine = [row for row in rows if (row["text"], row["minutes"]) == (text, minutes)]
        others = sorted(float(row["val_bpb"]) for row in mine if row["run"] != "plan")
        for plan in (row for row in mine if row["run"] == "plan"):
            numbers = [float(plan["foretold"]), float(plan["val_bpb"])]
            numbers += [others[0], statistics.median(others)] if others else []
            yield f"| {text} | {minutes} | " + " | ".join(f"{number:.3f}" for number in numbers) + " |"


@program
def main() -> None:
    """Run what is not in the table yet, and print the summary."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, metavar="FOLDER", help="where runs are kept")
    parser.add_argument("--text", action="append", required=True, metavar="NAME=SOURCE", help="again for each")
    parser.add_argument("--minutes", type=float, nargs="+", default=[2.0, 8.0])
    parser.add_argument("--n-random", type=int, default=6, help="random runs next to each planned one")
    parser.add_argument("--jobs", type=int, default=2, help="runs at a time, of one thread each")
    arguments = parser.parse_args()
    sources, out = dict(text.split("=", 1) for text in arguments.text), arguments.out.resolve()
    out.mkdir(parents=True, exist_ok=True)
    rows = list(csv.DictReader(TABLE.open())) if TABLE.exists() else []
    done = {(row["text"], float(row["minutes"]), row["run"]) for row in rows}
    speeds, lock = speeds_of(out), Lock()
    wanted = [
        row
        for name, source in sources.items()
        for row in runs(name, source, arguments.minutes, arguments.n_random, speeds, out)
        if (row["text"], row["minutes"], row["run"]) not in done
    ]

    def run(row: Values) -> None:
        found = measure(row, sources[row["text"]], out)
        with lock, TABLE.open("a", newline="") as file:
            writer = csv.DictWriter(file, list(found), lineterminator="\n")
            if file.tell() == 0:
                writer.writeheader()
            writer.writerow(found)
            print(f"{found['text']} {found['minutes']:g} {found['run']}: {found['val_bpb']}", flush=True)

    with ThreadPoolExecutor(arguments.jobs) as pool:
        list(pool.map(run, sorted(wanted, key=lambda row: (row["run"] != "plan", row["minutes"]))))
    print("\n".join(summary(list(csv.DictReader(TABLE.open())))))


if __name__ == "__main__":
    main()
