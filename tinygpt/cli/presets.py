"""`python -m tinygpt preset`: put the values of a preset into params.yaml, whose comments and other values stay."""

from __future__ import annotations

import io
from argparse import Namespace
from pathlib import Path
from typing import Any

from ruamel.yaml import YAML

from tinygpt import paths
from tinygpt.cli.flags import nearest
from tinygpt.errors import UserError, printable
from tinygpt.files import atomic_write
from tinygpt.params import PARAMS_FILE, check_names, check_params, read_groups, read_text, yaml_text

PRESETS = Path("presets")
BASE = paths.BASE / "preset.yaml"  # written with the model there


def preset(args: Namespace) -> None:
    """List the presets, or apply one and show what has changed."""
    files = {path.stem: path for path in sorted(PRESETS.glob("*.yaml"))}
    if BASE.exists():
        files["base"] = BASE
    if args.name is None:
        width = max(map(len, files), default=0)
        for name, path in files.items():
            print(f"{name:{width}}  {printable(read_text(path).partition(chr(10))[0].removeprefix('# '))}")
        return
    if args.name == "base" and not BASE.exists():
        raise UserError(
            f"{paths.BASE} is empty: run `python -m tinygpt import-hf FOLDER` or `python -m tinygpt promote`"
        )
    if args.name not in files:
        hint = nearest(args.name, files) or f": {', '.join(files)}"
        raise UserError(f"there is no preset {args.name}{hint}")
    changed = apply_values(PARAMS_FILE, read_groups(files[args.name]))
    for change in changed:
        print(printable(change))
    print(
        f"{args.name}: {len(changed)} values changed in {PARAMS_FILE}" + ("; `dvc repro` uses them" if changed else "")
    )


def apply_values(path: Path, values: dict[str, dict[str, Any]]) -> list[str]:
    """Set values by group and key in a params file, whole or not at all; return a line for each that was another.

    Raises ParamsError when the file lacks one, or would not be right with them.
    """
    names = [(group, key) for group, keys in values.items() for key in (keys if isinstance(keys, dict) else [""])]
    check_names(f"{group}.{key}" for group, key in names)
    there = read_groups(path)
    if not all(isinstance(there.get(group), dict) and key in there[group] for group, key in names):
        check_params(path)  # which says what is missing
    yaml, written = YAML(), path.read_bytes().decode()
    document = yaml.load(written.replace("\r\n", "\n"))
    changed = []
    for group, keys in values.items():
        for key, value in keys.items():
            if document[group][key] != value:
                changed.append(f"{group}.{key}: {yaml_text(document[group][key])} -> {yaml_text(value)}")
                document[group][key] = value
    text = io.StringIO(newline="\r\n" if "\r\n" in written else "\n")
    yaml.dump(document, text)
    trial = path.with_name(path.name + ".trial")
    try:
        trial.write_bytes(text.getvalue().encode())
        check_params(trial)
    finally:
        trial.unlink(missing_ok=True)
    with atomic_write(path) as file:
        file.write(text.getvalue())
    return changed
