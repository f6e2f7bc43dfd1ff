"""The second half of a build: the documents of a part that stay are tokenised and written as shards.

A part's shards are closed together, as segments: each has a record, written last, from which an interrupted build goes on.
"""

import hashlib
import json
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from functools import lru_cache
from operator import add
from typing import Any

import numpy as np

from officina.trainer.data.documents import NO_LANGUAGE, SHOWN, Document, Filter, LeftOut, load_filter, read_documents
from officina.trainer.data.manifest import ShardEntry, TokenizerInfo, write_whole
from officina.trainer.data.scan import Job, check_bad_rows
from officina.trainer.data.seal import Seal, read_seal
from officina.trainer.data.shard_writer import ShardWriter
from officina.trainer.data.shards import DTYPES
from officina.trainer.data.tokenizer import Encoder, SampleEncoder, dtype_of
from officina.trainer.data.workers import Report
from officina.trainer.errors import DataError

TRAIN, VALIDATION = "train", "validation"
BATCH_CHARACTERS = 1 << 20
"""Text tokenised at once, while the batch before it is written."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Writing:
    """What all parts are written with."""

    tokenizer: str
    """Text of tokenizer.json."""
    info: TokenizerInfo
    sources: dict[str, int]
    languages: dict[str, int]
    """Empty where no language is known."""
    shard_bytes: int
    validation: float
    key: str = ""
    """Where the key is that shards are sealed with; each process reads it there."""
    max_bad_rows: int = 0
    bad: int = 0
    """Bad rows that were found while reading, of all parts."""
    bad_rows: tuple[str, ...] = ()
    """The first of them."""


@dataclass(slots=True, kw_only=True)
class Segment:
    """Shards that were closed together, and what is in them."""

    stop: int
    """Number of the part's first document after it."""
    bytes: int
    """Of the texts as they were read, those left out included."""
    last: bool
    shards: list[ShardEntry]
    groups: list[list[Any]]
    """[split, source, language, documents, tokens, bytes, characters, words, segments]"""
    lengths: list[list[Any]]
    """[split, bound, documents with fewer tokens than it and no fewer than half of it]"""
    steps: dict[str, list[int]]
    """Filter -> documents that it left out, and that it changed."""
    bad: int = 0
    """Rows that only their tokens showed to be bad: they were left out."""
    bad_rows: list[str] = field(default_factory=list)
    """Place and reason of each: the first `SHOWN`."""


# ---- tokens ----------------------------------------------------------------------------------------------------------
def write_part(given: tuple[Job, Writing], report: Report) -> list[Segment]:
    """Tokenise a part and write its shards into the work folder; finished segments are not done again. `report` gets
    bytes of text."""
    job, writing = given
    done = finished_segments(job)
    report(sum(segment.bytes for segment in done))
    if done and done[-1].last:
        return done
    open_segment = _OpenSegment(job, writing, len(done), done[-1].stop if done else 0)
    try:
        for item in _tokenised(job, writing, open_segment.stop, report):
            if item.document is not None and open_segment.is_full(item):
                done.append(open_segment.close(last=False))
                open_segment = _OpenSegment(job, writing, len(done), open_segment.stop)
            open_segment.add(item)
            if item.bad:
                found = [*done, open_segment]
                check_bad_rows(writing.bad + sum(segment.bad for segment in found),
                               [*writing.bad_rows, *(row for segment in found for row in segment.bad_rows)],
                               writing.max_bad_rows)
        done.append(open_segment.close(last=True))
    finally:
        open_segment.abandon()
    return done


def finished_segments(job: Job) -> list[Segment]:
    """The part's segments whose record stands, in order."""
    found: list[Segment] = []
    while (record := job.file("part", f"-{len(found):05d}.json")).exists():
        values = json.loads(record.read_bytes())
        shards = [ShardEntry(**entry) for entry in values.pop("shards")]
        found.append(Segment(**values, shards=shards))
        if found[-1].last:
            break
    return found


@dataclass(slots=True)
class _Item:
    """A document on its way into a shard; at the end of the part, none, with what came after the last one."""

    document: Document | None
    stop: int
    """Number after it in the part."""
    split: str = TRAIN
    bytes: int = 0
    """As read, with all that was left out before it."""
    steps: list[tuple[str, int]] = field(default_factory=list)
    """(filter, 0 = left out, 1 = changed) of it and of all that was left out before it."""
    bad: str = ""
    """Place and reason, if its tokens show that it must be left out; the document then is none."""
    arrays: list[tuple[np.ndarray, np.ndarray | None]] = field(default_factory=list)
    """Tokens, and which are trained on (None: all), of the document; of a pair's two answers."""

    @property
    def tokens(self) -> int:
        """Of all arrays."""
        return sum(len(tokens) for tokens, _ in self.arrays)


def _items(job: Job, writing: Writing, first: int) -> Iterator[_Item]:
    """What stays of the part's documents, from number `first` on."""
    filters = [load_filter(name) for name in job.filters]
    drops = set(np.fromfile(job.file("drops", ""), "<u8").tolist())
    item, number = _Item(None, first), -1
    found = read_documents(job.pieces, job.fields, LeftOut(hides_why=job.hides_text), chat=job.chat, all_fields=bool(filters))
    for number, document in enumerate(found):
        if number < first:
            continue
        item.bytes += document.bytes
        item.stop = number + 1
        if number in drops or not _passes(document, filters, item.steps):
            continue
        item.document = document
        item.split = VALIDATION if is_held_out(document.text, writing.validation) else TRAIN
        yield item
        item = _Item(None, number + 1)
    yield item


def _passes(document: Document, filters: Sequence[Filter], steps: list[tuple[str, int]]) -> bool:
    for each in filters:
        before = document.text
        if not each(document):
            steps.append((each.name, 0))
            return False
        if document.text != before:
            steps.append((each.name, 1))
    return True


def is_held_out(text: str, share: float) -> bool:
    """Does a document belong to the validation split? Asked of its text as it is written: equal ones are on the same side."""
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:6]) / (1 << 48) < share


def _tokenised(job: Job, writing: Writing, first: int, report: Report) -> Iterator[_Item]:
    """Items with their tokens; one batch is tokenised in a thread while the one before is written and the next is read."""
    encoder = (_encoder if job.chat is None else _sample_encoder)(writing.tokenizer, writing.info)
    batches = _batches(_items(job, writing, first))
    with ThreadPoolExecutor(1) as thread:
        batch = next(batches, None)
        waiting = None
        while batch is not None or waiting is not None:
            submitted = None
            if batch is not None:
                documents = [item.document for item in batch if item.document is not None]
                given = documents if job.chat else [document.text for document in documents]
                submitted = batch, thread.submit(encoder.encode, given)
            if waiting is not None:
                yield from _with_tokens(*waiting, encoder, job.hides_text)
                report(sum(item.bytes for item in waiting[0]))
            waiting, batch = submitted, next(batches, None) if batch is not None else None


@lru_cache(maxsize=1)
def _encoder(text: str, info: TokenizerInfo) -> Encoder:
    """One for all parts of a process: a large vocabulary takes a second to load."""
    return Encoder(text, info)


@lru_cache(maxsize=1)
def _sample_encoder(text: str, info: TokenizerInfo) -> SampleEncoder:
    return SampleEncoder(text, info)


def _with_tokens(batch: list[_Item], encodings: Any, encoder: Encoder | SampleEncoder, hides_why: bool) -> Iterator[_Item]:
    found = iter(encodings.result())
    for item in batch:
        if item.document is not None:
            try:
                item.arrays = encoder.arrays(next(found))
            except DataError as exc:
                left_out = LeftOut(hides_why=hides_why)
                left_out.refuse(item.document.place, str(exc))
                item.document, [item.bad] = None, left_out.bad_rows
        yield item


def _batches(items: Iterator[_Item]) -> Iterator[list[_Item]]:
    batch: list[_Item] = []
    characters = 0
    for item in items:
        batch.append(item)
        characters += len(item.document.text) if item.document is not None else 0
        if characters >= BATCH_CHARACTERS:
            yield batch
            batch, characters = [], 0
    if batch:
        yield batch


@lru_cache(maxsize=1)
def _seal(key: str) -> Seal | None:
    return read_seal(key, what="--seal") if key else None


class _OpenSegment:
    """Shards that are being written, one of each split, and the sums over their documents."""

    def __init__(self, job: Job, writing: Writing, number: int, first: int) -> None:
        self._job, self._writing, self._number = job, writing, number
        self._dtype = dtype_of(writing.info.vocab_size)
        self._writers: dict[str, ShardWriter] = {}
        self._groups: dict[tuple[str, str, str], tuple[int, ...]] = {}
        self._lengths: Counter = Counter()
        self._steps: dict[str, list[int]] = {}
        self.stop, self._bytes = first, 0
        self.bad = 0
        self.bad_rows: list[str] = []

    def is_full(self, item: _Item) -> bool:
        """Would the document make its shard too large?"""
        writer = self._writers.get(item.split)
        return writer is not None and (
            writer.bytes + item.tokens * DTYPES[self._dtype].itemsize > self._writing.shard_bytes)

    def add(self, item: _Item) -> None:
        """Write the item's document, if there is one, and count."""
        self.stop, self._bytes = item.stop, self._bytes + item.bytes
        for name, changed in item.steps:
            self._steps.setdefault(name, [0, 0])[changed] += 1
        if item.bad:
            self.bad += 1
            self.bad_rows = [*self.bad_rows, item.bad][:SHOWN]
        if item.document is None:
            return
        if item.split not in self._writers:
            path = self._job.work / f"{item.split}-{self._job.part:05d}-{self._number:05d}.dls"
            self._writers[item.split] = ShardWriter(path, dtype=self._dtype, tokenizer_sha256=self._writing.info.sha256,
                                                    seal=_seal(self._writing.key))
        document, languages = item.document, self._writing.languages
        content = document.text.encode()
        language = languages[document.language or NO_LANGUAGE] if languages else None
        known = len(content) if self._job.chat is None else None  # a sample's text is not what its tokens spell
        for tokens, trained in item.arrays:
            self._writers[item.split].add(
                tokens, self._writing.sources[document.source], language, document.id, trained, known)
            self._lengths[item.split, 1 << len(tokens).bit_length()] += 1
        key = (item.split, document.source, document.language)
        more = (len(item.arrays), item.tokens, len(content), len(document.text), count_words(content),
                count_segments(content))
        before = self._groups.get(key)
        self._groups[key] = more if before is None else tuple(map(add, before, more))

    def close(self, *, last: bool) -> Segment:
        """Finish the shards, then write the record."""
        entries = [self._writers[split].close(relative_to=self._job.work, split=split)
                   for split in (TRAIN, VALIDATION) if split in self._writers]
        self._writers = {}
        found = Segment(stop=self.stop, bytes=self._bytes, last=last, shards=entries, steps=self._steps,
                        bad=self.bad, bad_rows=self.bad_rows,
                        groups=[[*key, *sums] for key, sums in self._groups.items()],
                        lengths=[[*key, n] for key, n in sorted(self._lengths.items())])
        record = json.dumps(asdict(found)).encode()
        write_whole(self._job.file("part", f"-{self._number:05d}.json"), record)
        return found

    def abandon(self) -> None:
        """Remove what is not finished."""
        for writer in self._writers.values():
            writer.abandon()


def count_words(content: bytes) -> int:
    """Runs of bytes that are no ASCII white space or control characters."""
    inside = np.frombuffer(content, np.uint8) > 32
    return int(inside[0]) + int(np.count_nonzero(inside[1:] > inside[:-1])) if len(content) else 0


def count_segments(content: bytes) -> int:
    """Lines with something in them, as HPLT counts segments."""
    return sum(map(bool, map(bytes.strip, content.split(b"\n"))))
