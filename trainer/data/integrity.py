"""What is done about a damaged block of a shard: read once more, taken from the origin of a staged copy, else set aside.

A block is 256 KiB of tokens with a checksum, compared when it is first touched. A block that is set aside (quarantined) keeps
its place: its rows are read in their order, and its tokens as the ends of documents without loss, on whichever rank. So a
step is the same on any number of ranks and after any resume while the block stays as it is. The ledger names the blocks of each
step.
"""

import json
import mmap
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from officina.trainer.config import RunConfig
from officina.trainer.data.manifest import Dataset, ShardEntry
from officina.trainer.data.reader import open_source
from officina.trainer.data.remote import Store, is_url
from officina.trainer.data.shards import GRANULE_BYTES, DamagedBlock, Lost, Shard, merge_lost
from officina.trainer.data.stream import Stream
from officina.trainer.errors import DataError
from officina.trainer.run_dir import LEDGER

if TYPE_CHECKING:  # the loader needs torch, a login node has none
    from officina.trainer.data.loader import StepData
    from officina.trainer.ranks import Ranks

ORIGIN = "staged.json"
"""In a staged copy, where it was copied from: {"origin": FOLDER or URL}. Part of neither manifest nor fingerprint."""
STORE_TIMEOUT_S = 10.0
"""For a block from the store that a copy came from: all ranks wait, and a compute node may not reach it at all."""


@dataclass(frozen=True, slots=True)
class Mended:
    """What became of a damaged block."""

    shard: str
    """Path of the file."""
    block: int
    first_byte: int
    stop_byte: int
    tokens: int
    """Tokens of the block (bytes, of records)."""
    how: Literal["re-read", "re-staged", "lost"]
    why: str = ""
    """Why the origin could not be asked, if it could not."""

    def told(self) -> str:
        """A sentence for the log."""
        not_asked = f" (from where it was staged it cannot be had: {self.why})" if self.why else ""
        what = {"re-read": "was sound when it was read once more past the cache",
                "re-staged": "was taken from the origin of the staged copy",
                "lost": f"is set aside: its {self.tokens:,} tokens give no loss{not_asked}"}[self.how]
        where = f"{self.shard}: block {self.block} (bytes {self.first_byte:,} to {self.stop_byte:,})"
        return f"{where} did not match its checksum and {what}"


def mend(dataset: Dataset, entry: ShardEntry, shard: Shard, block: int) -> Mended:
    """Get the bytes of a damaged block from somewhere, or set it aside; afterwards `shard` no longer stumbles over it."""
    start, stop = shard.byte_span(block)
    how, why = "lost", ""
    if shard.accept(block, read_past_cache(shard.path, start, stop)):
        how = "re-read"
    elif origin := origin_of(dataset.folder):
        content, why = _from_origin(origin, entry.path, start, stop, lambda content: shard.is_sound(start, content))
        if shard.accept(block, content):
            how = "re-staged"
            _write_back(shard.path, content, start)
    if how == "lost":
        shard.set_aside({*shard.lost, block})
    first, last = shard.token_span(block)
    return Mended(str(shard.path), block, start, stop, last - first, how, why)


def _from_origin(origin: str, name: str, start: int, stop: int, sound: Callable[[bytes], bool]) -> tuple[bytes, str]:
    """Bytes [start, stop) of a file where a copy came from; fewer or none if it has no more, and why a store gives none."""
    if not is_url(origin):
        return read_past_cache(Path(origin) / name, start, stop), ""
    try:
        return Store(origin, STORE_TIMEOUT_S).read(name, start, stop, sound), ""
    except FileNotFoundError:
        return b"", f"{origin}/{name} is not there"
    except DataError as exc:
        return b"", str(exc)


def read_past_cache(path: Path, start: int, stop: int) -> bytes:
    """Bytes [start, stop) of a file, from the disk where its file system can; fewer if it is shorter, none without it.

    start: a multiple of 4096.
    """
    buffer = mmap.mmap(-1, -(-(stop - start) // 4096) * 4096)  # pages of our own: aligned, as O_DIRECT asks
    for flags in (getattr(os, "O_DIRECT", 0), 0):
        try:
            file = os.open(path, os.O_RDONLY | flags)
        except OSError:
            continue
        try:
            if hasattr(os, "posix_fadvise"):
                os.posix_fadvise(file, start, stop - start, os.POSIX_FADV_DONTNEED)
            got = os.preadv(file, [buffer], start)
            return buffer[:min(got, stop - start)]
        except OSError:
            continue
        finally:
            os.close(file)
    return b""


def _write_back(path: Path, content: bytes, start: int) -> None:
    """Mend the staged copy itself, so that others need not; several ranks may do so at once, with the same bytes."""
    try:
        file = os.open(path, os.O_WRONLY)
    except OSError:
        return  # a copy that cannot be written stays as it is: the good bytes are held in memory
    try:
        os.pwrite(file, content, start)
    except OSError:
        return
    finally:
        os.close(file)


def origin_of(folder: Path) -> str | None:
    """Folder or URL that a staged copy was copied from; none if it is none, or if the origin is not known."""
    try:
        return str(json.loads((folder / ORIGIN).read_bytes())["origin"])
    except (OSError, ValueError, KeyError, TypeError):
        return None


# ---- agreement of the ranks ----------------------------------------------------------------------------------------
@dataclass(slots=True)
class Quarantine:
    """What the ranks know together of damaged blocks."""

    budget: int
    """`data.max_damaged_blocks`."""
    lost: dict[str, Lost] = field(default_factory=dict)
    """By source."""
    all_blocks: Mapping[str, int] = field(default_factory=dict)
    """How many blocks each source has."""

    @property
    def blocks(self) -> int:
        """Blocks set aside so far, in all starts of the run."""
        return sum(len(numbers) for shards in self.lost.values() for numbers in shards.values())

    @property
    def is_over(self) -> bool:
        """Are more blocks set aside than the run may lose, or all of a source?"""
        return self.blocks > self.budget or bool(self._gone)

    @property
    def _gone(self) -> list[str]:
        """Sources of which nothing is left: small ones may lose all within the budget."""
        counts = {source: sum(map(len, shards.values())) for source, shards in self.lost.items()}
        return [source for source, count in counts.items() if count == self.all_blocks.get(source)]

    def agree(self, data: "StepData", found: float, ranks: "Ranks") -> tuple["StepData", list[str]]:
        """`data` with the lost blocks of all ranks' rows, and sentences on what is new; found: sum of `StepData.damage`.

        A collective, but only in a step for which a rank met damage.
        """
        if not found:
            return data, []
        said = [json.loads(text) for text in ranks.gather_text(json.dumps([data.lost, data.mended]))]
        lost = merge_lost(*(lost for lost, _ in said))
        self.lost = merge_lost(self.lost, lost)
        return replace(data, lost=lost), list(dict.fromkeys(text for _, mended in said for text in mended))

    def why_over(self, folders: Mapping[str, str]) -> str:
        """What is lost, by name, and how the run could go on. folders: path of each source's data set."""
        named = [f"  - {folders[source]}/{shard}: block{'s' * (len(blocks) > 1)} {', '.join(map(str, blocks))}"
                 for source, shards in self.lost.items() for shard, blocks in shards.items()]
        damaged, mend = "\n".join(named), "Mend the data set from a copy (officina data stage COPY {}), then go on"
        if self._gone:
            gone = self._gone[0]
            return (f"every block of data.sources.{gone} is damaged:\n{damaged}\n{mend.format(folders[gone])}; or go on "
                    f"without it: '~data.sources.{gone}'")
        return (f"{self.blocks} blocks are damaged, more than data.max_damaged_blocks={self.budget}:\n{damaged}\n"
                f"{mend.format(folders[next(iter(self.lost))])}; or go on without these blocks: "
                f"data.max_damaged_blocks={self.blocks}")


def open_quarantine(run: RunConfig, run_dir: Path, step: int, blocks: Mapping[str, int], ranks: "Ranks") -> Quarantine:
    """With what earlier starts set aside up to `step`; all ranks know what rank 0 finds. blocks: how many each source has."""
    found = still_lost(run, run_dir, step, blocks) if ranks.rank == 0 and step else {}
    return Quarantine(run.data.max_damaged_blocks, json.loads(ranks.broadcast_text(json.dumps(found))), blocks)


def still_lost(run: RunConfig, run_dir: Path, step: int, sources: Iterable[str]) -> dict[str, Lost]:
    """The blocks of `sources` that were set aside up to `step`, as the ledger says, and are damaged still: what was repaired
    since is lost no more."""
    lost = merge_lost(*(line.get("lost", {}) for line in _lines_of_loss(run_dir / LEDGER) if line.get("step", 0) <= step))
    found: dict[str, Lost] = {}
    for name in sorted(set(sources) & set(lost)):
        stream = Stream(open_source(run, name), run.data.split, read=run.data.read)
        for number, entry in enumerate(stream.entries):
            if blocks := [block for block in lost[name].get(entry.path, ()) if not _is_sound(stream.shard(number), block)]:
                found.setdefault(name, {})[entry.path] = blocks
    return found


def _lines_of_loss(ledger: Path) -> Iterator[dict[str, Any]]:
    """The steps that read without some blocks; their lines alone are parsed, for a ledger may have millions."""
    if ledger.exists():
        with open(ledger, "rb") as lines:
            for line in lines:
                if b'"lost":' in line:
                    with suppress(ValueError):  # a torn or damaged line is told by `officina data audit`
                        yield json.loads(line)


def _is_sound(shard: Shard, block: int) -> bool:
    try:
        shard.check(*(np.asarray([token]) for token in shard.token_span(block)))
    except DamagedBlock:
        return False
    return True


def spans_of(lost: Lost, entries: list[ShardEntry], itemsize: int) -> tuple[np.ndarray, np.ndarray]:
    """First tokens and ends of lost blocks in the stream of `entries`: (n,) int64 each, sorted."""
    starts, stops, first, size = [], [], 0, GRANULE_BYTES // itemsize
    for entry in entries:
        for block in lost.get(entry.path, ()):
            if block * size >= entry.tokens:
                raise DataError(f"{entry.path} has no block {block}, but the ledger says that it was set aside. The ledger was "
                                "edited or damaged: restore it from a copy of the run directory.")
            starts.append(first + block * size)
            stops.append(first + min((block + 1) * size, entry.tokens))
        first += entry.tokens
    return np.asarray(starts, np.int64), np.asarray(stops, np.int64)
