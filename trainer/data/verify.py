"""Checks every byte of a data set against its manifest."""

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from officina.trainer.data.manifest import MANIFEST, TOKENIZER, Dataset, ShardEntry
from officina.trainer.data.packing import FOLDER as PLANS
from officina.trainer.data.packing import load_plan
from officina.trainer.data.remote import open_whole
from officina.trainer.data.removal import removed_documents
from officina.trainer.data.seal import read_seal
from officina.trainer.data.shards import Shard
from officina.trainer.data.tokenizer import tokenizer_info
from officina.trainer.errors import DataError

_CHUNK_BYTES = 8 << 20


@dataclass(frozen=True, slots=True)
class VerifyReport:
    """What `verify` found."""

    dataset: Dataset
    bytes: int
    """Bytes read."""
    faults: list[str]
    """One message per damaged file or part of it; empty if all is sound."""


def verify(folder: str | Path, progress: Callable[[int], None] = lambda done_bytes: None, key: str = "") -> VerifyReport:
    """Compare sha256 of the tokenizer and of each shard; where one differs, find the damaged part. Stored packing plans too.

    `progress` is called with the bytes read so far. key: of a sealed set, tries every block's seal too. Raises DataError if
    there is no readable manifest.
    """
    dataset = open_whole(folder)
    if key and not dataset.manifest.sealed:
        raise DataError(f"--key {key}: {folder} is not sealed. Leave the key out.")
    seal = read_seal(key, dataset.manifest.sealed) if key else None
    faults, done_bytes = _tokenizer_faults(dataset) + _removal_faults(dataset) + _plan_faults(dataset), 0
    for entry in dataset.shards:
        found, done_bytes = _sha256(dataset.folder / entry.path, done_bytes, progress)
        faults += _shard_faults(dataset, entry, found)
        if seal is not None and found == entry.sha256:
            faults += Shard(dataset.folder / entry.path, entry, seal=seal).check_all()
    return VerifyReport(dataset, done_bytes, faults)


def _tokenizer_faults(dataset: Dataset) -> list[str]:
    wanted, path = dataset.manifest.tokenizer, dataset.folder / TOKENIZER
    if wanted is None:
        return []
    found, _ = _sha256(path, 0, lambda done_bytes: None)
    if found == wanted.sha256:
        return _info_faults(dataset)
    return [f"{path}: {'missing' if found is None else f'sha256 {found}'}, but dataset.json says {wanted.sha256}. "
            "Restore the file from a copy: with another tokenizer the token ids mean something else."]


def _info_faults(dataset: Dataset) -> list[str]:
    """What dataset.json says of its tokenizer, which no hash covers, against the tokenizer."""
    wanted, path = dataset.manifest.tokenizer, dataset.folder / TOKENIZER
    try:
        has = tokenizer_info(path.read_text(encoding="utf-8"), wanted.eos)
    except DataError as exc:
        return [f"{dataset.folder / MANIFEST}: tokenizer.eos={wanted.eos}, but {exc}"]
    except Exception:  # as tokenizers raises: a file that it cannot read, and that is the one which was given
        return []
    differ = [f"{name}={getattr(wanted, name)}, but {TOKENIZER} has {getattr(has, name)}" for name in ("vocab_size", "eos_id")
              if getattr(wanted, name) != getattr(has, name)]
    return [f"{dataset.folder / MANIFEST}: tokenizer.{each}. Restore the file from a copy." for each in differ]


def _removal_faults(dataset: Dataset) -> list[str]:
    try:
        removed_documents(dataset)
    except DataError as exc:
        return [str(exc)]
    return []


def _plan_faults(dataset: Dataset) -> list[str]:
    faults = []
    for path in sorted((dataset.folder / PLANS).glob("*.plan")):
        try:
            load_plan(path, dataset.manifest.fingerprint)
        except DataError as exc:
            faults.append(str(exc))
    return faults


def _shard_faults(dataset: Dataset, entry: ShardEntry, sha256: str | None) -> list[str]:
    path = dataset.folder / entry.path
    if sha256 is None:
        return [f"{path}: missing, but shards.jsonl lists it with {entry.bytes} bytes. Restore it from a copy."]
    sound = sha256 == entry.sha256
    if sound and entry.kind == "dls":
        return []  # a pair of Megatron's has an index beside it, which that hash does not cover
    try:
        parts = Shard(path, entry).check_all()
    except DataError as exc:
        parts = [str(exc)]
    if sound or parts:
        return parts
    return [f"{path}: sha256 {sha256}, but shards.jsonl says {entry.sha256}: bytes between the sections differ; "
                     "tokens, documents and checksums are sound. Restore the file from a copy."]


def _sha256(path: Path, done_bytes: int, progress: Callable[[int], None]) -> tuple[str | None, int]:
    """Hash of a file, and bytes read so far; no hash if the file is not there."""
    digest = hashlib.sha256()
    try:
        with open(path, "rb") as file:
            while chunk := file.read(_CHUNK_BYTES):
                digest.update(chunk)
                done_bytes += len(chunk)
                progress(done_bytes)
    except OSError:
        return None, done_bytes
    return digest.hexdigest(), done_bytes
