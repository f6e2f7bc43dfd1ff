"""Copies a data set to a faster place, verified while it is copied, within a budget; an interrupted copy goes on.

The copy knows where it came from, so that a run which meets a damaged block takes that block from there.
"""

import contextlib
import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path

from officina.trainer.data.chat import CHAT_TEMPLATE
from officina.trainer.data.croissant import CROISSANT
from officina.trainer.data.integrity import ORIGIN
from officina.trainer.data.manifest import (
    MANIFEST,
    SHARDS,
    STATS,
    TOKENIZER,
    Dataset,
    Manifest,
    claimed,
    open_dataset,
    rewrite_manifest,
    sync_folder,
    write_whole,
)
from officina.trainer.data.mldcat import MLDCAT
from officina.trainer.data.packing import FOLDER as PLANS
from officina.trainer.data.policy import POLICY
from officina.trainer.data.remote import PIECES, REMOTE
from officina.trainer.data.removal import FOLDER as REMOVED
from officina.trainer.data.removal import check_all_named
from officina.trainer.data.shards import INDEX_SUFFIX, Shard, index_of
from officina.trainer.errors import DataError

_CHUNK_BYTES = 8 << 20
BESIDE = (STATS, CROISSANT, MLDCAT, CHAT_TEMPLATE, POLICY)
"""Files that belong to a data set and that no hash in its manifest need cover. What else lies there is not ours to copy: it
may be the text that was sealed."""


@dataclass(frozen=True, slots=True)
class StageReport:
    """What was copied."""

    files: int
    copied_bytes: int
    kept_bytes: int
    """Of files that were there already, whole and right."""
    own_words: list[str] = field(default_factory=list)
    """Files in which a data set that was mended goes on saying of itself what the other does not say."""


def stage(folder: str | Path, out: str | Path, budget_bytes: int | None = None,
          progress: Callable[[int, int], None] = lambda done_bytes, total_bytes: None) -> StageReport:
    """Copy the data set in `folder` to `out`; its dataset.json comes last, so that half a copy is no data set.

    Where `out` is this data set already, its damaged files are mended. If it was staged from somewhere it takes on what
    `folder` says of itself (licence, conditions of use); if not it goes on saying its own.

    Raises DataError before the first byte if it exceeds `budget_bytes` or the room there is; and, naming each, if files
    are not what the manifest says: then none of them is left in `out`.
    """
    said, dataset, out = _content(Path(folder) / MANIFEST), open_dataset(folder), Path(out)
    own, original = check_target(dataset, folder, out), is_original(out)
    own_words = other_words(dataset, own, out)
    check_all_named(dataset)
    files = [(name, sha256) for name, sha256 in _files(dataset) if name not in own_words]
    total = sum((dataset.folder / name).stat().st_size for name, _ in files if (dataset.folder / name).exists())
    there = sum(size for name, _ in files if (out / name).exists()
                and (size := (out / name).stat().st_size) == (dataset.folder / name).stat().st_size)
    room(dataset.folder, out, total, there, budget_bytes)
    with claimed(out):
        done = copied = kept = 0
        faults = []
        for name, sha256 in files:
            source, target = dataset.folder / name, out / name
            size = source.stat().st_size if source.exists() else 0
            base = done
            if sha256 and target.exists() and target.stat().st_size == size and hash_of(target) == sha256:
                kept += size
            elif fault := _index_fault(dataset, name) or _copy(source, target, sha256,
                                                               lambda here, base=base: progress(base + here, total)):
                faults.append(fault)
            else:
                copied += size
            done += size
            progress(done, total)
        if faults:
            raise DataError(f"{folder} cannot be staged:\n" + "\n".join(f"  - {fault}" for fault in faults) +
                            f"\nRepair it from another copy: officina data stage COPY {folder}. What is whole stays in {out}, "
                            "and the same command goes on.")
        if _content(dataset.folder / MANIFEST) != said:
            raise DataError(f"{folder}: its {MANIFEST} was changed while it was copied. Give the same command again.")
        with disk_told(out):
            if not original:
                write_whole(out / ORIGIN, json.dumps({"origin": str(dataset.folder.resolve())}).encode())
            if own is None:
                write_whole(out / MANIFEST, said)
            else:
                take_removals(out, own, dataset)
            forget_store(out)
    return StageReport(len(files) + (own is None), copied, kept, own_words)


def check_target(dataset: Dataset, origin: str | Path, out: Path) -> Manifest | None:
    """The manifest in `out` if it is this data set and was not staged from anywhere: then what it says of itself stays.

    Raises DataError if `out` holds another data set than `origin`, or lists of removed documents that are missing there.
    """
    try:
        there = open_dataset(out).manifest if (out / MANIFEST).exists() else None
    except DataError:  # damaged: it is mended as a whole, but heeded are the lists that lie there
        there = None
    if there and there.fingerprint != dataset.manifest.fingerprint:
        raise DataError(f"{out} holds another data set. Name an empty folder.")
    known = dataset.manifest.removals
    lost = [each.path for each in there.removals if each not in known] if there else [
        name for path in sorted((out / REMOVED).glob("*.jsonl")) if (name := f"{REMOVED}/{path.name}") not in
        {each.path for each in known}]
    if lost:
        raise DataError(f"{out}: documents were removed from it on request ({', '.join(lost)}), but not "
                        f"from {origin}: staged over, they would be trained on again. Remove them there first "
                        "(officina data remove DATASET IDS), or stage into an empty folder.")
    return there if is_original(out) else None


def is_original(out: Path) -> bool:
    """Is there a data set that was not staged from anywhere?"""
    return (out / MANIFEST).exists() and not (out / ORIGIN).exists() and not (out / REMOTE).exists()


def other_words(dataset: Dataset, own: Manifest | None, out: Path) -> list[str]:
    """The files that are left as they are in `out`, since its own manifest stays and they say what the other's do not."""
    if own is None:
        return []
    described = [name for name in (CROISSANT, MLDCAT) if (out / name).exists()
                 and (out / name).read_bytes() != _content(dataset.folder / name)]
    differ = replace(own, removals=dataset.manifest.removals) != dataset.manifest
    return [POLICY] * (own.policy_sha256 != dataset.manifest.policy_sha256) + described + [MANIFEST] * differ


def take_removals(out: Path, own: Manifest, dataset: Dataset) -> None:
    """Let the manifest in `out` name the lists of removed documents that `dataset` has; they lie there already."""
    if own.removals != dataset.manifest.removals:
        rewrite_manifest(out, replace(own, removals=dataset.manifest.removals))


@contextlib.contextmanager
def disk_told(out: Path) -> Iterator[None]:
    """Raise DataError where the last small files cannot be written."""
    try:
        yield
    except OSError as exc:
        raise DataError(f"{exc.filename or out}: cannot be written ({exc.strerror}). Make room there, and the same command "
                        "goes on.") from exc


def _content(path: Path) -> bytes:
    return path.read_bytes() if path.exists() else b""


def forget_store(out: Path) -> None:
    """Every shard is in `out` now: none is read from the store any more."""
    (out / REMOTE).unlink(missing_ok=True)
    shutil.rmtree(out / PIECES, ignore_errors=True)


def _files(dataset: Dataset) -> Iterator[tuple[str, str | None]]:
    """Every file but dataset.json, with its sha256 where the manifest knows it."""
    manifest = dataset.manifest
    known = {SHARDS: manifest.shards_sha256} | {removal.path: removal.sha256 for removal in manifest.removals}
    known |= {POLICY: manifest.policy_sha256} if manifest.policy_sha256 else {}
    if manifest.tokenizer:
        known[TOKENIZER] = manifest.tokenizer.sha256
    for name in BESIDE:
        if name not in known and (dataset.folder / name).is_file():
            yield name, None
    for path in sorted((dataset.folder / PLANS).glob("*.plan")):  # each holds its own checksum
        yield f"{PLANS}/{path.name}", None
    yield from known.items()
    for entry in dataset.shards:
        yield entry.path, entry.sha256
        index = index_of(Path(entry.path))
        if index.as_posix() != entry.path:
            yield index.as_posix(), None


def _index_fault(dataset: Dataset, name: str) -> str:
    """What is wrong with the file, if it is the index of a Megatron pair: no hash in the manifest covers it."""
    if not name.endswith(INDEX_SUFFIX):
        return ""
    try:
        faults = Shard(dataset.folder / name.replace(INDEX_SUFFIX, ".bin")).check_footer()
    except DataError as exc:
        faults = [str(exc)]
    return faults[0] if faults else ""


def room(origin: str | Path, out: Path, total: int, there: int, budget_bytes: int | None) -> None:
    """Raise DataError unless `total` bytes, of which `there` are in `out` already, keep the budget and fit in."""
    if budget_bytes is not None and total > budget_bytes:
        raise DataError(f"{origin} has {total:,} bytes, more than --budget {budget_bytes:,}. Nothing was copied. "
                        f"Try: --budget {-(-total // 10**9)}G")
    try:
        out.mkdir(parents=True, exist_ok=True)
        free = shutil.disk_usage(out).free
    except OSError as exc:
        raise DataError(f"{out}: cannot be made ({exc.strerror}). Name a folder that you may write.") from exc
    if total - there > free:
        raise DataError(f"{origin} needs {total - there:,} more bytes, but {out} has {free:,} free. Nothing was "
                        "copied. Name a larger place.")


def _copy(source: Path, target: Path, sha256: str | None, progress: Callable[[int], None]) -> str | None:
    """Copy under a temporary name, compare what was read with the hash, and rename. Returns the fault, if there is one."""
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary, digest, done = target.with_name(target.name + ".tmp"), hashlib.sha256(), 0
    try:
        with open(source, "rb") as reader, open(temporary, "wb") as writer:
            while chunk := reader.read(_CHUNK_BYTES):
                digest.update(chunk)
                writer.write(chunk)
                done += len(chunk)
                progress(done)
            writer.flush()
            os.fsync(writer.fileno())
        if sha256 and digest.hexdigest() != sha256:
            return f"{source}: sha256 {digest.hexdigest()}, but the manifest says {sha256}"
        os.replace(temporary, target)
        sync_folder(target.parent)
        return None
    except OSError as exc:
        return f"{source}: cannot be copied to {target} ({exc.strerror})"
    finally:
        temporary.unlink(missing_ok=True)


def hash_of(path: Path) -> str:
    """sha256 of a file."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
