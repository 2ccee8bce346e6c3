"""`python -m tinygpt preset`, `import-hf`, `promote`, `mend`: params.yaml, the base, and what a killed DVC has left."""

import io
import math
import os
import subprocess
from argparse import Namespace
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import psutil
from ruamel.yaml import YAML

from tinygpt import paths
from tinygpt.errors import UserError, printable, shown
from tinygpt.files import atomic_write, parse_json
from tinygpt.params import (
    PARAMS_FILE,
    Count,
    ParamsError,
    check_names,
    check_params,
    coerce,
    nearest,
    read_bytes,
    read_groups,
)

PRESETS = Path("presets")
BASE = paths.BASE / "preset.yaml"  # written with the model there
WIDTH = 128  # n_embd of the models that the learning rates are for in presets that continue from a base
TEMPORARY = Path(".dvc/tmp")
RWLOCK, LOCK = TEMPORARY / "rwlock", Path("dvc.lock")
# A run should see at least this many tokens per weight. On four texts (benchmarks/scaling.csv) models that saw 0.2, 0.4
# and 0.8 were 0.20 to 0.25, 0.08 to 0.14 and 0.04 to 0.07 bits per byte worse than a model of half or a quarter of the
# size that saw 3 to 7, with as many operations. The default sees 1.5; far larger models are best at 20
# (https://arxiv.org/abs/2203.15556).
MIN_TOKENS = 0.5
MAX_EPOCHS = 4  # reading a text so often is nearly as good as reading new text (https://arxiv.org/abs/2305.16264)


def preset(args: Namespace) -> None:
    """List the presets, or apply one and print the changes."""
    files = {path.stem: path for path in sorted(PRESETS.glob("*.yaml"), key=_size)}
    if not files:
        raise UserError(f"{PRESETS} holds no presets: run this from the project's top folder")
    if args.name is None:
        width = max(map(len, files), default=0)
        for name, path in files.items():
            print(f"{name:{width}}  {about(path)}")
        return
    if args.name not in files:
        hint = nearest(args.name, files) or f": {', '.join(files)}"
        raise UserError(f"there is no preset {args.name}{hint}")
    values = read_groups(files[args.name])
    try:
        check_names(f"{group}.{key}" for group, keys in values.items() for key in keys)
    except ParamsError as error:
        raise UserError(f"{files[args.name]}: {error}") from None
    if values.get("train", {}).get("init_from") == "base":
        values = going_on(values)
    write_values(args.name, values)
    if "model" in values:
        if "max_steps" not in values.get("train", {}):
            steps = check_params()["train"].max_steps
            print(f"{args.name}: {about(files[args.name])}; train.max_steps stays {steps:,}")
        same_text = not values.keys() & {"download", "clean", "tokenizer"}
        warn_of_size(same_text=same_text, from_base="init_from" in values.get("train", {}))


def about(path: Path) -> str:
    """The first line of a preset, which says what it is for."""
    return printable(read_bytes(path).decode(errors="replace").partition("\n")[0].removeprefix("# "))


def write_values(name: str, values: dict[str, dict[str, Any]]) -> None:
    """Put the values of a preset or plan into params.yaml, and print the changes."""
    changed = apply_values(PARAMS_FILE, values)
    for change in changed:
        print(printable(change))
    values_changed = f"{len(changed)} value{'s' * (len(changed) != 1)} changed in {PARAMS_FILE}"
    print(f"{name}: {values_changed}" + ("; `dvc repro` uses them" if changed else ""))


def going_on(rules: dict[str, Any]) -> dict[str, Any]:
    """The values of the base, overridden by `rules`, the preset for continuing, with learning rates for its width.

    Muon's rates fall with the square root of the width.  Raises UserError if there is no base, or none with a width.
    """
    if not BASE.exists():
        raise UserError(
            f"{paths.BASE} is empty: run `python -m tinygpt import-hf FOLDER` or `python -m tinygpt promote`"
        )
    try:
        base, train = read_groups(BASE), rules["train"]
        scale = math.sqrt(WIDTH / coerce(base.get("model", {}).get("n_embd"), Count, "model.n_embd"))
    except UserError as error:
        raise UserError(f"{paths.BASE} is damaged ({error}): `dvc checkout -f {paths.BASE}` restores it") from None
    rates = {key: rate for key, rate in train.items() if str(key).endswith("lr") and type(rate) in (int, float)}
    return base | rules | {"train": train | {key: float(f"{scale * rate:.5g}") for key, rate in rates.items()}}


def warn_of_size(*, same_text: bool, from_base: bool) -> None:
    """Print a warning if a model is too large for its run or text, or still starts from a base of other sizes.

    `same_text`: the text has not just been changed.  `from_base`: the values are those of a base, whose weights have
    been trained already.
    """
    from tinygpt.tokenizer.kinds import expected_size  # here, so that listing the presets does not wait for it
    from tinygpt.tokens import load_meta

    groups = check_params()
    model, train = groups["model"], groups["train"]
    if train.init_from == "base":
        if not from_base:
            print(
                f"warning: training still starts from {paths.BASE}, which has sizes of its own: for a new model, set "
                "train.init_from=scratch, and train.lora and tokenizer.from_file to null"
            )
        return
    try:
        n_weights = model.n_weights(expected_size(groups["tokenizer"], paths.TOKENIZER))
    except UserError:  # no such tokenizer: its stage will say so
        return
    per_step = train.batch_size * model.block_size
    needed = MIN_TOKENS * n_weights
    more = f"set train.max_steps={math.ceil(needed / per_step)} or more"
    found = [(train.max_steps * per_step, f"train.max_steps={train.max_steps}", more)]
    if same_text:
        with suppress(UserError):  # no text yet, or none that can be read
            text = MAX_EPOCHS * load_meta(paths.TOKENS).train.tokens
            found.append((text, f"the current text, read {MAX_EPOCHS} times", "use a larger text"))
    n_tokens, where, remedy = min(found)
    if n_tokens < needed:
        print(
            f"warning: {n_weights:,} weights see {n_tokens:,} tokens in {where}. Below {MIN_TOKENS} tokens per "
            f"weight, a smaller model learns more in the same time: {remedy}, or use a smaller preset"
        )


def _size(path: Path) -> tuple[float, str]:
    """Sort key of presets: small models before large ones, then files without a size, or that cannot be read."""
    try:
        groups = read_groups(path)
        n_layer, width = (float(groups["model"][key]) for key in ("n_layer", "n_embd"))
        rows = 2 * float(groups.get("tokenizer", {}).get("vocab_size", 1024))  # of embedding and head
        return 12 * n_layer * width**2 + rows * width, path.stem
    except (UserError, KeyError, TypeError, ValueError, ArithmeticError):
        return math.inf, path.stem


def apply_values(path: Path, values: dict[str, dict[str, Any]]) -> list[str]:
    """Set values by group and key in a params file, all or none; return a line for each that changed.

    Raises UserError if the file lacks one, or would be invalid with them.
    """
    read_groups(path)  # refuses other files, and deep nesting, for which ruamel.yaml takes seconds
    check_names(f"{group}.{key}" for group, keys in values.items() for key in keys)
    yaml, written, changed = YAML(), path.read_bytes().decode(), list[str]()
    document = yaml.load(written.replace("\r\n", "\n"))
    for group, keys in values.items():
        for key, value in keys.items():
            if key not in document.get(group, {}):
                check_params(path)  # which says what is missing
            if (old := document[group][key]) != value:
                changed.append(f"{group}.{key}: {shown(old)} -> {shown(value)}")
                document[group][key] = value
                comment = document[group].ca.items.get(key, [])
                if value == [] and comment[3:] == [[]]:  # of a block list: ruamel.yaml would put no line end after []
                    comment[3] = None
    text = io.StringIO(newline="\r\n" if "\r\n" in written else "\n")
    yaml.dump(document, text)
    with atomic_write(path.resolve()) as file:  # a link to a file stays one
        file.write(text.getvalue())
        file.flush()
        check_params(Path(file.name))
    return changed


def import_hf(args: Namespace) -> None:
    """Make a transformers folder the base, which training can start from."""
    from tinygpt.export.folders import read_hf_pair, use_of, write_base  # here, as presets do not need PyTorch

    must_be_at_top(args.to)
    config, tensors, tokenizer = read_hf_pair(args.folder)
    write_base(args.to, config, tensors, tokenizer)
    n_weights = sum(tensor.numel() for tensor in tensors.values())
    print(f"{args.to}: {n_weights:,} weights; {use_of(args.to)}")


def must_be_at_top(to: Path) -> None:
    """Raise UserError where `data/base` would be no project's."""
    if to == paths.BASE and not PARAMS_FILE.exists():
        raise UserError(f"{PARAMS_FILE} not found: run this from the project's top folder, or give another folder --to")


def promote(args: Namespace) -> None:
    """Make the trained model the base, which training can start from."""
    from tinygpt.export.folders import open_model, use_of, write_base
    from tinygpt.model.weights import model_tensors

    must_be_at_top(args.to)
    model, tokenizer = open_model(args.model, args.tokenizer)
    write_base(args.to, model.config, model_tensors(model), tokenizer)
    print(f"{args.to}: {model.n_params():,} weights; {use_of(args.to)}")


# ---- what a killed DVC has left ----
#
# DVC (3.67) writes two files in place. If killed, it may leave one empty or cut off, and every later command fails.


def mend(args: Namespace) -> None:
    """Replace each file that was cut off with git's version, or remove it if git has none, and print that.

    Raises UserError if DVC is running, as it may be writing the file just now, or if the folder is not writable.
    """
    folder = TEMPORARY if TEMPORARY.exists() else TEMPORARY.parent
    if folder.exists() and not os.access(folder, os.W_OK):
        raise UserError(f"{Path.cwd()} is not writable: `chown` it, or clone the project into a folder of your own")
    if cut_off():
        with no_dvc():
            for path in cut_off():
                print(replace(path))


def cut_off() -> list[Path]:
    """DVC's files that it can no longer read."""
    return [path for path in (RWLOCK, LOCK) if path.exists() and not is_whole(path)]


@contextmanager
def no_dvc() -> Iterator[None]:
    """Keep every DVC out of the project for the block.  Raises UserError if one is running there.

    DVC holds its lock except while a stage runs; then we find its process, or the stage's.
    """
    from dvc.config import Config
    from dvc.lock import LockError, make_lock

    hardlink = Config(".dvc")["core"].get("hardlink_lock", False)
    try:
        with make_lock(str(TEMPORARY / "lock"), tmp_dir=str(TEMPORARY), hardlink_lock=hardlink):
            if found := [process.pid for process in psutil.process_iter() if is_dvc(process)]:
                raise UserError(f"DVC is running in this folder (process {found[0]}): wait for it, or stop it first")
            yield
    except LockError:
        raise UserError("DVC is running in this folder: wait for it, or stop it first") from None


def is_dvc(process: psutil.Process) -> bool:
    """Whether this is a DVC that works in this project, or one of its stages."""
    here = Path.cwd()
    try:
        is_named = any(Path(argument).name == "dvc" for argument in process.cmdline()[:3])
        return (is_named and Path(process.cwd()).is_relative_to(here)) or process.environ().get("DVC_ROOT") == str(here)
    except (psutil.Error, OSError):  # it has ended, or belongs to another user
        return False


def is_whole(path: Path) -> bool:
    """Whether the file is not cut off: DVC can read it, another version of DVC wrote it, or git left a conflict."""
    from dvc.exceptions import DvcException
    from dvc.schema import COMPILED_LOCKFILE_SCHEMA
    from dvc.utils.serialize import load_yaml
    from voluptuous import Invalid

    try:
        if path == RWLOCK:
            return isinstance(parse_json(path.read_bytes()), dict)
        document = load_yaml(str(path))
        if not isinstance(document, dict) or document.get("schema", "2.0") == "2.0":
            COMPILED_LOCKFILE_SCHEMA(document)
    except (DvcException, Invalid, RecursionError, ValueError):
        return b"<<<<<<<" in path.read_bytes()
    return True


def replace(path: Path) -> str:
    """Put git's version in the place of a file; returns a line that says what was done."""
    kept = TEMPORARY / f"{path.name}.cut"
    os.replace(path, kept)
    subprocess.run(["git", "checkout", "--quiet", "--", path], stderr=subprocess.DEVNULL, check=False)
    if path.exists() and not is_whole(path):
        path.unlink()
    done = "git's version has replaced it" if path.exists() else "it was removed"
    return f"{path} was cut off when DVC was killed: {done}; its remains are in {kept}"
