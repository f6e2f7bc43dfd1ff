"""Reads the rows that global samples stand for: order and shards together, in numpy, without torch.

A decoder's row r holds tokens [r T, r T + T + 1) of its split's shards laid end to end, so that neighbouring
rows share one token: the last label of one is the first token of the next. A custom model's row is a record.

Documents that were removed on request keep their places, but every token of theirs is read as the end of a document. So is
every token of a damaged block that is set aside, `officina.trainer.data.integrity`.
"""

from bisect import bisect_right
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import xxhash

from officina.trainer.config import RunConfig
from officina.trainer.data.buffers import Buffers
from officina.trainer.data.manifest import Dataset, ShardEntry, open_dataset
from officina.trainer.data.order import Mixture, Order, Places, Skips, SourceRows, sources_in_use, timeline_of
from officina.trainer.data.removal import removed_spans
from officina.trainer.data.shards import DTYPES, DamagedBlock, Lost, Shard, merge_lost
from officina.trainer.errors import DataError

DIGEST_MODULUS = 1 << 32
OnDamage = Callable[[Dataset, ShardEntry, Shard, int], object]


class Stream:
    """The shards of one split, opened when they are first needed."""

    def __init__(self, dataset: Dataset, split: str, removals: int | None = None, on_damage: OnDamage | None = None) -> None:
        """removals: lists of removed documents that are heeded; none = all.

        on_damage: called for each damaged block with (data set, entry, shard, block), must mend it or set it aside; none =
        reading one raises DamagedBlock.
        """
        self.dataset, self.split, self._on_damage = dataset, split, on_damage
        self.entries: list[ShardEntry] = dataset.of_split(split)
        if not self.entries:
            raise DataError(f"{dataset.folder}: has no split {split}, only {sorted(dataset.manifest.splits)}. "
                            "Name one of these as data.split or data.validation_split.")
        self.token_starts = np.cumsum([0, *(e.tokens for e in self.entries)])
        """(shards + 1,) offset of each shard's first token in the stream."""
        self.document_starts = np.cumsum([0, *(e.documents for e in self.entries)])
        self._open: dict[int, Shard] = {}
        self._buffers = Buffers()
        self._removed_starts, self._removed_stops = removed_spans(dataset, self.entries, removals)
        self._blank = dataset.manifest.tokenizer.eos_id if dataset.manifest.tokenizer else 0

    def shard(self, number: int) -> Shard:
        """The open shard."""
        if number not in self._open:
            entry = self.entries[number]
            self._open[number] = Shard(self.dataset.folder / entry.path, entry)
        return self._open[number]

    def rows(self, seq_len: int) -> int:
        """Rows of `seq_len` tokens with their labels."""
        return max(0, (int(self.token_starts[-1]) - 1) // seq_len)

    def set_aside(self, lost: Lost) -> None:
        """These blocks are lost, by shard path, and no others: as a step's line in the ledger says."""
        for number, entry in enumerate(self.entries):
            if number in self._open or entry.path in lost:
                self.shard(number).set_aside(lost.get(entry.path, ()))

    def _check(self, number: int, starts: np.ndarray, stops: np.ndarray) -> Shard:
        """The shard, with the blocks under token ranges [starts, stops) sound, replaced or set aside."""
        shard = self.shard(number)
        while True:
            try:
                shard.check(starts, stops)
                return shard
            except DamagedBlock as damaged:
                if self._on_damage is None:
                    raise
                self._on_damage(self.dataset, self.entries[number], shard, damaged.block)

    def record(self, number: int) -> "Record":
        """A record, verified."""
        of_shard = bisect_right(self.document_starts, number) - 1
        inside = number - int(self.document_starts[of_shard])
        ends = self.shard(of_shard).ends
        start, stop = int(ends[inside - 1]) if inside else 0, int(ends[inside])
        shard = self._check(of_shard, np.asarray([start]), np.asarray([stop]))
        lost = {self.entries[of_shard].path: blocks} if (blocks := shard.touches_lost(start, stop)) else {}
        return Record(b"" if lost else shard.part(start, stop).tobytes(), f"{shard.path} record {inside}", lost)

    def gather(self, rows: np.ndarray, seq_len: int, *, borders: bool) -> "Rows":
        """Tokens (n, seq_len + 1) of `rows` (n,), verified; and, unless not `borders`, the document borders inside them."""
        out = self._buffers.take((len(rows), seq_len + 1), DTYPES[self.dataset.manifest.dtype])
        starts = rows * seq_len
        first = np.searchsorted(self.token_starts, starts, side="right") - 1
        last = np.searchsorted(self.token_starts, starts + seq_len, side="right") - 1
        found: list[tuple[np.ndarray, np.ndarray]] = []
        for number in np.unique(first[first == last]):
            here = np.flatnonzero((first == number) & (last == number))
            inside = starts[here] - self.token_starts[number]
            shard = self._check(int(number), inside, inside + seq_len + 1)
            for i, start in zip(here.tolist(), inside.tolist(), strict=True):  # beats every gather of numpy and torch
                out[i] = shard.data[start:start + seq_len + 1]
            if borders:
                row, column = _borders(shard.ends, inside, seq_len)
                found.append((here[row], column))
        for i in np.flatnonzero(first != last):
            found.append(self._copy_over_shards(int(i), int(starts[i]), out))
        removed = self._blanked(out, starts)
        lost: Lost = {}
        if any(shard.replaced or shard.lost for shard in self._open.values()):
            removed, lost, around = self._amended(out, starts, removed)
            found += around
        if not borders or not found:
            return Rows(out, np.empty(0, np.int64), np.empty(0, np.int64), removed, lost)
        row, column = (np.concatenate(parts) for parts in zip(*found, strict=True))
        if lost:  # a block may end where a document does
            row, column = np.unique(np.stack((row, column)), axis=1)
        in_order = np.lexsort((column, row))
        return Rows(out, row[in_order], column[in_order], removed, lost)

    def _amended(self, out: np.ndarray, starts: np.ndarray, removed: np.ndarray | None,
                 ) -> tuple[np.ndarray | None, Lost, list[tuple[np.ndarray, np.ndarray]]]:
        """Put the right bytes of replaced blocks into rows that begin at `starts`, and blank what is lost.

        Returns `removed` with the lost tokens, the lost blocks under the rows, and the borders around them: what stands
        before a lost block and what follows it are two documents.
        """
        lost: Lost = {}
        borders, width = [], out.shape[1]
        for number, shard in self._open.items():
            for block in sorted({*shard.replaced, *shard.lost}):
                first, last = (int(self.token_starts[number]) + token for token in shard.token_span(block))
                for i in np.flatnonzero((starts < last) & (starts + width > first)):
                    a, b = max(first - int(starts[i]), 0), min(last - int(starts[i]), width)
                    if block not in shard.lost:
                        content = np.frombuffer(shard.replaced[block], shard.data.dtype)
                        keep = slice(None) if removed is None else ~removed[i, a:b]
                        out[i, a:b][keep] = content[int(starts[i]) + a - first:int(starts[i]) + b - first][keep]
                        continue
                    removed = np.zeros(out.shape, bool) if removed is None else removed
                    out[i, a:b], removed[i, a:b] = self._blank, True
                    blocks = lost.setdefault(self.entries[number].path, [])
                    if block not in blocks:
                        blocks.append(block)
                    columns = np.asarray([c for c in (a, b) if 0 < c < width], np.int64)
                    borders.append((np.full(len(columns), i), columns))
        return removed, lost, borders

    def _blanked(self, out: np.ndarray, starts: np.ndarray) -> np.ndarray | None:
        """Blank the tokens of removed documents in rows that begin at `starts`; (n, T + 1) bool of them, if there are any."""
        if not len(self._removed_starts):
            return None
        first = np.searchsorted(self._removed_stops, starts, side="right")
        stop = np.searchsorted(self._removed_starts, starts + out.shape[1], side="left")
        touched = np.flatnonzero(stop > first)
        if not len(touched):
            return None
        removed = np.zeros(out.shape, bool)
        for i in touched:
            for span in range(first[i], stop[i]):
                removed[i, max(self._removed_starts[span] - starts[i], 0):self._removed_stops[span] - starts[i]] = True
        out[removed] = self._blank
        return removed

    def _copy_over_shards(self, i: int, start: int, out: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Fill row `i` of `out` from several shards: one row in each shard's last, so slow is fast enough."""
        columns, width, filled = [], out.shape[1], 0
        while filled < width:
            number = bisect_right(self.token_starts, start + filled) - 1
            inside = start + filled - int(self.token_starts[number])
            stop = min(inside + width - filled, self.entries[number].tokens)
            shard = self._check(number, np.asarray([inside]), np.asarray([stop]))
            part = shard.data[inside:stop]
            out[i, filled:filled + len(part)] = part
            if filled:
                columns.append(np.asarray([filled]))
            lo, hi = np.searchsorted(shard.ends, [inside, inside + len(part) - 1], side="right")
            columns.append(shard.ends[lo:hi] - inside + filled)
            filled += len(part)
        column = np.concatenate(columns)
        return np.full(len(column), i), column


def _borders(ends: np.ndarray, starts: np.ndarray, seq_len: int) -> tuple[np.ndarray, np.ndarray]:
    """Rows 0..n-1 and columns of the document ends e with start < e <= start + seq_len."""
    lo = np.searchsorted(ends, starts, side="right")
    counts = np.searchsorted(ends, starts + seq_len, side="right") - lo
    row = np.repeat(np.arange(len(starts)), counts)
    nth = np.arange(len(row)) - np.repeat(np.cumsum(counts) - counts, counts)
    return row, ends[lo[row] + nth] - starts[row]


@dataclass(frozen=True, slots=True)
class Rows:
    """Tokens of some samples. n rows, T = seq_len."""

    tokens: np.ndarray
    """(n, T + 1) in the shards' dtype."""
    border_rows: np.ndarray
    """(b,) row of each document border, sorted."""
    border_columns: np.ndarray
    """(b,) column 1..T of each first token of a document, sorted within a row."""
    removed: np.ndarray | None = None
    """(n, T + 1) bool, tokens of documents that were removed on request, or of lost blocks; None if there are none."""
    lost: Lost = field(default_factory=dict)
    """Lost blocks under the rows; `RowReader` gives them in `lost_of`."""
    digest: int = 0
    """See `RowReader`."""
    lost_of: dict[str, Lost] = field(default_factory=dict)
    """Lost blocks under the rows, by source."""


@dataclass(frozen=True, slots=True)
class Record:
    """A record of a user's own data."""

    content: bytes
    """Empty if a lost block holds a part of it."""
    where: str
    """Names it in an error."""
    lost: Lost
    """Lost blocks under it."""


class RowReader:
    """Order and data of a run: global sample indices in, rows out.

    Each row has a 32-bit digest, xxh3 of its tokens or record in the shard's dtype, seeded with its global sample index; the
    digest of several is their sum modulo 2**32, so that it does not depend on how rows are dealt to ranks.
    """

    def __init__(self, run: RunConfig, position: int = 0, removals: Mapping[str, int] | None = None,
                 on_damage: OnDamage | None = None) -> None:
        """Open the data sets that give rows at or after global sample index `position`.

        removals: lists of removed documents that are heeded, by source; none = all that there are. on_damage: see `Stream`.
        """
        mixture = Mixture(timeline_of(run.data))
        self.records = run.model.kind == "custom"
        self.seq_len = 1 if self.records else run.batch.seq_len
        self.streams: dict[str, Stream] = {}
        for name in sorted(mixture.sources_from(position)):
            heeded = None if removals is None else removals.get(name, 0)
            self.streams[name] = Stream(open_source(run, name), run.data.split, heeded, on_damage)
        self.removals = {name: n for name, s in self.streams.items()
                         if (n := len(s.dataset.manifest.removals[:None if removals is None else removals.get(name, 0)]))}
        """Lists of removed documents that are heeded, by source; for the ledger."""
        _same_tokenizer(run, self.streams)
        rows = {name: SourceRows(s.dataset.manifest.fingerprint, self._rows_of(name, s))
                for name, s in self.streams.items()}
        self.rows = {name: known.rows for name, known in rows.items()}
        self.fingerprints = {name: known.fingerprint for name, known in rows.items()}
        self.order = Order(mixture, rows, seed=run.seed, shuffle=run.data.shuffle)
        self.skips = Skips(run.data.skip)
        self._borders = run.data.mask_documents

    def _rows_of(self, name: str, stream: Stream) -> int:
        rows = int(stream.document_starts[-1]) if self.records else stream.rows(self.seq_len)
        if not rows:
            raise DataError(f"data.sources.{name}: split {stream.split} of {stream.dataset.folder} "
                            f"has {stream.token_starts[-1]} tokens, fewer than one row of batch.seq_len={self.seq_len} and its "
                            f"label. Try batch.seq_len={max(1, int(stream.token_starts[-1]) // 8)}.")
        return rows

    def read(self, samples: np.ndarray) -> Rows:
        """The rows of the global samples `samples`, (n,) int64, in their order."""
        places = self.order.place(samples)
        dtypes = [DTYPES[s.dataset.manifest.dtype] for s in self.streams.values()]
        numbers = np.unique(places.source)
        parts, digest, lost_of = [], 0, {}
        for number in numbers:
            here = np.flatnonzero(places.source == number)
            part = self._stream(number).gather(places.row[here], self.seq_len, borders=self._borders)
            digest += _digest(part.tokens, samples[here])
            lost_of |= {self.order.names[number]: part.lost} if part.lost else {}
            if len(numbers) == 1:
                return replace(part, digest=digest % DIGEST_MODULUS, lost_of=lost_of)
            parts.append((here, part))
        tokens = np.empty((len(samples), self.seq_len + 1), np.result_type(*dtypes))
        removed = None
        for here, part in parts:
            tokens[here] = part.tokens
            if part.removed is not None:
                removed = np.zeros(tokens.shape, bool) if removed is None else removed
                removed[here] = part.removed
        row = np.concatenate([here[part.border_rows] for here, part in parts]) if parts else np.empty(0, np.int64)
        column = np.concatenate([part.border_columns for _, part in parts]) if parts else np.empty(0, np.int64)
        in_order = np.lexsort((column, row))
        return Rows(tokens, row[in_order], column[in_order], removed, digest=digest % DIGEST_MODULUS, lost_of=lost_of)

    def read_records(self, samples: np.ndarray) -> tuple[list[Record], int, dict[str, Lost]]:
        """Records of the global samples, their digest, and the lost blocks under them by source."""
        places = self.order.place(samples)
        records = [self._stream(source).record(int(row)) for source, row in zip(places.source, places.row, strict=True)]
        lost = merge_lost(*({self.order.names[source]: record.lost}
                            for source, record in zip(places.source, records, strict=True) if record.lost))
        return records, _digest([record.content for record in records], samples), lost

    def set_aside(self, lost: Mapping[str, Lost]) -> None:
        """Read as a step did that had these lost blocks, by source, and no others."""
        for name, stream in self.streams.items():
            stream.set_aside(lost.get(name, {}))

    def digest(self, samples: np.ndarray) -> int:
        """Digest of the global samples as their shards hold them now."""
        return self.read_records(samples)[1] if self.records else self.read(samples).digest

    def place(self, samples: np.ndarray) -> Places:
        """Where the global samples lie."""
        return self.order.place(samples)

    def source_rows(self, samples: np.ndarray) -> dict[str, int]:
        """How many of the global samples each source gives."""
        counts = np.bincount(self.order.mixture.place(samples)[0], minlength=len(self.order.names))
        return {name: int(n) for name, n in zip(self.order.names, counts, strict=True) if n}

    def _stream(self, number: int) -> Stream:
        return self.streams[self.order.names[number]]


def _digest(rows: Iterable[object], samples: np.ndarray) -> int:
    hashes = map(xxhash.xxh3_64_intdigest, rows, samples.tolist())  # the index is the seed: a swap shows
    return sum(h % DIGEST_MODULUS for h in hashes) % DIGEST_MODULUS


def open_source(run: RunConfig, name: str) -> Dataset:
    """The data set of a source, checked to be what the run's model reads."""
    if name not in run.data.sources:
        raise DataError(f"data.timeline names source {name}, but data.sources has only {sorted(run.data.sources)}. "
                        f"Try: data.sources.{name}.path=DIR, the data set that was read before.")
    dataset = open_dataset(Path(run.data.sources[name].path))
    manifest = dataset.manifest
    wanted = "records" if run.model.kind == "custom" else "tokens"
    if manifest.kind != wanted:
        raise DataError(f"data.sources.{name}: {dataset.folder} holds {manifest.kind}, "
                        f"but model.kind={run.model.kind} reads {wanted}. Name a data set of {wanted}, or another model.")
    if wanted == "tokens" and manifest.tokenizer and manifest.tokenizer.vocab_size > run.model.vocab_size:
        raise DataError(f"data.sources.{name}: the tokenizer of {dataset.folder} has {manifest.tokenizer.vocab_size} tokens, "
                        f"but model.vocab_size={run.model.vocab_size}. Try: model.vocab_size={manifest.tokenizer.vocab_size}")
    return dataset


def _same_tokenizer(run: RunConfig, streams: dict[str, Stream]) -> None:
    by_hash: dict[str, str] = {}
    for name, stream in streams.items():
        if stream.dataset.manifest.tokenizer:
            by_hash.setdefault(stream.dataset.manifest.tokenizer.sha256, name)
    if len(by_hash) > 1:
        told = ", ".join(f"{name} ({sha256[:12]})" for sha256, name in by_hash.items())
        raise DataError(f"data.sources: {told} were made with different tokenizers, so that a token id has two meanings. "
                        "Build one again with `officina data build --tokenizer OTHER/tokenizer.json`.")


def validation_streams(run: RunConfig) -> dict[str, Stream]:
    """The validation split of every source in the mixture that has one, by source name: one that left it is read no more."""
    streams: dict[str, Stream] = {}
    for name in sources_in_use(run.data):
        dataset = open_source(run, name)
        if run.data.validation_split in dataset.manifest.splits:
            streams[name] = Stream(dataset, run.data.validation_split)
    return streams
