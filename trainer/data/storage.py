"""How the bytes of a file are reached: mapped into memory, or read, by the kind of file system it lies on.

On a local disk and in memory a map is fastest. On a parallel or network file system every missing page costs a round
trip, and some allow a process few maps: there each row is one read, and several are under way at once.
"""

import errno
import mmap
import os
import resource
import sys
import threading
import time
import weakref
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from officina.trainer.errors import DataError

READ_BY_PREAD = {
    "lustre": "mount.lustre(8)",
    "gpfs": "IBM Storage Scale, mmmount",
    "nfs": "nfs(5)",
    "nfs4": "nfs(5)",
    "wekafs": "docs.weka.io, mount; refuses maps after some 600: NVIDIA-NeMo/Megatron-Bridge issue 3968",
    "beegfs": "doc.beegfs.io, client",
    "ceph": "mount.ceph(8)",
    "panfs": "mount.panfs(8)",
}
"""File system type, as /proc/self/mountinfo names it (proc_pid_mountinfo(5)) -> where that name is from."""
THREADS = 8
"""Reads under way at once, where they are not made by the kernel's readahead."""
T = TypeVar("T")


def file_system(path: Path) -> str:
    """Type of the file system that `path` lies on; empty where the system does not tell."""
    try:
        lines = Path("/proc/self/mountinfo").read_text().splitlines()
    except OSError:
        return ""
    return type_of_mount(os.path.realpath(path), lines)


def type_of_mount(path: str, mountinfo: Iterable[str]) -> str:
    """Type of the mount with the longest mount point above `path`; of two on one point, the later lies over the earlier."""
    best, found = -1, ""
    for line in mountinfo:
        before, _, after = line.partition(" - ")
        point = before.split(" ")[4].encode().decode("unicode_escape")  # a space is written as \040
        if (path == point or path.startswith(point.rstrip("/") + "/")) and len(point) >= best:
            best, found = len(point), after.split(" ")[0]
    return found


@lru_cache(maxsize=1024)
def reads_by_pread(folder: Path, choice: str) -> bool:
    """Shall files in `folder` be read instead of mapped? choice: auto (by file system), mmap or pread."""
    return choice == "pread" if choice != "auto" else file_system(folder) in READ_BY_PREAD


_maps: "weakref.WeakSet[mmap.mmap]" = weakref.WeakSet()


def most_maps() -> int:
    """Files that may be mapped at once: Python keeps each of them open, and half of what may be open is for others."""
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return sys.maxsize if soft == resource.RLIM_INFINITY else soft // 2


class Mapped:
    """A mapped file."""

    def __init__(self, path: Path) -> None:
        """Raises OSError, or ValueError for an empty file."""
        with open(path, "rb") as file:
            self._map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
            _maps.add(self._map)
            self._path, self._key = path, _key(os.fstat(file.fileno()))
        self.bytes = np.frombuffer(self._map, np.uint8)

    def will_need(self, start: int, stop: int) -> None:
        """Begin to read bytes [start, stop) without waiting for them."""
        _will_need(self._path, self._key, start, stop)


class ByteArray:
    """Bytes [offset, offset + length) of a file like a (n,) array, but every slice of it is read anew. Threads may share it."""

    def __init__(self, offset: int, length: int, dtype: Any) -> None:
        self._offset, self._length, self.dtype = offset, length, np.dtype(dtype)

    @property
    def itemsize(self) -> int:
        """Bytes of an element."""
        return self.dtype.itemsize

    def __len__(self) -> int:
        return self._length // self.dtype.itemsize

    def view(self, dtype: Any) -> "ByteArray":
        """The same bytes as elements of another type."""
        return self.part(self._offset, self._length, dtype)

    def __getitem__(self, wanted: slice | np.ndarray) -> np.ndarray:
        if isinstance(wanted, np.ndarray):  # places: runs of neighbours are read together
            runs = np.split(wanted, np.flatnonzero(np.diff(wanted) != 1) + 1) if len(wanted) else []
            return np.concatenate([self[int(run[0]):int(run[-1]) + 1] for run in runs] or [np.empty(0, self.dtype)])
        start, stop, step = wanted.indices(len(self))
        assert step == 1
        return self.copy_to(start, np.empty(max(stop - start, 0), self.dtype))

    def copy_to(self, start: int, out: np.ndarray) -> np.ndarray:
        """Fill `out`, (n,) of this dtype, from element `start` on."""
        self.fill(self._offset + start * self.itemsize, memoryview(out).cast("B"))
        return out

    def borrowed(self, wanted: slice) -> np.ndarray:
        """A slice in memory that this thread uses again for the next: fresh pages cost as much as reading from memory."""
        start, stop, _ = wanted.indices(len(self))
        n_bytes = (stop - start) * self.itemsize
        kept = getattr(_of_thread, "kept", None)
        if kept is None or len(kept) < n_bytes:
            kept = _of_thread.kept = np.empty(n_bytes, np.uint8)
        return self.copy_to(start, kept[:n_bytes].view(self.dtype))

    def part(self, offset: int, length: int, dtype: Any) -> "ByteArray":
        """The `length` bytes from `offset` on of the same file."""
        raise NotImplementedError

    def will_need(self, start: int, stop: int) -> None:
        """Begin to read bytes [start, stop) of the file without waiting for them, where that can be."""

    def fill(self, at: int, out: memoryview) -> None:
        """Read from byte `at` of the file on."""
        raise NotImplementedError


_of_thread = threading.local()


def copy_range(data: Any, start: int, out: np.ndarray) -> None:
    """`out` = the elements of `data` from `start` on, read into place where they are read."""
    if isinstance(data, ByteArray) and data.dtype == out.dtype:
        data.copy_to(start, out)
    else:
        out[:] = data[start:start + len(out)]


class FileArray(ByteArray):
    """Of a file that is read."""

    def __init__(self, path: Path, offset: int = 0, length: int | None = None, dtype: Any = np.uint8) -> None:
        stat = os.stat(path)
        self._path, self._key = path, _key(stat)
        super().__init__(offset, stat.st_size - offset if length is None else length, dtype)

    def part(self, offset: int, length: int, dtype: Any) -> "FileArray":
        """The `length` bytes from `offset` on of the same file."""
        return FileArray(self._path, offset, length, dtype)

    def will_need(self, start: int, stop: int) -> None:
        """Begin to read bytes [start, stop) of the file into the page cache, if it has one."""
        _will_need(self._path, self._key, start, stop)

    def fill(self, at: int, out: memoryview) -> None:
        """Read from byte `at` of the file on. Raises DataError."""
        descriptor = _descriptor(self._path, self._key)
        while len(out):
            try:
                n = os.preadv(descriptor.number, [out], at)
            except OSError as exc:
                raise DataError(f"{self._path}: bytes {at} to {at + len(out)} cannot be read ({exc.strerror}). If the file "
                                "system is well again, resume the run; else restore the file from a copy.") from exc
            if not n:
                raise DataError(f"{self._path}: ends at byte {at}, {len(out)} bytes too early. Restore the file from a copy.")
            out, at = out[n:], at + n


class _Descriptor:
    """An open file, closed when the last who reads it has done so."""

    def __init__(self, path: Path) -> None:
        self.number = os.open(path, os.O_RDONLY | os.O_CLOEXEC)

    def __del__(self) -> None:
        if hasattr(self, "number"):
            os.close(self.number)


@lru_cache(maxsize=256)  # fewer than any limit of open files
def _descriptor(path: Path, key: tuple[int, int]) -> _Descriptor:
    """key: tells a file from one that took its name."""
    return _Descriptor(path)


def _key(stat: os.stat_result) -> tuple[int, int]:
    return stat.st_ino, stat.st_mtime_ns


def _will_need(path: Path, key: tuple[int, int], start: int, stop: int) -> None:
    if hasattr(os, "posix_fadvise"):  # unlike madvise, it lets other threads of Python run
        try:
            os.posix_fadvise(_descriptor(path, key).number, start, stop - start, os.POSIX_FADV_WILLNEED)
        except OSError:
            return  # advice: who reads the bytes says what is wrong


def map_file(path: Path) -> Mapped | None:
    """The mapped file; none where file system or open files allow no further map. Raises as `Mapped` does."""
    if len(_maps) >= most_maps():
        return None
    try:
        return Mapped(path)
    except OSError as exc:
        if exc.errno in (errno.EPERM, errno.ENOMEM, errno.ENODEV):
            return None
        raise


@lru_cache(maxsize=1)
def _pool(process: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(THREADS, thread_name_prefix="officina-read")


SLOW_S = 1e-4
"""A read of a row that takes longer had to wait for a disk or a network; from memory it takes microseconds."""


def at_once(work: Callable[[Sequence[T]], object], each: Sequence[T]) -> None:
    """`work` of all of `each`, several at once where they have to be waited for; raises what the first part that failed raised.

    What lies in memory is done here, one after the other: eight threads that take turns at Python's lock need four times as
    long. From the first that was slow on the rest goes to threads, and so does all of the next call, until one was fast.
    """
    begun, done = time.perf_counter(), 0
    if not getattr(_of_thread, "slow", False):
        for one in each:
            work([one])
            done, now = done + 1, time.perf_counter()
            if now - begun > SLOW_S:
                break
            begun = now
        else:
            return
    rest = each[done:]
    size = -(-len(rest) // THREADS)
    if size:
        pool = _pool(os.getpid())  # by process: a fork has none of the threads
        list(pool.map(work, [rest[first:first + size] for first in range(0, len(rest), size)]))
    _of_thread.slow = time.perf_counter() - begun > SLOW_S * len(rest)
