"""Which rows the next steps read, many steps at once: a plan costs a hundred calls of numpy, however long it is."""

from dataclasses import dataclass

import numpy as np

from officina.trainer.data.order import Places
from officina.trainer.data.reader import RowReader

_SAMPLES = 4096
_STEPS = 64


@dataclass(frozen=True, slots=True)
class PlannedStep:
    """One step, as one rank reads it."""

    first: int
    """Position at which it begins."""
    samples: np.ndarray
    """(rows,) int64 global sample indices of the whole batch."""
    own: np.ndarray
    """Those of the rank."""
    places: Places
    """Where they lie."""
    source_rows: dict[str, int]
    """Rows that each source gives to the whole batch."""

    @property
    def stop(self) -> int:
        """Position after it."""
        return int(self.samples[-1]) + 1


def plan_steps(reader: RowReader, position: int, rows: int, own: range) -> list[PlannedStep]:
    """The steps from `position` on, of `rows` samples each, of which the rank reads `own`."""
    n = max(1, min(_STEPS, _SAMPLES // rows))
    samples = reader.skips.indices(position, np.arange(n * rows)).reshape(n, rows)
    of_rank = samples[:, own]
    places, names = reader.place(of_rank.reshape(-1)), reader.order.names
    sources = reader.order.mixture.place(samples.reshape(-1))[0].reshape(n, rows)
    steps = []
    for i in range(n):
        part = slice(i * of_rank.shape[1], (i + 1) * of_rank.shape[1])
        counts = np.bincount(sources[i], minlength=len(names)).tolist()
        steps.append(PlannedStep(
            position, samples[i], of_rank[i],
            Places(places.source[part], places.cursor[part], places.epoch[part], places.row[part]),
            {name: count for name, count in zip(names, counts, strict=True) if count}))
        position = steps[-1].stop
    return steps
