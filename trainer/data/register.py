"""The register of use: how often and how far data sets with a maximum of use have been used, over all runs.

    DATASET/use/RUN_ID.NAME.json        or REGISTER/FINGERPRINT/RUN_ID.NAME.json with use.register=REGISTER

One file per run, written by that run alone and replaced as a whole, so that nothing needs a lock or an atomic append,
which NFS does not have. A start writes its own file first and looks at the others then: of two starts at once at least
one sees the other, and where both do and there is room for one only, both withdraw. A run writes down what it read at its
first step, at each save, every few minutes and at its end; without a sign of life for a day it counts that, not what it
planned. A data set counts once, whatever the names that a mixture has for it.
"""

import json
import math
import time
from collections.abc import Collection, Iterator
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime, timedelta
from functools import lru_cache
from pathlib import Path

import numpy as np
from pydantic import ConfigDict, TypeAdapter, ValidationError

from officina.trainer.config import RunConfig
from officina.trainer.data.integrity import ORIGIN
from officina.trainer.data.manifest import MANIFEST, Dataset, open_dataset, write_whole
from officina.trainer.data.order import Mixture, Skips, sources_in_use, timeline_of
from officina.trainer.data.policy import Policy, policy_of
from officina.trainer.data.remote import REMOTE
from officina.trainer.data.stream import Stream
from officina.trainer.errors import DataError

FOLDER = "use"
ALIVE = timedelta(days=1)
EVERY_S = 300.0
"""Between two notes of what a run has read."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Entry:
    """What one run used of one data set."""

    run: str
    """RUN_ID.NAME: a branch has the run's id and a name of its own."""
    purpose: str = ""
    organisation: str = ""
    first: str
    """Start of the first use, UTC."""
    last: str
    """Newest sign of life, UTC."""
    first_sample: int = 0
    """Global sample index at which the run's own use began; after 0 for a branch."""
    rows: int = 0
    """Rows read, those left out by data.skip included."""
    planned_rows: int = 0
    row_tokens: int = 1
    """Tokens (or records) of a row."""
    split_rows: int = 1
    """Rows of the split."""
    done: bool = False

    def counts(self, now: datetime) -> int:
        """Rows that stand against a maximum: what was read, and what a run under way has planned."""
        return self.rows if self.done or not self.alive(now) else max(self.rows, self.planned_rows)

    def alive(self, now: datetime) -> bool:
        """Has there been a sign of life within a day?"""
        return now - _time(self.last) < ALIVE


Entry.__pydantic_config__ = ConfigDict(extra="forbid")
_ENTRY = TypeAdapter(Entry)


@dataclass(frozen=True, slots=True)
class Going:
    """Where a run stands when it is judged; a new run stands at the beginning."""

    run_id: str = ""
    step: int = 0
    position: int = 0
    """Global sample index of the next sample."""
    branch: bool = False
    run_dir: Path | None = None
    """Of the run that is gone on with or branched from."""


@dataclass(frozen=True, slots=True)
class Tally:
    """What others have used of a data set, and what this run plans."""

    runs: int
    """Other runs that count."""
    rows: int
    """Rows of the others."""
    planned_rows: int
    """Of this run, from its own beginning to its last step."""
    row_tokens: int
    split_rows: int
    first: str
    """First use by anybody; empty if there was none."""


def is_limited(policy: Policy) -> bool:
    """Has the data set a maximum of use that needs a register?"""
    return any(limit is not None for limit in (policy.max_runs, policy.max_tokens, policy.max_epochs, policy.max_days))


def folder_of(dataset: Dataset, register: str) -> Path:
    """Where the uses of a data set are counted."""
    return Path(register) / dataset.manifest.fingerprint[:16] if register else dataset.folder / FOLDER


def _register_of(run: RunConfig, name: str, dataset: Dataset) -> Path:
    """Where the uses of source `name` are counted. Raises DataError for a copy: beside it no use of another would be known."""
    mark = next((mark for mark in (ORIGIN, REMOTE) if (dataset.folder / mark).exists()), "")
    if mark and not run.use.register:
        raise DataError(f"data.sources.{name}: {dataset.folder} is a copy ({mark}) of data with a maximum of use, and would "
                        "count from zero. Name one folder that all runs of this data can write: use.register=DIR")
    return folder_of(dataset, run.use.register)


def read_entries(folder: Path) -> list[Entry]:
    """All entries, oldest first. Raises DataError naming a file that is none: it may hold a use that counts."""
    found = []
    for path in sorted(folder.glob("*.json")):
        try:
            found.append(_ENTRY.validate_python(json.loads(path.read_bytes())))
        except (OSError, ValueError, ValidationError) as exc:
            raise DataError(f"{path}: no entry of a register of use ({' '.join(str(exc).split())[:200]}). Restore it from a "
                            "copy; it counts towards the maximum use of the data.") from exc
    return sorted(found, key=lambda entry: (entry.first, entry.run))


def tally(run: RunConfig, name: str, dataset: Dataset, going: Going, now: datetime) -> Tally:
    """What stands against the maximum use of source `name` before this run, and what the run would add."""
    entries = read_entries(_register_of(run, name, dataset))
    own = f"{going.run_id}.{run.name}"
    mine = next((entry for entry in entries if going.run_id and entry.run == own), None)
    others = [entry for entry in entries if entry is not mine]
    counting = [entry for entry in others if entry.rows or entry.alive(now)]
    first_sample = mine.first_sample if mine else going.position if going.branch else 0
    row_tokens, split_rows = _rows(run, dataset)
    planned = planned_rows(run, _alike(run, dataset), first_sample, going)
    return Tally(len(counting), sum(entry.counts(now) for entry in counting), planned, row_tokens, split_rows,
                 entries[0].first if entries else "")


def planned_rows(run: RunConfig, names: Collection[str], first_sample: int, going: Going) -> int:
    """Rows of the sources `names` from `first_sample` to the end of the run, in closed form."""
    mixture, left = Mixture(timeline_of(run.data)), max(run.steps - going.step, 0) * run.batch.rows
    stop = going.position
    if left:
        stop = int(Skips(run.data.skip).indices(going.position, np.asarray([left - 1]))[0]) + 1
    return _between(mixture, names, first_sample, max(stop, first_sample))


def _between(mixture: Mixture, names: Collection[str], first_sample: int, stop_sample: int) -> int:
    numbers = [number for number, name in enumerate(mixture.names) if name in names]
    return int((mixture.cursors(stop_sample) - mixture.cursors(first_sample))[numbers].sum())


def _alike(run: RunConfig, dataset: Dataset) -> list[str]:
    """The sources that have this content: one that left the mixture too, for what it gave before."""
    found = []
    for name, source in run.data.sources.items():
        path = Path(source.path) / MANIFEST
        with suppress(DataError, OSError):  # one that left may be gone from the disk
            if _fingerprint(path, path.stat().st_mtime_ns) == dataset.manifest.fingerprint:
                found.append(name)
    return found


@lru_cache(maxsize=1024)  # hundreds of sources are compared with each other
def _fingerprint(path: Path, written_ns: int) -> str:
    return open_dataset(path.parent).manifest.fingerprint


def _rows(run: RunConfig, dataset: Dataset) -> tuple[int, int]:
    """Tokens of a row at most (1 for a record), and rows of the split that is trained on."""
    manifest, split = dataset.manifest, run.data.split
    totals = manifest.splits.get(split)
    if totals and manifest.kind == "tokens" and (manifest.samples or run.data.packing == "best_fit"):
        stream = Stream(dataset, split).lay_out(run.data, run.batch.seq_len)
        return run.batch.seq_len + 1, max(stream.rows(run.batch.seq_len), 1)
    if manifest.kind == "records":
        return 1, max(totals.documents if totals else 1, 1)
    return run.batch.seq_len, max((totals.tokens - 1) // run.batch.seq_len if totals else 1, 1)


class Uses:
    """This run's entries in the registers of its data sets; only rank 0 has one."""

    def __init__(self, run: RunConfig, run_id: str, position: int = 0) -> None:
        """position: global sample index of the next sample; 0 = the beginning, or not known."""
        self._names: dict[Path, list[str]] = {}
        for _, dataset in _limited(run, position):
            path = folder_of(dataset, run.use.register) / f"{run_id}.{run.name}.json"
            if path.exists():
                self._names[path] = _alike(run, dataset)
        self._mixture = Mixture(timeline_of(run.data)) if self._names else None
        self._noted_s = -math.inf

    def step(self, position: int) -> None:
        """As `record`, at the first step and every few minutes; nothing to do for data without a maximum."""
        if self._names and time.monotonic() - self._noted_s >= EVERY_S:
            self._noted_s = time.monotonic()
            self.record(position)

    def record(self, position: int, *, done: bool = False) -> None:
        """Say that all samples before `position` have been read."""
        for path, names in self._names.items():
            entry = _ENTRY.validate_python(json.loads(path.read_bytes()))
            rows = _between(self._mixture, names, entry.first_sample, max(position, entry.first_sample))
            _write(path, replace(entry, rows=max(rows, entry.rows), last=_text(datetime.now(UTC)), done=done))


def enter(run: RunConfig, going: Going) -> None:
    """Enter the run into the registers of its data sets, before its first rank starts.

    Raises DataError if a register cannot be written, or if a start at the same moment came first and left no room.
    """
    made: list[Path] = []
    try:
        for name, dataset in _limited(run, going.position):
            _enter(run, going, name, dataset, made)
    except DataError:
        for path in made:
            path.unlink(missing_ok=True)
        raise


def _enter(run: RunConfig, going: Going, name: str, dataset: Dataset, made: list[Path]) -> None:
    now, folder = datetime.now(UTC), _register_of(run, name, dataset)
    path = folder / f"{going.run_id}.{run.name}.json"
    before = _ENTRY.validate_python(json.loads(path.read_bytes())) if path.exists() else None
    row_tokens, split_rows = _rows(run, dataset)
    first_sample = before.first_sample if before else going.position if going.branch else 0
    entry = Entry(run=f"{going.run_id}.{run.name}", purpose=run.use.purpose, organisation=run.use.organisation,
                  first=before.first if before else _text(now), last=_text(now), first_sample=first_sample,
                  rows=before.rows if before else 0, planned_rows=planned_rows(run, _alike(run, dataset), first_sample, going),
                  row_tokens=row_tokens, split_rows=split_rows)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        _write(path, entry)
    except OSError as exc:
        raise DataError(f"{folder}: {exc.strerror}, but data.sources.{name} has a maximum of use, which is counted there. "
                        "Name a folder that all runs of this data can write: use.register=DIR") from exc
    if before is None:
        made.append(path)
    found = tally(run, name, dataset, going, now)  # after writing: see above
    rows = found.rows + found.planned_rows
    if over := over_maximum(policy_of(dataset), found.runs + 1, rows, row_tokens, split_rows):
        raise DataError(f"data.sources.{name}: {over}; another run was entered at the same moment. Start again when it "
                        f"has ended, or leave the source out: '~data.sources.{name}'")


def over_maximum(policy: Policy, runs: int, rows: int, row_tokens: int, split_rows: int) -> str:
    """The maximum that so much use would exceed, in words; empty if there is none."""
    if policy.max_runs is not None and runs > policy.max_runs:
        return f"may be used by {policy.max_runs} runs, and this would be number {runs}"
    if policy.max_tokens is not None and rows * row_tokens > policy.max_tokens:
        return f"may give {policy.max_tokens:,} tokens to all runs together, and this would make {rows * row_tokens:,}"
    if policy.max_epochs is not None and rows > policy.max_epochs * split_rows:
        return f"may be read {policy.max_epochs:g} times by all runs together, and this would make {rows / split_rows:.3f}"
    return ""


def _limited(run: RunConfig, position: int) -> Iterator[tuple[str, Dataset]]:
    for name in sources_in_use(run.data, position):
        dataset = open_dataset(run.data.sources[name].path)
        if is_limited(policy_of(dataset)):
            yield name, dataset


def _write(path: Path, entry: Entry) -> None:
    write_whole(path, (json.dumps(asdict(entry), indent=1) + "\n").encode())


def _text(moment: datetime) -> str:
    return moment.strftime("%Y-%m-%dT%H:%M:%S.%fZ")


def _time(text: str) -> datetime:
    return datetime.fromisoformat(text)
