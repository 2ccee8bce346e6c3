"""What a client asks for, read and checked: OpenAI's names, and those of Sampling."""

from __future__ import annotations

import dataclasses
import json
import re
import secrets
import sys
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Annotated, Any

from tinygpt.errors import UserError
from tinygpt.generate import Answer, Sampling
from tinygpt.generate.stream import prompt_ids
from tinygpt.model.gpt import GPT
from tinygpt.options import seed_after
from tinygpt.params import ParamsError, Within, from_mapping, require
from tinygpt.serve.limits import Limits, Refusal
from tinygpt.serve.template import PLAIN, Template
from tinygpt.tokenizer import Tokenizer

MOST_KEYS = 100  # of a request: for each that is unknown the nearest name is searched
MOST_ITEMS = 1024  # ids of a list in the options
MOST_STOPS, STOP_SIZE = 16, 256  # texts, and characters of one: each is searched for at each token
Penalty = Annotated[float, Within("[-2, 2]")]
# Of OpenAI's API and of no use here, whatever they are; and those that are taken with the value that changes nothing.
UNUSED = {"user", "metadata", "store", "service_tier", "safety_identifier", "prompt_cache_key", "parallel_tool_calls"}
NEUTRAL: dict[str, Any] = {
    "best_of": 1,
    "suffix": "",
    "response_format": {"type": "text"},
    "tools": [],
}


@dataclass(frozen=True)
class Served:
    """A model that clients may name."""

    name: str
    model: GPT
    tokenizer: Tokenizer
    n_weight: int  # before any quantization
    template: Template = PLAIN  # of chats


@dataclass(frozen=True, kw_only=True)
class StreamOptions:
    """What a stream sends besides its text."""

    include_usage: bool = False


@dataclass(frozen=True, kw_only=True)
class Body(Sampling):
    """The fields of a request but `prompt`.  Penalties have OpenAI's bounds: within them all logits stay finite."""

    model: str | None = None  # None = the first one
    max_tokens: Annotated[int, Within("[0, inf)")] = 16
    n: Annotated[int, Within("[1, 1024]")] = 1
    stream: bool = False
    stream_options: StreamOptions | None = None
    logprobs: Annotated[int, Within("[0, 20]")] | None = None  # alternatives at each token
    echo: bool = False  # the text begins with the prompt
    return_token_ids: bool = False  # of what was read and written
    top_p: Annotated[float, Within("[0, 1]")] = 1.0
    seed: Annotated[int, Within("[-9223372036854775808, 9223372036854775807]")] = 0
    frequency_penalty: Penalty = 0.0
    presence_penalty: Penalty = 0.0
    repetition_penalty: Annotated[float, Within("[0.01, 100]")] = 1.0
    no_repeat_ngram_size: Annotated[int, Within("[0, 16]")] = 0  # all of a text are compared at each token

    def __post_init__(self) -> None:
        """Raises ParamsError with all that is wrong."""
        super().__post_init__()
        lists = {"stop_ids": self.stop_ids, "banned_ids": self.banned_ids, "logit_bias": self.logit_bias}
        require(
            *((len(ids) <= MOST_ITEMS, f"{name} has more than {MOST_ITEMS} items") for name, ids in lists.items()),
            (len(self.stop) <= MOST_STOPS, f"stop has more than {MOST_STOPS} texts"),
            (all(len(text) <= STOP_SIZE for text in self.stop), f"stop has a text of more than {STOP_SIZE} characters"),
            (all(abs(bias) <= 100 for _, bias in self.logit_bias), "logit_bias must be within [-100, 100]"),
            (self.max_tokens > 0 or self.echo, "max_tokens=0 needs echo: there would be nothing to answer"),
            (self.max_tokens > 0 or not self.stream, "max_tokens=0 has nothing to stream"),
            (self.stream or not self.stream_options, "stream_options needs stream"),
        )

    def sampling(self) -> Sampling:
        """The options that are of generation; seeds have 32 bits there, and top_p is not 0."""
        values = {each.name: getattr(self, each.name) for each in dataclasses.fields(Sampling)}
        return Sampling(**values | {"seed": self.seed % 2**32, "top_p": self.top_p or sys.float_info.min})


@dataclass(frozen=True)
class Given:
    """A prompt: what is continued."""

    ids: list[int]
    text: str
    n_added: int  # ids before the text: the one that begins a document, or none


@dataclass(frozen=True)
class Completion:
    """A request that can be done."""

    served: Served
    body: Body
    prompts: list[Given]
    answers: list[Answer] = field(repr=False)  # n of each prompt, one prompt after the other
    is_chat: bool


def read_completion(raw: bytes, models: Mapping[str, Served], limits: Limits) -> Completion:
    """Read a request.  Raises Refusal with all that is wrong."""
    document = read_object(raw)
    with refused(document):
        body, served = read_body({name: value for name, value in document.items() if name != "prompt"}, models, limits)
        return begin(served, body, read_given(document.get("prompt"), served, body.n, limits), limits)


@contextmanager
def refused(document: Mapping[str, Any]) -> Iterator[None]:
    """What is wrong with a request as a Refusal."""
    try:
        yield
    except ParamsError as error:
        problems = [problem.replace("max_new_tokens", "max_tokens") for problem in error.problems]
        named = re.match(r"(?:unknown key )?(\w+)", problems[0])
        param = named[1] if named and named[1] in document else None
        raise Refusal(400, "; ".join(problems), param=param) from None
    except UserError as error:
        raise Refusal(400, str(error), param="prompt" if "prompt" in document else "messages") from None
    except RecursionError:
        raise Refusal(400, "the request is nested too deeply") from None


def read_body(options: Mapping[str, Any], models: Mapping[str, Served], limits: Limits) -> tuple[Body, Served]:
    """The options of a request, and its model.  Raises ParamsError, or Refusal where there is no such model."""
    given = {
        name: value
        for name, value in options.items()
        if value is not None and name not in UNUSED and not (name in NEUTRAL and value == NEUTRAL[name])
    }
    body = from_mapping(Body, defaults() | {"seed": secrets.randbits(32)} | plain(given))
    served = find_model(body.model, models)
    message = f"max_tokens={body.max_tokens} must be at most {limits.max_tokens}, the limit of this server"
    require((body.max_tokens <= limits.max_tokens, message))
    return body, served


def begin(served: Served, body: Body, prompts: list[Given], limits: Limits, *, is_chat: bool = False) -> Completion:
    """A request whose answers can be written.  Raises ParamsError where an option does not fit."""
    n = len(prompts) * body.n
    require((n <= limits.max_rows, f"prompt and n ask for {n} answers, a request may have {limits.max_rows}"))
    answers = [begin_one(served, prompt, body, i) for prompt in prompts for i in range(body.n)]
    return Completion(served, body, prompts, answers, is_chat)


def read_object(raw: bytes) -> dict[str, Any]:
    """A JSON object.  Raises Refusal."""
    try:
        document = json.loads(raw.decode(), parse_constant=no_constant, object_pairs_hook=once)
    except UnicodeDecodeError as error:
        raise Refusal(400, f"the request is not UTF-8 from byte {error.start} on") from None
    except (ValueError, RecursionError) as error:
        raise Refusal(400, f"the request is not JSON: {error}") from None
    if not isinstance(document, dict):
        raise Refusal(400, 'the request must be a JSON object of options, such as {"prompt": "The"}')
    if len(document) > MOST_KEYS:
        raise Refusal(400, f"the request has {len(document):,} keys, it may have {MOST_KEYS}")
    return document


def no_constant(name: str) -> None:
    """Refuse NaN and Infinity, which Python's JSON has."""
    raise ValueError(f"{name} is not a number")


def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """An object whose keys differ."""
    found = dict(pairs)
    if len(found) < len(pairs):
        ((name, _),) = Counter(name for name, _ in pairs).most_common(1)
        raise ValueError(f"key {name[:100]!r} is there twice")
    return found


def defaults() -> dict[str, Any]:
    """Those of Body."""
    return {each.name: each.default for each in dataclasses.fields(Body)}


def plain(given: dict[str, Any]) -> dict[str, Any]:
    """OpenAI's shorter forms in ours: one stop text for a list of one, an object of biases for a list of pairs."""
    values = dict(given)
    if isinstance(values.get("stop"), str):
        values["stop"] = [values["stop"]]
    if isinstance(options := values.get("stream_options"), dict):
        values["stream_options"] = {"include_usage": False} | options
    if isinstance(biases := values.get("logit_bias"), dict):
        values["logit_bias"] = [(int(i) if re.fullmatch(r"\d{1,9}", i) else i, bias) for i, bias in biases.items()]
    return values


def find_model(name: str | None, models: Mapping[str, Served]) -> Served:
    """The model of a name, the first one without.  Raises Refusal when there is none."""
    if name is None:
        return next(iter(models.values()))
    if name not in models:
        message = f"model {name!r} is not served here, these are: {', '.join(models)}"
        raise Refusal(404, message, param="model", code="model_not_found")
    return models[name]


def read_given(value: Any, served: Served, n: int, limits: Limits) -> list[Given]:
    """One prompt or several, as texts or ids; nothing begins a new document.  Raises Refusal or UserError."""
    each = value if isinstance(value, list) and not are_ids(value) else [value]
    if not each or not all(one is None or isinstance(one, str) or are_ids(one) for one in each):
        raise Refusal(400, "prompt must be a text, a list of texts, or of ids, or of lists of ids", param="prompt")
    if len(each) > limits.max_rows:
        raise Refusal(400, f"prompt has {len(each)} texts, a request may have {limits.max_rows}", param="prompt")
    prompts = ["" if one is None else one for one in each]
    check_sizes(prompts, n, limits)
    return [read_one(one, served) for one in prompts]


def are_ids(value: Any) -> bool:
    """Whether this is a list of whole numbers, and not empty."""
    return isinstance(value, list) and bool(value) and all(type(one) is int for one in value)


def check_sizes(prompts: Sequence[str | list[int]], n: int, limits: Limits, *, param: str = "prompt") -> None:
    """Raise Refusal where a prompt, or all together, each with n answers, are too much.  No text has been encoded."""
    sizes = [len(one.encode(errors="replace")) if isinstance(one, str) else len(one) for one in prompts]
    unit = "bytes" if isinstance(prompts[0], str) else "ids"
    for size, most, of in (
        (max(sizes), limits.max_prompt, ""),
        (sum(sizes) * n, limits.max_prompts, f" with all answers ({n} each)"),
    ):
        if size > most:
            message = f"{param} has {size:,} {unit}{of}, it may have {most:,}"
            raise Refusal(400, message, param=param, code="context_length_exceeded")


def read_one(value: str | list[int], served: Served) -> Given:
    """One prompt.  A text begins a document, ids are taken as they are."""
    if isinstance(value, str):
        return Given(prompt_ids(served.tokenizer, value), value, 1)
    check_ids("prompt", value, served)
    return Given(value, served.tokenizer.decode(value), 0)


def check_ids(name: str, ids: list[int], served: Served) -> None:
    """Raise Refusal where the model has no such id."""
    n = served.tokenizer.vocab_size
    if wrong := [i for i in ids if not 0 <= i < n]:
        raise Refusal(400, f"{name} has the id {str(wrong[0])[:20]}, the model's are 0 to {n - 1}", param=name)


def begin_one(served: Served, prompt: Given, body: Body, index: int) -> Answer:
    """The answer number `index` to a prompt, which has a seed of its own."""
    sampling = body.sampling()
    sampling = dataclasses.replace(sampling, seed=seed_after(sampling.seed, index))
    return Answer(
        prompt.ids,
        served.tokenizer,
        sampling,
        max_new_tokens=max(1, body.max_tokens),  # where it is 0, nothing is run
        block_size=served.model.config.block_size,
        n_logprobs=body.logprobs,
    )
