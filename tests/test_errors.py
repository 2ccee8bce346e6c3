"""What a program prints when it cannot continue: one line, without control characters."""

import errno
import io
import os
import pickle
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tinygpt.errors import BREAK, Stopped, UserError, leave_at_once, program
from tinygpt.params import ParamsError

ROOT = Path(__file__).parents[1]


@pytest.mark.parametrize("name", ["\x1b]0;title\x07", "a\nb", "\r", "\x9b2J", "caf\udce9", "\u202egnp", "\x00"])
def test_a_message_has_no_control_characters(name):
    for error in (UserError(f"data/{name} not found"), ParamsError([f"unknown key {name}"])):
        assert str(error).isprintable()
    assert str(UserError("日本 naïve 🙂 ½ not found")) == "日本 naïve 🙂 ½ not found"


def test_a_message_is_never_long_and_keeps_what_to_do_at_its_end():
    error = UserError(f"{'x' * 10**6} is not valid: take another")
    assert len(str(error)) < 1100
    assert str(error).endswith("is not valid: take another")
    many = str(ParamsError([f"problem {i}" for i in range(10_000)]))
    assert len(many.split(BREAK)) == 21
    assert many.endswith("and 9,980 more")


def test_an_error_is_the_same_after_it_came_from_another_process():
    for error in (UserError("one"), ParamsError(["one", "two"]), UserError(f"one{BREAK}two")):
        again = pickle.loads(pickle.dumps(error))
        assert (type(again), str(again)) == (type(error), str(error))


def left_by(main) -> int:
    """The exit status of a program; a text is printed, as Python does."""
    with pytest.raises(SystemExit) as left:
        program(main)()
    if isinstance(left.value.code, str):
        print(left.value.code, file=sys.stderr)
    return 1 if isinstance(left.value.code, str) else left.value.code


def raising(error: BaseException):
    def main() -> None:
        raise error

    return main


def system(number: int, name: object = None) -> OSError:
    return OSError(number, os.strerror(number), name)


CAUSES: list[tuple[BaseException | type, int, str]] = [
    (UserError("no such thing"), 1, "error: no such thing"),
    (Stopped(15, "stopped after step 3"), 143, "stopped after step 3"),
    (KeyboardInterrupt(), 130, "interrupted"),
    (MemoryError(), 1, "error: there is not enough memory: use a smaller model"),
    (RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried"), 1, "error: there is not enough memory"),
    (
        RecursionError("maximum recursion depth"),
        1,
        "error: a text or number of the input cannot be used (test_errors.py:",
    ),
    (
        UnicodeEncodeError("ascii", "±", 0, 1, "no"),
        1,
        "error: a text or number of the input cannot be used (test_errors",
    ),
    (UnicodeDecodeError("utf-8", b"\xff", 0, 1, "no"), 1, "error: a text or number of the input cannot be used (test_"),
    (OverflowError("int too large"), 1, "error: a text or number of the input cannot be used (test_errors.py:"),
    (system(errno.ENOSPC, "a.bin"), 1, "error: no room to write a.bin (No space left on device): free some space"),
    (system(errno.EFBIG), 1, "error: no room to write a file (File too large): free some space and run again"),
    (system(errno.EACCES, "a\x1b[2J"), 1, "error: cannot use a\\x1b[2J (Permission denied): check its permissions"),
    (system(errno.ENOENT, b"caf\xe9"), 1, "error: cannot use caf\\udce9 (No such file or directory)"),
    (system(errno.EIO, 3), 1, "error: cannot use 3 (Input/output error)"),
    (system(errno.EIO), 1, "error: Input/output error"),
    (system(errno.EMFILE), 1, "error: Too many open files"),
    (OSError("a library\nsays so"), 1, "error: a library\\nsays so"),
    (OSError(), 1, "error: OSError"),
]


@pytest.mark.parametrize(("error", "status", "line"), CAUSES, ids=[repr(error) for error, *_ in CAUSES])
def test_whatever_a_user_or_the_machine_can_cause_is_one_line_and_a_status(error, status, line, capsys):
    def main():
        print("so far")
        raise error

    code = left_by(main)
    out, err = capsys.readouterr()
    assert (code, out) == (status, "so far\n")
    assert err.startswith(line)
    assert err.endswith("\n") and err[:-1].isprintable()


def test_a_fault_of_ours_keeps_its_traceback():
    for error in (ValueError("x"), TypeError("x"), AssertionError("x"), KeyError("x")):
        with pytest.raises(type(error)):
            program(raising(error))()


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "cp1252", "utf-8"])
def test_every_text_can_be_printed_in_every_encoding(encoding, monkeypatch):
    raw = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(raw, encoding=encoding))
    program(lambda: print("2.8 ± 0.1 日本 \udcff"))()
    said = raw.getvalue().decode(encoding).strip()
    assert said.encode(encoding).decode(encoding) == said
    assert said == "2.8 ± 0.1 日本 \\udcff".encode(encoding, errors="backslashreplace").decode(encoding)


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="a device that is always full")
def test_a_full_disk_under_the_output_is_reported(monkeypatch, capsys):
    monkeypatch.setattr(sys, "stdout", os.fdopen(os.open("/dev/full", os.O_WRONLY), "w"))
    assert left_by(lambda: print("x")) == 1
    assert capsys.readouterr().err.startswith("error: no room to write a file (No space left on device): free some")
    sys.stdout.close()  # does not try to write again


def test_a_reader_that_goes_away_ends_a_program_quietly(monkeypatch, capsys):
    reader, writer = os.pipe()
    os.close(reader)
    monkeypatch.setattr(sys, "stdout", os.fdopen(writer, "w"))
    assert left_by(lambda: print("x")) == 141
    assert capsys.readouterr().err == ""
    sys.stdout.close()


def test_a_closed_output_is_not_a_mistake(monkeypatch):
    monkeypatch.setattr(sys, "stdout", None)  # as Python does for `>&-`
    monkeypatch.setattr(sys, "stderr", None)
    program(lambda: print("x", sys.stdout.isatty(), sys.stderr.isatty()))()
    program(lambda: sys.stdout.buffer.write(b"x"))()


@pytest.mark.parametrize(
    ("command", "package"),
    [("stages.train", "torch"), ("stages.plot", "matplotlib"), ("tinygpt generate", "torch"), ("tinygpt", "difflib")],
)
def test_ctrl_c_while_a_program_imports_is_one_line(command, package, tmp_path):
    (tmp_path / f"{package}.py").write_text("import os, time\nos.kill(os.getpid(), 2)\ntime.sleep(9)\n")
    done = subprocess.run(
        [sys.executable, "-m", *command.split()],
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": f"{tmp_path}:{ROOT}", "PYTHONSAFEPATH": "1"},
        capture_output=True,
        check=False,
    )
    assert (done.returncode, done.stdout, done.stderr) == (130, b"", b"interrupted\n")


def test_ctrl_c_raises_while_a_program_works_and_ends_it_before_and_after():
    before, seen = signal.getsignal(signal.SIGINT), list[object]()
    try:
        leave_at_once()
        at_first = signal.getsignal(signal.SIGINT)
        program(lambda: seen.append(signal.getsignal(signal.SIGINT)))()
        assert seen == [signal.default_int_handler]
        assert signal.getsignal(signal.SIGINT) is at_first is not signal.default_int_handler
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # as in a background job
        leave_at_once()
        program(lambda: seen.append(signal.getsignal(signal.SIGINT)))()
        assert seen[1] is signal.getsignal(signal.SIGINT) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGINT, before)
