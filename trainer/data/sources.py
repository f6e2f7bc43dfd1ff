"""Where documents come from: folders and files of text, JSON lines (also gzipped), the standard library's sources."""

import gzip
import json
import platform
import sysconfig
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from officina.trainer.errors import DataError

INCLUDE = ("*.txt", "*.md", "*.rst", "*.py", "*.jsonl", "*.jsonl.gz")
"""What is read of a folder unless something else is asked for."""
_STDLIB_WITHOUT = {"test", "tests", "idle_test", "site-packages", "dist-packages", "turtledemo",
                   "encodings", "pydoc_data"}  # the last two are tables and prose, a fifth of all bytes


@dataclass(frozen=True, slots=True)
class TextSource:
    """Some files under one name."""

    name: str
    """Stored with each document; never a path."""
    files: tuple[tuple[str, Path], ...]
    """Name to be shown, relative to the source; and where the file is. Sorted by name."""

    @property
    def bytes(self) -> int:
        """Sum of the files' sizes, compressed where they are."""
        return sum(path.stat().st_size for _, path in self.files)


@dataclass(frozen=True, slots=True)
class Document:
    """One text."""

    text: str
    source_id: int
    done_bytes: int
    """Bytes of all files read when the document was complete."""


@dataclass(slots=True)
class LeftOut:
    """Documents that are not in the data set, and why."""

    undecodable: list[str] = field(default_factory=list)
    """Names of the files, or lines of JSON files, that are not UTF-8."""
    empty: int = 0
    duplicates: int = 0


def standard_library() -> tuple[list[TextSource], dict[str, str]]:
    """The sources of this Python's standard library without tests and tables, and words about them for the manifest."""
    root = Path(sysconfig.get_path("stdlib"))
    version = platform.python_version()
    files = [(path.relative_to(root).as_posix(), path) for path in root.rglob("*.py")
             if not _STDLIB_WITHOUT.intersection(path.relative_to(root).parts[:-1])]
    if not files:
        raise DataError(f"the standard library's sources are not at {root} (a zipped or frozen Python?). "
                        "Name a folder of text: officina data build OUT FOLDER")
    about = {"description": f"Sources of the Python {version} standard library, without tests and tables.",
             "licence": "PSF-2.0", "python": version}
    return [TextSource("python-stdlib", tuple(sorted(files)))], about


def find_sources(inputs: Sequence[str | Path], include: Sequence[str] = INCLUDE) -> list[TextSource]:
    """One source for each input: a file, or a folder that is searched for the patterns of `include` (hidden files out).

    Raises DataError for an input that does not exist or has no such file.
    """
    sources: list[TextSource] = []
    for given in map(Path, inputs):
        if given.is_file():
            files = [(given.name, given)]
        elif given.is_dir():
            found = {path for pattern in include for path in given.rglob(pattern) if path.is_file()}
            named = [(path.relative_to(given).as_posix(), path) for path in found]
            files = [(name, path) for name, path in named if not f"/{name}".count("/.")]
        else:
            raise DataError(f"input {given}: no such file or folder. Name a folder of text or a .jsonl file.")
        if not files:
            raise DataError(f"input {given}: no file matches {' '.join(include)}. Try: --include '*.xyz'")
        name = _unused(given.resolve().name.split(".")[0] or "input", sources)
        sources.append(TextSource(name, tuple(sorted(files))))
    return sources


def _unused(name: str, sources: list[TextSource]) -> str:
    taken = {s.name for s in sources}
    return next(n for n in (name, *(f"{name}-{i}" for i in range(2, len(taken) + 3))) if n not in taken)


def read_documents(sources: Sequence[TextSource], text_field: str, left_out: LeftOut) -> Iterator[Document]:
    """All documents in order: a text file is one, a line of JSON is one. What is left out is counted in `left_out`.

    Raises DataError, with file and line, for what is not JSON or has no text under `text_field`, and for
    files that cannot be read.
    """
    before_bytes = 0
    for source_id, source in enumerate(sources):
        for name, path in source.files:
            lines = path.name.endswith((".jsonl", ".jsonl.gz"))
            try:
                for place, content, inside_bytes in _json_lines(path, text_field) if lines else _whole(path):
                    text = _decoded(content)
                    if text is None:
                        left_out.undecodable.append(f"{source.name}/{name}{place}")
                    elif text.strip():
                        yield Document(text, source_id, before_bytes + inside_bytes)
                    else:
                        left_out.empty += 1
            except (OSError, EOFError, zlib.error) as exc:  # a cut or damaged .gz raises any of them
                raise DataError(f"{path}: cannot be read ({exc}). Restore the file, or leave it out.") from exc
            before_bytes += path.stat().st_size


def _decoded(content: bytes | str) -> str | None:
    """The text, if it is Unicode: JSON can spell half a surrogate pair, which is none."""
    try:
        return content.decode("utf-8") if isinstance(content, bytes) else (content.encode(), content)[1]
    except UnicodeError:
        return None


def _whole(path: Path) -> Iterator[tuple[str, bytes, int]]:
    content = path.read_bytes()
    yield "", content, len(content)


def _json_lines(path: Path, text_field: str) -> Iterator[tuple[str, bytes | str, int]]:
    with open(path, "rb") as raw:
        lines = gzip.open(raw) if path.name.endswith(".gz") else raw
        for number, line in enumerate(lines, 1):
            if not line.strip():
                continue
            try:
                text: bytes | str = json.loads(line)[text_field]
            except UnicodeDecodeError:
                text = line  # counted by the caller
            except (ValueError, KeyError, TypeError) as exc:
                raise DataError(f"{path} line {number}: no JSON object with the field {text_field!r} ({type(exc).__name__}). "
                                "Mend the line, or name the text's field: --field NAME") from exc
            if not isinstance(text, (str, bytes)):
                raise DataError(f"{path} line {number}: field {text_field!r} is no text. Name the text's field: --field NAME")
            yield f" line {number}", text, raw.tell()


Progress = Callable[[str, int, int], None]
"""Called with the phase, the bytes done and the bytes of the phase."""
