import fcntl
import io
import os
import pty
import re
import struct
import subprocess
import sys
import termios

import pytest

from officina.trainer.metrics import EvalMetrics, StepMetrics
from officina.trainer.progress import Progress, duration

SCRIPT = """
import time
from officina.trainer.metrics import EvalMetrics, StepMetrics
from officina.trainer.progress import Progress
with Progress(120, 20) as progress:
    for n in range(21, 121):
        time.sleep(0.003)
        progress.update(StepMetrics(step=n, tokens=16384, loss_nats=10 / n**0.3, grad_norm=1.0, lr=1e-3,
            step_time_s=0.01, data_wait_s=0.0, tokens_per_s=1.6e6, applied=n != 40, mfu_causal=0.4125))
        if n == 60:
            progress.phase("evaluating")
            progress.evaluated(EvalMetrics(step=60, source="books", loss_nats=2.5, tokens=1))
            progress.phase("")
        if n == 80:
            progress.say("checkpoint step-00000080 saved")
"""


def step(number: int, **changes) -> StepMetrics:
    return StepMetrics(**{"step": number, "tokens": 100, "loss_nats": 2.5, "grad_norm": 1.0, "lr": 1e-3,
                          "step_time_s": 0.5, "data_wait_s": 0.1, "tokens_per_s": 1234.0} | changes)


def test_the_rate_counts_all_tokens_that_are_no_padding():
    stream = io.StringIO()
    with Progress(2, stream=stream, live=False, plain_s=0.0, unit="rec") as progress:
        progress.update(step(1, filled_tokens=2000, filled_tokens_per_s=4000.0))
        progress.update(step(2))
    first, second = stream.getvalue().splitlines()
    assert "4k tok/s" in first and "1.23k rec/s" in second


def on_terminal(columns: int) -> str:
    """What the script above sends to a real pseudo terminal of that width."""
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 24, columns, 0, 0))
    env = {k: v for k, v in os.environ.items() if k not in ("COLUMNS", "LINES")}
    command = [sys.executable, "-c", SCRIPT]
    child = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=theirs, env=env | {"LC_ALL": "C.UTF-8"})
    os.close(theirs)
    sent = b""
    while True:
        try:
            part = os.read(ours, 65536)
        except OSError:  # Linux: the other side is closed
            break
        if not part:
            break
        sent += part
    os.close(ours)
    assert child.wait() == 0
    return sent.decode()


def screen(sent: str) -> list[str]:
    """The lines a terminal shows in the end: carriage return, erase to the end of the line, colours."""
    lines, column = [""], 0
    for token in re.findall(r"\x1b\[[0-9;]*[A-Za-z]|[\r\n]|.", sent):
        if token == "\r":
            column = 0
        elif token == "\n":
            lines.append("")
            column = 0
        elif token == "\x1b[K":
            lines[-1] = lines[-1][:column]
        elif not token.startswith("\x1b"):
            lines[-1] = lines[-1][:column].ljust(column) + token + lines[-1][column + 1:]
            column += 1
    return lines


@pytest.mark.parametrize("columns", [10, 20, 45, 80, 160])
def test_the_live_line_fits_the_terminal_and_messages_stand_above_it(columns):
    sent = on_terminal(columns)
    drawn = [re.sub(r"\x1b\[[0-9;]*[A-Za-z]", "", line) for line in re.split(r"[\r\n]+", sent)]
    assert max(len(line) for line in drawn if "saved" not in line) < columns, "a wrapped line stays behind"
    shown = screen(sent)
    assert shown[0] == "checkpoint step-00000080 saved"
    assert shown[1].startswith("step 120/120"[: columns - 1])
    assert shown[2:] == [""], "the prompt comes on a line of its own"
    if columns >= 80:
        assert "loss 2.3782" in shown[1] and "1.6M tok/s" in shown[1] and "held-out 2.5000" in shown[1]
    if columns == 160:
        assert "█" * 24 in shown[1] and "MFU 41.2%" in shown[1] and "1 left out" in shown[1]
        assert "evaluating …" in sent and " left" in sent


def test_without_a_terminal_plain_lines_come_now_and_then():
    stream = io.StringIO()
    progress = Progress(100, stream=stream, plain_s=3600.0)
    for number in range(1, 101):
        progress.update(step(number))
    progress.evaluated(EvalMetrics(step=100, source="books", loss_nats=2.25, tokens=10))
    progress.say("done")
    progress.close()
    lines = stream.getvalue().splitlines()
    assert lines[0] == "step   1/100 · loss 2.5000 · lr 1.00e-03 · 1.23k tok/s · 0 s left"
    assert lines[1] == "step 100/100 · loss 2.5000 · lr 1.00e-03 · 1.23k tok/s"
    assert lines[2:] == ["step 100 · held-out loss of books 2.2500", "done"]
    assert "\x1b" not in stream.getvalue() and "\r" not in stream.getvalue()


def test_other_ranks_print_nothing():
    stream = io.StringIO()
    with Progress(10, enabled=False, live=True, stream=stream) as progress:
        progress.update(step(1))
        progress.phase("saving")
        progress.evaluated(EvalMetrics(step=1, source="a", loss_nats=1.0, tokens=1))
        progress.say("hidden")
    assert stream.getvalue() == ""


def test_a_non_finite_loss_is_shown_as_what_it_is():
    stream = io.StringIO()
    with Progress(10, stream=stream) as progress:
        progress.update(step(1, loss_nats=float("nan"), applied=False))
    assert "loss nan" in stream.getvalue() and "1 left out" in stream.getvalue()


def test_a_terminal_that_knows_only_ascii_or_goes_away_stops_nothing():
    ascii_only = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    with Progress(10, stream=ascii_only, live=True) as progress:
        progress.update(step(10))
    assert b"step 10/10" in ascii_only.buffer.getvalue()

    class Gone(io.StringIO):
        def write(self, text: str) -> int:
            raise BrokenPipeError

    with Progress(10, stream=Gone(), live=True) as progress:
        progress.update(step(1))
        progress.say("nobody hears this")


@pytest.mark.parametrize(("seconds", "text"), [
    (0.4, "0 s"), (59.4, "59 s"), (59.6, "1:00"), (187, "3:07"), (7509, "2:05:09"), (356_400, "4 d 03 h")])
def test_durations_read_well(seconds, text):
    assert duration(seconds) == text


def test_a_dumb_terminal_is_a_log(monkeypatch):
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    for term, live in (("xterm", True), ("dumb", False)):
        monkeypatch.setenv("TERM", term)
        assert Progress(10, stream=Terminal())._live is live
