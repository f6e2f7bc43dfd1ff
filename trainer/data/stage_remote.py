"""Stages a data set from an object store or HTTP: all of it, or its small files now and its shards when they are read."""

import json
import os
import tempfile
from collections.abc import Callable
from dataclasses import asdict
from hashlib import sha256
from pathlib import Path

from officina.trainer.data.integrity import ORIGIN
from officina.trainer.data.manifest import (
    MANIFEST,
    SHARDS,
    TOKENIZER,
    Dataset,
    claimed,
    open_dataset,
    sync_folder,
    write_whole,
)
from officina.trainer.data.policy import POLICY
from officina.trainer.data.remote import LEAST_BUDGET_BYTES, REMOTE, Remote, Store
from officina.trainer.data.shards import index_of
from officina.trainer.data.stage import (
    BESIDE,
    StageReport,
    check_target,
    disk_told,
    forget_store,
    hash_of,
    is_original,
    other_words,
    room,
    take_removals,
)
from officina.trainer.errors import DataError

_PART_BYTES = 64 << 20
_SMALL = (SHARDS, TOKENIZER, *BESIDE)


def stage_from_store(url: str, out: str | Path, budget_bytes: int | None = None, *, on_demand: bool = False,
                     progress: Callable[[int, int], None] = lambda done_bytes, total_bytes: None) -> StageReport:
    """Copy the data set at `url` to `out`, its dataset.json last.

    on_demand: leave the shards where they are; at most `budget_bytes` of them are kept here as they are read. Raises DataError
    before a shard is fetched if there is no room for them; files that are not what the manifest says are named, and not kept.
    """
    store, out = Store(url), Path(out)
    with tempfile.TemporaryDirectory(prefix="officina-stage-") as scratch:
        dataset = _fetch_small(store, Path(scratch))
        own, original = check_target(dataset, store.url, out), is_original(out)
        own_words = other_words(dataset, own, out)
        small = sorted(path.relative_to(scratch).as_posix() for path in Path(scratch).rglob("*") if path.is_file())
        total = 0 if on_demand else sum(entry.bytes for entry in dataset.shards)
        if on_demand:
            _check_on_demand(dataset, store, budget_bytes)
        there = sum(entry.bytes for entry in dataset.shards if _is_there(out / entry.path, entry.bytes))
        room(store.url, out, total, there, budget_bytes if not on_demand else None)
        with claimed(out):
            copied = kept = done = 0
            faults = []
            for entry in () if on_demand else dataset.shards:
                if _is_there(out / entry.path, entry.bytes) and hash_of(out / entry.path) == entry.sha256:
                    kept += entry.bytes
                elif fault := _fetch(store, entry.path, entry.bytes, entry.sha256, out / entry.path,
                                     lambda here, done=done: progress(done + here, total)):
                    faults.append(fault)
                else:
                    copied += entry.bytes
                done += entry.bytes
                progress(done, total)
            if faults:
                raise DataError(f"{store.url} cannot be staged:\n" + "\n".join(f"  - {fault}" for fault in faults) +
                                f"\nRestore these files in the store; what is whole stays in {out}, and the same command "
                                "goes on.")
            with disk_told(out):
                if on_demand:
                    whole = sum(entry.bytes for entry in dataset.shards)
                    remote = Remote(store.url, budget_bytes or whole * 10 // 9 + 1)  # nine tenths of it are filled
                elif not original:
                    write_whole(out / ORIGIN, json.dumps({"origin": store.url}).encode())
                for name in (*(name for name in small if name != MANIFEST), MANIFEST):
                    if name == MANIFEST and on_demand:
                        write_whole(out / REMOTE, (json.dumps(asdict(remote), indent=1) + "\n").encode())
                    if name in own_words or (name == MANIFEST and own is not None):
                        continue
                    content = (Path(scratch) / name).read_bytes()
                    (out / name).parent.mkdir(parents=True, exist_ok=True)
                    write_whole(out / name, content)
                    copied += len(content)
                if own is not None:
                    take_removals(out, own, dataset)
                if not on_demand:
                    forget_store(out)
    return StageReport(len(small) + (0 if on_demand else len(dataset.shards)), copied, kept, own_words)


def _fetch_small(store: Store, folder: Path) -> Dataset:
    """Everything but the tokens, in `folder`, checked."""
    try:
        manifest = store.read(MANIFEST)
    except FileNotFoundError as exc:
        raise DataError(f"{store.url} is no data set: it has no {MANIFEST}. "
                        "Name the folder that `officina data build` made.") from exc
    (folder / MANIFEST).write_bytes(manifest)
    for name in _SMALL:
        try:
            (folder / name).write_bytes(store.read(name))
        except FileNotFoundError:
            continue  # what must be there is missed when it is opened
    dataset = open_dataset(folder)
    indexes = {index_of(Path(entry.path)).as_posix() for entry in dataset.shards} - {entry.path for entry in dataset.shards}
    for name in (*(removal.path for removal in dataset.manifest.removals), *sorted(indexes)):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        try:
            (folder / name).write_bytes(store.read(name))
        except FileNotFoundError as exc:
            raise DataError(f"{store.url}/{name}: is not there, but belongs to the data set. Restore it in the store.") from exc
    named = {TOKENIZER: dataset.manifest.tokenizer.sha256 if dataset.manifest.tokenizer else None,
             POLICY: dataset.manifest.policy_sha256} | {removal.path: removal.sha256 for removal in dataset.manifest.removals}
    for name, wanted in named.items():
        if wanted and (not (folder / name).exists() or hash_of(folder / name) != wanted):
            raise DataError(f"{store.url}/{name}: is not the one that {MANIFEST} names. Restore it in the store.")
    return dataset


def _check_on_demand(dataset: Dataset, store: Store, budget_bytes: int | None) -> None:
    if budget_bytes is not None and budget_bytes < LEAST_BUDGET_BYTES:
        raise DataError(f"--budget {budget_bytes}: the pieces of one step may be more than that. "
                        f"Try: --budget {LEAST_BUDGET_BYTES}")
    if any(entry.kind != "dls" for entry in dataset.shards):
        raise DataError(f"{store.url}: Megatron's files cannot be read on demand. Stage them whole, without --on-demand.")
    for entry in dataset.shards[:1]:
        store.read(entry.path, 0, 16)  # does it give parts of files?


def _is_there(path: Path, size: int) -> bool:
    return path.exists() and path.stat().st_size == size


def _fetch(store: Store, name: str, size: int, wanted: str, target: Path, progress: Callable[[int], None]) -> str | None:
    """Fetch a file under a temporary name, compare its hash, and rename. Returns the fault, if there is one."""
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary, digest = target.with_name(target.name + ".tmp"), sha256()
    try:
        with open(temporary, "wb") as file:
            for start in range(0, size, _PART_BYTES):
                content = store.read(name, start, min(start + _PART_BYTES, size))
                digest.update(content)
                file.write(content)
                progress(start + len(content))
            file.flush()
            os.fsync(file.fileno())
        if digest.hexdigest() != wanted:
            return f"{store.url}/{name}: sha256 {digest.hexdigest()}, but the manifest says {wanted}"
        temporary.replace(target)
        sync_folder(target.parent)
        return None
    except FileNotFoundError:
        return f"{store.url}/{name}: is not there"
    except OSError as exc:
        return f"{store.url}/{name}: cannot be copied to {target} ({exc.strerror})"
    finally:
        temporary.unlink(missing_ok=True)
