"""`python -m tinygpt chat`, with lines from a file and in a terminal."""

import os
import pty
import select
import signal
import stat
import sys
import time
from collections.abc import Callable
from contextlib import ExitStack, closing
from functools import partial
from pathlib import Path

import pytest
from conftest import save_cycle, tiny_model
from hypothesis import given, settings
from hypothesis import strategies as st
from project import ROOT

from tinygpt.cli.chat import COMMANDS, Conversation, follow, history_file
from tinygpt.cli.engine import torch_engine
from tinygpt.cli.flags import parse_settings
from tinygpt.generate import Sampling, Search, generate
from tinygpt.model.gpt import GPT
from tinygpt.model.weights import model_tensors, save_model
from tinygpt.tokenizer import Tokenizer

DRAWN = {"temperature": 0.8, "top_p": 0.95}


@pytest.fixture(scope="module")
def model() -> GPT:
    return tiny_model()


@pytest.fixture
def chat(command, model, tiny_tokenizer, tmp_path):
    """Run a chat with the lines of a user."""
    save_model(tmp_path / "model", model.config, model_tensors(model))
    tiny_tokenizer.save(tmp_path / "model")

    def run(*lines: str, args=()):
        text = "".join(f"{line}\n" for line in lines).encode("utf-8", "surrogateescape")
        return command("chat", "--model", tmp_path / "model", "--max-new-tokens", 5, *args, stdin=text)

    return run


@pytest.fixture
def answer(model, tiny_tokenizer):
    """What the model writes after a text."""

    def run(past: str, n: int = 5, **options) -> str:
        return generate(model, tiny_tokenizer, past, max_new_tokens=n, sampling=Sampling(**DRAWN | options))

    return run


def test_each_line_is_answered_from_all_so_far_and_reset_forgets_them(chat, answer):
    done = chat("the file", "", "again", "/reset", "again")
    first = answer("the file\n")
    second = answer(f"the file\n{first}\nagain\n")
    assert done.stdout == f"{first}\n{second}\n{answer('again' + chr(10))}\n"
    assert done.returncode == 0


def test_options_are_set_and_shown_and_the_last_line_is_answered_again(chat, answer):
    setting = "/set temperature=.5 top-p=1 stop=q max_new_tokens=7 seed=3 early_stopping=false banned_ids=[5, 6]"
    done = chat(setting, "the", "/retry", "/retry", "/show")
    options = {"temperature": 0.5, "top_p": 1.0, "stop": ("q",), "banned_ids": (5, 6)}
    texts = [answer("the\n", 7, **options, seed=3 + i) for i in range(3)]
    assert len(set(texts)) == 3
    shown, told = done.stdout.split("max_new_tokens=7\n")
    assert shown == "".join(f"{text}\n" for text in texts)
    for line in ("temperature=0.5", 'stop=["q"]', "banned_ids=[5, 6]", 'early_stopping="false"', "seed=3"):
        assert line in told.splitlines()
    assert "answers: 1, " in told
    assert "the model reads at most 64" in told
    assert done.stderr.count("\n") == 1  # the greeting


def test_all_that_is_wrong_with_settings_is_reported_and_they_stay(chat, answer):
    done = chat("/set temperature=-1 topp=3 x top_k=1.5 stop_ids=[1,", "/set banned_ids=[999]", "/set", "the")
    for message in (
        "temperature=-1 must be 0 or more",
        "unknown option topp (did you mean top_p?)",
        "x is not of the form NAME=VALUE",
        "top_k=1.5 must be a whole number",
        'stop_ids[0]="[1," must be a whole number',
        "banned_ids has 999, but the model's ids are 0 to 299",
        "give options and values, such as /set temperature=0.5",
    ):
        assert message in done.stderr
    assert done.stdout == answer("the\n") + "\n"
    told = chat("/set n_beam=2 temperature=1", "/set min_new_tokens=9 best_of=2 temperature=0").stderr
    assert "n_beam=2 does not sample: it needs temperature=0" in told
    assert "min_new_tokens=9 is more than max_new_tokens=5" in told
    assert "best_of=2 needs temperature above 0" in told


def test_retry_draws_another_best_of_several(chat, model, tiny_tokenizer):
    done = chat("/set best_of=3 max_new_tokens=7 temperature=2", "the", "/retry", "/retry")
    texts = [
        generate(
            model,
            tiny_tokenizer,
            "the\n",
            max_new_tokens=7,
            sampling=Sampling(temperature=2.0, top_p=0.95, seed=seed),
            search=Search(best_of=3),
        )
        for seed in range(3)
    ]
    assert len(set(texts)) > 1
    assert done.stdout == "".join(f"{text}\n" for text in texts)


def test_beams_can_be_set(chat, answer, model, tiny_tokenizer):
    done = chat("zz", "/set n_beam=3 max_new_tokens=9", "/retry")
    greedy, beams = Sampling(temperature=0), Search(n_beam=3)
    found = generate(model, tiny_tokenizer, "zz\n", max_new_tokens=9, sampling=greedy, search=beams)
    assert found != answer("zz\n", 9, temperature=0, top_p=1.0)
    assert done.stdout == f"{answer('zz' + chr(10))}\n{found}\n"


def test_ctrl_c_before_another_answer_begins_leaves_the_last_one(model, tiny_tokenizer, monkeypatch, capsys):
    conversation = Conversation(torch_engine(model, tiny_tokenizer), {"max_new_tokens": 5})
    follow("the", conversation)
    turns = list(conversation.turns)
    with monkeypatch.context() as during:
        during.setattr(Tokenizer, "encode", lambda *_: signal.raise_signal(signal.SIGINT))
        follow("/retry", conversation)
    assert (conversation.turns, "(stopped)" in capsys.readouterr().err) == (turns, True)
    follow("/retry", conversation)
    assert len(conversation.turns) == 1


def test_unknown_or_impossible_commands_are_one_line_and_the_chat_continues(chat, answer, tmp_path):
    (tmp_path / "there").write_text("mine")
    lines = [
        "/hlep",
        "/xyz",
        "/retry",
        "/save",
        f"/save {tmp_path}/there",
        f"/save {tmp_path}/there/x",
        "/save ~no-one/x",
        "/save a\0b",
        " /help",
    ]
    done = chat(*lines)
    assert done.stderr.splitlines()[1:] == [
        "error: unknown command /hlep (did you mean /help?)",
        "error: unknown command /xyz: /help lists the commands; a line that begins with a space is sent as text",
        "error: nothing has been said yet: /retry answers the last line again",
        "error: give the name of a file, such as /save talk.txt",
        f"error: {tmp_path}/there already exists: give another name",
        f"error: cannot use {tmp_path}/there (File exists)",
        "error: ~no-one/x begins with the home of an unknown user: give the whole path",
        "error: a name cannot hold a zero byte",
    ]
    assert done.stdout == answer(" /help\n") + "\n"
    assert (tmp_path / "there").read_text() == "mine"


def test_a_conversation_is_saved(chat, answer, tmp_path):
    done = chat("the naïve", f"/save {tmp_path}/new/talk.txt", "/quit", "never")
    text = answer("the naïve\n")
    assert done.stdout == f"{text}\n{tmp_path}/new/talk.txt has the conversation\n"
    assert (tmp_path / "new/talk.txt").read_text() == f"> the naïve\n{text}\n"


def test_a_conversation_longer_than_the_context_is_read_from_its_end_or_refused(chat, answer):
    long = "the file " * 40
    done = chat(long, "more")
    first = answer(f"{long}\n")
    assert done.stdout == f"{first}\n{answer(f'{long}{chr(10)}{first}{chr(10)}more{chr(10)}')}\n"
    assert done.stderr.count("tokens: only the last 64 are read)") == 1
    done = chat("a", long, "/show", args=["--when-full", "stop"])
    assert "leaves no room in a context of 64: shorten it, or set when_full=slide" in done.stderr
    assert "answers: 1, " in done.stdout
    assert done.returncode == 0


def test_lines_that_are_not_utf8_are_refused_and_named(chat):
    done = chat("the", "b\udcff")
    assert done.returncode == 1
    assert "error: standard input:2: byte 2 is 0xff, which is not UTF-8" in done.stderr


def test_help_has_every_command(chat):
    told = chat("/help").stdout
    assert [line.split()[0] for line in told.splitlines()] == list(COMMANDS)


@settings(max_examples=40)
@given(st.text() | st.text(alphabet='tempraue=_[]{}",0.5 \n', max_size=30))
def test_any_text_can_be_a_setting(text):
    found, problems = parse_settings(text)
    assert found or problems or not text.strip()


@pytest.mark.parametrize(("text", "value"), [(".5", 0.5), ("5", 5), ('"a b"', "a b"), ("5th", "5th"), ("[1]", [1])])
def test_values_are_json_or_words(text, value):
    assert parse_settings(f"top_p={text} seed=1") == ({"top_p": value, "seed": 1}, [])


def test_the_history_is_in_the_folder_for_state(monkeypatch):
    monkeypatch.setenv("XDG_STATE_HOME", "/somewhere")
    assert history_file() == Path("/somewhere/tinygpt/history")
    monkeypatch.setenv("XDG_STATE_HOME", "relative")  # ignored, as the XDG base directory specification demands
    assert history_file() == Path.home() / ".local/state/tinygpt/history"


class Terminal:
    """A program in a terminal of its own."""

    def __init__(self, args, **env: str) -> None:
        self.pid, self.fd = pty.fork()
        if self.pid == 0:
            os.chdir(ROOT)
            os.execvpe(sys.executable, [sys.executable, *map(str, args)], {**os.environ, "TERM": "xterm", **env})
        self.shown, self.at, self.status = b"", 0, None

    def wait(self, text: str, seconds: float = 60) -> None:
        """Wait until the text is shown, after the last one waited for."""
        end = time.monotonic() + seconds
        while text.encode() not in self.shown[self.at :]:
            assert time.monotonic() < end, f"{text!r} is not in {self.shown[self.at :]!r}"
            assert self._read(0.1), f"it ended: {self.shown!r}"
        self.at = self.shown.index(text.encode(), self.at) + len(text.encode())

    def type(self, text: str) -> None:
        os.write(self.fd, text.encode())

    def leave(self, key: str, seconds: float = 60) -> int:
        """Press a key until the program ends; return its exit status.

        Once is not always enough: Python's input() loses a Ctrl-C that comes between its prompt and its wait for keys.
        And once too often, while the program leaves, must do no harm.
        """
        end = time.monotonic() + seconds
        self.type(key)
        while self._read(0.1, idle=partial(self.type, key)):
            assert time.monotonic() < end, f"it goes on: {self.shown!r}"
        return self._end()

    def close(self) -> None:
        """Kill the program if it is still running."""
        if self.status is None:
            os.kill(self.pid, signal.SIGKILL)
            self._end()
        os.close(self.fd)

    def _read(self, seconds: float, idle: Callable[[], None] = lambda: None) -> bool:
        """Read what is shown within some seconds, and call `idle` if that is nothing.  False when the program ends."""
        if not select.select([self.fd], [], [], seconds)[0]:
            idle()
            return True
        try:
            self.shown += os.read(self.fd, 1 << 16)
        except OSError:  # the end, on Linux
            return False
        return True

    def _end(self) -> int:
        self.status = os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])
        return self.status


@pytest.fixture
def terminal():
    """Opens terminals, and closes them at the end in any case."""
    with ExitStack() as opened:

        def start(args, **env: str) -> Terminal:
            return opened.enter_context(closing(Terminal(args, **env)))

        yield start


def test_in_a_terminal_lines_are_edited_and_remembered_and_ctrl_c_stops_an_answer(tmp_path, terminal):
    text = save_cycle(tmp_path / "model")
    args = ["-m", "tinygpt", "chat", "--model", tmp_path / "model", "--temperature", "0", "--max-new-tokens", "9"]
    user = terminal(args, XDG_STATE_HOME=str(tmp_path))
    user.wait("> ")
    user.type("hi\n")
    user.wait(f"{text}\r\n> ")
    user.type("/set max_new_tokens=1000000\n")
    user.wait("> ")
    user.type("go on\n")
    user.wait(text * 20)
    user.type("\x03")
    user.wait("(stopped)\r\n> ")
    user.type("\x1b[A\x1b[A" + "\b" * 6 + "8\n")  # the last line but one, with its end deleted
    user.wait("> ")
    user.type("/show\n")
    user.wait("max_new_tokens=18\r\n")
    user.wait("answers: 2")
    user.wait("> ")
    assert user.leave("\x03") == 0
    history = tmp_path / "tinygpt/history"
    assert history.read_text().splitlines()[:2] == ["hi", "/set max_new_tokens=1000000"]
    assert stat.S_IMODE(history.parent.stat().st_mode) == 0o700
    assert b"Traceback" not in user.shown


def test_without_readline_or_a_home_the_chat_works(tmp_path, terminal):
    text = save_cycle(tmp_path / "model")
    code = "import sys; sys.modules['readline'] = None; from tinygpt.cli.main import main; main()"
    args = ["-c", code, "chat", "--model", tmp_path / "model", "--temperature", "0", "--max-new-tokens", "9"]
    user = terminal(args, HOME="/dev/null")
    user.wait("> ")
    user.type("hi\n")
    user.wait(f"{text}\r\n> ")
    assert user.leave("\x04") == 0
    assert b"Traceback" not in user.shown
