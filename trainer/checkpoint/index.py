"""Where each range of each tensor lies in the ranks' files, and whether each element is there once. No torch here."""

import math
from bisect import bisect_right
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from officina.trainer.checkpoint.layout import Chunk, Key, Manifest, data_name


@dataclass(frozen=True, slots=True)
class Span:
    """A run of elements that lies in one piece in one file."""

    start: int
    stop: int
    rank: int
    offset: int


@dataclass(frozen=True, slots=True)
class Entry:
    """One slot of one tensor."""

    dtype: str
    shape: tuple[int, ...]
    item_bytes: int
    spans: tuple[Span, ...]
    """In order, without gap or overlap, from 0 to numel."""

    @property
    def numel(self) -> int:
        return math.prod(self.shape)

    def covering(self, start: int, stop: int) -> Iterable[Span]:
        """The parts of spans that make up [start, stop)."""
        i = bisect_right(self.spans, start, key=lambda s: s.start) - 1
        while start < stop:
            span = self.spans[i]
            end = min(stop, span.stop)
            yield Span(start, end, span.rank, span.offset + (start - span.start) * self.item_bytes)
            start, i = end, i + 1


def build_index(manifests: Iterable[Manifest]) -> tuple[dict[Key, Entry], list[str]]:
    """The index of a checkpoint and what does not fit in it (an empty list if all is well)."""
    found: dict[Key, list[tuple[int, Chunk]]] = {}
    for manifest in manifests:
        for chunk in manifest.chunks:
            found.setdefault((chunk.name, chunk.slot), []).append((manifest.rank, chunk))
    problems: list[str] = []
    index: dict[Key, Entry] = {}
    for (name, slot), chunks in found.items():
        rank0, first = chunks[0]
        for rank, c in chunks:
            if (c.shape, c.dtype) != (first.shape, first.dtype):
                problems.append(f"{name} {slot} is {list(first.shape)} {first.dtype} in {data_name(rank0)} and "
                                f"{list(c.shape)} {c.dtype} in {data_name(rank)}")
                break
        else:
            chunks.sort(key=lambda rc: rc[1].start)
            index[name, slot] = entry = _entry(chunks)
            problems += [f"{name} {slot} of shape {list(first.shape)}: elements {a} to {b} {fault}"
                         for a, b, fault in _faults(entry)]
    return index, problems


def _entry(chunks: list[tuple[int, Chunk]]) -> Entry:
    """Chunks in order of start -> spans, neighbours in the same file joined."""
    first = chunks[0][1]
    item_bytes = first.bytes // (first.stop - first.start) if first.stop > first.start else 1
    spans: list[Span] = []
    for rank, c in chunks:
        last = spans[-1] if spans else None
        if last and last.rank == rank and last.stop == c.start and \
                c.offset == last.offset + (last.stop - last.start) * item_bytes:
            spans[-1] = Span(last.start, c.stop, rank, last.offset)
        else:
            spans.append(Span(c.start, c.stop, rank, c.offset))
    return Entry(first.dtype, first.shape, item_bytes, tuple(spans))


def _faults(entry: Entry) -> Iterable[tuple[int, int, str]]:
    """Gaps, overlaps and ranges beyond the tensor."""
    at = 0
    for span in entry.spans:
        if span.start > at:
            yield at, span.start, "are in no file"
        elif span.start < at:
            yield span.start, min(at, span.stop), "are there twice"
        at = max(at, span.stop)
    if at < entry.numel:
        yield at, entry.numel, "are in no file"
    elif at > entry.numel:
        yield entry.numel, at, "are beyond its shape"


def content_sums(manifests: Iterable[Manifest]) -> Mapping[Key, int]:
    """Content sum of each slot of each tensor over all ranks (content.py says what it is)."""
    total: dict[Key, int] = {}
    for manifest in manifests:
        for slot, names in manifest.content.items():
            for name, share in names.items():
                total[name, slot] = (total.get((name, slot), 0) + int(share, 16)) % 2**64
    return total
