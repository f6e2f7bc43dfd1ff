"""Stop in good order: SIGTERM, SIGINT and SIGUSR1 only set a flag, which the loop shares with all ranks once a step."""

import signal
from types import FrameType

STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
"""SIGTERM: Slurm at the time limit, systemd, `kill`. SIGINT: Ctrl-C. SIGUSR1: `sbatch --signal=USR1@120`."""


class StopRequest:
    """Within its `with` block the stop signals ask for a stop instead of ending the process.

    A handler does nothing else: saving from within one could meet a half-done step or a lock that is held. A second
    Ctrl-C raises KeyboardInterrupt, for the person who will not wait. Blocks nest: the inner one sees what the outer
    one received, so that a signal that came while torch was still being imported is not lost. Main thread only.
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
            self._handlers_before = {number: signal.signal(number, self._receive) for number in STOP_SIGNALS}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._handlers_before.items():
            signal.signal(number, handler)  # type: ignore[arg-type]  # what signal.signal gave us
        self._handlers_before = {}

    def _receive(self, number: int, frame: FrameType | None) -> None:
        if self._number is None:
            self._number = number
        elif number == signal.SIGINT:
            signal.default_int_handler(number, frame)
