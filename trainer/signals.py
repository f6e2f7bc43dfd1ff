"""Stop in good order: SIGTERM, SIGINT, SIGUSR1 and SIGHUP only set a flag, which the loop shares with all ranks once a step."""

import errno
import os
import signal
import termios
from collections.abc import Callable
from types import FrameType

STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGHUP)
"""SIGTERM: Slurm at the time limit, systemd, `kill`. SIGINT: Ctrl-C. SIGUSR1: `sbatch --signal=USR1@120`. SIGHUP: the terminal
or its ssh was closed."""


def catch_stops(receive: Callable[[int, FrameType | None], None]) -> dict[signal.Signals, object]:
    """Have `receive` called at each stop signal, also at one that came before; returns the handlers before. Where SIGHUP is
    ignored (nohup), the run outlives its terminal, as was asked for."""
    wanted = [n for n in STOP_SIGNALS if n != signal.SIGHUP or signal.getsignal(n) != signal.SIG_IGN]
    before = {number: signal.signal(number, receive) for number in wanted}
    signal.pthread_sigmask(signal.SIG_UNBLOCK, wanted)  # held back since this process began, if our parent started it
    return before


def leave_dead_terminal() -> None:
    """Where stdout or stderr is a terminal that is gone, print to nowhere instead: each line would be an error."""
    for fd in (1, 2):
        try:
            termios.tcgetattr(fd)
        except termios.error as error:
            if error.args[0] == errno.EIO:  # of what never was a terminal it says ENOTTY
                null = os.open(os.devnull, os.O_WRONLY)
                os.dup2(null, fd)
                os.close(null)


class StopRequest:
    """Within its `with` block the stop signals ask for a stop instead of ending the process.

    A handler does nothing else (but leave a terminal that is gone): saving from within one could meet a half-done step or a
    lock that is held. A second Ctrl-C raises KeyboardInterrupt, for the person who will not wait. Blocks nest: the inner one
    sees what the outer one received, so that a signal that came while torch was still being imported is not lost. Main thread
    only.
    """

    def __init__(self) -> None:
        self._number: int | None = None
        self._outer: StopRequest | None = None
        self._handlers_before: dict[signal.Signals, object] = {}

    @property
    def wanted(self) -> bool:
        """Has a stop signal come?"""
        return self.reason is not None

    @property
    def reason(self) -> str | None:
        """Name of the first signal that came, e.g. `SIGTERM`."""
        if self._outer is not None:
            return self._outer.reason
        return None if self._number is None else signal.Signals(self._number).name

    def __enter__(self) -> "StopRequest":
        handler = getattr(signal.getsignal(signal.SIGTERM), "__self__", None)
        if isinstance(handler, StopRequest):
            self._outer = handler
        else:
            self._handlers_before = catch_stops(self._receive)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._handlers_before.items():
            signal.signal(number, handler)  # type: ignore[arg-type]  # what signal.signal gave us
        self._handlers_before = {}

    def _receive(self, number: int, frame: FrameType | None) -> None:
        if number == signal.SIGHUP:
            leave_dead_terminal()
        if self._number is None:
            self._number = number
        elif number == signal.SIGINT:
            signal.default_int_handler(number, frame)
