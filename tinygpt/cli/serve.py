"""`python -m tinygpt serve`."""

from argparse import Namespace
from pathlib import Path

from tinygpt import paths
from tinygpt.cli.engine import compile_if_asked, is_gguf, place
from tinygpt.cli.flags import DeviceOptions, read
from tinygpt.errors import UserError
from tinygpt.export.folders import open_model, tokenizer_of
from tinygpt.options import Limits
from tinygpt.runtime import find_device


def serve(args: Namespace) -> None:
    """Serve models by OpenAI's API until Ctrl-C."""
    try:
        from tinygpt.serve.request import Served
        from tinygpt.serve.server import listen, serve
        from tinygpt.serve.service import Service
        from tinygpt.serve.template import load_template
    except ModuleNotFoundError as error:
        raise UserError(f"serve needs {error.name}: pip install -r requirements-serve.txt") from None
    limits, options = read(Limits, args), read(DeviceOptions, args)
    find_device(options.device, "--device")
    listener = listen(args.host, args.port)
    models = []
    for name, folder in named(args.model or [str(paths.MODEL)]).items():
        if is_gguf(folder):
            raise UserError(f"--model {folder}: serve does not read .gguf files: give the folder that it was made from")
        model, tokenizer = open_model(folder, args.tokenizer)
        n_weight = model.n_params()  # before quantizing, after which they would not be counted
        place(model, options)
        compile_if_asked(model, options, n_row=limits.max_rows)
        beside = args.tokenizer or tokenizer_of(folder)
        template = load_template(beside.parent if beside.is_file() else beside)
        models.append(Served(name, model, tokenizer, n_weight, template))
    host = f"[{args.host}]" if ":" in args.host else args.host
    print(f"{', '.join(served.name for served in models)} at http://{host}:{listener.getsockname()[1]}", flush=True)
    serve(Service(models, limits), listener, [args.host, *args.allow_host])


def named(given: list[str]) -> dict[str, Path]:
    """Folders by name: the part before "=", or the path itself."""
    found: dict[str, Path] = {}
    for each in given:
        name, equals, folder = each.partition("=")
        if not name or name in found:
            raise UserError(f"--model {each}: its name is {'taken' if name else 'empty'}: give NAME=FOLDER")
        found[name] = Path(folder if equals else name)
    return found
