"""The commands and their flags.

A command's file is imported only after its flags are parsed, so --help and a typo are answered at once.
"""

import importlib
import re
import sys
from argparse import ArgumentParser
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Never

from tinygpt import paths
from tinygpt.cli.flags import (
    STDIN,
    DeviceOptions,
    EngineOptions,
    ProposalOptions,
    TextOptions,
    add_flags,
    add_number,
    existing,
    page,
    picture,
)
from tinygpt.errors import heed_interrupts, leave_at_once, printable, program, shown
from tinygpt.options import DRAWN, Limits, NotNegative, Settings
from tinygpt.params import Within, nearest

Port = Annotated[int, Within("[0, 65535]")]
Positive = Annotated[float, Within("(0, inf)")]
FOLDER = "folder (default: %(default)s)"
PICTURE = "a .png or .svg (default: %(default)s)"


def _generate_flags(command: ArgumentParser) -> None:
    about = f"text to continue; can be repeated; {STDIN} = all of standard input (default: a new document)"
    command.add_argument("-p", "--prompt", action="append", help=about)
    about = f'one prompt per line, or {{"prompt": …}} per line of a .jsonl; {STDIN} = the lines of standard input'
    command.add_argument("--prompts", metavar="FILE", help=about)
    add_flags(command, TextOptions, Settings, ProposalOptions, EngineOptions, defaults=DRAWN)


def _chat_flags(command: ArgumentParser) -> None:
    add_flags(command, Settings, EngineOptions, defaults=DRAWN)


def _serve_flags(command: ArgumentParser) -> None:
    about = f"a tinygpt or transformers folder; can be repeated (default: {paths.MODEL})"
    command.add_argument("--model", action="append", metavar="[NAME=]FOLDER", help=about)
    about = "a tokenizer's folder, for all tinygpt models (default: each model's own, or `tokenizer` next to it)"
    command.add_argument("--tokenizer", type=Path, help=about)
    command.add_argument("--host", default="127.0.0.1", help="address (default: %(default)s, for this machine only)")
    add_number(command, "--port", Port, default=8000, help="(default: %(default)s; 0 = any free port)")
    command.add_argument("--allow-host", action="append", default=[], metavar="NAME", help="another name of the host")
    add_flags(command, DeviceOptions, Limits)


def _encode_flags(command: ArgumentParser) -> None:
    command.add_argument("text", nargs="?", help="text to encode (default: standard input)")
    command.add_argument("--ids", action="store_true", help="print only the ids, as `decode` reads them")
    command.add_argument("--tokenizer", type=partial(existing, "--tokenizer"), default=paths.TOKENIZER, help=FOLDER)


def _decode_flags(command: ArgumentParser) -> None:
    command.add_argument("ids", nargs="*", help="ids to decode (default: standard input)")
    command.add_argument("--tokenizer", type=partial(existing, "--tokenizer"), default=paths.TOKENIZER, help=FOLDER)


def _tokenizer_report_flags(command: ArgumentParser) -> None:
    command.add_argument("--tokenizer", type=partial(existing, "--tokenizer"), default=paths.TOKENIZER, help=FOLDER)
    about = "another tokenizer.json, such as GPT-2's, on the same text"
    command.add_argument("--against", type=partial(existing, "--against"), help=about)
    command.add_argument("--text", type=partial(existing, "--text"), default=paths.CLEAN, help=FOLDER)
    command.add_argument("--plot", type=picture, default=paths.REPORTS / "tokenizer.png", help=PICTURE)


def _model_flags(command: ArgumentParser) -> None:
    command.add_argument("--model", type=partial(existing, "--model"), default=paths.MODEL, help=FOLDER)
    about = "folder (default: the model's own, or `tokenizer` next to it)"
    command.add_argument("--tokenizer", type=partial(existing, "--tokenizer"), help=about)


def _attention_flags(command: ArgumentParser) -> None:
    command.add_argument("-p", "--prompt", required=True, help="the text to look at")
    add_number(command, "--generate", NotNegative, default=0, help="first let the model add N tokens")
    _model_flags(command)
    command.add_argument("--plot", type=picture, default=paths.REPORTS / "attention.png", help=f"{PICTURE}, and a page")


def _import_hf_flags(command: ArgumentParser) -> None:
    command.add_argument("folder", type=Path, help="with config.json, model.safetensors and tokenizer.json")
    command.add_argument("--to", type=Path, default=paths.BASE, help=FOLDER)


def _promote_flags(command: ArgumentParser) -> None:
    _model_flags(command)
    command.add_argument("--to", type=Path, default=paths.BASE, help=FOLDER)


def _profile_flags(command: ArgumentParser) -> None:
    command.add_argument("--no-measure", action="store_true", help="only count, without timing training steps")


def _preset_flags(command: ArgumentParser) -> None:
    command.add_argument("name", nargs="?", help="the preset to apply; without a name, all are listed")


def _plan_flags(command: ArgumentParser) -> None:
    add_number(command, "--minutes", Positive, help="how long the whole pipeline may take")
    add_number(command, "--bpb", Positive, help="or the target loss, in bits per byte")
    command.add_argument("--write", action="store_true", help="write the plan to params.yaml")


def _runs_flags(command: ArgumentParser) -> None:
    command.add_argument("--prune", action="store_true", help="remove finished runs, but never one that is running")
    command.add_argument("--all", action="store_true", help="with --prune: remove interrupted and damaged runs, too")
    add_number(command, "--keep", NotNegative, help="with --prune: keep the newest N of them")


def _compare_flags(command: ArgumentParser) -> None:
    about = "an experiment, branch, tag, commit or `workspace` (default: `workspace`, HEAD and its experiments)"
    command.add_argument("rev", nargs="*", help=about)
    command.add_argument("--plot", type=picture, metavar="FILE", help="draw the curves, too: a .png or .svg")
    command.add_argument("--page", type=page, metavar="FILE", help="write a page with samples, too: an .html")
    command.add_argument(
        "--open", action="store_true", help="open that page in a browser (default: reports/compare.html)"
    )


def _watch_flags(command: ArgumentParser) -> None:
    command.add_argument("run", nargs="?", help="the beginning of its name in runs/ (default: the one that wrote last)")
    command.add_argument("--page", type=page, metavar="FILE", help="the page (default: reports/live.html)")


# Name -> its flags, the file with the function of that name, and the help text.
COMMANDS = {
    "generate": (_generate_flags, "generate", "continue a prompt, or many"),
    "chat": (_chat_flags, "chat", "continue what you type, line by line"),
    "serve": (_serve_flags, "serve", "serve models over OpenAI's API, with a playground in the browser"),
    "encode": (_encode_flags, "texts", "show the ids and pieces of a text"),
    "decode": (_decode_flags, "texts", "show the text of ids"),
    "attention": (_attention_flags, "texts", "draw what each head of the model attends to in a text"),
    "import-hf": (_import_hf_flags, "project", "import a transformers folder as the model that training starts from"),
    "promote": (_promote_flags, "project", "make the trained model the one that training starts from"),
    "profile": (_profile_flags, "plan", "say what the run of params.yaml will cost, and whether it fits"),
    "plan": (_plan_flags, "plan", "choose what to train in a given time, on this machine and text"),
    "preset": (_preset_flags, "project", "put the values of a preset into params.yaml, or list the presets"),
    "runs": (_runs_flags, "runs", "list what training keeps in runs/, and remove what is finished"),
    "mend": (None, "project", "repair what a killed DVC has left behind; `make repro` does this, too"),
    "watch": (_watch_flags, "runs", "follow a training run from a second terminal, and on a page"),
    "compare": (_compare_flags, "runs", "show DVC's experiments side by side, as a table and a picture"),
    "tokenizer-report": (_tokenizer_report_flags, "texts", "report how well the tokenizer fits the text, with a plot"),
}


class Parser(ArgumentParser):
    """A parser that reports wrong arguments in one line."""

    def parse_known_args(self, *args: Any) -> tuple[Any, list[str]]:  # type: ignore[override]  # it has overloads
        """Parse all arguments; an unknown one is an error, with the nearest name."""
        found, unknown = super().parse_known_args(*args)
        if unknown:
            near = nearest(unknown[0].partition("=")[0], self._option_string_actions)
            self.error(f"unknown argument {unknown[0]}{near}")
        return found, unknown

    def error(self, message: str) -> Never:
        """Print the message in one line, and exit with status 2."""
        if chosen := re.match(r"argument command: invalid choice: (['\"])(.*)\1 \(", message):
            message = f"unknown command {shown(chosen[2])}{nearest(chosen[2], COMMANDS)}"
        message = re.sub(
            r"argument (?:-\w/)?(\S+): ignored explicit \w+ (['\"])(.*)\2", r"\1 takes no value, found \3", message
        )
        self.exit(2, f"error: {printable(message)}: see {self.prog} --help\n")


@program
def main() -> None:
    """Run one command."""
    leave_at_once()
    args = build_parser().parse_args(sys.argv[1:] or ["--help"])
    module = importlib.import_module(f"tinygpt.cli.{COMMANDS[args.command][1]}")
    heed_interrupts()
    getattr(module, args.command.replace("-", "_"))(args)


def build_parser() -> ArgumentParser:
    """A parser of all commands and their flags."""
    parser = Parser(prog="python -m tinygpt", description="Use what the pipeline has made.")
    commands = parser.add_subparsers(dest="command", required=True, metavar="command")
    for name, (add_own_flags, _, help) in COMMANDS.items():
        command = commands.add_parser(name, help=help, description=f"{help[0].upper()}{help[1:]}.")
        if add_own_flags:
            add_own_flags(command)
    return parser
