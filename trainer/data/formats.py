"""Rows of input files: JSON lines (.gz, .zst), Parquet, Arrow and saved Hugging Face `datasets`, WebDataset tar, text.

A `Piece` is a file, or a part of one that can be read by itself: lines that begin between two bytes, row groups of a Parquet
file. A row is a dict of fields; the content of a text file as bytes; or a `BadRow`, which says why it is none.
"""

import csv
import gzip
import io
import json
import os
import tarfile
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from importlib import import_module
from itertools import pairwise
from pathlib import Path
from typing import Any

from pydantic_core import from_json

from officina.trainer.errors import DataError

INCLUDE = ("*.txt", "*.md", "*.rst", "*.py", "*.jsonl", "*.jsonl.gz", "*.jsonl.zst", "*.parquet", "*.arrow", "*.tar",
           "*.tar.gz", "*.tar.zst")
"""What is read of a folder unless something else is asked for."""
SAMPLE_INCLUDE = ("*.jsonl", "*.jsonl.gz", "*.jsonl.zst", "*.json", "*.csv", "*.parquet", "*.arrow")
"""The same for samples to fine-tune on."""
_FORMATS = ((".jsonl", "json"), (".ndjson", "json"), (".json", "array"), (".csv", "csv"),
            (".parquet", "parquet"), (".arrow", "arrow"), (".tar", "tar"))
_UNITS = {"json": "line", "array": "item", "csv": "row", "parquet": "row", "arrow": "row", "tar": "sample"}
_EXPANDS = 4
"""Text bytes of a byte of a compressed file, about: only parts are planned with it."""
_CHUNK_BYTES = 1 << 20


@dataclass(frozen=True, slots=True)
class Piece:
    """A file or a part of one."""

    source: str
    """Name of the input that it belongs to."""
    name: str
    """Relative to the input; shown and stored."""
    path: str
    format: str
    """json, array, csv, parquet, arrow, tar or text."""
    start: int
    """First byte (json) or row group (parquet); 0 for whole files."""
    stop: int
    """End of the piece; 0 for whole files."""
    bytes: int
    """Of the file, as many as fall to this piece."""
    text_bytes: int
    """Estimate."""

    def place(self, number: int) -> str:
        """The words that name row `number` (from 1 within the piece) in an error."""
        return "" if self.format == "text" else f" {_UNITS[self.format]} {number + _rows_before(self)}"


@dataclass(frozen=True, slots=True)
class BadRow:
    """What could not be read."""

    why: str


Row = dict[str, Any] | bytes | BadRow


def printable(name: str | Path) -> str:
    """A file's name for messages and JSON: bytes of it that are not UTF-8 as \\xe9."""
    return os.fsencode(name).decode("utf-8", "backslashreplace")


def format_of(name: str) -> str:
    """Format of a file by its name, whose suffixes may be in upper case; whatever is not known is text."""
    plain = name.lower().removesuffix(".gz").removesuffix(".zst")
    return next((found for suffix, found in _FORMATS if plain.endswith(suffix)), "text")


def _is_packed(name: str) -> bool:
    return name.lower().endswith((".gz", ".zst"))


def pieces_of(source: str, name: str, path: Path, most_bytes: int) -> list[Piece]:
    """The file in pieces of about `most_bytes` of text where its format can be entered in the middle."""
    form, size = format_of(name), path.stat().st_size
    packed = _is_packed(name)
    whole = Piece(source, name, str(path), form, 0, 0, size, size * (_EXPANDS if packed or form == "parquet" else 1))
    if whole.text_bytes <= most_bytes or packed:
        return [whole]
    if form == "json":
        cuts = [*range(0, size, most_bytes), size]
        return [Piece(source, name, str(path), form, a, b, b - a, b - a) for a, b in pairwise(cuts)]
    if form == "parquet":
        groups = _parquet(path).metadata
        sizes = [groups.row_group(i).total_byte_size for i in range(groups.num_row_groups)]
        share = size / max(sum(sizes), 1)
        return [Piece(source, name, str(path), form, i, i + 1, int(n * share), n) for i, n in enumerate(sizes)] or [whole]
    return [whole]


def rows(piece: Piece, columns: Sequence[str] | None = None) -> Iterator[tuple[int, Row, int]]:
    """Number from 1, row, and bytes of the piece read so far. `columns` are those that a columnar file need give.

    Raises DataError naming the file when it cannot be read on.
    """
    path = Path(piece.path)
    reader: Callable[[], Iterator[tuple[Row, int]]] = {
        "json": lambda: _json(path, piece), "parquet": lambda: _parquet_rows(path, piece, columns),
        "array": lambda: _array(path), "csv": lambda: _csv(path),
        "arrow": lambda: _arrow_rows(path, columns), "tar": lambda: _tar(path), "text": lambda: _whole(path)}[piece.format]
    try:
        for number, (row, done_bytes) in enumerate(reader(), 1):
            yield number, row, done_bytes
    except DataError:
        raise
    except (OSError, EOFError, zlib.error, tarfile.TarError) as exc:  # a cut or damaged .gz raises any of them
        raise DataError(f"{printable(path)}: cannot be read ({exc}). Restore the file, or leave it out.") from exc
    except Exception as exc:
        if type(exc).__module__.split(".")[0] not in ("pyarrow", "zstd", "zstandard"):
            raise
        raise DataError(f"{printable(path)}: cannot be read ({str(exc)[:200]}). Restore the file, or leave it out.") from exc


# ---- text and JSON lines ---------------------------------------------------------------------------------------------
def _whole(path: Path) -> Iterator[tuple[Row, int]]:
    content = path.read_bytes()
    yield content, len(content)


def _json(path: Path, piece: Piece) -> Iterator[tuple[Row, int]]:
    with open(path, "rb", _CHUNK_BYTES) as raw:
        if _is_packed(path.name):
            for line in _unpacked(raw, path):
                yield _parsed(line), raw.tell()
            return
        if piece.start:  # a line belongs to the piece in which it begins
            raw.seek(piece.start - 1)
            raw.readline()
        at = raw.tell()
        while (not piece.stop or at < piece.stop) and (line := raw.readline()):
            at += len(line)
            yield _parsed(line), at - piece.start


def _parsed(line: bytes) -> Row:
    if not line.strip():
        return b""
    try:
        row = _loads(line)
    except (ValueError, RecursionError) as exc:
        if b"\0" in line:
            return BadRow("no JSON object but NUL bytes: the file has a hole, or is UTF-16")
        if isinstance(exc, UnicodeDecodeError):
            return line  # as a text file that is not UTF-8: counted by the caller
        return BadRow(f"no JSON object ({type(exc).__name__})")
    return row if isinstance(row, dict) else BadRow(f"no JSON object but a {type(row).__name__}")


def _loads(line: bytes) -> Any:
    """As `json.loads` of UTF-8 (of bytes it would guess UTF-16 and UTF-32, by their NULs): twice as fast, which is heard in a
    build, and what its parser refuses, the standard library's judges."""
    try:
        return from_json(line)
    except ValueError:
        return json.loads(line.decode("utf-8-sig"))


def _array(path: Path) -> Iterator[tuple[Row, int]]:
    """A file that is one JSON list of objects."""
    content = _content(path)
    try:
        found = json.loads(content)
    except ValueError as exc:
        raise DataError(f"{printable(path)}: is no JSON ({type(exc).__name__}). One object a line is read from a file named "
                        ".jsonl.") from exc
    if not isinstance(found, list):
        raise DataError(f"{printable(path)}: expected a JSON list of objects; it is a {type(found).__name__}. One object a "
                        "line is read from a file named .jsonl.")
    for number, row in enumerate(found, 1):
        yield (row if isinstance(row, dict) else BadRow(f"no JSON object but a {type(row).__name__}"),
               len(content) * number // len(found))


def _csv(path: Path) -> Iterator[tuple[Row, int]]:
    """The first line names the columns; a row may hold line breaks within quotes."""
    content = _content(path)
    csv.field_size_limit(max(csv.field_size_limit(), len(content)))  # 128 KiB otherwise, and a conversation may be longer
    try:
        reader = csv.DictReader(io.StringIO(content.decode("utf-8-sig"), newline=""), strict=True)
        for row in reader:
            wrong = None in row or None in row.values()
            columns = len(reader.fieldnames or ())
            yield BadRow(f"expected {columns} columns, as the first line has") if wrong else row, len(content)
    except UnicodeDecodeError as exc:
        raise DataError(f"{printable(path)}: is not UTF-8. Convert it: iconv -f latin1 -t utf-8") from exc
    except csv.Error as exc:
        raise DataError(f"{printable(path)}: cannot be read ({exc}). Restore the file, or leave it out.") from exc


def _content(path: Path) -> bytes:
    with open(path, "rb") as raw:
        return _unpacked(raw, path).read() if _is_packed(path.name) else raw.read()


def _rows_before(piece: Piece) -> int:
    """Rows of the file before the piece: asked for only to name a place, so it may take its time."""
    if piece.format == "parquet" and piece.start:
        meta = _parquet(Path(piece.path)).metadata
        return sum(meta.row_group(i).num_rows for i in range(piece.start))
    if piece.format != "json" or not piece.start:
        return 0
    lines, left = 0, piece.start
    with open(piece.path, "rb") as file:
        while left:
            chunk = file.read(min(left, _CHUNK_BYTES))
            lines, left = lines + chunk.count(b"\n"), left - len(chunk)
        file.seek(piece.start - 1)
        return lines + (file.read(1) != b"\n")  # the line that goes on over the border belongs to the piece before


def _unpacked(raw: io.BufferedReader, path: Path) -> io.BufferedIOBase:
    if not raw.peek(1):
        raise EOFError("a compressed file is never empty")
    return gzip.open(raw) if path.name.lower().endswith(".gz") else io.BufferedReader(_Zst(raw, path), _CHUNK_BYTES)


class _Zst(io.RawIOBase):
    """Decompresses zstd frames one after the other, and says when the last one is cut off (the package's reader does not)."""

    def __init__(self, raw: io.BufferedReader, path: Path) -> None:
        self._raw, self._module = raw, _package("zstandard", path)
        self._frame: Any = None
        self._pending, self._left = b"", b""

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while not self._pending:
            packed = self._left or self._raw.read(_CHUNK_BYTES)
            self._left = b""
            if not packed:
                if self._frame is not None:
                    raise EOFError("the compressed file ends in the middle")
                return 0
            if self._frame is None:
                self._frame = self._module.ZstdDecompressor(max_window_size=1 << 31).decompressobj()  # up to `zstd --long=31`
            self._pending = self._frame.decompress(packed)
            if self._frame.eof:
                self._left, self._frame = self._frame.unused_data, None
        n = min(len(buffer), len(self._pending))
        buffer[:n], self._pending = self._pending[:n], self._pending[n:]
        return n


# ---- columns ---------------------------------------------------------------------------------------------------------
def _package(name: str, path: Path) -> Any:
    try:
        return import_module(name)
    except ImportError as exc:
        raise DataError(f"{printable(path)}: reading it needs the package {name.split('.')[0]}, which is not installed. "
                        "Try: pip install 'officina[data]'") from exc


def _parquet(path: Path) -> Any:
    module, pyarrow = _package("pyarrow.parquet", path), _package("pyarrow", path)
    try:
        return module.ParquetFile(pyarrow.OSFile(os.fsencode(path)))  # as text, it takes no name that is not UTF-8
    except Exception as exc:  # pyarrow's own errors; they derive from several classes
        raise DataError(f"{printable(path)}: is no Parquet file ({str(exc)[:200]}). Restore the file, or leave it "
                        "out.") from exc


def _parquet_rows(path: Path, piece: Piece, columns: Sequence[str] | None) -> Iterator[tuple[Row, int]]:
    file = _parquet(path)
    first, stop = piece.start, piece.stop or file.metadata.num_row_groups
    wanted = None if columns is None else [name for name in file.schema_arrow.names if name in columns]
    for group in range(first, stop):
        for batch in file.iter_batches(batch_size=1024, row_groups=[group], columns=wanted):
            for row in _dicts(batch):
                yield row, piece.bytes * (group - first) // (stop - first)


def _dicts(batch: Any) -> list[Row]:
    """The rows of a batch; one with a text that is not UTF-8 is that text's bytes, as a line of JSON is."""
    try:
        return batch.to_pylist()
    except (ValueError, OverflowError):
        return [_dict(batch.slice(i, 1)) for i in range(batch.num_rows)]


def _dict(row: Any) -> Row:
    try:
        return {name: _value(column[0]) for name, column in zip(row.schema.names, row.columns, strict=True)}
    except UnicodeDecodeError as exc:
        return exc.object


def _value(cell: Any) -> Any:
    """A time that Python's types do not hold is given as Arrow writes it: nanoseconds, or a year beyond 9999."""
    try:
        return cell.as_py()
    except UnicodeDecodeError:
        raise
    except (ValueError, OverflowError):
        return cell.cast("string").as_py()


def _arrow_rows(path: Path, columns: Sequence[str] | None) -> Iterator[tuple[Row, int]]:
    """Both forms of Arrow's IPC: the stream, which `datasets` saves, and the file, which can be told by its magic."""
    ipc, pyarrow = _package("pyarrow.ipc", path), _package("pyarrow", path)
    with pyarrow.memory_map(os.fsencode(path)) as source:
        size, is_file = source.size(), source.read(6) == b"ARROW1"
        source.seek(0)
        reader = ipc.open_file(source) if is_file else ipc.open_stream(source)
        batches = map(reader.get_batch, range(reader.num_record_batches)) if is_file else reader
        for batch in batches:
            if columns is not None:
                batch = batch.select([name for name in batch.schema.names if name in columns])
            for first in range(0, batch.num_rows, 1024):
                for row in _dicts(batch.slice(first, 1024)):
                    yield row, size if is_file else source.tell()


# ---- WebDataset ------------------------------------------------------------------------------------------------------
def _tar(path: Path) -> Iterator[tuple[Row, int]]:
    """A sample is the run of members whose names agree up to the first dot: .json gives fields, .txt the text."""
    with open(path, "rb") as raw:
        content = _unpacked(raw, path) if _is_packed(path.name) else raw
        with tarfile.open(fileobj=content, mode="r|", tarinfo=_Member) as tar:
            key, row, kinds = None, {}, set()
            for member in tar:
                if not member.isfile():
                    continue
                folder, _, name = member.name.rpartition("/")
                stem, _, kind = name.partition(".")
                if (folder, stem) != key:
                    if isinstance(row, BadRow) or row:
                        yield row, raw.tell()
                    key, row, kinds = (folder, stem), {}, set()
                if isinstance(row, dict) and kind in ("txt", "text", "json"):
                    row = _with_member(row, f"{folder}/{stem}".lstrip("/"), kind, tar.extractfile(member).read())
                    if kind in kinds:
                        row = BadRow(f"there are two members {printable(name)}")
                    kinds.add(kind)
            if isinstance(row, BadRow) or row:
                yield row, raw.tell()
            while rest := tar.fileobj.read(_CHUNK_BYTES):
                if rest.strip(b"\0"):
                    raise tarfile.ReadError(f"its end mark is at byte {tar.offset}, and more follows it; tar --concatenate "
                                            "joins archives")


class _Member(tarfile.TarInfo):
    """Without it, a header that is cut off or damaged is taken for the end of the archive, and the members after it are lost.

    The end is a block of zeros: writers leave two and fill a record, GNU tar takes a single one with a warning, as we do.
    """

    @classmethod
    def fromtarfile(cls, tar: tarfile.TarFile) -> tarfile.TarInfo:
        """The next member. Raises ReadError for a header that is none, EOFHeaderError at the end mark."""
        at = tar.offset
        try:
            return super().fromtarfile(tar)
        except tarfile.EOFHeaderError:
            raise
        except tarfile.HeaderError as exc:
            raise tarfile.ReadError(f"at byte {at} neither a member nor the archive's end: {exc}") from exc


def _with_member(row: dict[str, Any], key: str, kind: str, content: bytes) -> Row:
    row = {"__key__": key} | row
    if kind != "json":
        return row | {"text": content}
    try:
        fields = json.loads(content)
    except ValueError as exc:
        return BadRow(f"its .json is no JSON object ({type(exc).__name__})")
    if not isinstance(fields, dict):
        return BadRow(f"its .json is no JSON object but a {type(fields).__name__}")
    return fields | row  # a .txt member is the text, whatever the .json says
