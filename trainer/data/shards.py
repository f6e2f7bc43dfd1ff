"""The shard, a `.dls` file: tokens that need no decoding, and what is needed to trust and to divide them.

    header   4096 bytes: magic, version, sizes, tokenizer hash, table of the footer's sections with their xxh3-64, xxh3 of all
    this tokens   raw, little-endian, u8, u16 or u32; starts at byte 4096
    footer   sections, each starting at a multiple of 64 bytes:
               document_ends   u64 per document: offset in tokens just after its last token
               source_ids      u16 per document: number of its source in dataset.json
               language_ids    u16 per document: number of its language in dataset.json (where languages are known)
               document_bytes  u32 per document: UTF-8 bytes of its text (where the writer knew)
               document_ids    16 bytes per document, see `officina.trainer.data.documents.document_id` (not in old shards)
               trained         a bit per token, lowest first: is it trained on, as a label? (only where not all tokens are)
               seal            28 bytes per granule, of sealed shards: nonce and tag, see `officina.trainer.data.seal`
               granule_xxh3    u64 per granule: xxh3-64 of 256 KiB of tokens (the last granule may be shorter)
             and last, 16 bytes: xxh3-64 of the header (the root: it holds those of the sections, and they those of the
             granules), magic. In version 1 the table has no hashes, and the root is that of header and sections.

Tokens may also lie in a file of their own, as Megatron-LM's X.bin does: then X.dli beside it is header and footer alone.
A reader ignores sections it does not know, so that flags per document can be added without a new version. A shard never
changes: it is written under a temporary name and renamed when it is whole and on the disk. Documents are never split over
shards.
"""

import struct
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import xxhash

from officina.trainer.data.manifest import ShardEntry
from officina.trainer.data.seal import MARK_BYTES, Seal, SealedArray
from officina.trainer.data.storage import ByteArray, FileArray, Mapped, at_once, map_file
from officina.trainer.errors import DataError

if TYPE_CHECKING:
    from officina.trainer.data.remote import RemoteFile

HEADER_BYTES = 4096
GRANULE_BYTES = 256 * 1024
SHARD_BYTES = 1 << 30
"""Size at which a writer begins the next shard: few files, as parallel file systems like it."""
DTYPES = {"u8": np.dtype("u1"), "u16": np.dtype("<u2"), "u32": np.dtype("<u4")}
_MAGIC, END_MAGIC, _VERSION = b"OFF-DLS\x01", b"DLS-END\x01", 2
# magic, version, bytes per token, tokens, documents, granule bytes, file bytes, tokenizer sha256, sections
_FIXED = struct.Struct("<8sIIQQQQ32sI4x")
_SECTION = {1: struct.Struct("<24sQQ"), 2: struct.Struct("<24sQQQ")}  # by version: name, offset, bytes, xxh3-64
ALIGN = 64
INDEX_SUFFIX = ".dli"
Advise = Callable[[int, int], None]


@dataclass(frozen=True, slots=True)
class Header:
    """The first 4096 bytes of a shard, or of its index."""

    dtype: str
    tokens: int
    documents: int
    file_bytes: int
    tokenizer_sha256: str
    sections: dict[str, tuple[int, ...]]
    """Offset, bytes and xxh3-64 of each section of the footer; in version 1 without the last."""

    def pack(self) -> bytes:
        """The header's bytes."""
        tokenizer = bytes.fromhex(self.tokenizer_sha256 or "00" * 32)
        body = _FIXED.pack(_MAGIC, _VERSION, DTYPES[self.dtype].itemsize, self.tokens, self.documents,
                           GRANULE_BYTES, self.file_bytes, tokenizer, len(self.sections))
        body += b"".join(_SECTION[_VERSION].pack(name.encode(), *span) for name, span in self.sections.items())
        body = body.ljust(HEADER_BYTES - 8, b"\0")
        return body + struct.pack("<Q", xxhash.xxh3_64_intdigest(body))


Lost = dict[str, list[int]]
"""Path of a shard, as in shards.jsonl -> its blocks that are set aside, sorted; `officina.trainer.data.integrity`."""


def merge_lost(*parts: Mapping[str, Mapping[str, Iterable[int]]]) -> dict[str, Lost]:
    """The union of lost blocks by source, sorted."""
    union: dict[str, dict[str, set[int]]] = {}
    for part in parts:
        for source, shards in part.items():
            for shard, blocks in shards.items():
                union.setdefault(source, {}).setdefault(shard, set()).update(blocks)
    return {source: {shard: sorted(shards[shard]) for shard in sorted(shards)} for source, shards in sorted(union.items())}


class DamagedIndex(DataError):
    """A header or footer that is not what its checksum was made of."""


class DamagedBlock(DataError):
    """Bytes of a block that are not those its checksum was made of."""

    def __init__(self, message: str, block: int) -> None:
        super().__init__(message)
        self.block = block


class Shard:
    """A shard, mapped. Its header is checked when it is opened, sections of the footer and tokens when first touched.

    pread: read its tokens instead, see `officina.trainer.data.storage`; `data` then is a `ByteArray`. remote: it is in a store,
    `officina.trainer.data.remote`. seal: opens the tokens of a sealed shard; `data` then is a `SealedArray`.
    """

    def __init__(self, path: Path, entry: ShardEntry | None = None, *, pread: bool = False,
                 remote: "RemoteFile | None" = None, seal: Seal | None = None) -> None:
        self.path, self.pread, self._remote, self._seal = path, pread or remote is not None, remote, seal
        try:
            mapped = None if remote else map_file(index_of(path))
            self._map = mapped.bytes if mapped else remote.array() if remote else FileArray(index_of(path))
        except (OSError, ValueError) as exc:  # ValueError: an empty file cannot be mapped
            raise DataError(f"{path}: cannot be opened ({exc}). {_REMEDY}") from exc
        header = _parse_header(path, self._map)
        if header.file_bytes != len(self._map):
            raise DamagedIndex(f"{path}: has {len(self._map)} bytes, but its header says {header.file_bytes}. {_REMEDY}")
        root, end_magic = struct.unpack("<Q8s", self._map[-16:].tobytes())
        found = xxhash.xxh3_64(self._map[:HEADER_BYTES])
        for offset, length, *own in header.sections.values():
            if not own:
                found.update(self._map[offset:offset + length])
        if end_magic != END_MAGIC or found.intdigest() != root:
            raise DamagedIndex(f"{path}: the footer (bytes {HEADER_BYTES + header.tokens * DTYPES[header.dtype].itemsize} to "
                            f"{len(self._map)}) does not match its checksum. {_REMEDY}")
        if entry and (found.hexdigest(), header.tokens) != (entry.xxh3, entry.tokens):
            raise DataError(f"{path}: xxh3 root {found.hexdigest()}, but shards.jsonl says {entry.xxh3}: "
                            f"it is a shard of another data set. {_REMEDY}")
        self.dtype, self.tokenizer_sha256 = header.dtype, header.tokenizer_sha256
        self.documents, self._sections = header.documents, header.sections
        self._first_byte, self._bytes, self._will_need = self._find_tokens(header, mapped)
        self.pread = isinstance(self._bytes, ByteArray)
        self._marks = self._section("seal", "u1").reshape(-1, MARK_BYTES)
        self.data = SealedArray(self._bytes, self._marks, seal, DTYPES[header.dtype], GRANULE_BYTES, path) if len(
            self._marks) else self._bytes.view(DTYPES[header.dtype])
        """(tokens,) unverified; see `check`."""
        self._hashes = self._section("granule_xxh3", "<u8")
        for name in header.sections if remote is not None else ():  # it came as a whole, and is asked for again if damaged
            self._section(name, "u1")
        self._flags = bytearray(len(self._hashes))  # the same memory, for single questions
        self._checked = np.frombuffer(self._flags, bool)
        self.replaced: dict[int, bytes] = {}
        """Right bytes of blocks that the map does not hold; see `accept`."""
        self.lost: frozenset[int] = frozenset()
        """Blocks that are set aside: nobody asks what they hold."""

    @cached_property
    def ends(self) -> np.ndarray:
        """(documents,) int64 offset just after each document's last token."""
        return self._section("document_ends", "<i8")

    @cached_property
    def source_ids(self) -> np.ndarray:
        """(documents,) number of each document's source."""
        return self._section("source_ids", "<u2")

    @cached_property
    def language_ids(self) -> np.ndarray:
        """(documents,), or (0,) where languages are not known."""
        return self._section("language_ids", "<u2")

    @cached_property
    def document_bytes(self) -> np.ndarray:
        """(documents,) UTF-8 bytes of each text, or (0,) where they are not known."""
        return self._section("document_bytes", "<u4")

    @cached_property
    def document_ids(self) -> np.ndarray:
        """(documents, 16), or (0, 16) in shards without ids."""
        return self._section("document_ids", "u1").reshape(-1, 16)

    @cached_property
    def _trained(self) -> np.ndarray:
        return self._section("trained", "u1")

    @property
    def has_trained(self) -> bool:
        """Does it say which tokens are trained on? If not, all are."""
        return "trained" in self._sections

    def trained(self, places: np.ndarray) -> np.ndarray:
        """Are the tokens at `places`, (n,) int64, trained on? (n,) bool."""
        if not self.has_trained:
            return np.ones(len(places), bool)
        return (self._trained[places >> 3] >> (places & 7).astype(np.uint8) & 1).astype(bool)

    def _section(self, name: str, dtype: str) -> np.ndarray:
        """A section of the footer, compared with its checksum; empty if there is none. Raises DamagedIndex."""
        offset, length, *own = self._sections.get(name, (0, 0))
        content = self._map[offset:offset + length]
        if own and xxhash.xxh3_64_intdigest(content) != own[0]:
            raise DamagedIndex(f"{self.path}: {name} in the footer (bytes {offset} to {offset + length}) does not match its "
                               f"checksum. {_REMEDY}")
        return content.view(dtype)

    def _find_tokens(self, header: Header, mapped: Mapped | None) -> tuple[int, np.ndarray | ByteArray, Advise]:
        """First byte of the tokens in their file, all of their bytes, and who is told which ones will be read."""
        n_bytes = header.tokens * DTYPES[header.dtype].itemsize
        if index_of(self.path) == self.path:
            if mapped and not self.pread:
                return HEADER_BYTES, mapped.bytes[HEADER_BYTES:HEADER_BYTES + n_bytes], mapped.will_need
            file = FileArray(self.path) if self._remote is None else self._map
            return HEADER_BYTES, file.part(HEADER_BYTES, n_bytes, np.uint8), file.will_need
        size = self.path.stat().st_size if self.path.exists() else 0
        if size != n_bytes:
            raise DataError(f"{self.path}: has {size} bytes, but its index {index_of(self.path).name} says {n_bytes}. "
                            f"{_REMEDY}")
        mapped = None if self.pread else map_file(self.path)
        if mapped:
            return 0, mapped.bytes, mapped.will_need
        file = FileArray(self.path)
        return 0, file, file.will_need

    def is_checked(self, starts: list[int], length: int) -> bool:
        """Are the granules under the `length` tokens from each of `starts` known to be sound? May say no where they are."""
        size, flags = self.data.itemsize, self._flags
        return length * size <= GRANULE_BYTES and all(
            flags[start * size // GRANULE_BYTES] and flags[((start + length) * size - 1) // GRANULE_BYTES] for start in starts)

    def check(self, starts: np.ndarray, stops: np.ndarray) -> None:
        """Verify the granules under the token ranges [starts, stops), (n,) int64 each; each granule is read once."""
        first = starts * self.data.itemsize // GRANULE_BYTES
        last = (stops * self.data.itemsize - 1) // GRANULE_BYTES
        narrow = int((last - first).max(initial=0)) < 2
        if narrow and self._checked[first].all() and self._checked[last].all():
            return
        under = sorted({granule for a, b in zip(first.tolist(), last.tolist(), strict=True) for granule in range(a, b + 1)
                        if not self._checked[granule]})
        if self.pread:
            at_once(self._check_granules, under)
            return
        for granule in under:
            self._will_need(*self.byte_span(granule))
        self._check_granules(under)

    def read_ahead(self, blocks: list[int]) -> None:
        """Verify those blocks that are not yet, together; any thread may. Raises as `check` does."""
        new = sorted(block for block in blocks if not self._checked[block])
        first = 0
        for i, block in enumerate(new, 1):
            if i == len(new) or new[i] != block + 1:  # a run of neighbours is asked for at once
                self._will_need(self.byte_span(new[first])[0], self.byte_span(block)[1])
                first = i
        self._check_granules(new)

    def fetch(self, pieces: list[int]) -> None:
        """Have pieces of its tokens here, if it is in a store; any thread may. Raises DataError."""
        for piece in pieces if self._remote is not None else ():
            self._remote.fetch(piece)

    def will_need(self, start: int, stop: int) -> None:
        """Begin to read tokens [start, stop) without waiting for them."""
        self._will_need(self._first_byte + start * self.data.itemsize, self._first_byte + stop * self.data.itemsize)

    def _check_granules(self, granules: Iterable[int]) -> None:
        for granule in granules:
            self._check_granule(granule)

    def _check_granule(self, granule: int) -> None:
        span = slice(granule * GRANULE_BYTES, (granule + 1) * GRANULE_BYTES)
        content = self._bytes.borrowed(span) if self.pread else self._bytes[span]
        found = xxhash.xxh3_64_intdigest(content)
        if found != int(self._hashes[granule]) and self._remote is not None:  # perhaps what lies here was damaged since
            self._remote.forget(*self.byte_span(granule))
            content = self._bytes[span]
            found = xxhash.xxh3_64_intdigest(content)
        if found != int(self._hashes[granule]):
            start, stop = self.byte_span(granule)
            raise DamagedBlock(f"{self.path}: bytes {start} to {stop} do not match their checksum (xxh3 {found:016x}, "
                               f"should be {int(self._hashes[granule]):016x}). {_REMEDY}", granule)
        if len(self._marks):
            self._open(granule, content)
        self._checked[granule] = True

    def is_sound(self, start: int, content: bytes) -> bool:
        """Are the bytes from `start` of the file on, whole blocks of tokens, as their checksums say? True for other bytes."""
        return not self._unsound(start, content)

    def has_changed(self, start: int, content: bytes) -> bool:
        """Is one of these blocks not sound that was sound when it was checked?"""
        return any(self._checked[block] and block not in self.lost and block not in self.replaced
                   for block in self._unsound(start, content))

    def _unsound(self, start: int, content: bytes) -> list[int]:
        first, rest = divmod(start - self._first_byte, GRANULE_BYTES)
        if first < 0 or rest or start >= self._first_byte + len(self._bytes):
            return []
        blocks = enumerate(memoryview(content)[i:i + GRANULE_BYTES] for i in range(0, len(content), GRANULE_BYTES))
        return [first + i for i, block in blocks if xxhash.xxh3_64_intdigest(block) != int(self._hashes[first + i])]

    def _open(self, block: int, content: Any) -> bytes:
        """Content of a block that has its checksum: as it is, or with the seal opened and its tag checked."""
        if not len(self._marks) or self._seal is None:
            return bytes(content) if not len(self._marks) else b""
        before = self._marks[block - 1].tobytes() if block else b""
        try:
            return self._seal.open(block, bytes(content), self._marks[block].tobytes(), before)
        except ValueError:
            raise DataError(f"{self.path}: block {block} has its checksum, but not its seal: somebody changed it, or sealed it "
                            "with another key. Take the data set from its provider again.") from None

    def byte_span(self, block: int) -> tuple[int, int]:
        """Where a block of tokens begins and ends in its file."""
        start = self._first_byte + block * GRANULE_BYTES
        return start, min(start + GRANULE_BYTES, self._first_byte + len(self._bytes))

    def token_span(self, block: int) -> tuple[int, int]:
        """Its first token, and the one past its last."""
        size = GRANULE_BYTES // self.data.itemsize
        return block * size, min((block + 1) * size, len(self.data))

    def accept(self, block: int, content: bytes) -> bool:
        """Take `content` for a damaged block if it has the block's checksum."""
        if xxhash.xxh3_64_intdigest(content) != int(self._hashes[block]):
            return False
        self.replaced[block] = self._open(block, content)
        self._checked[block] = True
        return True

    def set_aside(self, blocks: Iterable[int]) -> None:
        """These blocks are lost, and no others: they are not checked any more."""
        self._checked[list(self.lost)] = False
        self.lost = frozenset(blocks)
        self._checked[list(self.lost)] = True

    def part(self, start: int, stop: int) -> np.ndarray:
        """Tokens [start, stop), unverified, right bytes in place of replaced blocks."""
        found = self.data[start:stop]
        for block, content in list(self.replaced.items()):
            first, last = self.token_span(block)
            if first < stop and start < last:
                found = found.copy() if found.base is not None else found
                a, b = max(first, start), min(last, stop)
                found[a - start:b - start] = np.frombuffer(content, self.data.dtype)[a - first:b - first]
        return found

    def touches_lost(self, start: int, stop: int) -> list[int]:
        """Lost blocks under tokens [start, stop)."""
        spans = ((block, self.token_span(block)) for block in sorted(self.lost))
        return [block for block, (first, last) in spans if first < stop and start < last]

    def check_all(self) -> list[str]:
        """The message of every damaged section and granule; empty if all is sound."""
        faults = self.check_footer()
        for granule in range(len(self._hashes)):
            try:
                self._check_granule(granule)
            except DataError as exc:
                faults.append(str(exc))
        return faults

    def check_footer(self) -> list[str]:
        """The message of every damaged section; empty if all are sound."""
        faults = []
        for name in self._sections:
            try:
                self._section(name, "u1")
            except DataError as exc:
                faults.append(str(exc))
        return faults

    def read(self, start: int, stop: int) -> np.ndarray:
        """Tokens [start, stop), verified: a view of the map."""
        if stop > start:
            self.check(np.asarray([start]), np.asarray([stop]))
        return self.part(start, stop) if self.replaced else self.data[start:stop]

    def document(self, number: int) -> np.ndarray:
        """Tokens or bytes of one document, verified."""
        return self.read(int(self.ends[number - 1]) if number else 0, int(self.ends[number]))


_REMEDY = ("The file is damaged or foreign: repair the data set from a copy with `officina data stage COPY DATASET`, or build "
           "it again with `officina data build`; `officina data verify DATASET` lists all damage.")


def _parse_header(path: Path, mapped: np.ndarray) -> Header:
    head = mapped[:HEADER_BYTES].tobytes()
    if len(mapped) < HEADER_BYTES + 16 or head[:8] != _MAGIC:
        raise DamagedIndex(f"{path}: bytes 0 to 8 are {head[:8]!r}, a shard begins with {_MAGIC!r}. {_REMEDY}")
    if xxhash.xxh3_64_intdigest(head[:-8]) != struct.unpack("<Q", head[-8:])[0]:
        raise DamagedIndex(f"{path}: the header (bytes 0 to {HEADER_BYTES}) does not match its checksum. {_REMEDY}")
    fixed = _FIXED.unpack(head[:_FIXED.size])
    _, version, itemsize, tokens, documents, granule, file_bytes, tokenizer, n = fixed
    dtypes = {d.itemsize: name for name, d in DTYPES.items()}
    if version not in _SECTION or granule != GRANULE_BYTES or itemsize not in dtypes:
        raise DataError(f"{path}: shard version {version} with {granule}-byte granules and {itemsize}-byte tokens; "
                        f"this officina reads versions up to {_VERSION}, {GRANULE_BYTES}, 1, 2 or 4. Update officina.")
    sections, line = {}, _SECTION[version]
    for i in range(n):
        name, *span = line.unpack_from(head, _FIXED.size + i * line.size)
        sections[name.rstrip(b"\0").decode()] = tuple(span)
    return Header(dtypes[itemsize], tokens, documents, file_bytes, tokenizer.hex(), sections)


def index_of(path: Path) -> Path:
    """The file with the shard's header and footer: the shard itself, or the index beside a file of tokens alone."""
    return path if path.suffix != ".bin" else path.with_suffix(INDEX_SUFFIX)
