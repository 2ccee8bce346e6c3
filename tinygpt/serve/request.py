"""Read and check what a client asks for, or refuse it: completions and chats with OpenAI's options, and Sampling's."""

import dataclasses
import re
import secrets
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Annotated, Any

from tinygpt.errors import UserError, shown
from tinygpt.files import each_once, parse_json
from tinygpt.generate import Answer, Sampling
from tinygpt.generate.answer import prompt_ids
from tinygpt.model.gpt import GPT
from tinygpt.options import Limits, seed_after, together
from tinygpt.params import ParamsError, Within, coerce, from_mapping, require
from tinygpt.serve.template import PLAIN, Template, read_messages
from tinygpt.tokenizer import Tokenizer

MOST_KEYS = 100  # of a request: each unknown one costs a search for the nearest name
MOST_ITEMS = 1024  # ids of a list in the options
MOST_STOPS, STOP_SIZE = 16, 256  # texts, and characters of one: every token costs a search for each
Penalty = Annotated[float, Within("[-2, 2]")]
Alternatives = Annotated[int, Within("[0, 20]")]
# Options of OpenAI's API that are ignored here; and those that are accepted only with the value that changes nothing.
UNUSED = {"user", "metadata", "store", "service_tier", "safety_identifier", "prompt_cache_key", "parallel_tool_calls"}
NEUTRAL: dict[str, Any] = {"best_of": 1, "suffix": "", "response_format": {"type": "text"}, "tools": []}
CHAT_KEYS = ("messages", "logprobs", "top_logprobs", "max_tokens", "max_completion_tokens", "tool_choice")
N_NEW = 256  # tokens of an answer in a chat, unless the request has a limit of its own


class Refusal(Exception):
    """A request is refused, with the HTTP status and the error object of OpenAI's API."""

    def __init__(self, status: int, message: str, *, param: str | None = None, code: str | None = None) -> None:
        self.status, self.message, self.param, self.code = status, message[:1000], param, code
        super().__init__(self.message)

    def body(self) -> dict[str, Any]:
        """The error as JSON."""
        kinds = {429: "rate_limit_error", 500: "server_error", 503: "server_error"}
        kind = kinds.get(self.status, "invalid_request_error")
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}


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
    """The fields of a request except `prompt`.  Penalties have OpenAI's bounds, within which all logits stay finite."""

    model: str | None = None  # None = the first one
    max_tokens: Annotated[int, Within("[0, inf)")] = 16
    n: Annotated[int, Within("[1, 1024]")] = 1
    stream: bool = False
    stream_options: StreamOptions | None = None
    logprobs: Alternatives | None = None  # how many alternatives for each token
    echo: bool = False  # the text begins with the prompt
    return_token_ids: bool = False  # those of the prompt and of the answer
    top_p: Annotated[float, Within("[0, 1]")] = 1.0
    seed: Annotated[int, Within("[-9223372036854775808, 9223372036854775807]")] = 0
    frequency_penalty: Penalty = 0.0
    presence_penalty: Penalty = 0.0
    repetition_penalty: Annotated[float, Within("[0.01, 100]")] = 1.0
    no_repeat_ngram_size: Annotated[int, Within("[0, 16]")] = 0  # each token costs a comparison with all n-grams

    def __post_init__(self) -> None:
        """Raises ParamsError with everything that is wrong."""
        super().__post_init__()
        require(
            (all(len(text) <= STOP_SIZE for text in self.stop), f"stop has a text of more than {STOP_SIZE} characters"),
            (all(abs(bias) <= 100 for _, bias in self.logit_bias), "logit_bias must be from -100 to 100"),
            (self.max_tokens > 0 or self.echo, "max_tokens=0 needs echo: without it, the answer would be empty"),
            (self.max_tokens > 0 or not self.stream, "max_tokens=0 has nothing to stream"),
            (self.stream or not self.stream_options, "stream_options needs stream"),
        )

    def sampling(self) -> Sampling:
        """The options of generation, where seeds have 32 bits and top_p is above 0."""
        values = {each.name: getattr(self, each.name) for each in dataclasses.fields(Sampling)}
        return Sampling(**values | {"seed": self.seed % 2**32, "top_p": self.top_p or sys.float_info.min})


@dataclass(frozen=True)
class Given:
    """A prompt."""

    ids: list[int]
    text: str
    n_added: int  # ids before the text: 1, which begins a document, or 0


@dataclass(frozen=True)
class Completion:
    """A request that has been read and can be answered."""

    served: Served
    body: Body
    prompts: list[Given]
    answers: list[Answer] = field(repr=False)  # n for each prompt, in the order of the prompts
    is_chat: bool


def read_request(raw: bytes, models: Mapping[str, Served], limits: Limits, *, is_chat: bool) -> Completion:
    """Read the body of a request.  Raises Refusal with everything that is wrong."""
    document = read_object(raw)
    try:
        return (read_chat if is_chat else read_completion)(document, models, limits)
    except ParamsError as error:
        is_new = is_chat and document.get("max_completion_tokens") is not None  # OpenAI's later name
        length = "max_completion_tokens" if is_new else "max_tokens"
        problems = [re.sub(r"(?<!unknown key )\bmax_(new_)?tokens\b", length, problem) for problem in error.problems]
        named = re.match(r"(?:unknown key )?(\w+)", problems[0])
        param = named[1] if named and named[1] in document else None
        raise Refusal(400, "; ".join(problems), param=param) from None
    except UserError as error:
        raise Refusal(400, str(error), param="messages" if is_chat else "prompt") from None
    except RecursionError:
        raise Refusal(400, "the request is nested too deeply") from None


def read_object(raw: bytes) -> dict[str, Any]:
    """A JSON object.  Raises Refusal."""
    try:
        document = parse_json(raw, object_pairs_hook=each_once, parse_constant=float, parse_float=float)
    except ValueError as error:
        raise Refusal(400, f"the request is not JSON in UTF-8: {error}") from None
    if not isinstance(document, dict):
        raise Refusal(400, 'the request must be a JSON object of options, such as {"prompt": "The"}')
    if len(document) > MOST_KEYS:
        raise Refusal(400, f"the request has {len(document):,} keys, at most {MOST_KEYS} are allowed")
    return document


def read_body(
    options: Mapping[str, Any], models: Mapping[str, Served], limits: Limits, *, others: Sequence[str]
) -> tuple[Body, Served]:
    """The options of a request, and its model; `others` are names of fields that the caller reads.

    Raises ParamsError, or Refusal if there is no such model.
    """
    values: dict[str, Any] = {each.name: each.default for each in dataclasses.fields(Body)}
    values |= {"seed": secrets.randbits(32), "max_tokens": min(values["max_tokens"], limits.max_tokens)}
    given = {name: value for name, value in options.items() if value is not None and name not in UNUSED}
    neutral = {name: given.pop(name) for name in NEUTRAL if name in given}
    is_known = given.pop("max_new_tokens", None) is None  # the nearest name would be min_new_tokens
    values |= {name: plain(name, value) for name, value in given.items()}
    rules = [(value == NEUTRAL[name], f"{name} can only be {shown(NEUTRAL[name])}") for name, value in neutral.items()]
    rules.append((is_known, "unknown key max_new_tokens (did you mean max_tokens?)"))
    _, body = together(lambda: require(*rules), lambda: from_mapping(Body, values, others=others))
    served = find_model(body.model, models)
    message = f"max_tokens={body.max_tokens} must be at most {limits.max_tokens}, the limit of this server"
    lists = [("stop", MOST_STOPS), *((name, MOST_ITEMS) for name in ("stop_ids", "banned_ids", "logit_bias"))]
    rules = [(len(getattr(body, name)) <= most, f"{name} has more than {most} items") for name, most in lists]
    require((body.max_tokens <= limits.max_tokens, message), *rules)  # here, as a template may add to a list
    return body, served


def plain(name: str, value: Any) -> Any:
    """Turn OpenAI's shorter forms into ours: one stop text into a list of one, an object of biases into pairs."""
    if name == "stop" and isinstance(value, str):
        return [value]
    if name == "stream_options" and isinstance(value, dict):
        return {"include_usage": False} | value
    if name == "logit_bias" and isinstance(value, dict):
        return [(int(i) if re.fullmatch(r"\d{1,9}", i) else i, bias) for i, bias in value.items()]
    return value


def find_model(name: str | None, models: Mapping[str, Served]) -> Served:
    """The model with this name; without a name, the first one.  Raises Refusal if there is none."""
    name = next(iter(models)) if name is None else name
    if name not in models:
        message = f"model {shown(name)} is not served here: choose one of {', '.join(models)}"
        raise Refusal(404, message, param="model", code="model_not_found")
    return models[name]


def check_sizes(prompts: Sequence[str | list[int]], n: int, limits: Limits, *, param: str) -> None:
    """Raise Refusal if a prompt is too long, or all of them with n answers each are.  This comes before encoding."""
    n_all = len(prompts) * n
    if n_all > limits.max_rows:
        message = f"{param} and n ask for {n_all} answers, at most {limits.max_rows} are allowed per request"
        raise Refusal(400, message, param=param)
    sizes = [len(one.encode(errors="replace")) if isinstance(one, str) else len(one) for one in prompts]
    for size, most, of in (
        (max(sizes), limits.max_prompt, ""),
        (sum(sizes) * n, limits.max_prompts, f" with all answers ({n} each)"),
    ):
        if size > most:
            unit = "bytes" if isinstance(prompts[0], str) else "ids"
            message = f"{param} has {size:,} {unit}{of}, at most {most:,} are allowed"
            raise Refusal(400, message, param=param, code="context_length_exceeded")


def check_ids(name: str, ids: list[int], served: Served) -> None:
    """Raise Refusal if the model lacks one of these ids."""
    n = served.tokenizer.vocab_size
    if wrong := [i for i in ids if not 0 <= i < n]:
        raise Refusal(400, f"{name} has the id {str(wrong[0])[:20]}, but the model's ids are 0 to {n - 1}", param=name)


def begin(served: Served, body: Body, prompts: list[Given], *, is_chat: bool) -> Completion:
    """The request with its answers, each with a seed of its own.  Raises ParamsError if one does not fit the model."""
    sampling = body.sampling()
    answers = [
        Answer(
            prompt.ids,
            served.tokenizer,
            dataclasses.replace(sampling, seed=seed_after(sampling.seed, index)),
            max_new_tokens=max(1, body.max_tokens),  # with 0, the model is not run
            block_size=served.model.config.block_size,
            n_logprobs=body.logprobs,
        )
        for prompt in prompts
        for index in range(body.n)
    ]
    return Completion(served, body, prompts, answers, is_chat)


def read_completion(document: Mapping[str, Any], models: Mapping[str, Served], limits: Limits) -> Completion:
    """One prompt or several, as texts or ids; without one, a new document begins.  Raises Refusal or UserError."""
    options = {name: value for name, value in document.items() if name != "prompt"}
    prompts, (body, served) = together(
        lambda: each_prompt(document.get("prompt")), lambda: read_body(options, models, limits, others=["prompt"])
    )
    check_sizes(prompts, body.n, limits, param="prompt")
    return begin(served, body, [read_prompt(one, served) for one in prompts], is_chat=False)


def each_prompt(given: Any) -> list[str | list[int]]:
    """The prompts of a request, where null is an empty text.  Raises ParamsError."""
    each = given if isinstance(given, list) and not are_ids(given) else [given]
    are_prompts = bool(each) and all(one is None or isinstance(one, str) or are_ids(one) for one in each)
    require((are_prompts, "prompt must be a text, a list of ids, or a list of one or more of these"))
    return ["" if one is None else one for one in each]


def are_ids(value: Any) -> bool:
    """Whether this is a list of whole numbers that is not empty."""
    return isinstance(value, list) and bool(value) and all(type(one) is int for one in value)


def read_prompt(value: str | list[int], served: Served) -> Given:
    """One prompt.  A text begins a new document; ids are used unchanged."""
    if isinstance(value, str):
        return Given(prompt_ids(served.tokenizer, value), value, 1)
    check_ids("prompt", value, served)
    return Given(value, served.tokenizer.decode(value), 0)


def read_chat(document: Mapping[str, Any], models: Mapping[str, Served], limits: Limits) -> Completion:
    """A chat's options as those of a completion, and its messages as a prompt.  Raises Refusal or UserError."""
    messages, (body, served) = together(
        lambda: read_messages(document.get("messages")),
        lambda: read_body(chat_options(document, limits), models, limits, others=CHAT_KEYS),
    )
    template = served.template
    check_sizes(["".join(each["content"] for each in messages)], body.n, limits, param="messages")
    text, ids = template.prompt(messages, served.tokenizer, limits.max_prompt)
    check_sizes([text], body.n, limits, param="messages")
    require((bool(ids), "messages give an empty prompt with the model's chat template"))
    stop_ids = (*body.stop_ids, *template.stop_ids(served.tokenizer))
    body = dataclasses.replace(body, stop=(*body.stop, *template.stop), stop_ids=stop_ids)
    return begin(served, body, [Given(ids, text, 0)], is_chat=True)


def chat_options(document: Mapping[str, Any], limits: Limits) -> dict[str, Any]:
    """The options of a chat by a completion's names.  Raises ParamsError."""
    has_scores, n_best = document.get("logprobs"), document.get("top_logprobs")
    lengths = [document[name] for name in ("max_completion_tokens", "max_tokens") if document.get(name) is not None]
    require(
        (isinstance(has_scores, bool | None), f"logprobs={shown(has_scores)} must be true or false"),
        (n_best is None or bool(has_scores), "top_logprobs needs logprobs"),
        *((name not in document, f"unknown key {name}") for name in ("prompt", "echo")),
        (0 not in lengths[:1], "max_tokens must be 1 or more"),
    )
    options = {name: value for name, value in document.items() if name not in CHAT_KEYS}
    options["max_tokens"] = lengths[0] if lengths else min(N_NEW, limits.max_tokens)
    options["logprobs"] = (coerce(n_best, Alternatives | None, "top_logprobs") or 0) if has_scores else None
    return options
