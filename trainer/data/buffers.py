"""Memory for batches, used again once nobody holds it: fresh pages cost more than what is written into them."""

import sys
from typing import Any

import numpy as np

_MOST = 64
"""Arrays of one kind that are kept; whoever holds more gets fresh ones."""
_OWN = 3
"""References to an array that only the pool holds, while `take` looks at it: list, loop variable, argument."""


class Buffers:
    """A pool of arrays. One is free again when no array or tensor over its memory is left, wherever that was held."""

    def __init__(self) -> None:
        self._kept: dict[tuple[Any, ...], list[np.ndarray]] = {}

    def take(self, shape: tuple[int, ...], dtype: Any) -> np.ndarray:
        """An array of whatever was in it before. One thread at a time."""
        kept = self._kept.setdefault((shape, dtype), [])
        for array in kept:
            if sys.getrefcount(array) == _OWN:
                return array
        array = np.empty(shape, dtype)
        kept.append(array)
        del kept[:-_MOST]
        return array
