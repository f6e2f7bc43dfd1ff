"""A run that stands still ends itself, and every rank tells where it stands.

One lost rank, a file system that answers no more, ranks that wait for each other: all the others hang in a collective, with all
their devices, until its own limit is over half an hour later, and then nobody knows why. So a thread of each rank looks once a
second how long the step lasts.
"""

import os
import socket
import sys
import threading
import time
import traceback
from dataclasses import replace
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
"""A step may last so many times the longest one after those."""
_OTHERS_S = 10.0
"""What a rank that waits for others gives them to say first where they stand."""
_WAITS = ("torch.", "deepspeed.", "officina.trainer.ranks", "officina.trainer.parallel.")
"""Modules in which a rank waits for others, or for a device that does."""


class Watch:
    """Watches the steps of one rank. Use it as a context manager."""

    def __init__(self, run_dir: Path, env: RankEnv, *, stall_after_s: float) -> None:
        """stall_after_s: what a step may last, 0 = for ever; see `RunConfig.stall_after`."""
        self._run_dir, self._env, self._stall_after_s = Path(run_dir), env, stall_after_s
        self._steps, self._longest_s = 0, 0.0
        self._turn: tuple[int, float] | None = None  # step, since when
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._look, args=(threading.get_ident(),), daemon=True, name="officina-watch")

    def step(self, number: int) -> None:
        """Optimizer step `number` begins."""
        if self._stall_after_s and self._steps >= _FIRST_STEPS:
            self._turn = (number, time.monotonic())
            if not self._thread.is_alive():
                self._thread.start()

    def stepped(self, seconds: float) -> None:
        """It ended and took so long. What comes until the next one is not watched."""
        self._longest_s = max(self._longest_s, seconds) if self._turn else 0.0
        self._steps, self._turn = self._steps + 1, None

    def __enter__(self) -> "Watch":
        return self

    def __exit__(self, *exc: object) -> None:
        self._closed.set()
        if self._thread.is_alive():
            self._thread.join()

    def _look(self, main_thread: int) -> None:
        looked, of, excused_s = time.monotonic(), None, 0.0
        while not self._closed.wait(_EVERY_S):
            now, turn = time.monotonic(), self._turn
            frame = sys._current_frames().get(main_thread)
            if turn is not of:
                of, excused_s = turn, 0.0
            if now - looked > _SUSPENDED_S or frame is None or frame.f_trace is not None:  # or a debugger holds it
                excused_s += now - looked
            elif turn is not None and now - turn[1] - excused_s > max(self._stall_after_s, _TIMES * self._longest_s):
                self._end(turn, now - turn[1], frame, main_thread)
            looked = now

    def _end(self, turn: tuple[int, float], seconds: float, frame: FrameType, main_thread: int) -> None:
        """Say where this rank stands, and leave: devices and the other ranks are free then."""
        waits = self._env.world_size > 1 and str(frame.f_globals.get("__name__", "")).startswith(_WAITS)
        place = traceback.extract_stack(frame, limit=1)[-1]
        usual = f" (the longest before took {self._longest_s:.3g} s)" if self._longest_s else ""
        told = (f"step {turn[0]} has not ended after {seconds:.0f} s{usual}, stall_after={self._stall_after_s:g}s. This rank "
                f"{'waits for others' if waits else 'stands'} in {place.name}, {place.filename}:{place.lineno}")
        failure = rank_log.Failure(
            rank=self._env.rank, host=socket.gethostname(), pid=os.getpid(), time_s=time.time(), error="Stalled", message=told,
            exit_status=EXIT_BUG, consequence=waits, traceback=f"Stalled: {told}\n\n{_stacks(main_thread)}")
        if waits:  # whoever is waited for says so first
            rank_log.write_failure(self._run_dir, failure)
            if self._closed.wait(_OTHERS_S) or self._turn is not turn:  # the others are gone; or it goes on after all
                rank_log.clear_failures(self._run_dir, self._env.rank)
                return
            heard = {each.rank for each in rank_log.read_failures(self._run_dir)}
            silent = sorted({*range(self._env.world_size)} - heard)
            failure = replace(failure, message=f"nothing was heard of {_named(silent)}, and {told}" if silent else
                              f"every rank waits, each one's log says where; {told}")
        rank_log.leave(self._run_dir, failure)
        os._exit(EXIT_BUG)


def _named(ranks: list[int]) -> str:
    shown = ", ".join(map(str, ranks[:8])) + (f" and {len(ranks) - 8} more" if len(ranks) > 8 else "")
    return f"rank{'s' * (len(ranks) > 1)} {shown}"


def _stacks(main_thread: int) -> str:
    """Where each thread of this process stands, that of the training first."""
    names = {thread.ident: thread.name for thread in threading.enumerate()}
    frames = sorted(sys._current_frames().items(), key=lambda item: item[0] != main_thread)
    return "\n".join(f"Thread {names.get(ident, ident)}:\n{''.join(traceback.format_stack(frame))}" for ident, frame in frames
                     if ident != threading.get_ident())
