"""Bars and lines that show the progress of long work, and how long it will still take."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

START, TOTAL, STEP_S = 100, 260, 0.015
WORK = f"""
import time
from tinygpt import progress
progress.LINE_EVERY_S = 0.2
with progress.progress("train", total={TOTAL}, unit="steps", start={START}) as bar:
    for step in range({TOTAL - START}):
        time.sleep({STEP_S})
        if step == 50:
            bar.write("a line of the log")
        bar.update(1)
"""
COMMAND = [sys.executable, "-c", WORK]
ROOT = Path(__file__).parents[1]


def seconds(text: str) -> int:
    minutes, rest = text.split(":")
    return 60 * int(minutes) + int(rest)


def test_without_a_terminal_lines_show_the_remaining_time_of_resumed_work():
    done = subprocess.run(COMMAND, cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout == "a line of the log\n"
    pattern = rf"train: (\d+) of {TOTAL} steps, \d+:\d\d elapsed, (\d+:\d\d) remaining"
    lines = [re.fullmatch(pattern, line).groups() for line in done.stderr.splitlines()]
    steps = [int(step) for step, _ in lines]
    assert steps == sorted(set(steps)) and steps[0] > START and steps[-1] == TOTAL
    assert len(steps) < (TOTAL - START) / 2
    for step, left in lines:  # by the speed since this start, without the steps before it
        assert seconds(left) >= int((TOTAL - int(step)) * STEP_S)
    assert seconds(lines[0][1]) >= 1
    assert seconds(lines[-1][1]) == 0


@pytest.mark.skipif(sys.platform == "win32", reason="needs a pseudo-terminal")
def test_in_a_terminal_a_bar_is_drawn_with_time_left_and_the_log_above_it():
    import pty
    import termios

    ours, theirs = pty.openpty()
    termios.tcsetwinsize(theirs, (24, 80))
    process = subprocess.Popen(COMMAND, cwd=ROOT, stdout=theirs, stderr=theirs)
    os.close(theirs)
    output = b""
    try:
        while chunk := os.read(ours, 65536):
            output += chunk
    except OSError:  # the end, on Linux
        pass
    os.close(ours)
    assert process.wait() == 0
    text = output.decode()
    assert re.search(r"train:\s+\d+%\|.*\| \d+/260 \[\d\d:\d\d<\d\d:\d\d, +\d+\.\d+ steps/s\]", text)
    assert "\ra line of the log\r\n" in text
