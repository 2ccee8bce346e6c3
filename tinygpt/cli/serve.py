"""`python -m tinygpt serve`: OpenAI's API for completions, and a page to play with one model or several."""

from __future__ import annotations

import argparse
import importlib.util
from pathlib import Path

from tinygpt.cli.engine import MODEL, add_device_options, is_gguf
from tinygpt.cli.sampling import flag, named_as_options
from tinygpt.device import find_device
from tinygpt.errors import UserError
from tinygpt.params import from_mapping
from tinygpt.serve.limits import Limits

LIMITS = {
    "max_tokens": "most tokens of an answer",
    "max_rows": "answers that are written at a time",
    "max_waiting": "requests that wait; one more is told to come back later",
    "max_body": "bytes of a request",
}


def add_options(command: argparse.ArgumentParser) -> None:
    """What the command takes."""
    command.add_argument(
        "--model",
        action="append",
        metavar="[NAME=]FOLDER",
        help="of ours or of transformers; may be given again; its tokenizer is in the folder, or in `tokenizer` "
        f"beside it (default: {MODEL})",
    )
    command.add_argument("--tokenizer", type=Path, help="folder, for all models, of ours")
    add_device_options(command)
    command.add_argument(
        "--host", default="127.0.0.1", help="address to listen at (default: %(default)s, this machine alone)"
    )
    command.add_argument("--port", type=int, default=8000, help="(default: %(default)s; 0 = any that is free)")
    command.add_argument(
        "--allow-host", action="append", default=[], metavar="NAME", help="a name the server is called by"
    )
    for name, help in LIMITS.items():
        command.add_argument(
            flag(name), type=int, default=getattr(Limits(), name), help=f"{help} (default: %(default)s)"
        )


def run(args: argparse.Namespace) -> None:
    """Serve until Ctrl-C."""
    for package in ("fastapi", "uvicorn"):
        if importlib.util.find_spec(package) is None:
            raise UserError(f"serve needs {package}: run  pip install -r requirements-serve.txt")
    from tinygpt.cli.torch_engine import TorchEngine, load_folder
    from tinygpt.serve.request import Served
    from tinygpt.serve.server import listen, serve
    from tinygpt.serve.service import Service

    if not 0 <= args.port <= 65535:
        raise UserError(f"--port {args.port} must be within 0 and 65535")
    with named_as_options(LIMITS):
        limits = from_mapping(Limits, vars(Limits()) | {name: getattr(args, name) for name in LIMITS})
    device = find_device(args.device or "auto", "--device")
    listener = listen(args.host, args.port)
    models, compiled_rows = [], limits.max_rows if args.compile else 0
    for name, folder in named(args.model or [str(MODEL)]).items():
        if is_gguf(folder):
            raise UserError(f"--model {folder}: serve reads no .gguf file, name the folder it was made of")
        model, tokenizer = load_folder(folder, args.tokenizer)
        n_weight = model.n_params()  # quantized ones are not counted
        engine = TorchEngine(model, tokenizer, device=device, quantized=args.quantize, compiled_rows=compiled_rows)
        models.append(Served(name, engine.model, tokenizer, n_weight))
    host = f"[{args.host}]" if ":" in args.host else args.host
    print(f"{', '.join(served.name for served in models)} at http://{host}:{listener.getsockname()[1]}", flush=True)
    serve(Service(models, limits), listener, [args.host, *args.allow_host])


def named(given: list[str]) -> dict[str, Path]:
    """Folders by name: what stands before "=", or the path as it is given."""
    found: dict[str, Path] = {}
    for each in given:
        name, equals, folder = each.partition("=")
        if not name or name in found:
            raise UserError(
                f"--model {each}: " + ("its name is taken: give NAME=FOLDER" if name else "its name is empty")
            )
        found[name] = Path(folder if equals else name)
    return found
