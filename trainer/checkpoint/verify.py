"""Is a checkpoint whole? Metadata first, then every chunk, shared among ranks and threads. No torch here.

Files are read with pread, not mapped: a sector that cannot be read, or a file cut short meanwhile, is an error with a
name; through a mapping it would be a SIGBUS.
"""

import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import xxhash

from officina.trainer.checkpoint.disk import why
from officina.trainer.checkpoint.index import Entry, build_index
from officina.trainer.checkpoint.layout import (
    CHUNK_BYTES,
    COMMIT,
    HEADER_BYTES,
    CheckpointInfo,
    Commit,
    Key,
    Manifest,
    Unreadable,
    checkpoints_dir,
    data_name,
    describe_header,
    header,
    manifest_hash,
    manifest_name,
    padded,
    parse_step_dir,
    read_commit,
    unpack_manifest,
)


class RankGroup(Protocol):
    """What is needed of `Ranks` here."""

    @property
    def rank(self) -> int: ...

    @property
    def world_size(self) -> int: ...

    def sum(self, numbers: Sequence[float]) -> list[float]: ...


class Alone:
    """One process by itself."""

    rank = 0
    world_size = 1

    def sum(self, numbers: Sequence[float]) -> list[float]:
        return list(numbers)


@dataclass(frozen=True, slots=True)
class Damage:
    """One thing that is wrong with a checkpoint."""

    file: str
    """Name in the checkpoint directory; empty for the directory itself."""
    why: str
    """What is wrong, with the byte range and tensor where there is one."""

    def __str__(self) -> str:
        return f"{self.file}: {self.why}" if self.file else self.why


@dataclass(frozen=True, slots=True)
class Contents:
    """The metadata of a checkpoint that fits together."""

    path: Path
    commit: Commit
    manifests: tuple[Manifest, ...]
    index: dict[Key, Entry]


def threads_here(ranks: RankGroup | None) -> int:
    """Threads a rank may use for reading: its share of the cores, 1 to 8."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    local = getattr(getattr(ranks, "env", None), "local_world_size", 1)
    return max(1, min(8, cores // max(1, local)))


def examine(directory: Path, *, step: int, run_id: str | None = None) -> tuple[Contents | None, list[Damage]]:
    """Read and check COMMIT, manifests, sizes and headers; not the chunks. Contents is None if anything is wrong.

    step is the one in the directory's name. With run_id, a checkpoint of another run is damage. Raises
    FileNotFoundError if there is no COMMIT.
    """
    try:
        commit = read_commit(directory)
    except Unreadable as e:
        return None, [Damage(COMMIT, str(e))]
    except FileNotFoundError:
        raise
    except OSError as e:
        return None, [Damage(COMMIT, f"cannot be read: {why(e.errno)}")]
    if commit.step != step:
        return None, [Damage(COMMIT, f"is of step {commit.step}, in a directory of step {step}")]
    if run_id is not None and commit.run_id != run_id:
        return None, [Damage(COMMIT, f"is of run {commit.run_id}, not of this run {run_id}")]
    damage: list[Damage] = []
    manifests: list[Manifest] = []
    for rank, stated in enumerate(commit.manifests):
        found = _examine_rank(directory, commit, rank, stated)
        (manifests if isinstance(found, Manifest) else damage).append(found)
    if damage:
        return None, damage
    index, problems = build_index(manifests)
    if problems:
        return None, [Damage("manifests", p) for p in problems]
    return Contents(directory, commit, tuple(manifests), index), []


def _examine_rank(directory: Path, commit: Commit, rank: int, stated_hash: str) -> Manifest | Damage:
    name = manifest_name(rank)
    try:
        raw = (directory / name).read_bytes()
    except FileNotFoundError:
        return Damage(name, "is missing")
    except OSError as e:
        return Damage(name, f"cannot be read: {why(e.errno)}")
    if manifest_hash(raw) != stated_hash:
        try:
            other = unpack_manifest(raw)
        except Unreadable as e:
            return Damage(name, f"its hash is not the one in COMMIT; {e}")
        if (other.run_id, other.step, other.rank) != (commit.run_id, commit.step, rank):
            return Damage(name, f"is of rank {other.rank}, step {other.step}, run {other.run_id}, not of "
                                f"rank {rank}, step {commit.step}, run {commit.run_id}")
        return Damage(name, "its hash is not the one in COMMIT: bytes were changed, or it is of another save")
    manifest = unpack_manifest(raw)
    name = data_name(rank)
    try:
        with open(directory / name, "rb", buffering=0) as file:
            size = os.fstat(file.fileno()).st_size
            found = file.read(HEADER_BYTES)
    except FileNotFoundError:
        return Damage(name, "is missing")
    except OSError as e:
        return Damage(name, f"cannot be read: {why(e.errno)}")
    wanted = header(commit.run_id, commit.step, commit.world_size, rank)
    if size < HEADER_BYTES or found == wanted:
        if size != manifest.file_bytes:
            return Damage(name, f"has {size} bytes; written were {manifest.file_bytes}")
        return manifest
    return Damage(name, f"bytes 0 to {HEADER_BYTES}: the header says {describe_header(found)}; "
                        f"expected {describe_header(wanted)}")


def _share(manifests: Sequence[Manifest], rank: int, world_size: int) -> Iterator[tuple[int, int]]:
    """(file, chunk) pairs that this rank verifies: a contiguous share of all bytes."""
    total = sum(m.file_bytes for m in manifests)
    begin, end = rank * total // world_size, (rank + 1) * total // world_size
    at = 0
    for m in manifests:
        for i, c in enumerate(m.chunks):
            if begin <= at < end:
                yield m.rank, i
            at += padded(c.bytes)


def _bad_chunks(directory: Path, manifest: Manifest, chunks: Sequence[int]) -> list[tuple[int, int, int]]:
    """(file, chunk, errno or 0) of those of `chunks` whose bytes are not what was written."""
    bad = []
    buffer = memoryview(bytearray(CHUNK_BYTES))
    try:
        fd = os.open(directory / data_name(manifest.rank), os.O_RDONLY | os.O_CLOEXEC)
    except OSError as e:
        return [(manifest.rank, chunks[0], e.errno)]
    try:
        for i in chunks:
            c = manifest.chunks[i]
            part = buffer[:padded(c.bytes)]
            try:
                got = os.preadv(fd, [part], c.offset)
            except OSError as e:
                bad.append((manifest.rank, i, e.errno))
                continue
            if got != part.nbytes or f"{xxhash.xxh3_64_intdigest(part):016x}" != c.hash:
                bad.append((manifest.rank, i, 0))
    finally:
        os.close(fd)
    return bad


def verify(directory: Path, *, step: int, run_id: str | None = None,
           ranks: RankGroup | None = None) -> tuple[Contents | None, list[Damage]]:
    """Check everything; Contents if it is whole, else what is wrong, the same on all ranks. Collective.

    Raises FileNotFoundError on all ranks if there is no COMMIT.
    """
    ranks = ranks or Alone()
    try:
        contents, damage = examine(directory, step=step, run_id=run_id)
    except FileNotFoundError:
        contents, damage = None, None
    missing, broken = ranks.sum([float(damage is None), float(bool(damage))])
    if missing:
        raise FileNotFoundError(f"{directory} has no {COMMIT}")
    if broken:
        return None, damage or [Damage(COMMIT, f"{broken:.0f} other ranks cannot read this checkpoint; see their logs")]
    assert contents is not None
    mine: dict[int, list[int]] = {}
    for file, chunk in _share(contents.manifests, ranks.rank, ranks.world_size):
        mine.setdefault(file, []).append(chunk)
    threads = threads_here(ranks)
    tasks = [(file, chunks[i::threads]) for file, chunks in mine.items() for i in range(min(threads, len(chunks)))]
    with ThreadPoolExecutor(threads) as pool:
        found = pool.map(lambda t: _bad_chunks(directory, contents.manifests[t[0]], t[1]), tasks)
        bad = sorted(b for part in found for b in part)
    damage = _agree(contents, bad, ranks)
    return (None, damage) if damage else (contents, [])


def _agree(contents: Contents, bad: list[tuple[int, int, int]], ranks: RankGroup) -> list[Damage]:
    """Every rank learns of each rank's first bad chunk; the manifests turn the numbers into words."""
    mine = [float(len(bad)), *(float(x) for x in (bad[0] if bad else (0, 0, 0)))]
    table = [0.0] * (4 * ranks.world_size)
    table[4 * ranks.rank:4 * ranks.rank + 4] = mine
    table = ranks.sum(table)
    damage = []
    for r in range(ranks.world_size):
        count, file, chunk, code = (int(x) for x in table[4 * r:4 * r + 4])
        if count:
            where = contents.manifests[file].chunks[chunk].where
            reason = f"cannot be read: {why(code)}" if code else "the hash is not that of what was written"
            more = f" (and {count - 1} more chunks)" if count > 1 else ""
            damage.append(Damage(data_name(file), f"{where}: {reason}{more}"))
    return damage


def list_checkpoints(run_dir: Path) -> list[CheckpointInfo]:
    """Every checkpoint directory of a run, oldest step first, by name: complete, incomplete or damaged.

    Reads metadata, sizes and headers, not the data: `latest_valid` and `open_checkpoint` do that.
    """
    root = checkpoints_dir(run_dir)
    found = [(parse_step_dir(p.name), p) for p in root.iterdir()] if root.is_dir() else []
    infos = [_info(p, *parsed) for parsed, p in found if parsed and p.is_dir()]
    return sorted(infos, key=lambda i: (i.step, i.name))


def _info(path: Path, step: int, suffix: str) -> CheckpointInfo:
    if suffix.startswith(".damaged"):
        return CheckpointInfo(step, path, "damaged", "was found damaged and set aside")
    try:
        contents, damage = examine(path, step=step)
    except FileNotFoundError:
        return CheckpointInfo(step, path, "incomplete", f"no {COMMIT}: its writing was not finished")
    if contents is None:
        return CheckpointInfo(step, path, "damaged", "; ".join(map(str, damage)))
    c = contents.commit
    return CheckpointInfo(step, path, "complete", None, c.run_id, c.world_size, c.data_bytes, c.train_state.tokens)


def latest_valid(run_dir: Path, *, run_id: str | None = None) -> CheckpointInfo | None:
    """The newest checkpoint of which every byte was read and found right; None if there is none."""
    for info in reversed(list_checkpoints(run_dir)):
        if info.status == "complete" and verify(info.path, step=info.step, run_id=run_id)[0]:
            return info
    return None
