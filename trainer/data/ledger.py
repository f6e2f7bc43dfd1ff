"""What each step read, and the proof from it that every sample was used as planned: once, and in order.

A line of ledger.jsonl is a step: the range of global sample indices that all ranks read together, the ranges
left out of it, the digest of the content, and the rows of each source:

    {"step":41,"first_sample":2560,"stop_sample":2624,"digest":2954100371,"skipped":[],"source_rows":{"a":64}}

or a start, written before the first step of each start of the run. It takes back all steps after it, which
are done again from a checkpoint:

    {"start":40}

A start also says, where documents were removed on request, how many of a source's lists are heeded from then on:
{"start":40,"removals":{"a":2}}. A step that met damaged blocks which could not be had elsewhere names those under its rows,
whose tokens gave no loss: "lost":{"a":{"shards/train-00003.dls":[17]}}.
"""

import json
import os
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from officina.trainer.data.reader import DIGEST_MODULUS, RowReader
from officina.trainer.data.shards import DamagedBlock, Lost, merge_lost
from officina.trainer.errors import DataError
from officina.trainer.run_dir import LEDGER, load_config, read_history

if TYPE_CHECKING:  # the loader needs torch, a login node has none
    from officina.trainer.data.loader import StepData


class Ledger:
    """Appends to RUN/ledger.jsonl; only rank 0 has one. Lines that a full disk does not take wait in memory for the next."""

    def __init__(self, run_dir: Path) -> None:
        path = Path(run_dir) / LEDGER
        if path.exists():
            _cut_torn_line(path)
        self._file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o666)
        self._pending = b""
        self._started = False

    def write(self, step: int, data: "StepData", digest: float) -> None:
        """Add optimizer step `step` (a run's first is 1) with the sum of all ranks' digests."""
        start = {"start": step - 1} | ({"removals": data.removals} if data.removals else {})
        lines = [] if self._started else [start]
        lines.append({"step": step, "first_sample": data.first_sample, "stop_sample": data.stop_sample,
                      "digest": int(digest) % DIGEST_MODULUS, "skipped": data.skipped,
                      "source_rows": data.source_rows} | ({"lost": data.lost} if data.lost else {}))
        self._pending += "".join(json.dumps(line, separators=(",", ":")) + "\n" for line in lines).encode()
        self._started = True
        with suppress(OSError):  # no checkpoint of the step is committed before `sync` has brought it to the disk
            self._flush()

    def sync(self) -> None:
        """Return when all lines are on the disk; before a checkpoint of their steps is committed. Raises OSError."""
        self._flush()
        os.fsync(self._file)

    def close(self) -> None:
        """Sync and close. Lines that cannot be written are of steps without a checkpoint, which are done again."""
        with suppress(OSError):
            self.sync()
        os.close(self._file)

    def _flush(self) -> None:
        while self._pending:  # a short write leaves its rest, so that no line is begun twice
            self._pending = self._pending[os.write(self._file, self._pending):]

    def __enter__(self) -> "Ledger":
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()


def _cut_torn_line(path: Path) -> None:
    """Remove a last line without its end: a kill in the middle of writing left it, and its step is done again."""
    with open(path, "r+b") as file:
        content = file.read()
        if content and not content.endswith(b"\n"):
            file.truncate(content.rfind(b"\n") + 1)


@dataclass(frozen=True, slots=True)
class Entry:
    """One step of the ledger."""

    step: int
    first_sample: int
    stop_sample: int
    digest: int
    skipped: list[list[int]]
    source_rows: dict[str, int]
    removals: dict[str, int] = field(default_factory=dict)
    """Lists of removed documents that were heeded, by source: those of the start that did the step."""
    lost: dict[str, Lost] = field(default_factory=dict)
    """Damaged blocks under the rows, by source, whose tokens gave no loss."""

    def samples(self) -> np.ndarray:
        """Global sample indices that were read: (n,) int64."""
        out = np.ones(self.stop_sample - self.first_sample, bool)
        for a, b in self.skipped:
            out[a - self.first_sample:b - self.first_sample] = False
        return np.flatnonzero(out) + self.first_sample


def read_ledger(run_dir: str | Path) -> tuple[list[Entry], int]:
    """The steps that stand, in their order, and the number of starts. A torn last line is left out.

    Raises DataError naming the line for what is no ledger.
    """
    path = Path(run_dir) / LEDGER
    if not path.is_file():
        raise DataError(f"{path} does not exist: no step of this run has read data, or {run_dir} is no run directory. "
                        "Name a run directory, for example runs/NAME.")
    steps: dict[int, Entry] = {}
    starts, removals = 0, {}
    whole_lines = path.read_bytes().split(b"\n")[:-1]  # after the last newline: nothing, or a torn line
    for number, line in enumerate(whole_lines, 1):
        try:
            values = json.loads(line)
            if "start" in values:
                steps = {step: entry for step, entry in steps.items() if step <= values["start"]}
                starts, removals = starts + 1, values.get("removals", {})
            else:
                steps[values["step"]] = Entry(**values, removals=removals)
        except (ValueError, KeyError, TypeError) as exc:
            raise DataError(f"{path} line {number}: no line of a ledger ({type(exc).__name__}: {exc}). "
                            "The file was edited or damaged: restore it from a copy of the run directory.") from exc
    return [steps[step] for step in sorted(steps)], starts


def heeded(run_dir: str | Path) -> dict[str, int]:
    """Lists of removed documents that the run's newest start heeds, by source."""
    last: dict[str, int] = {}
    with suppress(FileNotFoundError), open(Path(run_dir) / LEDGER, "rb") as file:
        for line in file:
            if line.startswith(b'{"start":') and line.endswith(b"\n"):
                last = json.loads(line).get("removals", {})
    return last


# ---- audit -------------------------------------------------------------------------------------------------
@dataclass(frozen=True, slots=True)
class SourceUse:
    """How far a source was read."""

    rows: int
    """Rows of its split."""
    first_row: int
    """Cursor at the ledger's beginning: 0, or where a branch began."""
    used: int
    skipped: int

    @property
    def epochs(self) -> float:
        """Passes over the source since the run's beginning, those before a branch included."""
        return (self.first_row + self.used + self.skipped) / self.rows


@dataclass(frozen=True, slots=True)
class AuditReport:
    """The verdict of `audit`."""

    steps: int
    first_sample: int
    stop_sample: int
    samples: int
    """Samples read, those left out by data.skip not counted."""
    skipped: list[list[int]]
    starts: int
    sources: dict[str, SourceUse]
    lost: dict[str, Lost]
    """Damaged blocks, by source, whose tokens gave no loss in at least one step."""
    removals: list[tuple[int, dict[str, int]]]
    """(first step, lists of removed documents by source) wherever another number of lists was heeded than before."""
    faults: list[str]
    """What is not as planned; empty is the proof."""

    @property
    def ok(self) -> bool:
        """Every sample of the range was used once, in order, with the content that the shards hold."""
        return not self.faults


def audit(run_dir: str | Path,
          progress: Callable[[int, int], None] = lambda done, total: None) -> AuditReport:
    """Compute order and digests anew from configuration and shards and compare them with the ledger.

    Raises ConfigError or DataError if run or data sets cannot be read. Memory: one byte per row of each source.
    """
    run_dir = Path(run_dir)
    run, (entries, starts) = load_config(run_dir), read_ledger(run_dir)
    if not entries:
        raise DataError(f"{run_dir / LEDGER}: has no step yet. Audit the run after its first step.")
    first, stop = entries[0].first_sample, entries[-1].stop_sample
    readers = {str(removals): RowReader(run, first, removals) for removals in _each(e.removals for e in entries)}
    reader = readers[str(entries[0].removals)]
    faults = _range_faults(entries, _branched(run_dir))
    coverage = _Coverage(reader, first)
    for done, entry in enumerate(entries, 1):
        samples = entry.samples()
        faults += coverage.use(entry)
        as_then = readers[str(entry.removals)]
        as_then.set_aside(entry.lost)
        try:
            if (found := as_then.digest(samples)) != entry.digest:
                faults.append(f"step {entry.step}: the ledger's digest is {entry.digest}, samples {entry.first_sample} to "
                              f"{entry.stop_sample} give {found}: it read other rows, or the shards have changed")
        except DamagedBlock as damaged:
            faults.append(f"step {entry.step}: what it read cannot be read again. {damaged}")
        if (planned := reader.source_rows(samples)) != entry.source_rows:
            faults.append(f"step {entry.step}: read rows {entry.source_rows}, planned {planned}")
        progress(done, len(entries))
    faults += coverage.finish()
    return AuditReport(len(entries), first, stop, sum(len(e.samples()) for e in entries),
                       [r for e in entries for r in e.skipped], starts, coverage.report(),
                       merge_lost(*(e.lost for e in entries)), _changes(entries), faults)


def _changes(entries: list[Entry]) -> list[tuple[int, dict[str, int]]]:
    before = [{}, *(entry.removals for entry in entries)]
    return [(entry.step, entry.removals) for entry, last in zip(entries, before, strict=False) if entry.removals != last]


def _each(values: Iterable[dict[str, int]]) -> list[dict[str, int]]:
    """Those that differ, in their order."""
    return list({str(value): value for value in values}.values())


def _branched(run_dir: Path) -> bool:
    history = read_history(run_dir)
    return bool(history) and history[0].get("action") == "branch"


def _range_faults(entries: list[Entry], branched: bool) -> list[str]:
    """Steps must follow each other, and so must their ranges."""
    faults = []
    if not branched and (entries[0].step, entries[0].first_sample) != (1, 0):
        faults.append(f"the ledger begins with step {entries[0].step} at sample {entries[0].first_sample}, "
                      "not with step 1 at sample 0: its beginning is missing")
    for before, entry in pairwise(entries):
        if entry.step != before.step + 1:
            faults.append(f"steps {before.step + 1} to {entry.step - 1} are missing")
        if entry.first_sample > before.stop_sample:
            faults.append(f"step {entry.step}: samples {before.stop_sample} to {entry.first_sample} were never read")
        if entry.first_sample < before.stop_sample:
            faults.append(f"step {entry.step}: samples {entry.first_sample} to {before.stop_sample} were read twice")
    return faults


class _Coverage:
    """Marks each row of each epoch as it is used, and finds what is used twice or left out."""

    def __init__(self, reader: RowReader, first_sample: int) -> None:
        self._reader, self._names = reader, reader.order.names
        self._first = reader.order.mixture.cursors(first_sample)
        self._next = self._first.copy()
        self._seen: dict[int, tuple[int, np.ndarray]] = {}  # source -> epoch, (rows,) bool
        self._skipped = np.zeros_like(self._first)

    def use(self, entry: Entry) -> list[str]:
        """Mark the samples of one step, those left out too: they are spent."""
        faults = []
        samples = np.arange(entry.first_sample, entry.stop_sample)
        places = self._reader.place(samples)
        read = np.isin(samples, entry.samples(), assume_unique=True)
        for source in np.unique(places.source):
            here = places.source == source
            self._skipped[source] += int(np.count_nonzero(here & ~read))
            cursors = places.cursor[here]
            if not np.array_equal(cursors, np.arange(len(cursors)) + self._next[source]):
                faults.append(f"step {entry.step}: source {self._names[source]} goes from row {self._next[source]} on to "
                              f"{cursors[0]}: the mixture lost or repeats rows")
            self._next[source] = cursors[-1] + 1
            for epoch in np.unique(places.epoch[here]):
                rows = places.row[here & (places.epoch == epoch)]
                faults += self._mark(int(source), int(epoch), rows, entry.step)
        return faults

    def _mark(self, source: int, epoch: int, rows: np.ndarray, step: int) -> list[str]:
        name, faults = self._names[source], []
        total = self._reader.rows[name]
        open_epoch, seen = self._seen.get(source, (-1, np.empty(0, bool)))
        if epoch != open_epoch:
            faults += self._end_epoch(source)
            seen = np.zeros(total, bool)
            self._seen[source] = (epoch, seen)
        twice = np.count_nonzero(seen[rows]) + len(rows) - len(np.unique(rows))
        if twice:
            faults.append(f"step {step}: source {name} uses {twice} rows of epoch {epoch} a second time")
        seen[rows] = True
        return faults

    def _end_epoch(self, source: int) -> list[str]:
        """When the next epoch begins, every row of the one before must have been used, but for a branch's first."""
        if source not in self._seen:
            return []
        epoch, seen = self._seen[source]
        begun_at = max(0, int(self._first[source]) - epoch * len(seen))
        missing = len(seen) - begun_at - int(np.count_nonzero(seen))
        return [f"source {self._names[source]}: {missing} rows of epoch {epoch} were left out"] if missing else []

    def finish(self) -> list[str]:
        """Compare the rows marked in the open epochs with the cursors."""
        faults = []
        for source, (epoch, seen) in self._seen.items():
            start = max(epoch * len(seen), int(self._first[source]))
            if (used := int(np.count_nonzero(seen))) != (planned := int(self._next[source]) - start):
                faults.append(f"source {self._names[source]}: {used} rows of epoch {epoch} used, planned {planned}")
        return faults

    def report(self) -> dict[str, SourceUse]:
        """How far each source was read."""
        return {name: SourceUse(self._reader.rows[name], int(self._first[i]),
                                int(self._next[i] - self._first[i] - self._skipped[i]), int(self._skipped[i]))
                for i, name in enumerate(self._names) if name in self._reader.rows}
