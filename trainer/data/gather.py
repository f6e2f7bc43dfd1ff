"""Tokens out of an open shard, and the borders of documents under them, in numpy."""

from collections.abc import Iterable

import numpy as np

from officina.trainer.data.shards import Shard
from officina.trainer.data.storage import at_once, copy_range


def copy_rows(shard: Shard, starts: list[int], out: np.ndarray, here: list[int]) -> None:
    """out[here] = the tokens from each of `starts`; row by row beats every gather of numpy and torch."""

    def copy(rows: Iterable[tuple[int, int]]) -> None:
        for i, start in rows:
            copy_range(shard.data, start, out[i])

    rows = list(zip(here, starts, strict=True))
    if shard.pread:
        at_once(copy, rows)
        return
    for i, start in rows:
        out[i] = shard.data[start:start + out.shape[1]]


def tokens_at(shard: Shard, starts: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    """Tokens of the ranges that begin at `starts`, (n,) int64, end to end: (lengths.sum(),), unverified."""
    into = np.cumsum(lengths) - lengths
    if not shard.pread:
        return shard.data[np.repeat(starts - into, lengths) + np.arange(lengths.sum())]
    out = np.empty(lengths.sum(), shard.data.dtype)

    def copy(pieces: Iterable[tuple[int, int, int]]) -> None:
        for at, start, length in pieces:
            copy_range(shard.data, start, out[at:at + length])

    at_once(copy, list(zip(into.tolist(), starts.tolist(), lengths.tolist(), strict=True)))
    return out


def borders_of_rows(ends: np.ndarray, starts: list[int], seq_len: int) -> list[np.ndarray]:
    """Of each row the columns of the document ends e with start < e <= start + seq_len: arrays of (k,) int64, sorted."""
    begins = np.asarray(starts)
    lo, hi = ends.searchsorted(begins, side="right").tolist(), ends.searchsorted(begins + seq_len, side="right").tolist()
    return [ends[a:b] - start for a, b, start in zip(lo, hi, starts, strict=True)]


def borders_of_pieces(ends: np.ndarray, starts: np.ndarray, seq_len: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The same of many pieces at once, `starts` and `seq_len` (n,) int64: pieces 0..n-1 and columns, (m,) int64 each."""
    lo = np.searchsorted(ends, starts, side="right")
    counts = np.searchsorted(ends, starts + seq_len, side="right") - lo
    row = np.repeat(np.arange(len(starts)), counts)
    nth = np.arange(len(row)) - np.repeat(np.cumsum(counts) - counts, counts)
    return row, ends[lo[row] + nth] - starts[row]
