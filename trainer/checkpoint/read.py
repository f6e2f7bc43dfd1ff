"""A checkpoint as a `Source`: verified when opened, then read by any engine on any number of ranks."""

import difflib
import os
import threading
from collections import OrderedDict
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from torch import Tensor

from officina.trainer.checkpoint.disk import why
from officina.trainer.checkpoint.index import Span, content_sums
from officina.trainer.checkpoint.layout import (
    CheckpointInfo,
    Key,
    TrainState,
    checkpoints_dir,
    data_name,
    parse_step_dir,
    step_dir,
)
from officina.trainer.checkpoint.verify import (
    Alone,
    Contents,
    Damage,
    RankGroup,
    latest_valid,
    list_checkpoints,
    threads_here,
    verify,
)
from officina.trainer.errors import CheckpointError, listed

__all__ = ["CheckpointInfo", "OpenCheckpoint", "latest_valid", "list_checkpoints", "open_checkpoint"]

_PART_BYTES = 16 << 20
"""Larger reads are split into parts of this size for the threads."""
_OPEN_FILES = 64
"""Data files kept open at a time; a rank of a large world needs a few, a single reader may need thousands."""


class OpenCheckpoint:
    """A checkpoint whose every byte was verified. Close it when the engine is filled."""

    def __init__(self, contents: Contents, passed_over: tuple[str, ...], damaged: tuple[Path, ...], threads: int) -> None:
        self.path = contents.path
        self.step = contents.commit.step
        self.run_id = contents.commit.run_id
        self.world_size = contents.commit.world_size
        """Ranks that wrote it."""
        self.bytes = contents.commit.data_bytes
        self.train_state: TrainState = contents.commit.train_state
        self.content: Mapping[Key, int] = content_sums(contents.manifests)
        """Content sum of each (name, slot): see content.py."""
        self.passed_over = passed_over
        """What was wrong with newer checkpoints, one sentence each, with directory and file."""
        self.damaged = damaged
        """Directories of those that are committed and damaged; `Saver` sets them aside when given them."""
        self._index = contents.index
        self._threads = threads
        self._files: OrderedDict[int, int] = OrderedDict()
        self._lock = threading.Lock()

    def has(self, name: str, slot: str) -> bool:
        return (name, slot) in self._index

    def tensors(self) -> dict[str, tuple[tuple[int, ...], tuple[str, ...]]]:
        """name -> (shape, slots)."""
        slots: dict[str, list[str]] = {}
        for name, slot in self._index:
            slots.setdefault(name, []).append(slot)
        return {n: (self._index[n, s[0]].shape, tuple(sorted(s))) for n, s in slots.items()}

    def check_fits(self, shapes: Mapping[str, tuple[int, ...]], slot: str = "param") -> None:
        """Raise CheckpointError with every tensor of `shapes` that is missing here or of another shape."""
        faults = []
        for name, shape in shapes.items():
            entry = self._index.get((name, slot))
            if entry is None:
                faults.append(self._missing(name, slot))
            elif entry.shape != tuple(shape):
                file = data_name(entry.spans[0].rank) if entry.spans else "COMMIT"
                faults.append(f"{name} {slot} is {list(entry.shape)} in {self.path / file} and {list(shape)} in the model")
        if faults:
            raise CheckpointError(f"{self.path} is not of this model:\n  " + listed(faults) +
                                  "\nThe model's shape cannot change on a resume: use the run's own model settings.")

    def read(self, name: str, slot: str, start: int, stop: int) -> Tensor:
        """Elements [start, stop) in row-major order as a CPU tensor (stop - start,) of the dtype that was written."""
        entry = self._index.get((name, slot))
        if entry is None:
            raise CheckpointError(self._missing(name, slot))
        if not 0 <= start <= stop <= entry.numel:
            raise CheckpointError(f"{name} {slot} is {list(entry.shape)} in {self.path}: elements {start} to {stop} "
                                  f"were asked for, it has {entry.numel}. A model's shape cannot change on a resume")
        out = torch.empty(stop - start, dtype=getattr(torch, entry.dtype))
        if stop == start:
            return out
        target = memoryview(out.view(torch.uint8).numpy())
        parts = []
        for span in entry.covering(start, stop):
            size, at = (span.stop - span.start) * entry.item_bytes, (span.start - start) * entry.item_bytes
            for i in range(0, size, _PART_BYTES):
                parts.append((span, span.offset + i, target[at + i:at + min(size, i + _PART_BYTES)]))
        if len(parts) > 1 and self._threads > 1 and target.nbytes > _PART_BYTES:
            with ThreadPoolExecutor(self._threads) as pool:
                list(pool.map(lambda p: self._fill(name, slot, *p), parts))
        else:
            for part in parts:
                self._fill(name, slot, *part)
        return out

    def close(self) -> None:
        """Close the data files."""
        while self._files:
            os.close(self._files.popitem()[1])

    def __enter__(self) -> "OpenCheckpoint":
        return self

    def __exit__(self, *_) -> None:
        self.close()

    def _fill(self, name: str, slot: str, span: Span, offset: int, target: memoryview) -> None:
        path = self.path / data_name(span.rank)
        try:
            fd = self._fd(span.rank)
            try:
                while target.nbytes:
                    got = os.preadv(fd, [target], offset)
                    if not got:
                        raise CheckpointError(f"{path} was cut short at byte {offset} after it had been verified "
                                              f"({name} {slot}). Does another process write to this run?")
                    target, offset = target[got:], offset + got
            finally:
                os.close(fd)
        except OSError as e:
            raise CheckpointError(f"{path}, byte {offset} ({name} {slot}) cannot be read: {why(e.errno)}. "
                                  f"Resume again to take the previous checkpoint if it stays so") from e

    def _fd(self, rank: int) -> int:
        """A descriptor of the rank's data file; the caller closes it (the cached one may go meanwhile)."""
        with self._lock:
            fd = self._files.get(rank)
            if fd is None:
                fd = os.open(self.path / data_name(rank), os.O_RDONLY | os.O_CLOEXEC)
                self._files[rank] = fd
                if len(self._files) > _OPEN_FILES:
                    os.close(self._files.popitem(last=False)[1])
            self._files.move_to_end(rank)
            return os.dup(fd)

    def _missing(self, name: str, slot: str) -> str:
        slots = sorted(s for n, s in self._index if n == name)
        if slots:
            return f"{self.path} has no {slot} of {name}, only {', '.join(slots)}"
        near = difflib.get_close_matches(name, {n for n, _ in self._index}, 1)
        return f"{self.path} has no tensor {name}" + (f"; did the model change? It has {near[0]}" if near else "")


def open_checkpoint(run_dir: Path, *, step: int | None = None, ranks: RankGroup | None = None,
                    run_id: str | None = None) -> OpenCheckpoint:
    """The newest checkpoint of the run that is whole, or that of `step`. Collective over `ranks`.

    All chunks are verified before anything is returned, the ranks and their threads sharing the work. A damaged or
    incomplete one is passed over and named in `.passed_over`; with `step` it is an error that names one that works.
    run_id, if given, is the run the checkpoint must be of. Raises CheckpointError if there is none.
    """
    ranks = ranks or Alone()
    passed_over: list[str] = []
    damaged: list[Path] = []
    candidates = _candidates(run_dir, ranks)
    for path in sorted(candidates, key=lambda p: parse_step_dir(p.name)[0] != step) if step is not None else candidates:
        of_step = parse_step_dir(path.name)[0]
        if step is not None and of_step != step and not passed_over:
            passed_over.append(f"{step_dir(run_dir, step)} does not exist")
        contents, damage = _try(path, of_step, run_id, ranks)
        if contents is None:
            passed_over += [f"{path} is {'incomplete' if d.file == '' else 'damaged'}: {d}" for d in damage]
            damaged += [path] if any(d.file for d in damage) else []
        elif step is None or of_step == step:
            return OpenCheckpoint(contents, tuple(passed_over), tuple(damaged), threads_here(ranks))
        else:
            raise CheckpointError(f"step {step} of {run_dir} cannot be loaded: {'; '.join(passed_over)}. "
                                  f"Step {of_step} is whole: {run_dir}@{of_step}, step={of_step} or --step {of_step}")
    if not candidates:
        raise CheckpointError(f"{checkpoints_dir(run_dir)} holds no checkpoint. Is {run_dir} the run you mean? Without "
                              f"a checkpoint a run starts anew: officina train")
    raise CheckpointError(f"no checkpoint of {run_dir} can be loaded:\n  " + "\n  ".join(passed_over) +
                          "\nA copy of one step's directory from elsewhere would do; else start anew: officina train")


def _try(path: Path, step: int, run_id: str | None, ranks: RankGroup) -> tuple[Contents | None, list[Damage]]:
    try:
        return verify(path, step=step, run_id=run_id, ranks=ranks)
    except FileNotFoundError:
        return None, [Damage("", "no COMMIT, its writing was not finished")]


def _candidates(run_dir: Path, ranks: RankGroup) -> list[Path]:
    """Step directories, newest first, as rank 0 sees them (a listing on another node may lag behind).

    `step-N.old` is the former checkpoint of a step that was being written anew: it counts after `step-N` itself.
    """
    root = checkpoints_dir(run_dir)
    codes: list[int] = []
    if ranks.rank == 0 and root.is_dir():
        parsed = [parse_step_dir(p.name) for p in root.iterdir() if p.is_dir()]
        codes = sorted((2 * p[0] + (p[1] == "") for p in parsed if p and p[1] in ("", ".old")), reverse=True)
    count = int(ranks.sum([float(len(codes))])[0])
    codes = [int(c) for c in ranks.sum([float(c) for c in codes] or [0.0] * count)]
    return [root / f"step-{c // 2:08d}{'' if c % 2 else '.old'}" for c in codes]
