"""Megatron-LM's X.bin and X.idx: read where they lie, with an index of ours beside them, and written.

The .bin is token ids laid end to end; the .idx, little-endian: b"MMIDIDX\\0\\0", u64 version 1, u8 dtype code, u64 sequences,
u64 entries of the document list, i32 length of each sequence, i64 byte at which it begins, i64 number of each document's
first sequence and, last, of all sequences (megatron/core/datasets/indexed_dataset.py). X.dli is a shard's header and footer.
"""

import hashlib
import os
import struct
from collections.abc import Callable, Sequence
from dataclasses import replace
from fnmatch import fnmatch
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np

from officina.trainer.data.croissant import write_croissant
from officina.trainer.data.describe import read_policy_file
from officina.trainer.data.manifest import (
    MANIFEST,
    TOKENIZER,
    Manifest,
    ShardEntry,
    TokenizerInfo,
    write_manifest,
    write_whole,
)
from officina.trainer.data.policy import POLICY, place_policy, policy_of, write_policy
from officina.trainer.data.remote import open_whole
from officina.trainer.data.removal import removed_documents
from officina.trainer.data.shard_writer import ShardWriter
from officina.trainer.data.shards import DTYPES, INDEX_SUFFIX, Shard
from officina.trainer.data.tokenizer import given_tokenizer, tokenizer_info
from officina.trainer.errors import DataError

_MAGIC = b"MMIDIDX\0\0"
_HEAD = struct.Struct("<9sQBQQ")
_CODES = {1: "u8", 8: "u16", 4: "u32"}  # 4 is int32, whose ids are never negative
_CHUNK_TOKENS = 1 << 22

Progress = Callable[[int], None]
"""Called with the bytes done."""


def index_folder(folder: str | Path, tokenizer: str | Path, *, eos: str = "", validation: Sequence[str] = (),
                 progress: Progress = lambda done_bytes: None, **about: Any) -> Manifest:
    """Make a folder with pairs of .bin and .idx a data set, without copying a token.

    validation: patterns of the names of files that are held out. about: further fields of dataset.json. A policy.json that
    lies there holds for it. Raises DataError if the folder holds a data set already, or files that are none of Megatron's
    or do not fit the tokenizer.
    """
    folder = Path(folder)
    if (folder / MANIFEST).exists():
        raise DataError(f"{folder} holds a data set already. Show it with `officina data inspect {folder}`; to index its "
                        f"files again, remove {folder / MANIFEST} first.")
    paths = sorted(path for path in folder.rglob("*.bin") if path.with_suffix(".idx").exists())
    if not paths:
        raise DataError(f"{folder}: has no X.bin with an X.idx beside it. Name the folder that Megatron's preprocess_data.py "
                        "wrote to.")
    policy = read_policy_file(folder / POLICY) if (folder / POLICY).exists() else None
    text = given_tokenizer(Path(tokenizer))
    info, entries, done, dtypes = tokenizer_info(text, eos), [], 0, {}
    for number, path in enumerate(paths):
        split = "validation" if any(fnmatch(path.name, pattern) for pattern in validation) else "train"
        entry, dtype = _index(folder, path, split, number, info, lambda here, done=done: progress(done + here))
        entries.append(entry)
        dtypes.setdefault(dtype, path)
        done += entry.bytes
    if len(dtypes) > 1:
        told = ", ".join(f"{path.name} ({dtype})" for dtype, path in dtypes.items())
        raise DataError(f"{folder}: {told} differ in dtype, but a data set has one. Move them to folders of their own.")
    if not any(entry.split == "train" for entry in entries):
        raise DataError(f"{folder}: every file is held out. Name fewer with --validation {' '.join(validation)}")
    write_whole(folder / TOKENIZER, text.encode())
    entries.sort(key=lambda entry: entry.split)
    stats = {split: {"documents": sum(e.documents for e in entries if e.split == split),
                     "tokens": sum(e.tokens for e in entries if e.split == split)}
             for split in sorted({e.split for e in entries})}
    provenance = {"tool": "officina data index", "officina": metadata.version("officina"),
                  "format": "Megatron-LM .bin and .idx"}
    about = {"name": folder.resolve().name} | (place_policy(folder, policy) if policy else {}) | about
    manifest = write_manifest(folder, entries, stats, kind="tokens", dtype=next(iter(dtypes)), tokenizer=info,
                              sources=[path.relative_to(folder).with_suffix("").as_posix() for path in paths],
                              provenance=provenance, **about)
    write_croissant(folder)
    return manifest


def _index(folder: Path, path: Path, split: str, source_id: int, info: TokenizerInfo,
           progress: Progress) -> tuple[ShardEntry, str]:
    """Write X.dli; the entry for shards.jsonl, and the dtype."""
    dtype, ends = read_index(path.with_suffix(".idx"))
    size, listed = path.stat().st_size, int(ends[-1]) if len(ends) else 0
    if not listed or size != listed * DTYPES[dtype].itemsize:
        raise DataError(f"{path}: has {size} bytes, but {path.with_suffix('.idx').name} says {listed} tokens of "
                        f"{DTYPES[dtype].itemsize} bytes. Restore the pair from a copy.")
    tokens = np.memmap(path, DTYPES[dtype], mode="r")
    digest, writer = hashlib.sha256(), ShardWriter(path.with_suffix(INDEX_SUFFIX), dtype=dtype, tokenizer_sha256=info.sha256,
                                                   holds_tokens=False)
    try:
        for first in range(0, len(tokens), _CHUNK_TOKENS):
            chunk = tokens[first:first + _CHUNK_TOKENS]
            digest.update(np.ascontiguousarray(chunk).view(np.uint8))
            if int(chunk.max()) >= info.vocab_size:
                raise DataError(f"{path}: has token id {int(chunk.max())}, but the tokenizer has {info.vocab_size} tokens: "
                                "it is not the one that made the file. Name the right one with --tokenizer FILE.")
            progress(first * tokens.itemsize)
        start = 0
        for end in ends.tolist():
            writer.add(tokens[start:end], source_id)
            start = end
        entry = writer.close(relative_to=folder, split=split)
    finally:
        writer.abandon()
    return replace(entry, path=path.relative_to(folder).as_posix(), bytes=path.stat().st_size, sha256=digest.hexdigest(),
                   kind="megatron"), dtype


def read_index(path: Path) -> tuple[str, np.ndarray]:
    """dtype and (documents,) int64 ends of the documents of an .idx, in tokens. Raises DataError if it is none."""
    content = path.read_bytes()
    if len(content) < _HEAD.size or content[:9] != _MAGIC:
        raise DataError(f"{path}: begins with {content[:9]!r}, an index of Megatron's with {_MAGIC!r}. Restore it from a "
                        "copy.")
    _, version, code, sequences, listed = _HEAD.unpack_from(content)
    if version != 1 or code not in _CODES:
        raise DataError(f"{path}: version {version}, dtype code {code}; officina reads version 1 with codes "
                        f"{', '.join(map(str, _CODES))} (uint8, uint16, int32). Preprocess the data again.")
    sizes = (4 * sequences, 8 * sequences, 8 * listed)
    if len(content) < _HEAD.size + sum(sizes):
        raise DataError(f"{path}: has {len(content)} bytes, but its header asks for {_HEAD.size + sum(sizes)}. Restore it "
                        "from a copy.")
    lengths = np.frombuffer(content, "<i4", sequences, _HEAD.size).astype(np.int64)
    begins = np.frombuffer(content, "<i8", sequences, _HEAD.size + sizes[0])
    firsts = np.frombuffer(content, "<i8", listed, _HEAD.size + sizes[0] + sizes[1])
    ends = np.concatenate(([0], np.cumsum(lengths)))
    if not np.array_equal(begins, ends[:-1] * DTYPES[_CODES[code]].itemsize):
        raise DataError(f"{path}: its sequences do not lie end to end in the .bin. Preprocess the data again, or merge it with "
                        "Megatron's tools/merge_datasets.py.")
    if listed < 1 or firsts[0] != 0 or firsts[-1] != sequences or np.any(np.diff(firsts) < 0):
        raise DataError(f"{path}: its list of documents does not go from sequence 0 to {sequences}. Restore it from a copy.")
    return _CODES[code], np.unique(ends[firsts])[1:]  # unique: documents without tokens are left out


# ---- export ----------------------------------------------------------------------------------------------------------
def write_megatron(folder: str | Path, out: str | Path | None = None) -> Path:
    """Write every split to OUT (default: DATASET/megatron), see `export_megatron`; returns OUT.

    Conditions of use that are more than a licence stand in OUT/policy.json, which holds for them when they are indexed again.
    """
    dataset, out = open_whole(folder), Path(out) if out else Path(folder) / "megatron"
    policy = policy_of(dataset)
    export_megatron(folder, out)
    if dataset.manifest.policy_sha256 or policy.sensitive or policy.personal_data != "none":
        write_policy(out, policy)
    return out


def export_megatron(dataset_folder: str | Path, out: str | Path,
                    progress: Progress = lambda done_bytes: None) -> dict[str, tuple[Path, int, int]]:
    """Write each split as OUT/SPLIT.bin and OUT/SPLIT.idx, a sequence per document; removed documents are left out.

    Returns path, documents and tokens of each. Raises DataError for records, and for files that are there already.
    """
    dataset, out, done = open_whole(dataset_folder), Path(out), 0
    if dataset.manifest.sealed:
        raise DataError(f"{dataset_folder} is sealed, and Megatron's files lie open. Build one without --seal where you may.")
    if dataset.manifest.kind != "tokens":
        raise DataError(f"{dataset_folder} holds {dataset.manifest.kind}, but Megatron reads tokens. "
                        "Name a data set of tokens.")
    if dataset.manifest.samples:
        raise DataError(f"{dataset_folder} holds {dataset.manifest.samples}, and Megatron's files cannot say which tokens are "
                        "trained on. Name a data set of texts.")
    removed, found = removed_documents(dataset), {}
    out.mkdir(parents=True, exist_ok=True)
    for split in dataset.manifest.splits:
        path = out / f"{split}.bin"
        if path.exists() or path.with_suffix(".idx").exists():
            raise DataError(f"{path}: is there already. Name an empty folder.")
        lengths: list[np.ndarray] = []
        temporary = path.with_name(path.name + ".tmp")
        with open(temporary, "wb") as file:
            for entry in dataset.of_split(split):
                shard = Shard(dataset.folder / entry.path, entry)
                lengths.append(_write_tokens(file, shard, removed.get(entry.path)))
                progress(done := done + entry.bytes)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
        documents = np.concatenate(lengths)
        write_whole(path.with_suffix(".idx"), _index_bytes(dataset.manifest.dtype, documents))
        found[split] = path, len(documents), int(documents.sum())
    return found


def _write_tokens(file: Any, shard: Shard, removed: np.ndarray | None) -> np.ndarray:
    """Write the tokens of the documents that are not removed, verified; returns their lengths."""
    lengths, starts = np.diff(shard.ends, prepend=0), np.concatenate(([0], shard.ends))
    stays = np.ones(len(lengths), bool)
    if removed is not None:
        stays[removed] = False
    first = 0
    for number in [*np.flatnonzero(~stays).tolist(), len(lengths)]:  # what lies between removed documents
        for start in range(int(starts[first]), int(starts[number]), _CHUNK_TOKENS):
            file.write(shard.read(start, min(start + _CHUNK_TOKENS, int(starts[number]))).tobytes())
        first = number + 1
    return lengths[stays]


def _index_bytes(dtype: str, lengths: np.ndarray) -> bytes:
    code = next(code for code, name in _CODES.items() if name == dtype)
    begins = (np.cumsum(lengths) - lengths) * DTYPES[dtype].itemsize
    head = _HEAD.pack(_MAGIC, 1, code, len(lengths), len(lengths) + 1)
    return head + lengths.astype("<i4").tobytes() + begins.astype("<i8").tobytes() + np.arange(
        len(lengths) + 1, dtype="<i8").tobytes()
