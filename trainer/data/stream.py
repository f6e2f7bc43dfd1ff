"""The rows of one split: its shards laid end to end, cut every T tokens or packed, in numpy, without torch.

A decoder's row r holds tokens [r T, r T + T + 1) of its split's shards laid end to end, so that neighbouring
rows share one token: the last label of one is the first token of the next. A custom model's row is a record.

Where documents are packed whole (`officina.trainer.data.packing`), row r is that of the plan: up to T + 1 tokens, then padding.

Documents that were removed on request keep their places, but every token of theirs is read as the end of a document. So is
every token of a damaged block that is set aside, `officina.trainer.data.integrity`.
"""

from bisect import bisect_right
from collections.abc import Callable
from functools import cached_property
from pathlib import Path
from threading import Lock

import numpy as np

from officina.trainer.config import DataConfig
from officina.trainer.data.buffers import Buffers
from officina.trainer.data.gather import borders_of_pieces, borders_of_rows, copy_rows, tokens_at
from officina.trainer.data.manifest import Dataset, ShardEntry
from officina.trainer.data.packing import REFUSE, SPLIT, TRUNCATE, Plan, load_plan, make_plan, plan_path
from officina.trainer.data.remote import TRIES, Pieces, RemoteFile, remote_of
from officina.trainer.data.removal import removed_spans
from officina.trainer.data.rows import Record, Rows
from officina.trainer.data.shards import DTYPES, GRANULE_BYTES, HEADER_BYTES, DamagedBlock, DamagedIndex, Lost, Shard
from officina.trainer.data.storage import reads_by_pread
from officina.trainer.errors import DataError

OnDamage = Callable[[Dataset, ShardEntry, Shard, int], object]
_NONE = np.empty(0, np.int64)


class Stream:
    """The shards of one split, opened when they are first needed."""

    def __init__(self, dataset: Dataset, split: str, removals: int | None = None, on_damage: OnDamage | None = None, *,
                 read: str = "auto") -> None:
        """removals: lists of removed documents that are heeded; none = all.

        on_damage: called for each damaged block with (data set, entry, shard, block), must mend it or set it aside; none =
        reading one raises DamagedBlock. read: `data.read`.
        """
        self.dataset, self.split, self._on_damage, self._read = dataset, split, on_damage, read
        self.entries: list[ShardEntry] = dataset.of_split(split)
        if not self.entries:
            raise DataError(f"{dataset.folder}: has no split {split}, only {sorted(dataset.manifest.splits)}. "
                            "Name one of these as data.split or data.validation_split.")
        self.token_starts = np.cumsum([0, *(e.tokens for e in self.entries)])
        """(shards + 1,) offset of each shard's first token in the stream."""
        self._bounds: list[int] = self.token_starts.tolist()
        self.document_starts = np.cumsum([0, *(e.documents for e in self.entries)])
        self._open: dict[int, Shard] = {}
        self._opening: dict[int, Lock] = {}
        self._buffers = Buffers()
        remote = remote_of(dataset.folder)
        self.pieces = Pieces(dataset.folder, remote) if remote else None
        """Of shards in a store."""
        self._removed_starts, self._removed_stops = removed_spans(dataset, self.entries, removals, self.shard)
        self._blank = dataset.manifest.tokenizer.eos_id if dataset.manifest.tokenizer else 0
        self.plan: Plan | None = None
        """Rows of whole documents; none: cut from the stream."""
        self.reference: np.ndarray | None = None
        """Preference pairs: (pairs, 2) fp32, the reference's log-probabilities of the chosen and the rejected answers."""

    def lay_out(self, data: DataConfig, seq_len: int, what: str = "data") -> "Stream":
        """Pack documents into rows as `data` asks for, by the stored plan if there is one; `what` names it in an error."""
        samples = self.dataset.manifest.samples
        packing = ("best_fit" if samples else "cut") if data.packing == "auto" else data.packing
        if packing == "cut":
            if samples:
                raise DataError(f"{what}: {self.dataset.folder} holds {samples}, which data.packing=cut would cut through. "
                                "Try: data.packing=auto")
            return self
        overlong = resolve_overlong(self.dataset, data.overlong)
        if samples == "pairs" and overlong in (SPLIT, TRUNCATE):
            raise DataError(f"{what}: data.overlong={overlong} would compare parts of answers. Try: data.overlong=leave_out")
        fingerprint = self.dataset.manifest.fingerprint
        path = plan_path(self.dataset.folder, self.split, seq_len, overlong)
        if path.exists():
            self.plan = load_plan(path, fingerprint)
        else:
            trained = self._trained_before() if overlong == TRUNCATE and samples else None
            self.plan = make_plan(self.document_ends(), seq_len, overlong, unit=2 if samples == "pairs" else 1,
                                  trained=trained, what=what)
        return self

    @cached_property
    def pair_starts(self) -> np.ndarray:
        """(pairs,) offset in the stream of each pair's first token."""
        return np.concatenate(([0], self.document_ends()[1::2][:-1]))

    def document_ends(self) -> np.ndarray:
        """(documents,) int64 offset in the stream just after each document; opens every shard."""
        return np.concatenate([self.shard(i).ends + self.token_starts[i] for i in range(len(self.entries))])

    def _trained_before(self) -> np.ndarray:
        """(tokens,) int64: how many of the tokens up to each one, itself included, are trained on."""
        return np.cumsum(np.concatenate([self.shard(i).trained(np.arange(e.tokens)) for i, e in enumerate(self.entries)]))

    def shard(self, number: int) -> Shard:
        """The open shard. Any thread may ask."""
        if number not in self._open:
            with self._opening.setdefault(number, Lock()):
                if number not in self._open:
                    self._open[number] = self._opened(self.entries[number])
        return self._open[number]

    def _opened(self, entry: ShardEntry) -> Shard:
        path = self.dataset.folder / entry.path
        if self.pieces is not None and not path.exists():
            return self._open_remote(path, entry)
        return Shard(path, entry, pread=reads_by_pread(path.parent, self._read), seal=self.dataset.seal)

    @property
    def stays_here(self) -> bool:
        """Does what was read once remain, so that it need not be fetched again?"""
        return self.pieces is None or self.pieces.keeps(self.dataset.shards)

    def meet(self, number: int, blocks: list[int]) -> None:
        """Verify blocks of a shard before a row needs them, on any thread; of a set in a store, fetch pieces instead. The row
        that needs what is damaged or cannot be had says so."""
        try:
            shard = self.shard(number)
            (shard.fetch if self.pieces is not None else shard.read_ahead)(blocks)
            _ = shard.ends  # compared with its checksum once
        except DataError:
            return

    def _open_remote(self, path: Path, entry: ShardEntry) -> Shard:
        file = RemoteFile(self.pieces, entry, DTYPES[self.dataset.manifest.dtype].itemsize, HEADER_BYTES)
        for left in reversed(range(TRIES)):
            try:
                shard = Shard(path, entry, remote=file, seal=self.dataset.seal)
                file.sound, file.changed = shard.is_sound, shard.has_changed
                return shard
            except DamagedIndex:  # it may have come damaged, or have been damaged here
                if not left:
                    raise
                file.forget()
        raise AssertionError

    def rows(self, seq_len: int) -> int:
        """Rows of `seq_len` tokens with their labels."""
        if self.plan is not None:
            return len(self.plan)
        return max(0, (int(self.token_starts[-1]) - 1) // seq_len)

    @property
    def blocks(self) -> int:
        """How many there are, each with a checksum."""
        size = DTYPES[self.dataset.manifest.dtype].itemsize
        return sum(-(-entry.tokens * size // GRANULE_BYTES) for entry in self.entries)

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

    def places(self, rows: np.ndarray, seq_len: int) -> np.ndarray:
        """Where the tokens of `rows` (n,) lie in the stream: (n, seq_len + 1) int64, -1 for padding."""
        if self.plan is None:
            return rows[:, None] * seq_len + np.arange(seq_len + 1)
        piece, row = self.plan.pieces(rows)
        lengths = self.plan.lengths[piece].astype(np.int64)
        nth = np.arange(lengths.sum()) - np.repeat(np.cumsum(lengths) - lengths, lengths)
        filled = np.bincount(row, weights=lengths, minlength=len(rows)).astype(np.int64)
        found = np.full((len(rows), seq_len + 1), -1)
        found[np.arange(seq_len + 1) < filled[:, None]] = np.repeat(self.plan.starts[piece], lengths) + nth
        return found

    def tokens(self, number: int, start: int, stop: int) -> np.ndarray:
        """Tokens [start, stop) of shard `number`, verified; of lost blocks whatever lies there."""
        return self._check(number, np.asarray([start]), np.asarray([stop])).part(start, stop)

    def record(self, number: int) -> Record:
        """A record, verified."""
        of_shard = bisect_right(self.document_starts, number) - 1
        inside = number - int(self.document_starts[of_shard])
        ends = self.shard(of_shard).ends
        start, stop = int(ends[inside - 1]) if inside else 0, int(ends[inside])
        shard = self._check(of_shard, np.asarray([start]), np.asarray([stop]))
        lost = {self.entries[of_shard].path: blocks} if (blocks := shard.touches_lost(start, stop)) else {}
        return Record(b"" if lost else shard.part(start, stop).tobytes(), f"{shard.path} record {inside}", lost)

    def gather(self, rows: np.ndarray, seq_len: int, *, borders: bool) -> Rows:
        """Tokens (n, seq_len + 1) of `rows` (n,), verified; and, unless not `borders`, the document borders inside them."""
        if self.plan is not None:
            return self._gather_planned(self.plan, rows, seq_len)
        out = self._buffers.take((len(rows), seq_len + 1), DTYPES[self.dataset.manifest.dtype])
        starts = rows * seq_len
        by_shard: dict[int, tuple[list[int], list[int]]] = {}  # numbers of rows, and where in the shard they begin
        over: list[int] = []
        touched: set[int] = set()
        bounds = self._bounds
        for i, start in enumerate(starts.tolist()):  # in Python: of a few rows numpy's calls cost more than the copies
            number = bisect_right(bounds, start) - 1
            if start + seq_len < bounds[number + 1]:
                here, inside = by_shard.setdefault(number, ([], []))
                here.append(i)
                inside.append(start - bounds[number])
            else:
                over.append(i)
                touched.update(range(number, bisect_right(bounds, start + seq_len)))
        columns = [_NONE] * len(rows)  # of the borders of each row
        for number, (here, inside) in by_shard.items():
            shard = self._open.get(number)
            if shard is None or not shard.is_checked(inside, seq_len + 1):
                begins = np.asarray(inside)
                shard = self._check(number, begins, begins + seq_len + 1)
            copy_rows(shard, inside, out, here)
            if borders:
                for i, column in zip(here, borders_of_rows(shard.ends, inside, seq_len), strict=True):
                    columns[i] = column
        for i in over:
            columns[i] = self._copy_over_shards(i, int(starts[i]), out)
        removed = self._blanked(out, starts)
        lost: Lost = {}
        touched.update(by_shard)
        around: list[tuple[np.ndarray, np.ndarray]] = []
        if any(self._open[number].replaced or self._open[number].lost for number in touched):
            removed, lost, around = self._amended(out, starts, removed)
        if not borders or not columns:
            return Rows(out, _NONE, _NONE, removed, lost)
        row, column = np.repeat(np.arange(len(columns)), [len(each) for each in columns]), np.concatenate(columns)
        if lost:  # a block may end where a document does
            parts = [np.concatenate(both) for both in zip((row, column), *around, strict=True)]
            row, column = np.unique(np.stack(parts), axis=1)
        return Rows(out, row, column, removed, lost)

    def _amended(self, out: np.ndarray, starts: np.ndarray, removed: np.ndarray | None,
                 ) -> tuple[np.ndarray | None, Lost, list[tuple[np.ndarray, np.ndarray]]]:
        """Put the right bytes of replaced blocks into rows that begin at `starts`, and blank what is lost.

        Returns `removed` with the lost tokens, the lost blocks under the rows, and the borders around them: what stands
        before a lost block and what follows it are two documents.
        """
        lost: Lost = {}
        borders, width = [], out.shape[1]
        for number, shard in list(self._open.items()):  # other threads open shards
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

    def _gather_planned(self, plan: Plan, rows: np.ndarray, seq_len: int) -> Rows:
        """Rows of the plan; what is left of a row is blank, a document of its own without labels."""
        n, width = len(rows), seq_len + 1
        piece, row = plan.pieces(rows)
        piece_row = row
        starts, lengths = plan.starts[piece], plan.lengths[piece].astype(np.int64)
        filled = np.bincount(row, weights=lengths, minlength=n).astype(np.int64)
        into = np.cumsum(lengths) - lengths  # where each piece begins if all rows lay end to end without padding
        column = into - (np.cumsum(filled) - filled)[row]
        token_row, piece_of = np.repeat(row, lengths), np.repeat(np.arange(len(piece)), lengths)
        nth = np.arange(len(piece_of)) - into[piece_of]
        token_column, places = column[piece_of] + nth, starts[piece_of] + nth
        out = np.full((n, width), self._blank, DTYPES[self.dataset.manifest.dtype])
        trained = np.zeros((n, width), bool)
        number = np.searchsorted(self.token_starts, starts, side="right") - 1
        gone = np.zeros((n, width), bool)
        lost: Lost = {}
        borders = [(row, column), (np.arange(n), filled)]  # a piece begins, and the padding
        for k in np.unique(number):
            here, base = np.flatnonzero(number == k), int(self.token_starts[k])
            shard = self._check(int(k), starts[here] - base, starts[here] + lengths[here] - base)
            of_shard = number[piece_of] == k
            at, inside = (token_row[of_shard], token_column[of_shard]), places[of_shard] - base
            out[at] = tokens_at(shard, starts[here] - base, lengths[here])
            trained[at] = shard.trained(inside)
            for block in sorted({*shard.replaced, *shard.lost}):
                first, stop = shard.token_span(block)
                touched = (inside >= first) & (inside < stop)
                cells = at[0][touched], at[1][touched]
                if block not in shard.lost:
                    out[cells] = np.frombuffer(shard.replaced[block], shard.data.dtype)[inside[touched] - first]
                elif touched.any():
                    gone[cells] = True
                    lost.setdefault(self.entries[k].path, []).append(block)
            piece_here, offset = borders_of_pieces(shard.ends, starts[here] - base, lengths[here] - 1)
            borders.append((row[here][piece_here], column[here][piece_here] + offset))
        if lost and self.dataset.manifest.samples == "pairs":  # a pair that lost a part is no comparison
            hit = np.unique(piece_of[gone[token_row, token_column]])
            whole = np.isin(piece_of, hit)
            gone[token_row[whole], token_column[whole]] = True
        elif lost:  # what stands before a lost block and what follows it are two documents
            of_row, before = np.nonzero(gone[:, 1:] != gone[:, :-1])
            borders.append((of_row, before + 1))
        if len(self._removed_starts):
            span = np.searchsorted(self._removed_stops, places, side="right")
            removed = np.append(self._removed_starts, np.iinfo(np.int64).max)[span] <= places
            gone[token_row[removed], token_column[removed]] = True
        out[gone] = self._blank
        row, column = (np.concatenate(parts) for parts in zip(*borders, strict=True))
        inner = (column > 0) & (column < width)
        row, column = np.unique(np.stack((row[inner], column[inner])), axis=1)
        reference = None if self.reference is None else self.reference[np.searchsorted(self.pair_starts, starts)]
        return Rows(out, row, column, gone if gone.any() else None, lost, trained=trained, filled=filled,
                    pair_rows=None if reference is None else piece_row, reference=reference)

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

    def _copy_over_shards(self, i: int, start: int, out: np.ndarray) -> np.ndarray:
        """Fill row `i` of `out` from several shards, one row in each shard's last, so slow is fast enough; its borders."""
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
        return np.concatenate(columns)


def resolve_overlong(dataset: Dataset, overlong: str) -> str:
    """What `data.overlong` means for this data set: auto splits documents and refuses samples."""
    return overlong if overlong != "auto" else REFUSE if dataset.manifest.samples else SPLIT
