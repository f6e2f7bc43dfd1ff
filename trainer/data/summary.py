"""What a run consumed: exact tokens by source, contributor, licence and language, and a receipt to settle by.

From the ledger and the manifests alone. Which rows were read is closed form: whole passes over a source are counted
without looking at one; only the rows of a pass that was begun and not ended are placed by the permutation. A row of
seq_len tokens counts its inputs, [r T, r T + T), to the documents they belong to, so that all sums agree to the token; a row
that was packed counts its pieces.
"""

from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np

from officina.trainer.config import RunConfig
from officina.trainer.data.integrity import spans_of
from officina.trainer.data.ledger import Entry, read_ledger
from officina.trainer.data.manifest import Manifest
from officina.trainer.data.policy import policy_of
from officina.trainer.data.reader import RowReader
from officina.trainer.data.removal import removed_documents
from officina.trainer.data.shards import DTYPES, Lost
from officina.trainer.data.stream import Stream
from officina.trainer.errors import DataError
from officina.trainer.metrics import read_metrics
from officina.trainer.run_dir import LEDGER, load_config, read_run_id

_AT_ONCE = 1 << 20
"""Rows placed at once."""
NOT_STATED = "not stated"


@dataclass(frozen=True, slots=True)
class Consumed:
    """What was read of one source of the mixture."""

    dataset: str
    """Name and version."""
    fingerprint: str
    policy_sha256: str | None
    licence: str
    personal_data: str
    rows: int
    tokens: int
    """Or records, see `Summary.unit`; those of documents that were removed on request, or in damaged blocks that were set
    aside, are not read and do not count."""
    passes: float
    """Over the rows of the split."""
    contributors: list[str]
    attribution: str
    lost: int = 0
    """Tokens (or records) of the rows that lay in damaged blocks, pairs whole: neither read nor counted above."""
    by_source: dict[str, int] = field(default_factory=dict)
    """Tokens by the sources within the data set."""
    by_language: dict[str, int] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Summary:
    """What a run consumed, and its receipt."""

    run: str
    run_id: str
    unit: str
    """`tokens` or `records`."""
    steps: int
    starts: int
    """Times that the run was started, resumes included."""
    first: str
    """Time of the first start, UTC; empty if no start is recorded."""
    last: str
    """Time of the last sign of life, UTC."""
    duration_s: float
    """Sum over the starts, from the start of the ranks to their last sign of life: pauses do not count."""
    total: int
    sources: dict[str, Consumed]
    """By the names of the mixture."""
    by_contributor: dict[str, int]
    """A data set of several contributors counts in full for their group, `A, B`: shares within it are not known."""
    by_licence: dict[str, int]
    by_language: dict[str, int]
    use: dict[str, Any]
    """What the run declared (`use.*`)."""
    attribution: list[str]


def summarise(run_dir: str | Path, progress: Callable[[int, int], None] = lambda done, total: None) -> Summary:
    """Count what the steps that stand in the ledger have read. Raises DataError if run or data sets cannot be read."""
    run_dir = Path(run_dir)
    run, (entries, starts) = load_config(run_dir), read_ledger(run_dir)
    if not entries:
        raise DataError(f"{run_dir / LEDGER}: has no step yet, so nothing was consumed. Ask again after the run's first step.")
    reader = RowReader(run, entries[0].first_sample)
    parts = [(dict(heeded), cursor_spans(reader, list(part)))
             for heeded, part in groupby(entries, lambda entry: sorted(entry.removals.items()))]
    total_rows = sum(b - a for _, spans in parts for span in spans.values() for a, b in span)
    done, counts = 0, {}
    for heeded, spans in parts:
        for name, span in spans.items():
            lists = heeded.get(name, 0)
            if (name, lists) not in counts:
                counts[name, lists] = _Counts(reader.streams[name], lists, reader.records, reader.seq_len)
            for a, b in span:
                for rows, times in _rows_of(reader, name, a, b):
                    counts[name, lists].add(rows, times)
                    done += reader.rows[name] * times if rows is None else len(rows)
                    progress(done, total_rows)
    for entry in entries:
        for name, lost in entry.lost.items():
            counts[name, dict(entry.removals).get(name, 0)].take_away(_rows_of_source(reader, entry, name), lost)
    sources = {name: _consumed(reader.streams[name], [c for (of, _), c in counts.items() if of == name], reader.rows[name])
               for name in sorted({name for name, _ in counts})}
    return _summary(run_dir, run, entries, starts, sources)


def cursor_spans(reader: RowReader, entries: list[Entry]) -> dict[str, list[tuple[int, int]]]:
    """Cursors [a, b) of each source that the entries have read, left-out samples taken out. Sources without a row have none."""
    mixture = reader.order.mixture
    spans: dict[str, list[tuple[int, int]]] = {name: [] for name in reader.streams}
    for first, stop in _sample_ranges(entries):
        before, after = mixture.cursors(first), mixture.cursors(stop)
        for number, name in enumerate(mixture.names):
            if name in spans and after[number] > before[number]:
                here = spans[name]
                if here and here[-1][1] == before[number]:
                    here[-1] = (here[-1][0], int(after[number]))
                else:
                    here.append((int(before[number]), int(after[number])))
    return {name: span for name, span in spans.items() if span}


def _sample_ranges(entries: list[Entry]) -> list[tuple[int, int]]:
    """Ranges of global samples that were read, joined over steps."""
    ranges: list[tuple[int, int]] = []
    for entry in entries:
        position = entry.first_sample
        for a, b in [*entry.skipped, [entry.stop_sample, entry.stop_sample]]:
            if a > position:
                if ranges and ranges[-1][1] == position:
                    ranges[-1] = (ranges[-1][0], a)
                else:
                    ranges.append((position, a))
            position = b
    return ranges


def _rows_of(reader: RowReader, name: str, first: int, stop: int) -> Iterator[tuple[np.ndarray | None, int]]:
    """Rows of the cursors [first, stop): (rows, 1) for passes that are not whole, (None, times) for whole ones."""
    size, cursor = reader.rows[name], first
    while cursor < stop:
        epoch, inside = divmod(cursor, size)
        if inside == 0 and stop - cursor >= size:
            times = (stop - cursor) // size
            yield None, times
            cursor += times * size
            continue
        upto = min(stop, (epoch + 1) * size, cursor + _AT_ONCE)
        yield reader.order.rows_of_epoch(name, epoch, np.arange(inside, inside + upto - cursor)), 1
        cursor = upto


def _rows_of_source(reader: RowReader, entry: Entry, name: str) -> np.ndarray:
    """Rows of one source that a step read."""
    places = reader.place(entry.samples())
    return places.row[places.source == reader.order.names.index(name)]


class _Counts:
    """Tokens (or records) by the document's source and language; lists: lists of removed documents that were heeded."""

    def __init__(self, stream: Stream, lists: int, records: bool, seq_len: int) -> None:
        self._stream, self._records, self._length = stream, records, 1 if records else seq_len
        self._split_rows = int(stream.document_starts[-1]) if records else stream.rows(seq_len)
        manifest = stream.dataset.manifest
        self._names = {"source": manifest.sources or [NOT_STATED], "language": manifest.languages or [NOT_STATED]}
        self.found = {kind: Counter[str]() for kind in self._names}
        self.rows = self.lost = 0
        gone = removed_documents(stream.dataset, lists)
        self._ids: dict[str, np.ndarray] = {}
        """(documents,) number of each document's name, or one beyond the last for a removed one; only where it matters."""
        self._ends = np.zeros(0, np.int64)
        if any(len(names) > 1 for names in self._names.values()) or gone:
            self._read_documents(gone, records)

    def _read_documents(self, gone: dict[str, np.ndarray], records: bool) -> None:
        shards = [self._stream.shard(i) for i in range(len(self._stream.entries))]
        if records:
            self._ends = np.arange(1, int(self._stream.document_starts[-1]) + 1)
        else:
            self._ends = np.concatenate([shard.ends + start for shard, start in
                                         zip(shards, self._stream.token_starts[:-1], strict=True)])
        for kind, names in self._names.items():
            known = [shard.source_ids if kind == "source" else shard.language_ids for shard in shards]
            ids = np.concatenate(known).astype(np.int64)
            if len(names) == 1 or len(ids) != len(self._ends):
                ids = np.zeros(len(self._ends), np.int64)
            for entry, start in zip(self._stream.entries, self._stream.document_starts[:-1], strict=True):
                if entry.path in gone:
                    ids[gone[entry.path] + start] = len(names)
            self._ids[kind] = ids

    def add(self, rows: np.ndarray | None, times: int = 1) -> None:
        """Count some rows, or all of them so many times (None)."""
        plan = self._stream.plan
        if plan is not None:
            rows = np.arange(len(plan)) if rows is None else rows
            starts, stops = plan.ranges(rows)
        elif rows is None:
            starts, stops = np.zeros(1, np.int64), np.asarray([self._split_rows * self._length])
        else:
            starts, stops = rows * self._length, (rows + 1) * self._length
        self.rows += (int((stops - starts).sum()) // self._length if plan is None else len(rows)) * times
        self._count(starts, stops, times)

    def take_away(self, rows: np.ndarray, lost: Lost) -> None:
        """Of rows that were counted, what lay in lost blocks."""
        if self._stream.plan is not None:
            starts, stops = self._stream.plan.ranges(rows)
        else:
            starts, stops = rows * self._length, (rows + 1) * self._length
        firsts, ends = spans_of(lost, self._stream.entries, DTYPES[self._stream.dataset.manifest.dtype].itemsize)
        if self._records:  # a record is lost with any part of it
            bounds = self._record_bounds()
            whole = (bounds[rows][:, None] < ends) & (bounds[rows + 1][:, None] > firsts)
            starts, stops = starts[whole.any(1)], stops[whole.any(1)]
        elif self._stream.dataset.manifest.samples == "pairs":  # and so is a pair
            whole = (starts[:, None] < ends) & (stops[:, None] > firsts)
            starts, stops = starts[whole.any(1)], stops[whole.any(1)]
        else:
            a, b = np.maximum(starts[:, None], firsts).ravel(), np.minimum(stops[:, None], ends).ravel()
            starts, stops = a[a < b], b[a < b]
        self.lost += self._count(starts, stops, -1)

    def _record_bounds(self) -> np.ndarray:
        """(records + 1,) first byte of each record in the stream, and the end of the last."""
        ends = [self._stream.shard(i).ends + start for i, start in enumerate(self._stream.token_starts[:-1])]
        return np.concatenate([np.zeros(1, np.int64), *ends])

    def _count(self, starts: np.ndarray, stops: np.ndarray, times: int) -> int:
        """Add the tokens of the ranges, so many times; returns how many of them are no removed document's."""
        everything = int((stops - starts).sum())
        for kind, names in self._names.items():
            if kind not in self._ids:
                self.found[kind][names[0]] += everything * times
                continue
            found = _tokens_by(self._ids[kind], self._ends, starts, stops, len(names) + 1)[:-1]
            for name, tokens in zip(names, found, strict=True):
                if tokens:
                    self.found[kind][name] += int(tokens) * times
            read = int(found.sum())
        return read if self._ids else everything


def _tokens_by(ids: np.ndarray, ends: np.ndarray, starts: np.ndarray, stops: np.ndarray, n: int) -> np.ndarray:
    """(n,) tokens of the ranges [starts, stops) that lie in documents of each id; documents end at `ends`, rising."""
    counts = np.zeros(n, np.int64)
    first = np.searchsorted(ends, starts, side="right")
    last = np.searchsorted(ends, stops - 1, side="right")
    one = first == last
    np.add.at(counts, ids[first[one]], (stops - starts)[one])
    first, last, starts, stops = first[~one], last[~one], starts[~one], stops[~one]
    np.add.at(counts, ids[first], ends[first] - starts)
    np.add.at(counts, ids[last], stops - ends[last - 1])
    lengths = np.diff(ends, prepend=0)
    inner = np.zeros(len(ends) + 1, np.int64)  # how many ranges hold each document whole: +1 and -1, summed
    np.add.at(inner, first + 1, 1)
    np.add.at(inner, last, -1)
    np.add.at(counts, ids, np.cumsum(inner)[:-1] * lengths)
    return counts


# ---- telling -------------------------------------------------------------------------------------------------------
def _consumed(stream: Stream, parts: list[_Counts], of: int) -> Consumed:
    manifest, policy = stream.dataset.manifest, policy_of(stream.dataset)
    by_source, by_language = (dict(sum((part.found[kind] for part in parts), Counter()).most_common())
                              for kind in ("source", "language"))
    rows, tokens = sum(part.rows for part in parts), sum(by_source.values())
    return Consumed(
        f"{manifest.name} {manifest.version}", manifest.fingerprint, manifest.policy_sha256,
        policy.licences or NOT_STATED, policy.personal_data, rows, tokens, rows / of, list(manifest.creators),
        policy.attribution or _attribution(manifest, policy.licences), sum(part.lost for part in parts), by_source, by_language)


def _attribution(manifest: Manifest, licences: str) -> str:
    who = ", ".join(manifest.creators)
    parts = [manifest.name, f"by {who}" if who else "", f"({licences})" if licences else "", manifest.url]
    return " ".join(part for part in parts if part)


def _summary(run_dir: Path, run: RunConfig, entries: list[Entry], starts: int, sources: dict[str, Consumed]) -> Summary:
    lives = [(life.start.time, max(life.last_time, life.start.time)) for life in read_metrics(run_dir).generations]
    by_contributor, by_licence, by_language = Counter[str](), Counter[str](), Counter[str]()
    for used in sources.values():
        by_contributor[", ".join(used.contributors) or NOT_STATED] += used.tokens
        by_licence[used.licence] += used.tokens
        by_language.update(used.by_language)
    return Summary(
        run=run.name, run_id=read_run_id(run_dir), unit=run.batch_unit, steps=len(entries), starts=starts,
        first=_utc(lives[0][0]) if lives else "", last=_utc(lives[-1][1]) if lives else "",
        duration_s=round(sum(b - a for a, b in lives), 3), total=sum(used.tokens for used in sources.values()), sources=sources,
        by_contributor=dict(by_contributor.most_common()), by_licence=dict(by_licence.most_common()),
        by_language=dict(by_language.most_common()), use=asdict(run.use),
        attribution=list(dict.fromkeys(used.attribution for used in sources.values())))


def _utc(seconds: float) -> str:
    return datetime.fromtimestamp(seconds, UTC).isoformat(timespec="seconds")


def receipt(summary: Summary) -> dict[str, Any]:
    """What a data pool settles by, one item per data set; no name of a host, user or path."""
    return {"kind": "officina usage receipt", "version": 1, "run": summary.run, "run_id": summary.run_id,
            "organisation": summary.use["organisation"], "purpose": summary.use["purpose"],
            "agreement": summary.use["agreement"], "runs": 1, "starts": summary.starts, "first": summary.first,
            "last": summary.last, "duration_s": summary.duration_s, "unit": summary.unit, "total": summary.total,
            "items": [{"dataset": used.dataset, "fingerprint": used.fingerprint, "policy_sha256": used.policy_sha256,
                       "contributors": used.contributors, "licence": used.licence, summary.unit: used.tokens,
                       "passes": round(used.passes, 6), "lost": used.lost, "by_source": used.by_source,
                       "by_language": used.by_language}
                      for used in summary.sources.values()]}
