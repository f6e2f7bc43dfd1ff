"""One rank's data file and manifest while they are written: hash, write, start the disk, and sync at the end."""

import os
from pathlib import Path

import xxhash

from officina.trainer.checkpoint.content import ContentHasher
from officina.trainer.checkpoint.disk import reserve, start_writeback, sync_dir, write_at
from officina.trainer.checkpoint.layout import (
    HEADER_BYTES,
    Chunk,
    Key,
    Manifest,
    data_name,
    header,
    manifest_hash,
    manifest_name,
    pack_manifest,
    padded,
)
from officina.trainer.checkpoint.stage import Segment


class RankFile:
    """Created, fed with segments in order, finished. Every method may raise OSError; then `abandon`."""

    def __init__(self, directory: Path, run_id: str, step: int, rank: int, world_size: int, expected_bytes: int) -> None:
        """expected_bytes: reserved at once; 0 if unknown."""
        self._about = (run_id, step, world_size, rank)
        self._manifest_path = directory / manifest_name(rank)
        self._header = header(run_id, step, world_size, rank)
        self._chunks: list[Chunk] = []
        self._content: dict[Key, int] = {}
        self._hasher = ContentHasher()
        self._size = self._reserved = 0
        os.makedirs(directory, exist_ok=True)
        self._fd = os.open(directory / data_name(rank), os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)
        try:
            self._reserve(expected_bytes)
        except OSError:
            self.abandon()
            raise

    def write(self, segment: Segment) -> None:
        """Hash the segment's chunks from memory, then send it to the file."""
        memory = memoryview(segment.buffer.numpy())[:segment.used]
        if segment.offset == 0:
            memory[:HEADER_BYTES] = self._header
        for d in segment.drafts:
            chunk = memory[d.at:d.at + padded(d.bytes)]
            self._chunks.append(Chunk(d.name, d.slot, d.dtype, d.shape, d.start, d.stop, segment.offset + d.at, d.bytes,
                                      f"{xxhash.xxh3_64_intdigest(chunk):016x}"))
            key = (d.name, d.slot)
            share = self._hasher.share(chunk[:d.bytes], d.start * d.item_bytes)
            self._content[key] = (self._content.get(key, 0) + share) % 2**64
        end = segment.offset + segment.used
        self._reserve(end)
        write_at(self._fd, memory, segment.offset)
        start_writeback(self._fd, segment.offset, segment.used)
        self._size = end

    def finish(self) -> str:
        """Sync the data, write the manifest and sync that and the directory; returns the manifest's hash."""
        if self._size == 0:  # a rank that holds nothing
            write_at(self._fd, memoryview(self._header), 0)
            self._size = HEADER_BYTES
        os.ftruncate(self._fd, self._size)
        os.fsync(self._fd)
        self.abandon()
        run_id, step, world_size, rank = self._about
        content: dict[str, dict[str, str]] = {}
        for (name, slot), share in self._content.items():
            content.setdefault(slot, {})[name] = f"{share:016x}"
        raw = pack_manifest(Manifest(run_id, step, world_size, rank, self._size, tuple(self._chunks), content))
        fd = os.open(self._manifest_path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)
        try:
            write_at(fd, memoryview(raw), 0)
            os.fsync(fd)
        finally:
            os.close(fd)
        sync_dir(self._manifest_path.parent)
        return manifest_hash(raw)

    def abandon(self) -> None:
        """Close the data file."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1

    def _reserve(self, end: int) -> None:
        if end > self._reserved:
            reserve(self._fd, self._reserved, end - self._reserved)
            self._reserved = end
