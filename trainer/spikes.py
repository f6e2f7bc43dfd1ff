"""Finite spikes of loss or gradient norm: a value far above its own recent past."""

import math
from collections import deque
from collections.abc import Iterable, Mapping

MIN_VALUES = 32
"""Values seen before anything is called a spike (fewer where the window is shorter)."""
RELATIVE_FLOOR = 1e-3
"""Smallest standard deviation, as a share of the mean: on a flat stretch rounding noise is no spike."""


class SpikeDetector:
    """Mean and standard deviation of the last `window` finite values, and the bound `sigma` deviations above.

    Its verdict follows from the values alone, so ranks that see the same (reduced) values agree without a
    collective. A spike enters the window clipped to the bound: one wild value does not blind it, and
    a lasting higher level is accepted after some values instead of being refused for ever.
    """

    def __init__(self, window: int, sigma: float) -> None:
        """sigma = 0 turns it off: the bound is infinite."""
        self.sigma = sigma
        self._values: deque[float] = deque(maxlen=window)

    def bound(self) -> float:
        """Highest value that is no spike now; infinite while too few values were seen."""
        values = self._values
        if self.sigma == 0 or len(values) < min(MIN_VALUES, values.maxlen):
            return math.inf
        # Computed afresh with exact sums: a resumed detector gives the same bits as one that never stopped.
        mean = math.fsum(values) / len(values)
        variance = math.fsum((v - mean) ** 2 for v in values) / len(values)
        return mean + self.sigma * max(math.sqrt(variance), RELATIVE_FLOOR * abs(mean))

    def observe(self, value: float) -> bool:
        """Take in one step's value; true if it is a spike. Non-finite values are none and leave no trace."""
        if not math.isfinite(value):
            return False
        bound = self.bound()
        self._values.append(min(value, bound))
        return value > bound

    def state(self) -> dict[str, list[float]]:
        """For the checkpoint: JSON-ready."""
        return {"values": list(self._values)}

    def load(self, state: Mapping[str, Iterable[float]]) -> None:
        """Take up a state; a window that was changed meanwhile keeps the newest values."""
        self._values.clear()
        self._values.extend(float(v) for v in state["values"])
