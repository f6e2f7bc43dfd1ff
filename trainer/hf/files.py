"""safetensors files: where each tensor lies, and how they are written, a range at a time. Torch-free.

A file is 8 bytes with the length of its header (little-endian), the header (JSON: name -> dtype, shape, offsets), and the
tensors' bytes, row-major and without gaps. Format: https://github.com/huggingface/safetensors#format
"""

import hashlib
import json
import math
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from officina.trainer.errors import OfficinaError

ITEM_BYTES = {"F32": 4, "F16": 2, "BF16": 2}
"""Dtypes that weights may have here, as safetensors calls them, with their size."""
ONE_FILE, INDEX_FILE = "model.safetensors", "model.safetensors.index.json"
_MAX_HEADER_BYTES = 100_000_000
"""The limit of the library itself."""
_COPY = "Copy it anew from where the model came from"


@dataclass(frozen=True, slots=True)
class Stored:
    """One tensor in a file."""

    file: Path
    dtype: str
    shape: tuple[int, ...]
    offset: int
    """Bytes from the beginning of the file."""
    bytes: int

    @property
    def numel(self) -> int:
        return math.prod(self.shape)


def find_tensors(folder: Path) -> dict[str, Stored]:
    """Every tensor of the folder's model, by name. OfficinaError names the file that is missing or damaged."""
    folder = Path(folder)
    one = (folder / ONE_FILE).exists()
    if (folder / INDEX_FILE).exists():
        return _by_index(folder, one)
    if one:
        return read_header(folder / ONE_FILE)
    others = sorted(path.name for path in folder.glob("*.bin") if "model" in path.name)
    hint = (f"it has {others[0]}, which is a pickle and may run code when it is opened. Convert it where you trust it: "
            "AutoModelForCausalLM.from_pretrained(...).save_pretrained(FOLDER)" if others
            else "Copy the model's *.safetensors into it")
    raise OfficinaError(f"{folder} has neither {ONE_FILE} nor {INDEX_FILE}; {hint}")


def _by_index(folder: Path, one: bool) -> dict[str, Stored]:
    path = folder / INDEX_FILE
    try:
        places = json.loads(path.read_text(encoding="utf-8"))["weight_map"]
        files = sorted(set(places.values()))
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise OfficinaError(f"{path} cannot be read: {error!r}. {_COPY}") from error
    if outside := [name for name in files if Path(name).name != name]:
        raise OfficinaError(f"{path} names {outside[0]}, which is not beside it. {_COPY}")
    if one and ONE_FILE not in files:
        raise OfficinaError(f"{folder} has {ONE_FILE} and {INDEX_FILE}, which names other files: two models, of which "
                            f"transformers takes the first. Remove what is left over: {ONE_FILE}, or the index and its files")
    found: dict[str, Stored] = {}
    for name in files:
        here = read_header(folder / name)
        if twice := here.keys() & found.keys():
            first = sorted(twice)[0]
            raise OfficinaError(f"{first} is in {found[first].file} and in {folder / name}. {_COPY}")
        found |= here
    wrong = sorted(name for name, file in places.items() if name not in found or found[name].file.name != file)
    if wrong:
        raise OfficinaError(f"{path} says that {wrong[0]} is in {places[wrong[0]]}, and it is not there. {_COPY}")
    return found


def read_header(path: Path) -> dict[str, Stored]:
    """The tensors of one file; the file's length must be what the header says."""
    try:
        with open(path, "rb") as file:
            size = os.fstat(file.fileno()).st_size
            length = int.from_bytes(file.read(8), "little")
            if not 2 <= length <= min(_MAX_HEADER_BYTES, size - 8):
                raise OfficinaError(f"{path} is no whole safetensors file: a header of {length} bytes in {size}. {_COPY}")
            header = json.loads(file.read(length))
    except FileNotFoundError:
        raise OfficinaError(f"{path} is missing. Copy it from where the model came from") from None
    except (OSError, ValueError) as error:
        raise OfficinaError(f"{path} cannot be read: {error}. {_COPY}") from error
    found, at = {}, 0
    try:
        header.pop("__metadata__", None)
        for name, entry in sorted(header.items(), key=lambda item: item[1]["data_offsets"]):
            begin, end = entry["data_offsets"]
            stored = Stored(path, entry["dtype"], tuple(entry["shape"]), 8 + length + begin, end - begin)
            item = ITEM_BYTES.get(stored.dtype)
            if begin != at or (item and stored.bytes != item * stored.numel):
                raise OfficinaError(f"{path}: the header's place of {name} does not fit its shape. {_COPY}")
            found[name], at = stored, end
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise OfficinaError(f"{path}: the header cannot be understood ({error!r}). {_COPY}") from error
    if 8 + length + at != size:
        raise OfficinaError(f"{path} has {size} bytes and should have {8 + length + at}: it was not copied to its end. {_COPY}")
    return found


# ---- writing -------------------------------------------------------------------------------------------------------
@dataclass(frozen=True, slots=True)
class ToWrite:
    """A tensor that shall be written."""

    name: str
    dtype: str
    shape: tuple[int, ...]

    @property
    def bytes(self) -> int:
        return ITEM_BYTES[self.dtype] * math.prod(self.shape)


class Writer:
    """The files of one model, in shards of at most `max_shard_bytes` (a larger tensor gets a shard of its own)."""

    def __init__(self, folder: Path, tensors: Sequence[ToWrite], max_shard_bytes: int) -> None:
        self.folder = Path(folder)
        shards: list[list[ToWrite]] = [[]]
        for tensor in tensors:
            if shards[-1] and sum(t.bytes for t in shards[-1]) + tensor.bytes > max_shard_bytes:
                shards.append([])
            shards[-1].append(tensor)
        names = [ONE_FILE] if len(shards) == 1 else [
            f"model-{i + 1:05d}-of-{len(shards):05d}.safetensors" for i in range(len(shards))]
        self.shards: Mapping[str, list[ToWrite]] = dict(zip(names, shards, strict=True))
        self.sha256: dict[str, str] = {}
        """Of each file that is finished."""

    def write(self, name: str, parts: Iterator[bytes]) -> None:
        """Write the file `name` whole or not at all; parts: the bytes of its tensors, in order."""
        tensors, header, at = self.shards[name], {"__metadata__": {"format": "pt"}}, 0
        for tensor in tensors:
            header[tensor.name] = {"dtype": tensor.dtype, "shape": list(tensor.shape), "data_offsets": [at, at + tensor.bytes]}
            at += tensor.bytes
        text = json.dumps(header, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)
        partial, digest, written = self.folder / f".{name}.partial", hashlib.sha256(), 0
        with open(partial, "wb") as file:
            for part in (len(text).to_bytes(8, "little"), text):
                file.write(part)
                digest.update(part)
            for part in parts:
                file.write(part)
                digest.update(part)
                written += len(part)
            file.flush()
            os.fsync(file.fileno())
        if written != at:
            raise ValueError(f"{name}: {written} bytes came and the header says {at}")
        os.replace(partial, self.folder / name)
        self.sha256[name] = digest.hexdigest()

    def finish(self) -> None:
        """The index, where there are several files."""
        if len(self.shards) == 1:
            return
        places = {tensor.name: name for name, tensors in self.shards.items() for tensor in tensors}
        total = sum(tensor.bytes for tensors in self.shards.values() for tensor in tensors)
        text = json.dumps({"metadata": {"total_size": total}, "weight_map": dict(sorted(places.items()))}, indent=2) + "\n"
        (self.folder / INDEX_FILE).write_text(text, encoding="utf-8")
