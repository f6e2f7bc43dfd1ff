"""Data sets in an object store or behind HTTP: the small files lie in a folder here, shards are fetched when they are read.

    officina data stage s3://bucket/corpus /scratch/corpus --on-demand --budget 200G

`remote.json` in the folder says where the shards are, and how many bytes of them may be kept. They come in pieces of 4 MiB,
which are compared with the shard's checksums before they get their name in `pieces/`; when there are too many, those that were
not read for the longest time go. Processes share the folder without locks: at worst, two fetch the same piece.

What speaks to the store is fsspec (`pip install 'officina[remote]'`), with the credentials and end points that it finds by
itself: ~/.aws, AWS_ENDPOINT_URL, ~/.config/fsspec. None of them is written down here.
"""

import json
import os
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import numpy as np

from officina.trainer.data.manifest import Dataset, ShardEntry, open_dataset
from officina.trainer.data.storage import ByteArray
from officina.trainer.errors import DataError

REMOTE, PIECES = "remote.json", "pieces"
PIECE_BYTES = 4 << 20
LEAST_BUDGET_BYTES = 64 << 20
TRIES = 4
PAUSE_S = 0.5
"""Before the second try; twice as long before each further one."""
TIMEOUT_S = 120.0
"""For one piece."""
_LATELY_S = 60.0


def is_url(folder: str | Path) -> bool:
    """Is it in a store?"""
    return "://" in str(folder)


# ---- the store -------------------------------------------------------------------------------------------------------
class Store:
    """What lies below a URL."""

    def __init__(self, url: str, timeout_s: float | None = None) -> None:
        """timeout_s: for one answer; none = `TIMEOUT_S`. Raises DataError if nothing here can speak to it, or if the URL
        carries a name or password, which would be written down beside the data."""
        if "@" in urlsplit(url).netloc:
            where = f"{url.split('://')[0]}://...@{urlsplit(url).netloc.rpartition('@')[2]}"
            raise DataError(f"{where}: the URL carries credentials. Leave them out, and give those that its driver looks for, "
                            "such as ~/.aws/credentials or ~/.netrc")
        self.url, self._timeout_s = url.split("?")[0].rstrip("/"), timeout_s
        try:
            import fsspec

            self._system, self._root = fsspec.core.url_to_fs(url.rstrip("/"))
        except (ImportError, ValueError) as exc:
            raise DataError(f"{self.url}: {exc}. Try: pip install 'officina[remote]'") from exc

    def size(self, name: str) -> int | None:
        """Bytes of a file; none if there is no such file."""
        try:
            return self._retried(name, lambda path: self._system.info(path)["size"])
        except FileNotFoundError:
            return None

    def read(self, name: str, start: int | None = None, stop: int | None = None,
             sound: Callable[[bytes], bool] = lambda content: True) -> bytes:
        """A file, or bytes [start, stop) of it. What comes too short or is not `sound` is asked for again; what is not sound
        after all tries is returned. Raises FileNotFoundError, or DataError when the store refuses or does not answer."""

        def once(path: str) -> bytes:
            if getattr(self._system, "async_impl", False):  # only there a time limit can be set
                from fsspec.asyn import sync

                content = sync(self._system.loop, self._system._cat_file, path, start=start, end=stop,
                               timeout=self._timeout_s or TIMEOUT_S)
            else:
                content = self._system.cat_file(path, start=start, end=stop)
            if start is not None and stop is not None and len(content) > stop - start:
                raise DataError(f"{self.url}/{name}: {len(content)} bytes came where {stop - start} were asked for: this "
                                "server gives whole files alone. Name one that answers range requests; object stores do.")
            if start is not None and stop is not None and len(content) < stop - start:
                raise EOFError(f"{len(content)} bytes came instead of {stop - start}")
            return bytes(content)

        for attempt in range(TRIES):
            content = self._retried(name, once)
            if sound(content):
                return content
            time.sleep(PAUSE_S * 2**attempt)
        return content

    def _retried(self, name: str, once: Callable[[str], Any]) -> Any:
        path = f"{self._root}/{name}"
        for attempt in range(TRIES):
            try:
                return once(path)
            except (FileNotFoundError, DataError):
                raise
            except Exception as exc:  # each driver has errors of its own
                if isinstance(exc, PermissionError) or getattr(exc, "status", 0) in (401, 403) or (
                        "Credentials" in type(exc).__name__):  # drivers of S3 and others find none
                    raise DataError(f"{self.url}/{name}: the store refuses ({_told(exc)}). Give the credentials that its "
                                    "driver looks for, such as ~/.aws/credentials, or ask the owner for access.") from exc
                if attempt == TRIES - 1:
                    raise DataError(f"{self.url}/{name}: cannot be read after {TRIES} tries ({_told(exc)}). When the store "
                                    "answers again, resume the run; or stage the data set whole: officina data stage.") from exc
                time.sleep(PAUSE_S * 2**attempt)


def _told(exc: Exception) -> str:
    """Its words, without addresses: those may carry a signature."""
    words = [word for word in str(exc).split() if "://" not in word and "=" not in word]
    said = " ".join(words)[:200] or ("nothing came in time" if isinstance(exc, TimeoutError) else "")
    return f"{type(exc).__name__}: {said}".rstrip(": ")


# ---- pieces ----------------------------------------------------------------------------------------------------------
@dataclass(frozen=True, slots=True)
class Remote:
    """remote.json."""

    url: str
    budget_bytes: int
    """Of all pieces together."""


def remote_of(folder: Path) -> Remote | None:
    """Where the shards of the data set in `folder` are, if not in it."""
    try:
        return Remote(**json.loads((folder / REMOTE).read_bytes()))
    except FileNotFoundError:
        return None
    except (OSError, ValueError, TypeError) as exc:
        raise DataError(f"{folder / REMOTE}: cannot be read ({exc}). Stage the data set again: officina data stage.") from exc


def open_whole(folder: str | Path) -> Dataset:
    """The data set, for what reads all of its shards. Raises DataError if they are in a store."""
    dataset = open_dataset(folder)
    if remote := remote_of(dataset.folder):
        raise DataError(f"{folder}: its shards are in {remote.url.split('?')[0]}, and this reads all of them. Stage the data "
                        "set whole: officina data stage, without --on-demand.")
    return dataset


class Pieces:
    """The pieces of a data set that lie here."""

    def __init__(self, folder: Path, remote: Remote) -> None:
        self.folder, self.store, self.budget_bytes = folder / PIECES, Store(remote.url), remote.budget_bytes
        self._since_look = remote.budget_bytes  # look at the first

    def keep(self, name: str, content: bytes) -> None:
        """Give a piece its name; the oldest go if there are more bytes than allowed. A full disk keeps none."""
        temporary = self.folder / f"{name}.{os.getpid()}.{threading.get_ident()}.tmp"
        try:
            self.folder.mkdir(exist_ok=True)
            temporary.write_bytes(content)
            os.replace(temporary, self.folder / name)
        except OSError:
            temporary.unlink(missing_ok=True)
            return
        self._since_look += len(content)
        if self._since_look > self.budget_bytes // 100:  # so that ten processes beside each other keep the budget too
            self._since_look = 0
            self._make_room()

    def keeps(self, entries: list[ShardEntry]) -> bool:
        """May all of these shards lie here together?"""
        return sum(entry.bytes for entry in entries) <= self.budget_bytes * 9 // 10

    def _make_room(self) -> None:
        found = []
        for entry in os.scandir(self.folder):
            try:
                stat = entry.stat()
            except FileNotFoundError:  # another process made room
                continue
            found.append((stat.st_mtime, stat.st_size, entry.path))
        used = sum(size for _, size, _ in found)
        for _, size, path in sorted(found):
            if used <= self.budget_bytes * 9 // 10:
                return
            Path(path).unlink(missing_ok=True)
            used -= size


class RemoteFile:
    """A shard in a store."""

    def __init__(self, pieces: Pieces, entry: ShardEntry, itemsize: int, first_byte: int) -> None:
        self._pieces, self.entry = pieces, entry
        tokens_end = first_byte + entry.tokens * itemsize
        self._bounds = [0, *range(first_byte, tokens_end, PIECE_BYTES), tokens_end, entry.bytes]
        self.sound: Callable[[int, bytes], bool] = lambda start, content: True
        """Is the piece at byte `start` as the shard's checksums say? Known when its footer is."""
        self.changed: Callable[[int, bytes], bool] = lambda start, content: False
        """Does it hold something else where it was sound before?"""
        self._unsound: dict[int, bytes] = {}
        """Pieces that stayed wrong in all tries: not kept on the disk, and not asked for again at each read."""
        self._fetching: dict[int, threading.Lock] = {}

    def read_into(self, start: int, out: memoryview) -> None:
        """Bytes from `start` on, as many as `out` holds."""
        number = int(np.searchsorted(self._bounds, start, side="right")) - 1
        while len(out):
            first, stop = self._bounds[number], self._bounds[number + 1]
            n = min(len(out), stop - start)
            if not self._read_here(number, start - first, out[:n]):
                with self._fetching.setdefault(number, threading.Lock()):
                    if not self._read_here(number, start - first, out[:n]):
                        out[:n] = self._fetch(number)[start - first:start - first + n]
            start, out, number = start + n, out[n:], number + 1

    def fetch(self, piece: int) -> None:
        """Have a piece of the tokens here, counted from 0, as one read now, so that it stays until it is needed."""
        try:
            os.utime(self._path(piece + 1))
        except OSError:
            self.read_into(self._bounds[piece + 1], memoryview(bytearray(1)))

    def _read_here(self, number: int, offset: int, out: memoryview) -> bool:
        if (content := self._unsound.get(number)) is not None:
            out[:] = content[offset:offset + len(out)]
            return True
        try:
            file = os.open(self._path(number), os.O_RDONLY | os.O_CLOEXEC)
        except OSError:
            return False
        try:
            if time.time() - os.fstat(file).st_mtime > _LATELY_S:
                os.utime(file)  # read lately
            return os.preadv(file, [out], offset) == len(out)
        except OSError:
            return False
        finally:
            os.close(file)

    def _fetch(self, number: int) -> bytes:
        start, stop = self._bounds[number], self._bounds[number + 1]
        try:
            content = self._pieces.store.read(self.entry.path, start, stop, lambda content: self.sound(start, content))
        except FileNotFoundError as exc:
            raise DataError(f"{self._pieces.store.url}/{self.entry.path}: is not there, but shards.jsonl lists it. "
                            "Restore it in the store.") from exc
        if self.sound(start, content):
            self._pieces.keep(self._name(number), content)
        elif self.changed(start, content):
            raise DataError(f"{self._pieces.store.url}/{self.entry.path}: bytes {start} to {stop} are not those any more that "
                            "this run read there before. Restore the file in the store, then resume the run.")
        else:
            self._unsound[number] = content
        return content

    def array(self) -> "RemoteArray":
        """All of its bytes."""
        return RemoteArray(self, 0, self.entry.bytes)

    def forget(self, start: int = 0, stop: int | None = None) -> None:
        """Fetch the pieces under bytes [start, stop) again when they are next read."""
        stop = self.entry.bytes if stop is None else stop
        for number, (first, end) in enumerate(pairwise(self._bounds)):
            if first < stop and end > start:
                self._unsound.pop(number, None)
                self._path(number).unlink(missing_ok=True)

    def _name(self, number: int) -> str:
        return f"{self.entry.sha256[:24]}-{number:05d}"

    def _path(self, number: int) -> Path:
        return self._pieces.folder / self._name(number)


class RemoteArray(ByteArray):
    """Bytes of a shard in a store like a (n,) array."""

    def __init__(self, file: RemoteFile, offset: int, length: int, dtype: Any = np.uint8) -> None:
        super().__init__(offset, length, dtype)
        self._file = file

    def part(self, offset: int, length: int, dtype: Any) -> "RemoteArray":
        """The `length` bytes from `offset` on of the same file."""
        return RemoteArray(self._file, offset, length, dtype)

    def fill(self, at: int, out: memoryview) -> None:
        """Read from byte `at` of the file on."""
        self._file.read_into(at, out)
