"""The routes: OpenAI's completions and models, and the page with what it asks besides."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fastapi import FastAPI
from fastapi.responses import Response
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.types import ASGIApp

from tinygpt.serve.choices import token_text
from tinygpt.serve.guard import Guard, refusal_response
from tinygpt.serve.limits import Refusal
from tinygpt.serve.request import Served, check_ids, find_model, read_object
from tinygpt.serve.scores import look, seen_before
from tinygpt.serve.service import Service, complete, json_response, unless_gone

PAGE = Path(__file__).with_name("page")
FILES = {
    "": ("index.html", "text/html"),
    "page.css": ("page.css", "text/css"),
    "page.js": ("page.js", "text/javascript"),
    "icon.svg": ("icon.svg", "image/svg+xml"),
}
N_ALTERNATIVES = 20


def build_app(service: Service, hosts: Sequence[str]) -> ASGIApp:
    """The whole server; `hosts` are names that it may be called by, besides localhost and addresses."""
    app = FastAPI(docs_url=None, redoc_url=None, openapi_url=None)  # their pages load scripts from elsewhere

    @app.exception_handler(Refusal)
    async def refused(request: Request, error: Refusal) -> Response:
        return refusal_response(error)

    @app.exception_handler(HTTPException)
    async def no_route(request: Request, error: HTTPException) -> Response:
        return refusal_response(Refusal(error.status_code, f"{request.method} {request.url.path}: {error.detail}"))

    @app.exception_handler(ClientDisconnect)
    async def gone(request: Request, error: ClientDisconnect) -> Response:
        return Response(status_code=499)  # nobody reads it

    @app.exception_handler(Exception)
    async def failed(request: Request, error: Exception) -> Response:
        return refusal_response(Refusal(500, "the server made a mistake, which its log tells"))

    @app.post("/v1/completions")
    async def completions(request: Request) -> Response:
        raw = await service.body(request)
        return await unless_gone(request, complete(service, raw))

    @app.get("/v1/models")
    async def models() -> Response:
        return json_response(
            {"object": "list", "data": [describe(served, service) for served in service.models.values()]}
        )

    @app.get("/v1/models/{name:path}")
    async def model(name: str) -> Response:
        return json_response(describe(find_model(name, service.models), service))

    @app.get("/health")
    async def health() -> Response:
        return json_response({"status": "ok"} | service.worker.counts())

    @app.post("/look")
    async def looked(request: Request) -> Response:
        raw = await service.body(request)
        return await unless_gone(request, looked_at(service, raw))

    @app.get("/")
    @app.get("/{name}")
    async def page(name: str = "") -> Response:
        if name not in FILES:
            raise HTTPException(404, "Not Found")
        file, kind = FILES[name]
        return Response((PAGE / file).read_bytes(), media_type=kind, headers={"cache-control": "no-cache"})

    return Guard(app, service.limits, hosts)


async def looked_at(service: Service, raw: bytes) -> Response:
    """`look_at` as a response."""
    return json_response(await service.aside(look_at, raw, service))


def look_at(raw: bytes, service: Service) -> dict[str, Any]:
    """For the page: what might have followed `prompt` and `text`, both ids, with the id that was `taken`; and what the
    model looked at then.
    """
    document = read_object(raw)
    name = document.get("model")
    served = find_model(name if isinstance(name, str) else None, service.models)
    prompt, text, taken = document.get("prompt"), document.get("text", []), document.get("taken")
    for key, ids in {"prompt": prompt, "text": text, "taken": [] if taken is None else [taken]}.items():
        if not isinstance(ids, list) or not all(type(i) is int for i in ids) or (key == "prompt" and not ids):
            raise Refusal(400, f"{key} must be {'an id' if key == 'taken' else 'a list of ids'}", param=key)
        check_ids(key, ids, served)
    assert isinstance(prompt, list)
    seen = seen_before(prompt, text, served.model.config.block_size)
    best, weights = look(served.model, seen, N_ALTERNATIVES, taken)
    return {
        "alternatives": [{"id": i, "token": token_text(served.tokenizer, i), "p": p} for i, p in best],
        "tokens": [token_text(served.tokenizer, i) for i in seen],
        "attention": weights.astype(float).round(4).tolist(),
    }


def describe(served: Served, service: Service) -> dict[str, Any]:
    """A model as OpenAI's list has it, and what a page needs to know of it."""
    config = served.model.config
    sizes = {name: getattr(config, name) for name in ("n_layer", "n_head", "block_size")}
    head = {"id": served.name, "object": "model", "created": service.created, "owned_by": "tinygpt"}
    return head | {"n_weight": served.n_weight} | sizes
