"""The manifest of a data set: what it is, what it may be used for, and the checksum of every file.

    DATASET/dataset.json     this file's `Manifest`; written last: a folder without it is no data set
    DATASET/shards.jsonl     one `ShardEntry` per line, in the order of the splits' token streams
    DATASET/tokenizer.json   Hugging Face tokenizers format (data sets of tokens)
    DATASET/policy.json      conditions of use, if there are any; `officina.trainer.data.policy`
    DATASET/croissant.json   the same for others, in Croissant; `officina.trainer.data.croissant`
    DATASET/stats.json       counts and length histograms per split and source
    DATASET/shards/*.dls     see `officina.trainer.data.shards`
    DATASET/removed/*.jsonl  lists of documents that were removed on request, see `officina.trainer.data.removal`

Nothing in it depends on the path, host, user or time of the build: the same input gives the same bytes.
"""

import contextlib
import fcntl
import hashlib
import json
import os
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import ConfigDict, Field, TypeAdapter, ValidationError

from officina.trainer.data.seal import Seal
from officina.trainer.errors import DataError

MANIFEST, SHARDS, TOKENIZER, STATS = "dataset.json", "shards.jsonl", "tokenizer.json", "stats.json"
WORK = ".build"
"""Folder of an unfinished build inside of the data set's."""
FORMAT = 1
Sha256 = Annotated[str, Field(pattern="^[0-9a-f]{64}$")]
Xxh64 = Annotated[str, Field(pattern="^[0-9a-f]{16}$")]
Natural = Annotated[int, Field(ge=0, strict=True)]


def _closed(cls):
    cls.__pydantic_config__ = ConfigDict(extra="forbid")
    return dataclass(frozen=True, kw_only=True)(cls)


@_closed
class ShardEntry:
    """One line of shards.jsonl."""

    path: str
    """Relative to the data set's folder, with forward slashes."""
    split: Annotated[str, Field(pattern="^[a-z0-9_-]+$")]
    bytes: Natural
    """Size of the file."""
    tokens: Natural
    """Tokens, or bytes of the records."""
    documents: Natural
    """Documents, or records."""
    sha256: Sha256
    """Of the whole file."""
    xxh3: Xxh64
    """Root of the shard's granule hashes, as in its footer."""
    kind: Literal["dls", "megatron"] = "dls"
    """megatron: `path` is a .bin of Megatron-LM, header and footer lie beside it, see `officina.trainer.data.megatron`."""


@_closed
class SplitTotals:
    """Sums over a split's shards."""

    shards: Natural
    documents: Natural
    tokens: Natural
    bytes: Natural


@_closed
class TokenizerInfo:
    """The tokenizer that made the tokens."""

    sha256: Sha256
    """Of tokenizer.json."""
    vocab_size: Natural
    eos: str
    """Token after each document."""
    eos_id: Natural


@_closed
class Step:
    """Something done to the documents on the way from the inputs to the shards."""

    name: str
    """Of ours, or a filter's package.module:function."""
    version: str = ""
    documents_in: Natural
    documents_out: Natural
    documents_changed: Natural = 0
    """Among those that went on, the ones whose text it changed."""


@_closed
class Removal:
    """A list of documents that were removed on request: their tokens give no loss, the order stays."""

    path: Annotated[str, Field(pattern=r"^removed/[0-9]+\.jsonl$")]
    """It is copied by this name: it must not lead out of the folder."""
    sha256: Sha256
    documents: Natural
    tokens: Natural


@_closed
class Manifest:
    """dataset.json."""

    format: Literal[1] = 1
    name: Annotated[str, Field(min_length=1)]
    version: Annotated[str, Field(pattern=r"^[0-9]+\.[0-9]+\.[0-9]+$")] = "1.0.0"
    kind: Literal["tokens", "records"]
    """Documents are rows of token ids, or records of bytes for a user's own decoder."""
    dtype: Literal["u8", "u16", "u32"]
    samples: Literal["", "answers", "pairs"] = ""
    """What a document is: a text; a sample of which the answers alone are trained on; or an answer of a preference pair,
    the chosen one and then the rejected one."""
    description: str = ""
    licence: str = ""
    """SPDX expression, or the name under which the data was licensed."""
    personal_data: Literal["none", "pseudonymised", "present"] = "none"
    sensitive: bool = False
    """With this, or with personal data present, no text of the data set is ever shown or logged."""
    sealed: Annotated[str, Field(pattern="^([0-9a-f]{16})?$")] = ""
    """Id of the key that the tokens are sealed with, see `officina.trainer.data.seal`; empty = they lie open."""
    policy_sha256: Sha256 | None = None
    """Of policy.json, the conditions of use; none = what this file says is all. See `officina.trainer.data.policy`."""
    creators: list[str] = field(default_factory=list)
    """Who made the data: named in summaries, receipts and attribution."""
    url: str = ""
    """Where the data set is described."""
    published: str = ""
    """Date of publication, 2026-11-23."""
    collected: str = ""
    """Date (2025, 2025-06 or 2025-06-30) at which the newest of the data was collected."""
    provenance: dict[str, str | int | float | bool | list[str]] = field(default_factory=dict)
    """How the data set was made: tool, versions, inputs and choices."""
    sources: list[str] = field(default_factory=list)
    """Names behind the documents' source ids."""
    languages: list[str] = field(default_factory=list)
    """Codes behind the documents' language ids, such as fin_Latn; none where no language is known."""
    steps: list[Step] = field(default_factory=list)
    """What was done to the documents, in order."""
    removals: list[Removal] = field(default_factory=list)
    """In the order of the requests; the shards and the fingerprint are the same with them."""
    tokenizer: TokenizerInfo | None = None
    splits: dict[str, SplitTotals] = field(default_factory=dict)
    shards_sha256: Sha256
    """Of shards.jsonl."""
    fingerprint: Sha256
    """Hash of the content alone: kind, dtype, tokenizer, and each shard's split and checksum."""


@dataclass(frozen=True, slots=True)
class Dataset:
    """A data set as opened: its folder, manifest and shards."""

    folder: Path
    manifest: Manifest
    shards: list[ShardEntry]
    seal: Seal | None = None
    """Opens the tokens of a sealed set."""

    def of_split(self, split: str) -> list[ShardEntry]:
        """The split's shards in stream order."""
        return [shard for shard in self.shards if shard.split == split]


_MANIFEST, _ENTRY = TypeAdapter(Manifest), TypeAdapter(ShardEntry)


def fingerprint(kind: str, dtype: str, tokenizer_sha256: str | None, shards: Iterable[ShardEntry]) -> str:
    """Hash of the content of a data set, whatever its name, folder, host or user."""
    content = [FORMAT, kind, dtype, tokenizer_sha256 or ""]
    content += [[s.split, s.sha256, s.tokens, s.documents] for s in shards]
    return hashlib.sha256(json.dumps(content, separators=(",", ":")).encode()).hexdigest()


def open_dataset(folder: str | Path) -> Dataset:
    """Read and check the manifest in `folder`; the shards themselves are opened when they are read."""
    folder = Path(folder)
    path = folder / MANIFEST
    if not os.path.isfile(path):  # also of a path that is too long for any
        begun = os.path.isdir(folder) and (any(folder.glob("shards/*")) or (folder / WORK).exists())
        half = " A build was begun there and not finished: the same command goes on with it." if begun else ""
        raise DataError(f"{folder} is no data set: it has no {MANIFEST}.{half} "
                        f"Make one with `officina data build {folder}`, or mend data.sources.NAME.path.")
    manifest = _parse(path, path.read_bytes(), _MANIFEST, path)
    listing = _read(folder / SHARDS)
    found = hashlib.sha256(listing).hexdigest()
    if found != manifest.shards_sha256:
        raise DataError(f"{folder / SHARDS}: sha256 {found}, but {MANIFEST} says {manifest.shards_sha256}. "
                        "The files do not belong together: restore the folder from a copy or build it again.")
    listed = folder / SHARDS
    shards = [_parse(f"{listed} line {i}", line, _ENTRY, listed)
              for i, line in enumerate(listing.splitlines(), 1)]
    for shard in shards:
        if shard.path.startswith("/") or ".." in shard.path.split("/"):  # by hand: thousands of them are opened in a second
            raise DataError(f"{folder / SHARDS}: path {shard.path!r} leaves the data set's folder. "
                            "Paths are relative to it, such as shards/train-00000.dls.")
    tokenizer_sha256 = manifest.tokenizer.sha256 if manifest.tokenizer else None
    found = fingerprint(manifest.kind, manifest.dtype, tokenizer_sha256, shards)
    if found != manifest.fingerprint:
        raise DataError(f"{path}: fingerprint {manifest.fingerprint}, but its content gives {found}. "
                        "Somebody edited the manifest: restore it from a copy or build the data set again.")
    if {name: asdict(totals) for name, totals in manifest.splits.items()} != (sums := _totals(shards)):
        raise DataError(f"{path}: splits are not the sums over {SHARDS}, which are {json.dumps(sums)}. "
                        "Somebody edited the manifest: restore it from a copy or build the data set again.")
    return Dataset(folder, manifest, shards)


def _totals(shards: list[ShardEntry]) -> dict[str, dict[str, int]]:
    """Sums over each split's shards."""
    found = {shard.split: dict.fromkeys(("shards", "documents", "tokens", "bytes"), 0) for shard in shards}
    for shard in shards:
        of_split = found[shard.split]
        of_split["shards"] += 1
        of_split["documents"] += shard.documents
        of_split["tokens"] += shard.tokens
        of_split["bytes"] += shard.bytes
    return found


def write_manifest(folder: Path, shards: list[ShardEntry], stats: dict[str, Any], *, kind: str, dtype: str,
                   tokenizer: TokenizerInfo | None = None, **about: Any) -> Manifest:
    """Write stats.json, shards.jsonl and, last, dataset.json; `about` are further fields of `Manifest`."""
    listing = "".join(json.dumps(_line(s), separators=(",", ":")) + "\n" for s in shards).encode()
    values = {**about, "kind": kind, "dtype": dtype, "splits": _totals(shards),
              "tokenizer": asdict(tokenizer) if tokenizer else None,
              "shards_sha256": hashlib.sha256(listing).hexdigest(),
              "fingerprint": fingerprint(kind, dtype, tokenizer.sha256 if tokenizer else None, shards)}
    try:
        manifest = _MANIFEST.validate_python(values)
    except ValidationError as exc:
        raise DataError(f"{folder / MANIFEST}: {_faults(exc)}") from exc
    write_whole(folder / STATS, (json.dumps(stats, indent=1) + "\n").encode())
    write_whole(folder / SHARDS, listing)
    rewrite_manifest(folder, manifest)
    return manifest


def rewrite_manifest(folder: Path, manifest: Manifest) -> None:
    """Write dataset.json alone: shards and fingerprint must be those that are there."""
    text = json.dumps(asdict(manifest), indent=1, ensure_ascii=False) + "\n"
    write_whole(folder / MANIFEST, text.encode())


def _line(entry: ShardEntry) -> dict[str, Any]:
    """Its line of shards.jsonl; the usual kind goes without saying."""
    return {key: value for key, value in asdict(entry).items() if (key, value) != ("kind", "dls")}


@contextlib.contextmanager
def claimed(folder: Path) -> Iterator[None]:
    """Be the one who writes to the data set in `folder`: a record lock, which a dead process loses. Raises OSError."""
    work = folder / WORK
    work.mkdir(parents=True, exist_ok=True)
    with open(work / "claim", "a+") as file:
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            taken = not os.fstat(file.fileno()).st_nlink  # who held it has removed it: another may have made a new one
        except (BlockingIOError, PermissionError):
            taken = True
        except OSError:
            taken = False  # a file system without locks
        if taken:
            raise DataError(f"{folder} is being built or changed by another process. Wait for it, then give the same command "
                            "again.")
        try:
            yield
        finally:
            with contextlib.suppress(OSError):
                if os.listdir(work) == ["claim"]:
                    os.unlink(work / "claim")
                    work.rmdir()


def write_whole(path: Path, content: bytes) -> None:
    """Write a file that is either whole or not there: temporary name, fsync, rename, fsync of the folder."""
    temporary = path.with_name(path.name + ".tmp")
    with open(temporary, "wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)
    sync_folder(path.parent)


def sync_folder(folder: Path) -> None:
    """Make renames in `folder` outlast a power cut."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as exc:
        raise DataError(f"{path}: {exc.strerror}. Restore the file from a copy or build the data set again.") from exc


def _parse(where: object, content: bytes, adapter: TypeAdapter, path: Path) -> Any:
    try:
        return adapter.validate_python(json.loads(content))
    except ValidationError as exc:
        raise DataError(f"{where}: {_faults(exc)}. Restore {path.name} from a copy or build the data set again.") from exc
    except (ValueError, RecursionError) as exc:
        raise DataError(f"{where}: not JSON ({exc}). Restore {path.name} from a copy or build the data set again.") from exc


def _faults(exc: ValidationError) -> str:
    return "; ".join(f"{'.'.join(map(str, e['loc'])) or 'content'}={e['input']!r}: {e['msg']}" for e in exc.errors())
