"""Reads the rows that global samples stand for: order and streams together, in numpy, without torch."""

from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np
import xxhash

from officina.trainer.config import RunConfig
from officina.trainer.data.manifest import Dataset, open_dataset
from officina.trainer.data.order import Mixture, Order, Places, Skips, SourceRows, sources_in_use, timeline_of
from officina.trainer.data.rows import Record, Rows
from officina.trainer.data.seal import read_seal
from officina.trainer.data.shards import DTYPES, Lost, merge_lost
from officina.trainer.data.stream import OnDamage, Stream
from officina.trainer.errors import DataError

DIGEST_MODULUS = 1 << 32


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
            stream = self.streams[name] = Stream(open_source(run, name), run.data.split, heeded, on_damage,
                                                 read=run.data.read)
            if not self.records:
                stream.lay_out(run.data, self.seq_len, f"data.sources.{name}")
        self.removals = {name: n for name, s in self.streams.items()
                         if (n := len(s.dataset.manifest.removals[:None if removals is None else removals.get(name, 0)]))}
        """Lists of removed documents that are heeded, by source; for the ledger."""
        _same_tokenizer(self.streams)
        rows = {name: SourceRows(s.dataset.manifest.fingerprint, self._rows_of(name, s))
                for name, s in self.streams.items()}
        self.rows = {name: known.rows for name, known in rows.items()}
        self.packing = {name: stream.plan.digest for name, stream in self.streams.items() if stream.plan is not None}
        """Digest of the plan of every source that is packed."""
        self.fingerprints = {name: known.fingerprint for name, known in rows.items()}
        self.order = Order(mixture, rows, seed=run.seed, shuffle=run.data.shuffle, block=run.data.shuffle_block)
        self.skips = Skips(run.data.skip)
        self._borders = run.data.mask_documents

    def _rows_of(self, name: str, stream: Stream) -> int:
        rows = int(stream.document_starts[-1]) if self.records else stream.rows(self.seq_len)
        if not rows and stream.plan is not None:
            unit = 2 if stream.dataset.manifest.samples == "pairs" else 1
            longest = int(np.diff(stream.document_ends()[unit - 1::unit], prepend=0).max())
            raise DataError(f"data.sources.{name}: nothing is left of split {stream.split} of {stream.dataset.folder}, as "
                            f"all of it is longer than a row of batch.seq_len={self.seq_len} and data.overlong leaves it "
                            f"out, or cuts off what is trained on. Try: batch.seq_len={longest - 1}")
        if not rows:
            raise DataError(f"data.sources.{name}: split {stream.split} of {stream.dataset.folder} "
                            f"has {stream.token_starts[-1]} tokens, fewer than one row of batch.seq_len={self.seq_len} and its "
                            f"label. Try batch.seq_len={max(1, int(stream.token_starts[-1]) // 8)}.")
        return rows

    def read(self, samples: np.ndarray, places: Places | None = None) -> Rows:
        """The rows of the global samples `samples`, (n,) int64, in their order; `places` are theirs, if they are known."""
        places = self.order.place(samples) if places is None else places
        if not len(samples):  # fewer rows than ranks: no row, but all that rows have
            return next(iter(self.streams.values())).gather(places.row, self.seq_len, borders=self._borders)
        numbers = np.unique(places.source) if len(self.streams) > 1 else places.source[:1]
        if len(numbers) == 1:
            part = self._stream(numbers[0]).gather(places.row, self.seq_len, borders=self._borders)
            part.digest = _digest(part.tokens, samples)
            part.lost_of = {self.order.names[numbers[0]]: part.lost} if part.lost else {}
            return part
        parts, digest, lost_of = [], 0, {}
        for number in numbers:
            here = np.flatnonzero(places.source == number)
            part = self._stream(number).gather(places.row[here], self.seq_len, borders=self._borders)
            digest += _digest(part.tokens, samples[here])
            lost_of |= {self.order.names[number]: part.lost} if part.lost else {}
            parts.append((here, part))
        dtypes = [DTYPES[s.dataset.manifest.dtype] for s in self.streams.values()]
        tokens = np.empty((len(samples), self.seq_len + 1), np.result_type(*dtypes))
        removed = trained = filled = None
        for here, part in parts:
            tokens[here] = part.tokens
            if part.removed is not None:
                removed = np.zeros(tokens.shape, bool) if removed is None else removed
                removed[here] = part.removed
            if part.trained is not None:
                trained = np.ones(tokens.shape, bool) if trained is None else trained
                filled = np.full(len(samples), self.seq_len + 1) if filled is None else filled
                trained[here], filled[here] = part.trained, part.filled
        row = np.concatenate([here[part.border_rows] for here, part in parts]) if parts else np.empty(0, np.int64)
        column = np.concatenate([part.border_columns for _, part in parts]) if parts else np.empty(0, np.int64)
        in_order = np.lexsort((column, row))
        pair_rows = reference = None
        if any(stream.reference is not None for stream in self.streams.values()):  # also of no rows: all ranks have the field
            pair_rows = np.concatenate([np.empty(0, np.int64), *(here[part.pair_rows] for here, part in parts)])
            by_row = np.argsort(pair_rows, kind="stable")
            pair_rows = pair_rows[by_row]
            reference = np.concatenate([np.empty((0, 2), np.float32), *(part.reference for _, part in parts)])[by_row]
        return Rows(tokens, row[in_order], column[in_order], removed, digest=digest % DIGEST_MODULUS, lost_of=lost_of,
                    trained=trained, filled=filled, pair_rows=pair_rows, reference=reference)

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
    return sum(hashes) % DIGEST_MODULUS


def open_source(run: RunConfig, name: str) -> Dataset:
    """The data set of a source, checked to be what the run's model reads."""
    if name not in run.data.sources:
        raise DataError(f"data.timeline names source {name}, but data.sources has only {sorted(run.data.sources)}. "
                        f"Try: data.sources.{name}.path=DIR, the data set that was read before.")
    dataset = open_dataset(Path(run.data.sources[name].path))
    manifest, key = dataset.manifest, run.data.sources[name].key
    if manifest.sealed and not key:
        raise DataError(f"data.sources.{name}: {dataset.folder} is sealed with the key {manifest.sealed}. "
                        f"Try: data.sources.{name}.key=FILE, or data.sources.{name}.key='command:PROGRAM ARGS'")
    if manifest.sealed:
        dataset = replace(dataset, seal=read_seal(key, manifest.sealed, f"data.sources.{name}.key"))
    wanted = "records" if run.model.kind == "custom" else "tokens"
    if manifest.kind != wanted:
        raise DataError(f"data.sources.{name}: {dataset.folder} holds {manifest.kind}, "
                        f"but model.kind={run.model.kind} reads {wanted}. Name a data set of {wanted}, or another model.")
    if wanted == "tokens" and (run.objective.kind == "dpo") != (manifest.samples == "pairs"):
        held, other = ("pairs", "dpo") if manifest.samples == "pairs" else ("no preference pairs", "next_token")
        raise DataError(f"data.sources.{name}: {dataset.folder} holds {held}, and objective.kind={run.objective.kind} "
                        f"{'reads nothing else' if run.objective.kind == 'dpo' else 'cannot train on them'}. "
                        f"Try: objective.kind={other}")
    if wanted == "tokens" and manifest.tokenizer and manifest.tokenizer.vocab_size > run.model.vocab_size:
        raise DataError(f"data.sources.{name}: the tokenizer of {dataset.folder} has {manifest.tokenizer.vocab_size} tokens, "
                        f"but model.vocab_size={run.model.vocab_size}. Try: model.vocab_size={manifest.tokenizer.vocab_size}")
    return dataset


def _same_tokenizer(streams: dict[str, Stream]) -> None:
    by_hash: dict[str, str] = {}
    for name, stream in streams.items():
        if stream.dataset.manifest.tokenizer:
            by_hash.setdefault(stream.dataset.manifest.tokenizer.sha256, name)
    if len(by_hash) > 1:
        told = ", ".join(f"{name} ({sha256[:12]})" for sha256, name in by_hash.items())
        raise DataError(f"data.sources: {told} were made with different tokenizers, so that a token id has two meanings. "
                        "Build one again with `officina data build --tokenizer OTHER/tokenizer.json`.")


def validation_streams(run: RunConfig, on_damage: OnDamage | None = None) -> dict[str, Stream]:
    """The validation split of every source in the mixture that has one, by source name: one that left it is read no more."""
    streams: dict[str, Stream] = {}
    for name in sources_in_use(run.data):
        dataset = open_source(run, name)
        if run.data.validation_split in dataset.manifest.splits:
            streams[name] = Stream(dataset, run.data.validation_split, on_damage=on_damage, read=run.data.read)
            if dataset.manifest.kind == "tokens":
                streams[name].lay_out(run.data, run.batch.seq_len, f"data.sources.{name}")
    return streams
