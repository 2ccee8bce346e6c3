"""Search for params of low validation loss with Optuna; every trial is an experiment of DVC.

    python -m sweeps.optuna_sweep --trials 20 -S train.lr=log:1e-3..1e-2 -S model.n_layer=2..6 -S train.max_steps=400

A value LOW..HIGH is searched evenly (among whole numbers if the param is one), log:LOW..HIGH on a logarithmic scale,
a,b,c as a choice; anything else is set as it is. Without -S the ranges of SPACE are searched. Stopped in any way and
started again, the sweep continues: its trials are in a SQLite file, and the one that was running resumes from its
checkpoint.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
import typing
from collections import Counter
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

import dvc.api
import psutil
from dvc.exceptions import DvcException
from filelock import FileLock, Timeout

from tinygpt.errors import UserError, program
from tinygpt.files import runs_folder
from tinygpt.params import check_names, coerce, find_class, require

if TYPE_CHECKING:
    from optuna import Study, Trial

SPACE = ("train.lr=log:5e-4..1e-2", "train.warmup_steps=20..200", "train.weight_decay=0.0..0.3")
NUMBER = r"([-+]?\d*\.?\d+(?:[eE][-+]?\d+)?)"
RANGE = re.compile(rf"(log:)?{NUMBER}\.\.{NUMBER}")
TARGET = "evaluate"  # what a trial runs: plots and exports are for the model that one keeps
REPORT = "reports/metrics/train.json"
MOST_FAILED = 2  # trials in a row: one may diverge, two mean that something is wrong


@program
def main() -> None:
    """Run trials until there are as many as requested; report the best."""
    parser = argparse.ArgumentParser(prog="python -m sweeps.optuna_sweep", description="Search for good params.")
    parser.add_argument(
        "-S", dest="settings", action="append", metavar="KEY=VALUE", help="LOW..HIGH, log:LOW..HIGH, a,b,c or a value"
    )
    parser.add_argument("--trials", type=int, default=20, help="in all, earlier ones included (default: %(default)s)")
    parser.add_argument("--name", default="sweep", help="experiments are NAME-0, NAME-1, … (default: %(default)s)")
    parser.add_argument("--study", type=Path, help="SQLite file (default: runs/optuna.db)")
    parser.add_argument("--seed", type=int, default=1, help="of Optuna's draws (default: %(default)s)")
    args = parser.parse_args()
    settings = read_settings(args.settings or SPACE)
    require((args.trials > 0, f"--trials={args.trials} must be 1 or more"))
    path = args.study or runs_folder() / "optuna.db"
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        with FileLock(f"{path}.lock", timeout=0):
            sweep(open_study(path, args.name, settings, args.seed), settings, args.trials)
    except Timeout:
        raise UserError(f"another sweep is writing {path}: wait for it, or give another --study") from None


def read_settings(texts: list[str] | tuple[str, ...]) -> dict[str, str]:
    """KEY=VALUE texts as a mapping.  Raises UserError for other texts and keys, and where nothing is searched."""
    wrong = [text for text in texts if not re.fullmatch(r"[\w.]+=.+", text)]
    if wrong:
        raise UserError(f"-S {wrong[0]}: must be KEY=VALUE, such as train.lr=log:1e-3..1e-2")
    settings = {key: value for key, _, value in (text.partition("=") for text in texts)}
    for key, n in Counter(text.partition("=")[0] for text in texts).items():
        require((n == 1, f"-S {key} is given {n} times: give it once"))
    check_names(settings)
    for key, value in settings.items():
        match = RANGE.fullmatch(value)
        if value.startswith("log:") and not match:
            raise UserError(f"-S {key}={value}: must be log:LOW..HIGH")
        if match and not (float(match[2]) < float(match[3]) and (float(match[2]) > 0 or not match[1])):
            raise UserError(f"-S {key}={value}: must be LOW..HIGH with LOW < HIGH, and above 0 after log:")
        for end in match.groups()[1:] if match else ():
            is_clear = end.isdecimal() or not is_whole(key, end)
            require((is_clear, f"-S {key}={value}: it is a whole number, so write {float(end):.0f} and not {end}"))
    if not any(RANGE.fullmatch(value) or choices(value) for value in settings.values()):
        raise UserError("nothing to search: give a range, such as -S train.lr=log:1e-3..1e-2, or a choice a,b")
    return settings


def is_whole(key: str, number: str) -> bool:
    """Whether a param is a whole number.  Raises ParamsError if it is none, or may not be this one."""
    group, _, name = key.partition(".")
    hint = typing.get_type_hints(find_class(group), include_extras=True).get(name)
    if hint is None:  # inside a mapping
        return number.isdecimal()
    return isinstance(coerce(int(number) if number.isdecimal() else float(number), hint, f"-S {key}"), int)


def choices(value: str) -> list[str]:
    """The parts of a,b,c; none for one value, and for the lists and mappings of YAML."""
    return value.split(",") if "," in value and value[0] not in "[{" else []


def open_study(path: Path, name: str, settings: dict[str, str], seed: int) -> Study:
    """The study of that name in a SQLite file, made if it is not there."""
    try:
        import optuna
        from sqlalchemy.exc import SQLAlchemyError
    except ImportError:
        raise UserError("sweeps.optuna_sweep needs Optuna: pip install -r requirements-sweep.txt") from None
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    try:
        study = optuna.create_study(storage=f"sqlite:///{path.absolute()}", study_name=name, load_if_exists=True)
    except SQLAlchemyError as error:
        raise UserError(f"--study {path} is not a study of Optuna ({error.args[0]}): give another file") from None
    before = study.user_attrs.setdefault("settings", settings)
    if before != settings:
        theirs = " ".join(f"-S {key}={value}" for key, value in before.items())
        raise UserError(f"the study {name} of {path} has trials with {theirs}: use these, or another --name")
    study.set_user_attr("settings", settings)
    study.sampler = optuna.samplers.TPESampler(seed=seed + len(study.trials))  # other draws after each restart
    return study


def sweep(study: Study, settings: dict[str, str], n_trials: int) -> None:
    """Ask for params, run them, report the loss, until `n_trials` have one."""
    from optuna.trial import TrialState

    for left in study.get_trials(states=[TrialState.RUNNING]):  # by a sweep that was stopped
        must_have_ended(f"{study.study_name}-{left.number}")
        study.tell(left.number, state=TrialState.FAIL)
        study.enqueue_trial(left.params)
    if not study.trials:
        must_be_free(study.study_name)
    failed = 0
    while len(study.get_trials(states=[TrialState.COMPLETE])) < n_trials:
        trial = study.ask()
        values = [f"{key}={suggest(trial, key, value)}" for key, value in settings.items()]
        name = f"{study.study_name}-{trial.number}"
        print(f"{name}: {' '.join(values)}", flush=True)
        loss = run_experiment(name, values)
        if loss is None:
            study.tell(trial, state=TrialState.FAIL)
            failed += 1
            if failed == MOST_FAILED:
                raise UserError(f"{failed} trials in a row failed, see above: run the sweep again to continue")
            continue
        failed = 0
        study.tell(trial, loss)
        best = study.best_trial
        print(f"{name}: val_loss {loss:.4f}; lowest {best.value:.4f}, {study.study_name}-{best.number}", flush=True)
    best_name = f"{study.study_name}-{study.best_trial.number}"
    n_done = len(study.get_trials(states=[TrialState.COMPLETE]))
    print(f"{best_name} has the lowest val_loss of {n_done}: `dvc exp apply {best_name}` makes it yours")


def must_have_ended(name: str) -> None:
    """Raise UserError if this experiment still trains: only the sweep was killed."""
    for process in psutil.process_iter():
        with suppress(psutil.Error, OSError):  # it has ended, or is another user's
            if {"exp", "run", name} <= {*process.cmdline()} and Path(process.cwd()) == Path.cwd():
                raise UserError(f"{name} is still training (process {process.pid}): wait until it ends, or stop it")


def must_be_free(name: str) -> None:
    """Raise UserError if experiments have the names of trials: the study that ran them is another one, or is gone."""
    command = [sys.executable, "-m", "dvc", "exp", "list", "--name-only"]
    names = subprocess.run(command, capture_output=True, text=True, check=False).stdout.split()
    if taken := [each for each in names if re.fullmatch(rf"{re.escape(name)}-\d+", each)]:
        raise UserError(f"{taken[0]} is an experiment of another study: give another --name, or `dvc exp remove` it")


def suggest(trial: Trial, key: str, value: str) -> str:
    """One param of a trial, with at most four digits where it is not a whole number."""
    match, parts = RANGE.fullmatch(value), choices(value)
    if match and is_whole(key, match[2]):
        return str(trial.suggest_int(key, int(match[2]), int(match[3]), log=bool(match[1])))
    if match:
        return f"{trial.suggest_float(key, float(match[2]), float(match[3]), log=bool(match[1])):.4g}"
    return str(trial.suggest_categorical(key, parts)) if parts else value


def run_experiment(name: str, values: list[str]) -> float | None:
    """`dvc exp run` in a temporary copy -> its validation loss, None if it failed."""
    changes = [word for value in values for word in ("-S", value)]
    process = subprocess.Popen([sys.executable, "-m", "dvc", "exp", "run", "--temp", "--name", name, *changes, TARGET])
    try:
        status = process.wait()
    except KeyboardInterrupt:  # the trainer has heard it, too, and saves
        process.wait()
        raise
    if status:
        return None
    try:
        return float(json.loads(dvc.api.read(REPORT, rev=name))["val_loss"])
    except DvcException as error:  # DVC says that all went well, and keeps nothing
        raise UserError(f"DVC has not kept {name} ({error}): see docs/troubleshooting.md, Experiments") from None


if __name__ == "__main__":
    main()
