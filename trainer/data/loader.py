"""Feeds a rank: the rows of each global batch that are its own, as micro-batches, made ahead by one thread.

The position is one integer, the global sample index of the next sample. Everything else follows from the
configuration and the data, so that a run goes on anywhere at once, on any number of ranks.
"""

import importlib
import queue
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

import numpy as np
import torch

from officina.trainer.batch import IGNORE, Batch
from officina.trainer.config import RunConfig
from officina.trainer.data.buffers import Buffers
from officina.trainer.data.integrity import mend
from officina.trainer.data.loader_state import check_state, make_state
from officina.trainer.data.readahead import ReadAhead
from officina.trainer.data.reader import RowReader, validation_streams
from officina.trainer.data.rows import Record, Rows
from officina.trainer.data.shards import Lost, merge_lost
from officina.trainer.data.stream import Stream
from officina.trainer.errors import DataError, told_by_place

Decode = Callable[[bytes], dict[str, torch.Tensor]]


@dataclass(slots=True)
class StepData:
    """What one rank reads for one optimizer step, and what the ledger says of it."""

    micros: list[Batch]
    """As many as on every other rank; see `BatchConfig.micro_steps`."""
    first_sample: int
    """Global sample index at which the step's samples begin (its start position)."""
    stop_sample: int
    """Position after the step; samples in [first_sample, stop_sample) are read or left out, on some rank."""
    loss_tokens: int
    """Loss-bearing tokens (records for custom models) of this rank."""
    digest: int
    """Of this rank's rows; the sum over ranks modulo 2**32 is the same on any number of ranks."""
    skipped: list[list[int]]
    """Ranges of `data.skip` within [first_sample, stop_sample)."""
    source_rows: dict[str, int]
    """Rows that each source gives to the whole global batch."""
    removals: dict[str, int]
    """Lists of removed documents that are heeded, by source."""
    lost: dict[str, Lost] = field(default_factory=dict)
    """Damaged blocks under this rank's rows that are set aside, by source; see `Quarantine.agree`."""
    mended: tuple[str, ...] = ()
    """What became of the damaged blocks that this step was the first to meet, in words."""
    wait_s: float = 0.0
    """Time for which the step had to wait for its data."""

    @property
    def filled_tokens(self) -> int:
        """Tokens of this rank that are no padding; 0 for custom models."""
        return sum(micro.filled_tokens for micro in self.micros)

    @property
    def damage(self) -> bool:
        """Is there something for all ranks to know?"""
        return bool(self.lost or self.mended)


class Memory:
    """Where batches lie: for a GPU in pinned memory, which torch hands out again when a copy from it has ended."""

    def __init__(self, pinned: bool) -> None:
        self.pinned, self._buffers = pinned, Buffers()

    def tensor(self, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        """A tensor of whatever was there before."""
        if self.pinned:
            return torch.empty(shape, dtype=dtype, pin_memory=True)
        return torch.from_numpy(self._buffers.take(shape, _NUMPY[dtype]))


_NUMPY = {torch.int64: np.int64, torch.int32: np.int32}


class Loader:
    """Steps of one rank from `position` on, without end. Close it, or use it as a context manager."""

    def __init__(self, run: RunConfig, *, rank: int, world_size: int, position: int,
                 device: torch.device | str = "cpu") -> None:
        """`device` is where the batches will go: for cuda they lie in pinned memory; they stay on the host."""
        self._run, self._rank, self._world_size = run, rank, world_size
        self._mended: list[str] = []
        self._reader = RowReader(run, position, on_damage=lambda *block: self._mended.append(mend(*block).told()))
        self._decode = _decoder(run)
        self._memory = Memory(torch.device(device).type == "cuda")
        self._position = position
        self._ahead = ReadAhead(self._reader, run.batch.rows, run.batch.rows_of_rank(rank, world_size))
        self._earlier: dict[str, bytes] = {}  # what a checkpoint keeps of sources that no longer give rows
        self._stopping = threading.Event()
        # Bounded by a second queue: both are C, where queue.Queue costs as much as a small batch.
        self._ready: queue.SimpleQueue[StepData | BaseException] = queue.SimpleQueue()
        self._room: queue.SimpleQueue[None] = queue.SimpleQueue()
        for _ in range(run.data.prefetch_batches):
            self._room.put(None)
        self._thread: threading.Thread | None = None

    def next_step(self) -> StepData:
        """The next step's data. Raises what went wrong while reading: DataError names shard and place."""
        if self._stopping.is_set():
            raise RuntimeError("the loader is closed")
        if self._thread is None:  # not earlier: a loader that is only asked for its state starts no thread
            self._thread = threading.Thread(target=self._read_ahead, name="officina-loader", daemon=True)
            self._thread.start()
        begun = time.perf_counter()
        found = self._ready.get()
        if isinstance(found, BaseException):
            self.close()
            raise found
        self._room.put(None)
        self._position = found.stop_sample
        found.wait_s = time.perf_counter() - begun
        return found

    def state(self, position: int | None = None) -> dict[str, Any]:
        """What a checkpoint keeps: the position of the next sample, and what makes its meaning.

        position: `stop_sample` of the last step that was trained; none = of the last one that was handed out.
        """
        position = self._position if position is None else position
        return make_state(self._run, self._reader, position, self._earlier)

    @property
    def fingerprints(self) -> dict[str, str]:
        """Of the data set of every source that gives rows."""
        return dict(self._reader.fingerprints)

    @property
    def removals(self) -> dict[str, int]:
        """Lists of removed documents that are heeded, by source."""
        return self._reader.removals

    @property
    def blocks(self) -> dict[str, int]:
        """Blocks of every source that gives rows, each with a checksum."""
        return {name: stream.blocks for name, stream in self._reader.streams.items()}

    def refer(self, references: Mapping[str, np.ndarray]) -> None:
        """Give the batches the reference's log-probabilities of each source's pairs, (pairs, 2); before the first step."""
        for name, values in references.items():
            self._reader.streams[name].reference = values

    def answer_ends(self) -> list[str]:
        """The tokens that end the answers of its samples, as the data sets name them; none for documents."""
        said = [stream.dataset.manifest.provenance.get("answers_end_with") for stream in self._reader.streams.values()]
        return [str(end) for end in dict.fromkeys(said) if end]

    def check_state(self, state: dict[str, Any]) -> None:
        """Raise DataError unless this loader goes on exactly where the one with `state` stopped."""
        self._earlier = check_state(self._run, self._reader, self._position, state)

    def close(self) -> None:
        """Stop reading ahead and wait for the threads to end."""
        self._stopping.set()
        self._room.put(None)  # a thread that waits for room sees the event only after it
        if self._thread is not None:
            self._thread.join()
        self._ahead.close()

    def __enter__(self) -> "Loader":
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def _read_ahead(self) -> None:
        position = self._position
        try:
            while True:
                self._room.get()
                if self._stopping.is_set():
                    return
                step = self._read_step(position)
                self._ready.put(step)
                position = step.stop_sample
        except BaseException as exc:  # raised again by next_step, in the consumer's thread
            self._ready.put(exc)

    def _read_step(self, position: int) -> StepData:
        reader, planned = self._reader, self._ahead.next(position)
        samples, own, stop = planned.samples, planned.own, planned.stop
        sizes = _micro_sizes(self._run, self._world_size)
        if reader.records:
            records, digest, lost = reader.read_records(own)
            padding = next((record for record in records if not record.lost), None) or _sound_record(
                (reader.read_records(np.asarray([i]))[0][0] for i in samples), f"samples {samples[0]} to {samples[-1]}")
            micros = _record_batches(records, padding, sizes, self._decode, self._memory)
        else:
            rows = reader.read(own, planned.places)
            digest, lost = rows.digest, rows.lost_of
            micros = _token_batches(rows, sizes, self._run.data.mask_documents, self._memory)
        mended, self._mended[:] = list(self._mended), []
        return StepData(micros, position, stop, sum(m.loss_tokens for m in micros), digest,
                        reader.skips.within(position, stop), planned.source_rows, reader.removals, lost, tuple(mended))


def _sound_record(records: Iterable[Record], what: str) -> Record:
    """The first that is whole: to fill up with, for a rank that has none of its own."""
    for record in records:
        if not record.lost:
            return record
    raise DataError(f"{what}: every record lies in a damaged block. `officina data verify DATASET` lists the damage.")


def validation_sources(run: RunConfig) -> list[str]:
    """Names of the sources that have a validation split."""
    return list(validation_streams(run))


def validation_rows(run: RunConfig, rank: int, world_size: int, source: str | None = None,
                    device: torch.device | str = "cpu") -> Iterator[Batch]:
    """This rank's share of the first `eval.max_rows` rows of each validation split, or of one `source`'s.

    The same rows on any number of ranks, and the same number of batches on every rank (padded by rows without loss).
    """
    for name, stream in validation_streams(run).items():
        if source in (None, name):
            yield from (batch for batch, _, _ in validation_batches(run, stream, rank, world_size, device))


def validation_batches(run: RunConfig, stream: Stream, rank: int, world_size: int,
                       device: torch.device | str = "cpu") -> Iterator[tuple[Batch, np.ndarray, Lost]]:
    """As `validation_rows`, of one stream: batches, the numbers of their rows, and the lost blocks under them."""
    decode, memory = _decoder(run), Memory(torch.device(device).type == "cuda")
    available = stream.rows(run.batch.seq_len) if decode is None else int(stream.document_starts[-1])
    padding = None if decode is None else _sound_record(
        map(stream.record, range(available)), f"split {stream.split} of {stream.dataset.folder}")
    for here, size in _shares(run, min(available, run.eval.max_rows), rank, world_size):
        if decode is None:
            found = stream.gather(here, run.batch.seq_len, borders=run.data.mask_documents)
            yield _token_batches(found, [size], run.data.mask_documents, memory)[0], here, found.lost
        else:
            records = [stream.record(int(i)) for i in here]
            lost = merge_lost(*({"": record.lost} for record in records)).get("", {})
            yield _record_batches(records, padding, [size], decode, memory)[0], here, lost


def packed_rows(run: RunConfig, stream: Stream, rank: int, world_size: int,
                device: torch.device | str = "cpu") -> Iterator[tuple[np.ndarray, Batch]]:
    """This rank's share of all rows of a stream, in order: their numbers and the batch. Every rank gives as many batches."""
    memory = Memory(torch.device(device).type == "cuda")
    for here, size in _shares(run, stream.rows(run.batch.seq_len), rank, world_size):
        yield here, _rows_as_batch(run, stream, here, size, memory)


def _shares(run: RunConfig, total: int, rank: int, world_size: int) -> Iterator[tuple[np.ndarray, int]]:
    """Rows of each micro-batch of this rank, and how many rows the batch has: as many batches on every rank."""
    own, most = range(rank * total // world_size, (rank + 1) * total // world_size), -(-total // world_size)
    for first in range(0, most, run.batch.micro_rows):
        size = min(run.batch.micro_rows, most - first)
        yield np.asarray(own[first:first + size], np.int64), size


def _rows_as_batch(run: RunConfig, stream: Stream, here: np.ndarray, size: int, memory: Memory) -> Batch:
    found = stream.gather(here, run.batch.seq_len, borders=run.data.mask_documents)
    return _token_batches(found, [size], run.data.mask_documents, memory)[0]


def _micro_sizes(run: RunConfig, world_size: int) -> list[int]:
    """Rows of each micro-batch, the same on every rank: full ones, and what the fullest rank has left."""
    most, size = -(-run.batch.rows // world_size), run.batch.micro_rows
    return [min(size, most - first) for first in range(0, most, size)]


def _token_batches(rows: Rows, sizes: list[int], documents: bool, memory: Memory) -> list[Batch]:
    """Micro-batches of `sizes` rows from `rows`; rows that are missing at the end carry no loss."""
    have, T = rows.tokens.shape[0], rows.tokens.shape[1] - 1
    batches, first = [], 0
    for size in sizes:
        here = rows.tokens[first:first + size]
        n = len(here)
        fields = {name: memory.tensor((size, T), torch.int64) for name in ("tokens", "labels")}
        tokens, labels = fields["tokens"].numpy(), fields["labels"].numpy()
        tokens[:n], labels[:n] = here[:, :-1], here[:, 1:]
        tokens[n:], labels[n:] = 0, IGNORE
        loss_tokens = n * T
        if documents:
            lo, hi = np.searchsorted(rows.border_rows, [first, min(first + size, have)])
            row, column = rows.border_rows[lo:hi] - first, rows.border_columns[lo:hi]
            labels[row, column - 1] = IGNORE  # the last token of a document predicts nothing
            loss_tokens -= len(row)
            fields["documents"], fields["positions"] = _document_fields(row, column, size, T, memory)
        if rows.removed is not None:  # no loss from a removed token, and none for it
            removed = rows.removed[first:first + size]
            labels[:n][removed[:, :-1] | removed[:, 1:]] = IGNORE
        filled = n * T if rows.filled is None else int(np.minimum(rows.filled[first:first + size], T).sum())
        if rows.trained is not None:
            labels[:n][~rows.trained[first:first + size, 1:]] = IGNORE
        if rows.trained is not None or rows.removed is not None:
            loss_tokens = int(np.count_nonzero(labels != IGNORE))
        if rows.reference is not None:
            fields["reference"], loss_tokens = _pair_fields(rows, first, size, labels, fields["documents"].numpy())
        batches.append(Batch(fields, loss_tokens, filled))
        first += size
    return batches


@lru_cache(maxsize=8)
def _counted(n: int) -> np.ndarray:
    return np.arange(n)


def _pair_fields(rows: Rows, first: int, size: int, labels: np.ndarray, documents: np.ndarray) -> tuple[torch.Tensor, int]:
    """reference (B, P, 2) fp32, and how many pairs have labels in both answers."""
    lo, hi = np.searchsorted(rows.pair_rows, [first, first + size])
    row = rows.pair_rows[lo:hi] - first
    nth = np.arange(len(row)) - np.searchsorted(row, row)
    pairs = int(nth.max(initial=0)) + 1
    reference = np.zeros((size, pairs, 2), np.float32)
    reference[row, nth] = rows.reference[lo:hi]
    counts = np.zeros((size, 2 * pairs + 1), np.int64)
    b, t = np.nonzero(labels != IGNORE)
    np.add.at(counts, (b, np.minimum(documents[b, t], 2 * pairs)), 1)
    return torch.from_numpy(reference), int((counts[:, :-1].reshape(size, pairs, 2) > 0).all(-1).sum())


def _document_fields(row: np.ndarray, column: np.ndarray, B: int, T: int,
                     memory: Memory) -> tuple[torch.Tensor, torch.Tensor]:
    """documents (B, T) int32 and positions (B, T) int64 from sorted borders; a border at column T lies outside."""
    inside = column < T
    border = row[inside], column[inside]
    fields = memory.tensor((B, T), torch.int32), memory.tensor((B, T), torch.int64)
    documents, positions = fields[0].numpy(), fields[1].numpy()
    documents.fill(0)
    documents[border] = 1
    np.cumsum(documents, axis=1, dtype=documents.dtype, out=documents)
    positions.fill(0)
    positions[border] = border[1]
    np.maximum.accumulate(positions, axis=1, out=positions)  # where the document of each token begins
    np.subtract(_counted(T), positions, out=positions)
    return fields


def _record_batches(records: list[Record], padding: Record, sizes: list[int], decode: Decode, memory: Memory) -> list[Batch]:
    """Micro-batches of `sizes` decoded records; missing and lost ones are copies of `padding` with valid = False."""
    batches, first = [], 0
    for size in sizes:
        here = records[first:first + size]
        valid = [not record.lost for record in here] + [False] * (size - len(here))
        taken = [record if good else padding for record, good in zip(here + [padding] * (size - len(here)), valid, strict=True)]
        decoded = [_decoded(decode, record.content, record.where) for record in taken]
        fields = {}
        for name in decoded[0]:
            try:
                fields[name] = torch.stack([fields_of_record[name] for fields_of_record in decoded])
            except (RuntimeError, KeyError) as exc:
                raise DataError(f"model.decoder: field {name} differs in shape or is missing between records, "
                                f"the first of which is {taken[0].where} ({type(exc).__name__}). "
                                "Return the same fields with the same shapes for every record.") from exc
        fields["valid"] = torch.tensor(valid)
        if memory.pinned:
            fields = {name: value.pin_memory() for name, value in fields.items()}
        batches.append(Batch(fields, sum(valid)))
        first += size
    return batches


def _decoded(decode: Decode, record: bytes, where: str) -> dict[str, torch.Tensor]:
    try:
        return decode(record)
    except Exception as exc:  # the user's code may raise anything, and its words may quote the data: no traceback has them
        raise DataError(f"{where}: model.decoder {decode.__module__}:{decode.__qualname__} raised {told_by_place(exc)} on its "
                        f"{len(record)} bytes. Mend the decoder, or leave the sample out with data.skip=[[a,b]].") from None


def _decoder(run: RunConfig) -> Decode | None:
    """The user's record decoder; none for decoder models."""
    if run.model.kind != "custom":
        return None
    module, _, name = run.model.decoder.partition(":")
    try:
        return getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError, ValueError) as exc:
        raise DataError(f"model.decoder={run.model.decoder}: cannot be imported ({exc}). Write package.module:name, "
                        "with the package installed or beside the place where the run is started.") from exc
