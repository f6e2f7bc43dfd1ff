"""Pieces of any device copied into reusable host segments, cut into chunks, at their places in the file to be."""

import mmap
import threading
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from officina.trainer.checkpoint.layout import CHUNK_BYTES, HEADER_BYTES, padded
from officina.trainer.state import Piece

SEGMENT_BYTES = 32 << 20


@dataclass(frozen=True, slots=True)
class Draft:
    """A chunk that is staged and not yet hashed."""

    name: str
    slot: str
    dtype: str
    shape: tuple[int, ...]
    start: int
    stop: int
    at: int
    """Bytes from the beginning of the segment."""
    bytes: int
    item_bytes: int


@dataclass(slots=True)
class Segment:
    """A stretch of the file in memory."""

    buffer: Tensor
    """(SEGMENT_BYTES,) uint8 on the host, pinned if the state is on a GPU."""
    offset: int
    """Bytes from the beginning of the file."""
    used: int
    drafts: list[Draft]


class Pool:
    """Host segments, kept between saves: fresh memory costs more than the copy into it (0.3 to 3 s/GiB seen)."""

    def __init__(self, *, pinned: bool, limit: int | None) -> None:
        """limit: segments at most; `take` then waits until one is given back. None: as many as are asked for."""
        self._pinned, self._limit = pinned, limit
        self._free: list[Tensor] = []
        self._made = 0
        self._changed = threading.Condition()

    def take(self) -> Tensor:
        """A segment's buffer. Raises MemoryError if the host has none left."""
        with self._changed:
            while not self._free and self._limit is not None and self._made >= self._limit:
                self._changed.wait()
            if self._free:
                return self._free.pop()
            self._made += 1
        try:
            return self._make()
        except BaseException:
            with self._changed:
                self._made -= 1
            raise

    def give(self, buffer: Tensor) -> None:
        """Hand a buffer back."""
        with self._changed:
            self._free.append(buffer)
            self._changed.notify()

    def fill_up(self, total_bytes: int) -> None:
        """Make and touch buffers for `total_bytes`, so that the first save need not; stops without memory."""
        while True:
            with self._changed:
                if self._made * SEGMENT_BYTES >= total_bytes:
                    return
                self._made += 1
            try:
                buffer = self._make()
                buffer.zero_()
            except MemoryError:
                with self._changed:
                    self._made -= 1
                return
            self.give(buffer)

    def _make(self) -> Tensor:
        try:
            if self._pinned:
                return torch.empty(SEGMENT_BYTES, dtype=torch.uint8, pin_memory=True)
            memory = mmap.mmap(-1, SEGMENT_BYTES)
            if hasattr(mmap, "MADV_HUGEPAGE"):
                memory.madvise(mmap.MADV_HUGEPAGE)  # a third of the page-fault time
            return torch.frombuffer(memory, dtype=torch.uint8)
        except (RuntimeError, OSError) as e:
            raise MemoryError(f"no host memory for a staging buffer of {SEGMENT_BYTES} bytes") from e


@dataclass(slots=True)
class Tally:
    """Counts while pieces are staged."""

    bytes: int = HEADER_BYTES
    """Size of the data file that the pieces so far make, whether or not they could be staged."""


def staged_bytes(pieces: Iterator[Piece]) -> int:
    """Bytes of the data file that these pieces make (a little more than the tensors: header and padding)."""
    return HEADER_BYTES + sum(padded(p.values.numel() * p.values.element_size()) for p in pieces)


@torch.no_grad()
def stage(pieces: Iterator[Piece], pool: Pool, tally: Tally) -> Iterator[Segment]:
    """Copy pieces into segments and yield each when it is full. The first one leaves room for the file's header.

    The iterator is always drained, also when memory runs out, since making pieces may be collective. Then MemoryError
    is raised at the end, and `tally` holds what would have been needed.
    """
    packer, failure = _Packer(pool), None
    for p in pieces:
        if p.values.numel() != p.stop - p.start:
            raise ValueError(f"piece {p.name} {p.slot} says elements {p.start} to {p.stop}, holds {p.values.numel()}")
        tally.bytes += padded(p.values.numel() * p.values.element_size())
        if failure is None:
            try:
                yield from packer.add(p)
            except MemoryError as e:
                failure = e
    yield from packer.last()
    if failure is not None:
        raise failure


class _Packer:
    """The segment that is being filled."""

    def __init__(self, pool: Pool) -> None:
        self._pool = pool
        self._segment: Segment | None = None
        self._next_offset = 0
        self._device = torch.device("cpu")

    def add(self, p: Piece) -> Iterator[Segment]:
        """Take in one piece; yields segments it fills. Items divide 64, so only a piece's last chunk has padding."""
        values, item = p.values.detach().reshape(-1), p.values.element_size()
        self._device = values.device
        done = 0
        while done < values.numel() or (done == 0 and 0 in p.shape):
            segment = self._segment
            if segment is not None and segment.used == SEGMENT_BYTES:
                yield from self.last()
                segment = None
            if segment is None:
                used = 0 if self._next_offset else HEADER_BYTES
                segment = self._segment = Segment(self._pool.take(), self._next_offset, used, [])
                self._next_offset += SEGMENT_BYTES
            count = min(values.numel() - done, min(CHUNK_BYTES, SEGMENT_BYTES - segment.used) // item)
            at, size = segment.used, count * item
            target = segment.buffer[at:at + size].view(values.dtype)
            target.copy_(values[done:done + count], non_blocking=values.is_cuda)
            segment.used += padded(size)
            segment.buffer[at + size:segment.used] = 0
            segment.drafts.append(Draft(p.name, p.slot, str(values.dtype).removeprefix("torch."), tuple(p.shape),
                                        p.start + done, p.start + done + count, at, size, item))
            done += count
            if count == 0:
                return

    def last(self) -> Iterator[Segment]:
        """Yield the segment that is being filled, once what comes from a GPU has arrived in it."""
        if self._segment is not None:
            if self._device.type == "cuda":
                torch.cuda.current_stream(self._device).synchronize()
            segment, self._segment = self._segment, None
            yield segment
