"""Memory for batches, used again once nobody holds it: fresh pages cost more than what is written into them."""

import sys
from typing import Any

import numpy as np

_MOST = 64
"""Arrays of one kind that are kept; whoever holds more gets fresh ones."""


def _references_to_free() -> int:
    """References to an array that only the pool holds, as `take` sees them: of the list, the loop variable and, before
    Python 3.14, the argument."""
    kept = [np.empty(0)]
    for array in kept:
        return sys.getrefcount(array)
    raise AssertionError


_OWN = _references_to_free()


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
