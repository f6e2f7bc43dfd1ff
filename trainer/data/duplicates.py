"""Exact duplicates among any number of documents, in bounded memory.

Each part of the inputs leaves sorted runs of digests. They are merged range by range of digests, so that only one range
lies in memory; the first document of each digest stays, in the order of parts and of documents within a part.
"""

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from officina.trainer.data.manifest import write_whole

RANGE_DOCUMENTS = 1 << 24
"""Documents compared at once: about a GiB with its sorting."""
_DIGEST = np.dtype([("high", "<u8"), ("low", "<u8"), ("number", "<u8")])


def write_run(path: Path, digests: bytes, first: int) -> None:
    """Write the 16-byte digests of documents number `first` and on of a part, sorted by digest."""
    halves = np.frombuffer(digests, ">u8").reshape(-1, 2)
    out = np.empty(len(halves), _DIGEST)
    out["high"], out["low"], out["number"] = halves[:, 0], halves[:, 1], np.arange(first, first + len(halves))
    write_whole(path, out[np.lexsort((out["low"], out["high"]))].tobytes())


def find_duplicates(runs: Sequence[tuple[int, Path]], drops: Sequence[Path]) -> int:
    """Write to `drops[part]` the numbers of the part's documents that stood before, sorted u64. Returns how many.

    runs: part and file of each run.
    """
    parts, owner = [_mapped(path) for _, path in runs], [part for part, _ in runs]
    total, found = sum(map(len, parts)), 0
    borders = np.linspace(0, 2.0**64, total // RANGE_DOCUMENTS + 2)[1:-1].astype(np.uint64)
    cuts = [[0, *np.searchsorted(part["high"], borders).tolist(), len(part)] for part in parts]
    for path in drops:
        path.write_bytes(b"")
    for i in range(len(borders) + 1):
        here = [np.asarray(part[cut[i]:cut[i + 1]]) for part, cut in zip(parts, cuts, strict=True)]
        for part, numbers in _repeated(here, owner):
            found += len(numbers)
            with open(drops[part], "ab") as file:
                file.write(numbers.astype("<u8").tobytes())  # numpy's tofile does not say that a disk is full
    for path in drops:
        path.write_bytes(np.sort(np.fromfile(path, "<u8")).tobytes())
    return found


def _mapped(path: Path) -> np.ndarray:
    return np.memmap(path, _DIGEST, mode="r") if path.stat().st_size else np.empty(0, _DIGEST)


def _repeated(parts: list[np.ndarray], owner: list[int]) -> list[tuple[int, np.ndarray]]:
    """For each part, the numbers of its documents whose digest stands before in this range."""
    all_parts = np.concatenate([np.empty(0, _DIGEST), *parts])
    of_part = np.repeat(np.asarray(owner, np.int64), [len(p) for p in parts])
    order = np.lexsort((all_parts["number"], of_part, all_parts["low"], all_parts["high"]))
    ranked = all_parts[order]
    again = np.zeros(len(ranked), bool)
    again[1:] = (ranked["high"][1:] == ranked["high"][:-1]) & (ranked["low"][1:] == ranked["low"][:-1])
    numbers, origin = ranked["number"][again], of_part[order][again]
    return [(int(part), numbers[origin == part]) for part in np.unique(origin)]
