"""Turn the messages of a chat into a prompt, with the tokenizer's chat template or a plain one."""

import json
import re
import subprocess
import sys
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from tinygpt.errors import UserError
from tinygpt.files import read_file, read_object
from tinygpt.options import checked, together
from tinygpt.params import ParamsError, from_mapping, require
from tinygpt.serve import sandbox
from tinygpt.serve.sandbox import MARK
from tinygpt.tokenizer import Tokenizer

MOST_SOURCE = 2**20  # characters of a template
REMEDY = "fix it or remove it"
MOST_SECONDS = 5.0  # for a template, which usually takes a thousandth of that; the first one also starts Python
MOST_FIELDS = 20  # of a message: each unknown one costs a search for the nearest name
PLAIN_NAMES = {"user": "User: ", "assistant": "Assistant: "}


@dataclass(frozen=True)
class Message:
    """A message in OpenAI's form, without tools and pictures."""

    role: Literal["system", "developer", "user", "assistant"]
    content: str


def read_messages(value: Any) -> list[dict[str, str]]:
    """Roles and texts of messages.  Raises ParamsError if a message has anything else."""
    objects = [each for each in value if isinstance(each, dict)] if isinstance(value, list) else []
    if not objects or len(objects) < len(value) or max(map(len, objects)) > MOST_FIELDS:
        raise ParamsError(["messages must be a list of one or more objects with role and content, and nothing else"])
    return [read_message(each, f"messages[{i}].") for i, each in enumerate(objects)]


def read_message(given: dict[str, Any], prefix: str) -> dict[str, str]:
    """The role and the text of one message.  Raises ParamsError with all that is wrong with it."""
    content = "" if given.get("content") is None else given["content"]
    parts = content if isinstance(content, list) else [{"type": "text", "text": content}]
    texts: list[Any] = [isinstance(part, dict) and part.get("type") == "text" and part.get("text") for part in parts]
    are_texts = all(isinstance(text, str) for text in texts)
    values = {key: value for key, value in given.items() if key != "name" and value}
    values["content"] = "".join(texts) if are_texts else ""
    _, message = together(
        lambda: require((are_texts, f"{prefix}content must be a text, or a list of parts that are texts")),
        lambda: from_mapping(Message, values, prefix=prefix),
    )
    return vars(message)


@dataclass(frozen=True)
class Template:
    """Turns messages into a prompt, and says what ends an answer besides `<|endoftext|>`."""

    source: str | None  # None = the plain template
    tokens: Mapping[str, str | None] = field(default_factory=dict)  # by the template's names, such as eos_token
    stop: tuple[str, ...] = ()  # texts that end an answer: the plain template has no token for it

    def prompt(self, messages: Sequence[Mapping[str, str]], tokenizer: Tokenizer, most: int) -> tuple[str, list[int]]:
        """The text of messages up to the answer, and its ids.

        Special tokens of the template become single ids; what looks like one in a message stays text. Raises UserError
        if the template fails, takes too long, or writes more than `most` characters or half a surrogate pair.
        """
        names = "|".join(map(re.escape, sorted(tokenizer.special_tokens, key=len, reverse=True)))
        marked = [
            {
                key: re.sub(names, lambda found: MARK.join(found[0]) + MARK, text.replace(MARK, ""))
                for key, text in each.items()
            }
            for each in messages
        ]
        parts = re.split(f"({names})(?!{MARK})", checked(self._render(marked, tokenizer, most)))
        ids = [
            i
            for place, part in enumerate(parts)
            for i in ([tokenizer.special_tokens[part]] if place % 2 else tokenizer.encode(part.replace(MARK, "")))
        ]
        return "".join(parts).replace(MARK, ""), ids

    def stop_ids(self, tokenizer: Tokenizer) -> tuple[int, ...]:
        """The token that ends a message in the template."""
        name = self.tokens.get("eos_token")
        return (tokenizer.special_tokens[name],) if name in tokenizer.special_tokens else ()

    def _render(self, messages: Sequence[Mapping[str, str]], tokenizer: Tokenizer, most: int) -> str:
        begin = tokenizer.tokens[tokenizer.bos_id]
        if self.source is None:
            lines = [PLAIN_NAMES.get(each["role"], "") + each["content"].strip() for each in messages]
            return "\n".join([begin + lines[0], *lines[1:], PLAIN_NAMES["assistant"].strip()])
        tokens = {"bos_token": begin, "eos_token": tokenizer.tokens[tokenizer.eos_id], **self.tokens}
        given = {name: token for name, token in tokens.items() if token is not None}  # as in transformers
        values = {"messages": messages, "tools": None, "documents": None, "add_generation_prompt": True, **given}
        return RENDERER.render(self.source, values, most)


PLAIN = Template(None, stop=("\nUser:",))


def load_template(folder: Path) -> Template:
    """The chat template in a tokenizer's folder, as transformers saves it, or the plain one.

    Raises UserError if it is not a valid template.
    """
    path, own = folder / "tokenizer_config.json", folder / "chat_template.jinja"
    config = read_object(path, remedy=REMEDY) if path.exists() else {}
    source = config.get("chat_template")
    try:
        if own.exists():
            path = own
            source = read_file(path).decode()
        elif isinstance(source, list):  # several by name
            source = {each["name"]: each["template"] for each in source}.get("default")
        names = ("bos_token", "eos_token", "pad_token", "unk_token")
        tokens = {name: config[name] for name in names if name in config}
        named = {name: value["content"] if isinstance(value, dict) else value for name, value in tokens.items()}
    except (KeyError, TypeError, ValueError):
        raise UserError(f"{path} is not a UTF-8 file in the form that transformers writes: {REMEDY}") from None
    if source is None:
        return PLAIN
    if not isinstance(source, str) or len(source) > MOST_SOURCE:
        raise UserError(f"{path}: its chat template is not a text of at most {MOST_SOURCE:,} characters: remove it")
    try:
        RENDERER.render(source, None, 0)
    except UserError as error:
        raise UserError(f"{path}: {error}: {REMEDY}") from None
    return Template(source, {name: value for name, value in named.items() if isinstance(value, str | None)})


class Renderer:
    """`sandbox.py` as a process, started for the first template, and again after one has made it die."""

    def __init__(self) -> None:
        self._process: subprocess.Popen[str] | None = None
        self._lock = threading.Lock()

    def render(self, source: str, values: Mapping[str, Any] | None, most: int) -> str:
        """A template's text, of at most `most` characters; without values it is only parsed.  Raises UserError."""
        line = json.dumps({"source": source, "values": values, "most": most})
        with self._lock:
            answer = json.loads(self._ask(line) or '{"error": "it takes too long, or too much memory"}')
        if "error" in answer:
            raise UserError(f"the chat template fails: {answer['error'][:500]}")
        return str(answer["text"])

    def _ask(self, line: str) -> str:
        """The line that the process answers; an empty one if it died."""
        if self._process is None:
            self._process = subprocess.Popen(
                [sys.executable, "-I", sandbox.__file__],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                text=True,
                start_new_session=True,  # Ctrl-C does not reach it; it ends with its input
            )
        process = self._process
        assert process.stdin and process.stdout
        timer = threading.Timer(MOST_SECONDS, process.kill)
        timer.start()
        try:
            process.stdin.write(line + "\n")
            process.stdin.flush()
            answer = process.stdout.readline()
        except OSError:
            answer = ""
        timer.cancel()
        if not answer:
            self._process = None
            process.kill()
            process.communicate()  # closes its pipes
        return answer


RENDERER = Renderer()
