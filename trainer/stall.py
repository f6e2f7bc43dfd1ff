"""A run that stands still ends itself, and every rank tells where it stands.

One lost rank, a file system that answers no more, ranks that wait for each other: all the others hang in a collective, with all
their devices, until its own limit is over half an hour later, and then nobody knows why. So a thread of each rank looks once a
second how long the step lasts.
"""

import contextlib
import os
import socket
import statistics
import sys
import threading
import time
import traceback
from collections import deque
from pathlib import Path
from types import FrameType

from officina.trainer import rank_log
from officina.trainer.errors import EXIT_BUG
from officina.trainer.rank_env import RankEnv

_EVERY_S = 1.0
_SUSPENDED_S = 10.0
"""The watching thread itself was held up for longer: the process was suspended, which is no stall."""
_FIRST_STEPS = 3
"""Of a start: kernels are compiled and files are read for the first time."""
_TIMES = 10
"""A step may last so many times the usual one."""
_USUAL_OF = 50
"""The usual step is the median of so many."""
_OTHERS_S = 10.0
"""What a rank that waits for others gives them to say first where they stand."""
_LEAVE_WITHIN_S = 30.0
"""From then on; a disk that takes no record must not hold the rank."""
_WAITS = ("torch.", "deepspeed.", "officina.trainer.ranks", "officina.trainer.parallel.")
"""Modules in which a rank waits for others, or for a device that does."""
_STEP = "officina.trainer.step"
"""Within it a rank on a GPU waits wherever the device's queue is full."""


class Watch:
    """Watches the steps of one rank. Use it as a context manager."""

    def __init__(self, run_dir: Path, env: RankEnv, *, stall_after_s: float, on_gpu: bool) -> None:
        """stall_after_s: what a step may last, 0 = for ever; see `RunConfig.stall_after`."""
        self._run_dir, self._env, self._stall_after_s, self._on_gpu = Path(run_dir), env, stall_after_s, on_gpu
        self._steps, self._recent = 0, deque[float](maxlen=_USUAL_OF)
        self._turn: tuple[int, float, float] | None = None  # step, since when, how long the usual one takes
        self._closed = threading.Event()
        self._thread: threading.Thread | None = None

    def step(self, number: int) -> None:
        """Optimizer step `number` begins."""
        if not self._stall_after_s or self._steps < _FIRST_STEPS:
            return
        self._turn = (number, time.monotonic(), statistics.median(self._recent))
        if self._thread is None:
            main = threading.get_ident()
            self._thread = threading.Thread(target=self._look, args=(main,), daemon=True, name="officina-watch")
            self._thread.start()

    def stepped(self, seconds: float) -> None:
        """It ended and took so long. What comes until the next one is not watched."""
        self._steps, self._turn = self._steps + 1, None
        self._recent.append(seconds)

    def __enter__(self) -> "Watch":
        return self

    def __exit__(self, *exc: object) -> None:
        self._closed.set()
        if self._thread is not None:
            self._thread.join(_EVERY_S)

    def _look(self, main_thread: int) -> None:
        looked, of, excused_s = time.monotonic(), None, 0.0
        while not self._closed.wait(_EVERY_S):
            now, turn = time.monotonic(), self._turn
            if turn is not of:
                of, excused_s = turn, 0.0
            if now - looked > _SUSPENDED_S:
                excused_s += now - looked
            elif turn is not None and now - turn[1] - excused_s > max(self._stall_after_s, _TIMES * turn[2]):
                self._end(turn, now - turn[1], main_thread)
            looked = now

    def _end(self, turn: tuple[int, float, float], seconds: float, main_thread: int) -> None:
        """Say where this rank stands, and leave: devices and the other ranks are free then."""
        if (frame := sys._current_frames().get(main_thread)) is None:
            return
        waits = self._env.world_size > 1 and self._waits(frame)
        told = (f"step {turn[0]} has not ended after {seconds:.0f} s (usual: {turn[2]:.3g} s; "
                f"stall_after={self._stall_after_s:g}s, 0 = never). This rank {'waits for others' if waits else 'stands'} "
                f"in {frame.f_code.co_name}, {frame.f_code.co_filename}:{frame.f_lineno}")
        if waits:  # whoever is waited for says so first
            self._leave_soon(_OTHERS_S + _LEAVE_WITHIN_S, turn)
            rank_log.write_failure(self._run_dir, self._failure(told, waits, main_thread))
            if self._closed.wait(_OTHERS_S) or self._turn is not turn:  # the others are gone; or it goes on after all
                with contextlib.suppress(OSError):
                    rank_log.clear_failures(self._run_dir, self._env.rank)
                return
            heard = {each.rank for each in rank_log.read_failures(self._run_dir)} | {self._env.rank}
            silent = sorted({*range(self._env.world_size)} - heard)
            told = (f"nothing was heard of {_named(silent)}, and {told}" if silent else
                    f"every rank waits, each one's log says where; {told}")
        else:
            self._leave_soon(_LEAVE_WITHIN_S, turn)
        rank_log.leave(self._run_dir, self._failure(told, waits, main_thread))
        os._exit(EXIT_BUG)

    def _waits(self, frame: FrameType) -> bool:
        stack = [str(each.f_globals.get("__name__", "")) for each, _ in traceback.walk_stack(frame)]
        return stack[0].startswith(_WAITS) or (self._on_gpu and _STEP in stack)

    def _leave_soon(self, seconds: float, turn: tuple[int, float, float]) -> None:
        def leave() -> None:
            if self._turn is turn and not self._closed.is_set():
                os._exit(EXIT_BUG)

        timer = threading.Timer(seconds, leave)
        timer.daemon = True
        timer.start()

    def _failure(self, told: str, waits: bool, main_thread: int) -> rank_log.Failure:
        return rank_log.Failure(
            rank=self._env.rank, host=socket.gethostname(), pid=os.getpid(), time_s=time.time(), error="Stalled", message=told,
            exit_status=EXIT_BUG, consequence=waits, traceback=f"Stalled: {told}\n\n{_stacks(main_thread)}")


def _named(ranks: list[int]) -> str:
    shown = ", ".join(map(str, ranks[:8])) + (f" and {len(ranks) - 8} more" if len(ranks) > 8 else "")
    return f"rank{'s' * (len(ranks) > 1)} {shown}"


def _stacks(main_thread: int) -> str:
    """Where each thread of this process stands, that of the training first."""
    names = {thread.ident: thread.name for thread in threading.enumerate()}
    frames = sorted(sys._current_frames().items(), key=lambda item: item[0] != main_thread)
    return "\n".join(f"Thread {names.get(ident, ident)}:\n{''.join(traceback.format_stack(frame))}" for ident, frame in frames
                     if ident != threading.get_ident())
