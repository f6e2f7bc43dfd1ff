"""A model's safetensors as a `Source`: each rank reads the ranges it holds and nothing else."""

import difflib
import os
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from officina.trainer.errors import OfficinaError, listed
from officina.trainer.hf.base import Base
from officina.trainer.hf.files import ITEM_BYTES, Stored
from officina.trainer.state import PARAM

DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
PART_BYTES = 16 << 20
"""Read at a time, so that memory does not grow with the tensor."""


class FolderSource:
    """A `state.Source` of the weights of `base`, a folder; checked against the module's shapes when made."""

    def __init__(self, base: Base, shapes: Mapping[str, tuple[int, ...]]) -> None:
        """Raises OfficinaError with every tensor that is missing, of another shape, or not known."""
        assert base.family is not None and base.tensors is not None
        self._stored: dict[str, Stored] = {}
        faults, known = [], set(_constants(base))
        for name, shape in shapes.items():
            theirs = base.family.their_name(name)
            known.add(theirs)
            stored = base.tensors.get(theirs)
            if stored is None:
                near = difflib.get_close_matches(theirs, base.tensors, 1, 0.8)
                faults.append(f"{theirs} is in no file" + (f"; {near[0]} is there" if near else ""))
            elif stored.shape != tuple(shape):
                faults.append(f"{theirs} is {list(stored.shape)} in {stored.file.name} and {list(shape)} in the model")
            else:
                self._stored[name] = stored
        head = base.tensors.get("lm_head.weight")
        if base.model.tie_embeddings and head is not None:  # old files hold a tied matrix twice
            known.add("lm_head.weight")
            embed = self._stored.get("embed.weight")
            if embed is not None and not _same(head, embed):
                faults.append("lm_head.weight differs from model.embed_tokens.weight, and tie_word_embeddings is true")
        faults += [f"{name} is known to no {base.family.model_type} model" for name in sorted(base.tensors.keys() - known)]
        if faults:
            raise OfficinaError(f"the weights in {base.path} are not those of its config.json as officina reads it:\n  " +
                                listed(faults) +
                                "\nTake config.json and *.safetensors of one and the same model")
        _check_constants(base)

    def read(self, name: str, slot: str, start: int, stop: int) -> Tensor:
        """Elements [start, stop) as fp32. KeyError for anything but a parameter of the module."""
        if slot != PARAM:
            raise KeyError(f"a folder of weights has no slot {slot!r} (asked for {name})")
        stored = self._stored[name]
        if not 0 <= start <= stop <= stored.numel:
            raise IndexError(f"{name} has {stored.numel} elements; [{start}, {stop}) is outside")
        return read_stored(stored, start, stop)

    def where(self, name: str) -> str:
        """The file that holds a parameter, for messages."""
        return str(self._stored[name].file)


def read_stored(stored: Stored, start: int, stop: int) -> Tensor:
    """Elements [start, stop) of a stored tensor as fp32, on the CPU."""
    item, dtype = ITEM_BYTES[stored.dtype], DTYPES[stored.dtype]
    out = torch.empty(stop - start)
    fd = _open(stored.file)
    try:
        for at in range(start, stop, PART_BYTES // item):
            end = min(stop, at + PART_BYTES // item)
            raw = torch.empty(end - at, dtype=dtype)
            _fill(fd, stored, memoryview(raw.view(torch.uint8).numpy()), stored.offset + at * item)
            out[at - start:end - start] = raw
    finally:
        os.close(fd)
    return out


def _open(path: Path) -> int:
    try:
        return os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except OSError as error:
        raise OfficinaError(f"{path} cannot be read: {error.strerror}. Is it on a file system that all ranks see?") from error


def _fill(fd: int, stored: Stored, target: memoryview, offset: int) -> None:
    while target.nbytes:
        try:
            got = os.preadv(fd, [target], offset)
        except OSError as error:
            raise OfficinaError(f"{stored.file}, byte {offset}: {error.strerror}. Copy the file anew") from error
        if not got:
            raise OfficinaError(f"{stored.file} was cut short at byte {offset} while it was read. Copy it anew")
        target, offset = target[got:], offset + got


def _same(a: Stored, b: Stored) -> bool:
    step = PART_BYTES // 4
    return a.shape == b.shape and all(
        torch.equal(read_stored(a, at, min(a.numel, at + step)), read_stored(b, at, min(b.numel, at + step)))
        for at in range(0, a.numel, step))


def _constants(base: Base) -> dict[str, float]:
    return {f"model.layers.{layer}.{name}": value for layer in range(base.model.n_layers)
            for name, value in base.family.constants.items()}


def _check_constants(base: Base) -> None:
    """Numbers that the kernels hold fixed must be those of the files, to the precision they are stored in."""
    for name, value in _constants(base).items():
        stored = base.tensors.get(name)
        if stored is None:
            continue
        found = read_stored(stored, 0, 1)
        if stored.numel != 1 or not torch.equal(found, torch.tensor([value], dtype=DTYPES[stored.dtype]).float()):
            raise OfficinaError(f"{stored.file}: {name} is {found.tolist()} and officina's kernels compute with {value}. "
                                "This model cannot be trained here")
