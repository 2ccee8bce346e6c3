"""A chat, read and checked: OpenAI's messages, and the fields in which a chat differs from a completion."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from tinygpt.params import require
from tinygpt.serve.limits import Limits, Refusal
from tinygpt.serve.request import Completion, Given, Served, begin, check_sizes, read_body, read_object, refused

ROLES = ("system", "developer", "user", "assistant")
N_NEW = 256  # tokens of an answer, where the request does not say


def read_chat(raw: bytes, models: Mapping[str, Served], limits: Limits) -> Completion:
    """Read a request.  Raises Refusal with all that is wrong."""
    document = read_object(raw)
    with refused(document):
        options = options_of(document) | {"max_tokens": max_tokens(document, limits)}
        body, served = read_body(options, models, limits)
        prompt = read_messages(document.get("messages"), served, body.n, limits)
        template = served.template
        stop_ids = (*body.stop_ids, *template.stop_ids(served.tokenizer))
        body = dataclasses.replace(body, stop=(*body.stop, *template.stop()), stop_ids=stop_ids)
        return begin(served, body, [prompt], limits, is_chat=True)


def options_of(document: Mapping[str, Any]) -> dict[str, Any]:
    """The options in the form of a completion: `logprobs` is a number there."""
    has_scores, n_best = document.get("logprobs") or False, document.get("top_logprobs")
    require(
        (isinstance(has_scores, bool), f"logprobs={has_scores!r} must be true or false"),
        (n_best is None or bool(has_scores), "top_logprobs needs logprobs"),
        *((name not in document, f"unknown key {name}") for name in ("prompt", "echo")),
    )
    of_chats = ("messages", "logprobs", "top_logprobs", "max_tokens", "max_completion_tokens", "tool_choice")
    options = {name: value for name, value in document.items() if name not in of_chats}
    return options | {"logprobs": (n_best or 0) if has_scores else None}


def max_tokens(document: Mapping[str, Any], limits: Limits) -> Any:
    """How long an answer may be, by its new name or its old one."""
    given = [document[name] for name in ("max_completion_tokens", "max_tokens") if document.get(name) is not None]
    return given[0] if given else min(N_NEW, limits.max_tokens)


def read_messages(value: Any, served: Served, n: int, limits: Limits) -> Given:
    """The prompt that messages make.  Raises Refusal."""
    if not isinstance(value, list) or not value or not all(isinstance(each, dict) for each in value):
        raise Refusal(400, "messages must be a list of objects with role and content", param="messages")
    messages = [read_message(i, each) for i, each in enumerate(value)]
    check_sizes(["".join(each["content"] for each in messages)], n, limits, param="messages")
    text, ids = served.template.prompt(messages, served.tokenizer, limits.max_prompt)
    check_sizes([text], n, limits, param="messages")
    return Given(ids, text, 0)


def read_message(index: int, value: dict[str, Any]) -> dict[str, str]:
    """A message whose content is a text or a list of them.  Raises Refusal where it has more."""
    name, content = f"messages[{index}]", value.get("content")
    if value.get("role") not in ROLES:
        message = f"{name}.role={value.get('role')!r} is not one of {', '.join(ROLES)}"
        raise Refusal(400, message, param="messages")
    parts = content if isinstance(content, list) else [{"type": "text", "text": content or ""}]
    told = [part.get("text") for part in parts if isinstance(part, dict) and part.get("type") == "text"]
    texts = [text for text in told if isinstance(text, str)]
    if len(texts) < len(parts):
        raise Refusal(400, f"{name}.content must be a text, or a list of parts that are texts", param="messages")
    more = [key for key, each in value.items() if key not in ("role", "content", "name") and each]
    if more:
        raise Refusal(400, f"{name}.{more[0][:100]} is not taken: a message is text", param="messages")
    return {"role": value["role"], "content": "".join(texts)}
