"""Writes shards, `officina.trainer.data.shards`: under a temporary name, and renamed when they are whole and on the disk."""

import contextlib
import hashlib
import os
import struct
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import xxhash

from officina.trainer.data.croissant import write_croissant
from officina.trainer.data.manifest import (
    MANIFEST,
    ShardEntry,
    open_dataset,
    sync_folder,
    write_manifest,
)
from officina.trainer.data.seal import Seal, read_seal
from officina.trainer.data.shards import ALIGN, DTYPES, END_MAGIC, GRANULE_BYTES, HEADER_BYTES, SHARD_BYTES, Header
from officina.trainer.errors import DataError


class ShardWriter:
    """Writes one shard document by document; `close` makes it appear under its name.

    holds_tokens: False writes the index alone, of tokens that lie in another file. seal: write them sealed.
    """

    def __init__(self, path: Path, *, dtype: str, tokenizer_sha256: str = "", holds_tokens: bool = True,
                 seal: Seal | None = None) -> None:
        self.path, self._dtype, self._tokenizer, self._holds_tokens = path, dtype, tokenizer_sha256, holds_tokens
        self._temporary = path.with_name(path.name + ".tmp")
        self._file = open(self._temporary, "wb")
        self._file.write(bytes(HEADER_BYTES))
        self._granule, self._hashes = xxhash.xxh3_64(), []
        self._in_granule = 0
        self._seal, self._open_granule, self._marks = seal, bytearray(), []
        self._ends: list[int] = []
        self._source_ids: list[int] = []
        self._language_ids: list[int] = []
        self._document_ids: list[bytes] = []
        self._trained: list[np.ndarray] = []
        self._document_bytes: list[int] = []
        self.tokens = 0

    @property
    def bytes(self) -> int:
        """Bytes of tokens so far."""
        return self.tokens * DTYPES[self._dtype].itemsize

    def add(self, document: np.ndarray, source_id: int = 0, language_id: int | None = None,
            document_id: bytes = b"", trained: np.ndarray | None = None, text_bytes: int | None = None) -> None:
        """Append one document, (n,) integers, n > 0; text_bytes: of its text in UTF-8.

        All documents of a shard have a language id, or none; so with ids, bytes and with `trained`, (n,) bool.
        """
        if not len(document):
            raise DataError(f"{self.path}: document {len(self._ends)} is empty; a document has at least one token or byte. "
                            "Leave empty documents out.")
        limit = np.iinfo(DTYPES[self._dtype]).max
        if document.dtype != DTYPES[self._dtype]:
            if int(document.max()) > limit or int(document.min()) < 0:
                raise DataError(f"{self.path}: document {len(self._ends)} has token id {int(document.max())}, "
                                f"but {self._dtype} holds 0 to {limit}. Take a wider dtype, such as u32.")
            document = document.astype(DTYPES[self._dtype])
        view = memoryview(np.ascontiguousarray(document)).cast("B")
        if self._holds_tokens and self._seal is None:
            self._file.write(view)
        while len(view):
            part = view[:GRANULE_BYTES - self._in_granule]
            if self._seal is None:
                self._granule.update(part)
            else:
                self._open_granule += part
            self._in_granule += len(part)
            view = view[len(part):]
            if self._in_granule == GRANULE_BYTES:
                self._end_granule()
        self.tokens += len(document)
        self._ends.append(self.tokens)
        self._source_ids.append(source_id)
        if language_id is not None:
            self._language_ids.append(language_id)
        if document_id:
            self._document_ids.append(document_id)
        if trained is not None:
            self._trained.append(trained)
        if text_bytes is not None:
            self._document_bytes.append(text_bytes)

    def _end_granule(self) -> None:
        if self._seal is not None:
            before = self._marks[-1] if self._marks else b""
            sealed, mark = self._seal.close(len(self._hashes), bytes(self._open_granule), before)
            self._file.write(sealed)
            self._granule.update(sealed)
            self._marks.append(mark)
            self._open_granule.clear()
        self._hashes.append(self._granule.intdigest())
        self._granule, self._in_granule = xxhash.xxh3_64(), 0

    def close(self, *, relative_to: Path, split: str) -> ShardEntry:
        """Finish the file, sync it, give it its name, and return its entry for shards.jsonl."""
        if self._in_granule:
            self._end_granule()
        footer = {"document_ends": np.asarray(self._ends, "<u8").tobytes(),
                  "source_ids": np.asarray(self._source_ids, "<u2").tobytes()}
        if self._language_ids:
            footer["language_ids"] = np.asarray(self._language_ids, "<u2").tobytes()
        if self._document_bytes:
            footer["document_bytes"] = np.minimum(self._document_bytes, 2**32 - 1).astype("<u4").tobytes()
        if self._document_ids:
            footer["document_ids"] = b"".join(self._document_ids)
        if self._trained:
            footer["trained"] = np.packbits(np.concatenate(self._trained), bitorder="little").tobytes()
        if self._marks:
            footer["seal"] = b"".join(self._marks)
        footer["granule_xxh3"] = np.asarray(self._hashes, "<u8").tobytes()
        offset, sections = HEADER_BYTES + self.bytes * self._holds_tokens, {}
        for name, content in footer.items():
            offset = _aligned(offset)
            sections[name] = (offset, len(content), xxhash.xxh3_64_intdigest(content))
            offset += len(content)
        offset = _aligned(offset)
        header = Header(self._dtype, self.tokens, len(self._ends), offset + 16, self._tokenizer, sections).pack()
        root = xxhash.xxh3_64(header)
        for name, content in footer.items():
            self._file.seek(sections[name][0])
            self._file.write(content)
        self._file.seek(offset)
        self._file.write(struct.pack("<Q8s", root.intdigest(), END_MAGIC))
        self._file.seek(0)
        self._file.write(header)
        self._file.flush()
        os.fsync(self._file.fileno())
        self._file.close()
        with open(self._temporary, "rb") as file:
            sha256 = hashlib.file_digest(file, "sha256").hexdigest()
        os.replace(self._temporary, self.path)
        sync_folder(self.path.parent)
        return ShardEntry(path=self.path.relative_to(relative_to).as_posix(), split=split, bytes=offset + 16,
                          tokens=self.tokens, documents=len(self._ends), sha256=sha256, xxh3=root.hexdigest())

    def abandon(self) -> None:
        """Remove what was written."""
        with contextlib.suppress(OSError):  # a full disk does not take what is left in memory
            self._file.close()
        self._temporary.unlink(missing_ok=True)


class SplitWriter:
    """Writes the shards of one split, `shards/SPLIT-00000.dls` and on, beginning a new one at `shard_bytes`."""

    def __init__(self, folder: Path, split: str, *, dtype: str, tokenizer_sha256: str = "",
                 shard_bytes: int = SHARD_BYTES, seal: Seal | None = None) -> None:
        self._folder, self._split, self._shard_bytes = folder, split, shard_bytes
        self._how = {"dtype": dtype, "tokenizer_sha256": tokenizer_sha256, "seal": seal}
        self._itemsize = DTYPES[dtype].itemsize
        self._writer: ShardWriter | None = None
        self._entries: list[ShardEntry] = []

    def add(self, document: np.ndarray, source_id: int = 0, language_id: int | None = None,
            document_id: bytes = b"", trained: np.ndarray | None = None, text_bytes: int | None = None) -> None:
        """Append one document, (n,) integers; see `ShardWriter.add`."""
        if self._writer and self._writer.bytes + len(document) * self._itemsize > self._shard_bytes:
            self._end_shard()
        if self._writer is None:
            (self._folder / "shards").mkdir(parents=True, exist_ok=True)
            path = self._folder / "shards" / f"{self._split}-{len(self._entries):05d}.dls"
            self._writer = ShardWriter(path, **self._how)
        self._writer.add(document, source_id, language_id, document_id, trained, text_bytes)

    def _end_shard(self) -> None:
        assert self._writer is not None
        self._entries.append(self._writer.close(relative_to=self._folder, split=self._split))
        self._writer = None

    def close(self) -> list[ShardEntry]:
        """Finish the last shard and return all entries."""
        if self._writer is not None:
            self._end_shard()
        return self._entries

    def __enter__(self) -> "SplitWriter":
        return self

    def __exit__(self, *exc: object) -> None:
        if self._writer is not None:
            self._writer.abandon()


def _aligned(offset: int) -> int:
    return -(-offset // ALIGN) * ALIGN


def write_records(directory: str | Path, records: Iterable[bytes], *, split: str = "train", name: str,
                  shard_bytes: int = SHARD_BYTES, seal: str = "", **about: Any) -> None:
    """Write `records` as split `split` of a data set for a user's own model; its decoder gets each back as bytes.

    A second call adds another split to the same folder. seal: where the key is to seal the records with, a file or
    `command:PROGRAM ARGS`; of all splits the same. `about` are further fields of dataset.json (version, description, licence,
    personal_data, sensitive, provenance). Raises DataError if the split exists already, if there is no record, or for another
    key than that of the other splits.
    """
    folder, before, stats = Path(directory), [], {}
    key = read_seal(seal, what="seal") if seal else None
    sealed = key.key_id if key else ""
    if (folder / MANIFEST).exists():
        dataset = open_dataset(folder)
        if dataset.manifest.kind != "records" or split in dataset.manifest.splits:
            raise DataError(f"{folder}: has splits {sorted(dataset.manifest.splits)} of {dataset.manifest.kind} already; "
                            f"split {split} cannot be written. Take another split name or an empty folder.")
        if dataset.manifest.sealed != sealed:
            others = dataset.manifest.sealed
            raise DataError(f"{folder}: all splits are sealed with one key, or none is. The others are sealed " + (
                f"with the key {others}: give it, seal=FILE." if others else "not: leave seal out."))
        before = dataset.shards
        said = ("version", "description", "licence", "personal_data", "sensitive", "policy_sha256", "creators", "url",
                "published", "collected", "provenance", "removals")
        kept = {key: getattr(dataset.manifest, key) for key in said}
        about = kept | about
    with SplitWriter(folder, split, dtype="u8", shard_bytes=shard_bytes, seal=key) as writer:
        for record in records:
            writer.add(np.frombuffer(record, np.uint8))
        entries = writer.close()
    if not entries:
        raise DataError(f"{folder}: split {split} has no record. Give write_records at least one.")
    shards = [*before, *entries]
    for each in dict.fromkeys(s.split for s in shards):
        of_split = [s for s in shards if s.split == each]
        stats[each] = {"records": sum(s.documents for s in of_split), "bytes": sum(s.tokens for s in of_split)}
    write_manifest(folder, shards, stats, kind="records", dtype="u8", name=name, sealed=sealed, **about)
    write_croissant(folder)
