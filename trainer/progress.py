"""What a person sees while the run trains: one live line on a terminal, plain lines elsewhere."""

import math
import os
import shutil
import sys
import time
from collections import deque
from typing import TextIO

from officina.trainer.metrics import EvalMetrics, StepMetrics

REDRAW_S = 0.1
"""Least time between two drawings: ten a second look alive and cost nothing."""
PLAIN_S = 10.0
"""Time between two plain lines."""
PACE_STEPS = 100
"""The time left follows the wall time of the last so many steps, evaluations and saves among them."""
_BLOCKS = " ▏▎▍▌▋▊▉█"
_DIM, _BOLD, _ACCENT, _WARN, _OFF = "\x1b[2m", "\x1b[1m", "\x1b[36m", "\x1b[33m", "\x1b[0m"


class Progress:
    """Progress of one run for rank 0; other ranks pass `enabled=False` and print nothing.

    On a terminal one line is rewritten in place, never longer than the window, so that it never wraps. Anywhere
    else a plain line comes every PLAIN_S seconds, at the first and at the last step.
    """

    def __init__(self, steps: int, start_step: int = 0, *, enabled: bool = True, stream: TextIO | None = None,
                 live: bool | None = None, plain_s: float = PLAIN_S, unit: str = "tok") -> None:
        """steps: of the whole run; start_step: those done before; live=None asks the stream if it is a terminal.
        unit: what `tokens_per_s` counts, short; shown where the tokens that are no padding are not known."""
        self._steps, self._unit = steps, unit
        self._enabled = enabled
        self._stream = sys.stderr if stream is None else stream
        self._live = enabled and (_is_terminal(self._stream) if live is None else live)
        self._plain_s = plain_s
        self._pace: deque[tuple[int, float]] = deque(maxlen=PACE_STEPS)
        self.start(start_step)
        self._last: StepMetrics | None = None
        self._eval: dict[str, EvalMetrics] = {}
        self._phase = ""
        self._left_out = 0
        self._drawn_at = self._printed_at = -math.inf
        self._on_screen = False

    def start(self, step: int) -> None:
        """Steps begin now, after `step` of them: the time spent before does not count for the time left."""
        self._pace.clear()
        self._pace.append((step, time.monotonic()))

    def update(self, metrics: StepMetrics) -> None:
        """One more step is done."""
        self._last = metrics
        self._left_out += not metrics.applied
        now = time.monotonic()
        self._pace.append((metrics.step, now))
        if not self._enabled:
            return
        final = metrics.step >= self._steps
        if self._live:
            if final or now - self._drawn_at >= REDRAW_S:
                self._draw()
        elif final or now - self._printed_at >= self._plain_s:
            self._printed_at = now
            self._write(self._line(10**6, colour=False) + "\n")

    def evaluated(self, metrics: EvalMetrics) -> None:
        """Show this held-out loss from now on."""
        self._eval[metrics.source] = metrics
        bits = "" if metrics.bits_per_byte is None else f", {_number(metrics.bits_per_byte)} bits per byte"
        if self._enabled and not self._live:
            self._write(f"step {metrics.step:,} · held-out loss of {metrics.source} {_number(metrics.loss_nats)}{bits}\n")

    def phase(self, text: str) -> None:
        """What goes on instead of a step, e.g. `evaluating` or `saving`; empty when steps go on."""
        self._phase = text
        if self._live and self._last is not None:
            self._draw()

    def say(self, text: str) -> None:
        """Print a line of its own; the live line moves down."""
        if not self._enabled:
            return
        if self._on_screen:
            self._write("\r\x1b[K" + text + "\n")
            self._draw()
        else:
            self._write(text + "\n")

    def close(self) -> None:
        """Leave the last line standing. A second call does nothing."""
        if self._on_screen:
            self._draw()
            self._write("\n")
            self._on_screen = False
        self._enabled = self._live = False

    def __enter__(self) -> "Progress":
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def _draw(self) -> None:
        self._drawn_at = time.monotonic()
        try:
            columns = os.get_terminal_size(self._stream.fileno()).columns  # each time: a window may be resized
        except (OSError, ValueError, AttributeError):  # not a real terminal
            columns = 0
        columns = columns or shutil.get_terminal_size((80, 24)).columns
        # One write for the whole line, the rest of the old one erased after it: nothing flickers.
        self._write("\r" + self._line(columns - 1, colour=True) + "\x1b[K")
        self._on_screen = True

    def _write(self, text: str) -> None:
        encoding = getattr(self._stream, "encoding", None) or "utf-8"
        try:
            self._stream.write(text.encode(encoding, "replace").decode(encoding))  # LANG=C has no blocks
            self._stream.flush()
        except (OSError, ValueError):  # the terminal went away; the run goes on
            self._enabled = self._live = self._on_screen = False

    def _line(self, columns: int, *, colour: bool) -> str:
        """The line in at most `columns` columns: what does not fit is left out, the least important part first."""
        m, paint = self._last, _paint if colour else _plain
        counter = f"{m.step:>{len(f'{self._steps:,}')},}/{self._steps:,}"
        parts: list[tuple[int, str, str]] = [(0, "step " + counter, _BOLD)]  # (rank of importance, text, colour)
        parts.append((1, "loss " + _number(m.loss_nats), _ACCENT))
        if self._eval:
            known = [e for e in self._eval.values() if e.tokens]
            held_out = sum(e.loss_nats * e.tokens for e in known) / sum(e.tokens for e in known) if known else math.nan
            parts.append((4, "held-out " + _number(held_out), _ACCENT))
        parts.append((6, f"lr {m.lr:.2e}", _DIM))
        filled = m.filled_tokens_per_s
        parts.append((3, f"{_si(m.tokens_per_s)} {self._unit}/s" if filled is None else f"{_si(filled)} tok/s", ""))
        if m.mfu_causal is not None:
            parts.append((7, f"MFU {m.mfu_causal:.1%}", _DIM))
        if self._left_out:
            parts.append((5, f"{self._left_out} left out", _WARN))
        left = self._left_s()
        if m.step < self._steps and left is not None:
            parts.append((2, duration(left) + " left", ""))
        if self._phase:
            parts.append((1, self._phase + " …", _WARN))
        while len(parts) > 1 and len(" · ".join(text for _, text, _ in parts)) > columns:
            parts.remove(max(parts))
        bar_columns = min(24, columns - len(" · ".join(text for _, text, _ in parts)) - 3)
        bar = _bar(m.step / self._steps, bar_columns) if colour and bar_columns >= 8 else ""
        shown = [paint(text[:columns], tone) for _, text, tone in parts]  # a very narrow window cuts the last part
        if bar:
            shown[0] += " " + paint(bar, _ACCENT)
        return paint(" · ", _DIM).join(shown)

    def _left_s(self) -> float | None:
        (first_step, first_s), (last_step, last_s) = self._pace[0], self._pace[-1]
        if last_step <= first_step:
            return None
        return (self._steps - last_step) * (last_s - first_s) / (last_step - first_step)


def _is_terminal(stream: TextIO) -> bool:
    """One that can draw: mpirun gives its ranks a terminal whose other end is a log, and says so by TERM=dumb."""
    return stream.isatty() and os.environ.get("TERM") != "dumb"


def duration(seconds: float) -> str:
    """`42 s`, `3:07`, `2:05:09`, `4 d 03 h`: short, and read the same everywhere."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    minutes, s = divmod(whole, 60)
    hours, minutes = divmod(minutes, 60)
    if hours >= 48:
        return f"{hours // 24} d {hours % 24:02} h"
    return f"{hours}:{minutes:02}:{s:02}" if hours else f"{minutes}:{s:02}"


def _number(value: float) -> str:
    return f"{value:.4f}" if math.isfinite(value) else str(value)


def _si(value: float) -> str:
    """1234 -> `1.23k`: three digits, the unit's prefix behind."""
    for factor, prefix in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if value >= 0.9995 * factor:
            return f"{value / factor:.3g}{prefix}"
    return f"{value:.3g}"


def _bar(share: float, columns: int) -> str:
    eighths = round(max(0.0, min(1.0, share)) * columns * 8)
    whole, rest = divmod(eighths, 8)
    return ("█" * whole + (_BLOCKS[rest] if rest else "")).ljust(columns, "·")


def _paint(text: str, tone: str) -> str:
    return f"{tone}{text}{_OFF}" if tone else text


def _plain(text: str, tone: str) -> str:
    return text
