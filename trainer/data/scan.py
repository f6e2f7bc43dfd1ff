"""The first half of a build: how inputs are divided into parts, and reading and judging every row of each.

A part is a run of pieces of the inputs; how inputs are divided depends on them alone, so that the shards are the same
whatever the number of processes.
"""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from officina.trainer.data.chat import Chat
from officina.trainer.data.documents import Fields, LeftOut, read_documents
from officina.trainer.data.duplicates import write_run
from officina.trainer.data.formats import Piece, pieces_of
from officina.trainer.data.manifest import write_whole
from officina.trainer.data.sources import TextSource
from officina.trainer.data.workers import Report
from officina.trainer.errors import DataError

LEAST_PART_BYTES = 16 << 20
"""Text of a part, at least: less is not worth a shard of its own."""
MOST_PARTS = 64
"""Parts of inputs that would give more only in shards smaller than they could be."""
RUN_DOCUMENTS = 1 << 22
"""Digests sorted at once."""
REPORT_BYTES = 1 << 22


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """One part, and how it is to be read."""

    part: int
    work: Path
    pieces: tuple[Piece, ...]
    fields: Fields
    filters: tuple[str, ...]
    max_bad_rows: int
    chat: Chat | None = None
    """Rows are samples; none: documents."""
    hides_text: bool = False
    """Nothing of a text may be told."""

    def file(self, kind: str, suffix: str) -> Path:
        """Its file in the work folder."""
        return self.work / f"{kind}-{self.part:05d}{suffix}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Scan:
    """What reading a part showed."""

    documents: int
    """Before duplicates and filters are left out."""
    bytes: int
    """Of their texts."""
    sources: list[str]
    languages: list[str]
    runs: int
    """Files of sorted digests."""
    left_out: dict[str, Any]
    """`LeftOut`."""


def plan_parts(sources: Sequence[TextSource], shard_bytes: int) -> list[tuple[Piece, ...]]:
    """The inputs in runs of pieces of about a shard's size in text, in their order."""
    total = sum(source.bytes for source in sources)
    part_bytes = max(min(shard_bytes, total // MOST_PARTS), LEAST_PART_BYTES)
    parts: list[list[Piece]] = [[]]
    filled = 0
    for source in sources:
        for name, path in source.files:
            for piece in pieces_of(source.name, name, path, part_bytes):
                if parts[-1] and filled + piece.text_bytes > part_bytes:
                    parts.append([])
                    filled = 0
                parts[-1].append(piece)
                filled += piece.text_bytes
    return [tuple(part) for part in parts]


def scan(job: Job, report: Report) -> Scan:
    """Read a part once: count, judge and digest. Stops when it alone has too many bad rows. `report` gets bytes of files."""
    record = job.file("scan", ".json")
    if record.exists():
        report(sum(piece.bytes for piece in job.pieces))
        return Scan(**json.loads(record.read_bytes()))
    left_out, digests, runs, documents, n_bytes = LeftOut(hides_why=job.hides_text), bytearray(), 0, 0, 0
    sources: dict[str, None] = {}
    languages: set[str] = set()
    reported = 0

    def progress(done_bytes: int) -> None:
        nonlocal reported
        if left_out.bad > job.max_bad_rows:
            raise _TooMany
        if done_bytes - reported >= REPORT_BYTES:
            report(done_bytes - reported)
            reported = done_bytes

    def end_run() -> None:
        nonlocal runs, digests
        write_run(job.file("digests", f"-{runs:03d}"), bytes(digests), documents - len(digests) // 16)
        runs, digests = runs + 1, bytearray()

    try:
        for document in read_documents(job.pieces, job.fields, left_out, chat=job.chat, progress=progress):
            sources.setdefault(document.source)
            languages.add(document.language)
            digests += document.digest[:16]
            documents, n_bytes = documents + 1, n_bytes + document.bytes
            if len(digests) >= 16 * RUN_DOCUMENTS:
                end_run()
    except _TooMany:
        pass
    end_run()
    report(sum(piece.bytes for piece in job.pieces) - reported)
    found = Scan(documents=documents, bytes=n_bytes, sources=list(sources), languages=sorted(languages), runs=runs,
                 left_out=asdict(left_out))
    if left_out.bad <= job.max_bad_rows:
        write_whole(record, json.dumps(asdict(found)).encode())
    return found


class _TooMany(Exception):
    """More bad rows than are allowed."""


def check_bad_rows(bad: int, rows: Sequence[str], allowed: int) -> None:
    """Raise DataError naming the first bad rows if there are more than `allowed`."""
    if bad > allowed:
        shown = "\n".join(f"  - {row}" for row in rows[:20])
        raise DataError(f"{bad} bad {'row' if bad == 1 else 'rows'}, {allowed} allowed:\n{shown}\n"
                        f"Mend the rows, or leave out so many: --max-bad-rows {max(bad, 10)}")
