"""Which documents a row of a run consists of, and what is known of each."""

from dataclasses import dataclass, replace

import numpy as np

from officina.trainer.data.documents import NO_LANGUAGE
from officina.trainer.data.shards import Shard
from officina.trainer.data.stream import Stream


@dataclass(frozen=True, slots=True)
class Extent:
    """A document's part of a row."""

    document: str
    """SHARD:NUMBER, as `officina data remove` takes it."""
    id: str
    """32 hexadecimal digits; empty in shards without ids."""
    source: str
    language: str
    start: int
    """Its first column in the row."""
    stop: int


def extents_of_row(stream: Stream, row: int, seq_len: int) -> list[Extent]:
    """The documents of a row's inputs in order, with their columns; the padding is none."""
    if stream.plan is None:
        return extents(stream, row * seq_len, seq_len)
    found, column = [], 0
    for piece in stream.plan.pieces(np.asarray([row]))[0]:
        length = int(stream.plan.lengths[piece])
        found += [replace(each, start=each.start + column, stop=each.stop + column)
                  for each in extents(stream, int(stream.plan.starts[piece]), length)]
        column += length
    return found


def extents(stream: Stream, first: int, tokens: int) -> list[Extent]:
    """The documents under tokens [first, first + tokens) of the stream, in order."""
    found, at, stop = [], first, first + tokens
    while at < stop:
        number = int(np.searchsorted(stream.token_starts, at, side="right")) - 1
        shard, begin = stream.shard(number), int(stream.token_starts[number])
        document = int(np.searchsorted(shard.ends, at - begin, side="right"))
        end = min(begin + int(shard.ends[document]), stop)
        name, id, source, language = describe_document(stream, number, shard, document)
        found.append(Extent(name, id, source, language, at - first, end - first))
        at = end
    return found


def describe_document(stream: Stream, number: int, shard: Shard, document: int) -> tuple[str, str, str, str]:
    """Name, id, source and language of a document of shard `number`."""
    manifest = stream.dataset.manifest
    source = int(shard.source_ids[document]) if len(shard.source_ids) else 0
    languages = manifest.languages if len(shard.language_ids) else []
    return (f"{stream.entries[number].path}:{document}",
            shard.document_ids[document].tobytes().hex() if len(shard.document_ids) else "",
            manifest.sources[source] if source < len(manifest.sources) else manifest.name,
            languages[int(shard.language_ids[document])] if languages else NO_LANGUAGE)
