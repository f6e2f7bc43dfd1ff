"""Where documents come from: files and folders, saved Hugging Face `datasets`, the standard library's sources."""

import json
import os
import platform
import re
import sysconfig
from collections import deque
from collections.abc import Callable, Container, Sequence
from dataclasses import dataclass
from fnmatch import translate
from itertools import chain, count
from pathlib import Path

from officina.trainer.data.formats import INCLUDE, printable
from officina.trainer.errors import DataError

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

    Raises DataError for an input that does not exist or has no such file, and for what in a folder cannot be looked into.
    """
    sources: dict[str, TextSource] = {}
    for given in map(Path, inputs):
        shown = printable(given)
        try:
            if given.is_file():
                files = [(given.name, given)]
            elif given.is_dir():
                files = _saved_dataset(given) or _matching(given, include)
            else:
                raise DataError(f"input {shown}: no such file or folder. Name a folder, or a file such as texts.jsonl.zst.")
        except OSError as exc:
            raise DataError(f"input {shown}: {printable(exc.filename or given)} cannot be read ({exc.strerror}). Mend its "
                            "rights (chmod u+rX) or what it links to, or take it away.") from exc
        if not files:
            raise DataError(f"input {shown}: no file matches {' '.join(include)}. Try: --include '*.xyz'")
        name = _unused(printable(given.resolve().name).split(".")[0] or "input", sources)
        sources[name] = TextSource(name, tuple(sorted((printable(file), path) for file, path in files)))
    return list(sources.values())


def _matching(folder: Path, include: Sequence[str]) -> list[tuple[str, Path]]:
    """Its files; links are followed, and a folder is read once, under its own name if it has one in there."""
    names = re.compile("|".join(translate(pattern) for pattern in include if "/" not in pattern))
    found: set[Path] = set()
    folders, seen = deque([folder]), set()
    while folders:
        here = folders.popleft()
        status = here.stat()
        if (status.st_dev, status.st_ino) in seen:
            continue
        seen.add((status.st_dev, status.st_ino))
        for entry in sorted(os.scandir(here), key=lambda entry: entry.name):
            stem, dot, suffixes = entry.name.partition(".")
            if not stem:  # hidden
                continue
            if entry.is_dir():
                (folders.append if entry.is_symlink() else folders.appendleft)(here / entry.name)  # links last
            elif entry.is_file():
                if names.fullmatch(entry.name) or names.fullmatch(stem + dot + suffixes.lower()):
                    found.add(here / entry.name)
            elif entry.is_symlink():
                entry.stat()  # says why it leads nowhere
        found.update(path for pattern in include if "/" in pattern for path in here.glob(pattern) if path.is_file())
    named = [(path.relative_to(folder).as_posix(), path) for path in found]
    return [(name, path) for name, path in named if not f"/{name}".count("/.")]


def _saved_dataset(folder: Path) -> list[tuple[str, Path]]:
    """Files of what Hugging Face's `Dataset.save_to_disk` wrote; other files beside them are its caches."""
    splits = folder / "dataset_dict.json"
    if splits.exists():
        names = sorted(path.parent.name for path in folder.glob("*/state.json"))
        raise DataError(f"input {folder}: is a saved DatasetDict of {', '.join(names) or 'no split'}; officina chooses what is "
                        f"held out itself. Name the splits to read: {' '.join(str(folder / name) for name in names[:3])}")
    state = folder / "state.json"
    try:
        listed = json.loads(state.read_bytes())["_data_files"] if state.exists() else []
        files = [(each["filename"], folder / each["filename"]) for each in listed]
    except (ValueError, KeyError, TypeError):
        return []  # somebody else's state.json
    if lost := [name for name, path in files if not path.is_file()]:
        raise DataError(f"input {printable(folder)}: its state.json lists {lost[0]}, which is not there. Copy the folder anew "
                        "from its source, or save it again.")
    return files


def _unused(name: str, taken: Container[str]) -> str:
    return next(n for n in chain([name], (f"{name}-{i}" for i in count(2))) if n not in taken)


Progress = Callable[[str, int, int], None]
"""Called with the phase, the bytes done and the bytes of the phase."""
