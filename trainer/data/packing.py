"""Best-fit packing: which documents share a row, so that none is cut without need and no token is lost.

A row holds up to seq_len + 1 tokens, the inputs and the last label. Longest first, each document goes into the row that it
fills best (best-fit decreasing; for language models: Ding et al., arXiv:2404.10830). What is longer than a row is split into
pieces of seq_len + 1 tokens that share one token each, so that every token but a document's first is a label exactly once; or,
if asked, cut off, left out, or refused. Both answers of a preference pair stay in one row, one after the other.

The plan is a pure function of the documents' lengths (and of their trained tokens where they are cut off). It may be stored:

    DATASET/packing/SPLIT-SEQ_LEN-OVERLONG.plan    a line of JSON, then starts (i8), lengths (i4) and rows (i8), little-endian
"""

import json
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from pathlib import Path

import numpy as np
import xxhash

from officina.trainer.data.manifest import write_whole
from officina.trainer.errors import DataError

FOLDER = "packing"
SPLIT, TRUNCATE, LEAVE_OUT, REFUSE = "split", "truncate", "leave_out", "refuse"


@dataclass(frozen=True)
class Plan:
    """Rows of pieces; a piece is a contiguous range of the split's token stream, within a document (or pair)."""

    starts: np.ndarray
    """(pieces,) int64 offset of each piece's first token in the stream."""
    lengths: np.ndarray
    """(pieces,) int32 tokens."""
    rows: np.ndarray
    """(rows + 1,) int64: row r holds the pieces [rows[r], rows[r + 1])."""
    left_out: int = 0
    """Documents (or pairs) longer than a row that are not in the plan."""
    truncated: int = 0
    """Documents of which the end is cut off."""
    emptied: int = 0
    """Documents left out because what is trained of them was all cut off."""
    tokens: int = 0
    """In the plan, the shared ones of split documents twice."""
    capacity: int = 1
    """Tokens that a row has room for: seq_len + 1."""

    def __len__(self) -> int:
        return len(self.rows) - 1

    def pieces(self, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Number of each piece of `rows`, (n,) int64, in order, and for each the place of its row in `rows`."""
        counts = self.rows[rows + 1] - self.rows[rows]
        row = np.repeat(np.arange(len(rows)), counts)
        nth = np.arange(len(row)) - np.repeat(np.cumsum(counts) - counts, counts)
        return self.rows[rows][row] + nth, row

    def ranges(self, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Starts and stops of the tokens of `rows` in the stream; a token that two pieces share belongs to the second."""
        piece, _ = self.pieces(rows)
        starts, stops = self.starts[piece], self.starts[piece] + self.lengths[piece]
        return starts, stops - ((self.lengths[piece] > 1) & np.isin(stops - 1, self.starts))

    @cached_property
    def digest(self) -> str:
        """xxh3-64 of the three arrays, 16 hexadecimal digits."""
        found = xxhash.xxh3_64()
        for part in _arrays(self):
            found.update(part)
        return found.hexdigest()

    def facts(self) -> dict[str, int | float]:
        """What a person wants to know of it."""
        return {"rows": len(self), "pieces": len(self.starts), "tokens": self.tokens,
                "filled": self.tokens / max(len(self) * self.capacity, 1),
                "truncated": self.truncated, "emptied": self.emptied, "left_out": self.left_out}


def make_plan(ends: np.ndarray, seq_len: int, overlong: str, *, unit: int = 1, trained: np.ndarray | None = None,
              what: str = "data.sources.NAME") -> Plan:
    """Pack documents that end at `ends`, (n,) int64 rising offsets in the stream, into rows of seq_len + 1 tokens.

    unit: documents that stay together (2: pairs). trained: (tokens,) running count of trained tokens, needed to truncate.
    Raises DataError where a document is longer than a row and `overlong` is `refuse`.
    """
    room = seq_len + 1
    stops = np.asarray(ends[unit - 1::unit], np.int64)
    starts = np.concatenate(([0], stops[:-1])).astype(np.int64)
    lengths = stops - starts
    long = np.flatnonzero(lengths > room)
    left_out = truncated = emptied = 0
    if len(long) and overlong == REFUSE:
        name = "pairs" if unit == 2 else "samples"
        most, other = int(lengths[long].max()), "leave_out" if unit == 2 else "truncate"
        raise DataError(
            f"{what}: {len(long):,} of {len(lengths):,} {name} are longer than a row of batch.seq_len={seq_len} and its "
            f"label, the longest has {most:,} tokens (number {int(long[np.argmax(lengths[long])])}). "
            f"Try: batch.seq_len={most - 1}, or data.overlong={other}")
    if overlong == LEAVE_OUT:
        left_out, keep = len(long), lengths <= room
        starts, lengths = starts[keep], lengths[keep]
    elif overlong == TRUNCATE and len(long):
        lengths = np.minimum(lengths, room)
        keep = np.ones(len(lengths), bool)
        if trained is not None:
            counts = trained[starts[long] + room - 1] - trained[starts[long]]  # the first token of a document is no label
            keep[long[counts == 0]] = False
        emptied, truncated = int(np.count_nonzero(~keep)), int(np.count_nonzero(keep[long]))
        starts, lengths = starts[keep], lengths[keep]
    elif len(long):
        starts, lengths = _split(starts, lengths, seq_len)
    bins = _best_fit(lengths, room)
    order = np.lexsort((starts, bins))
    rows = np.searchsorted(bins[order], np.arange(int(bins.max(initial=-1)) + 2))
    return Plan(starts[order], lengths[order].astype(np.int32), rows.astype(np.int64), left_out, truncated, emptied,
                int(lengths.sum()), room)


def _split(starts: np.ndarray, lengths: np.ndarray, seq_len: int) -> tuple[np.ndarray, np.ndarray]:
    """Pieces of at most seq_len + 1 tokens; a piece begins with the last token of the one before."""
    counts = np.maximum(-(-(lengths - 1) // seq_len), 1)
    document = np.repeat(np.arange(len(lengths)), counts)
    nth = np.arange(len(document)) - np.repeat(np.cumsum(counts) - counts, counts)
    offsets = nth * seq_len
    return starts[document] + offsets, np.minimum(lengths[document] - offsets, seq_len + 1)


def _best_fit(lengths: np.ndarray, room: int) -> np.ndarray:
    """(n,) int64 number of the row of each piece: best-fit decreasing, pieces of one length at once.

    Among rows with equal room the oldest is taken; equal lengths keep their order.
    """
    out, room = np.empty(len(lengths), np.int64), min(room, int(lengths.sum()))
    by_length = np.argsort(-lengths, kind="stable")
    bounds = np.flatnonzero(np.diff(lengths[by_length], prepend=-1, append=-1))
    waiting: dict[int, list[np.ndarray]] = {}  # room left -> rows, in the order in which they got there
    left = np.zeros(room + 1, bool)
    made = 0
    for a, b in pairwise(bounds):
        group = by_length[a:b]
        length = int(lengths[group[0]])
        while len(group):
            fitting = np.flatnonzero(left[length:])
            if len(fitting):
                space = length + int(fitting[0])
                rows = np.concatenate(waiting[space])
            else:
                space, rows = room, made + np.arange(-(-len(group) // (room // length)))
                made += len(rows)
            each = space // length  # the tightest row stays the tightest until it takes no more
            used = min(len(rows), -(-len(group) // each))
            taken = min(len(group), used * each)
            out[group[:taken]] = np.repeat(rows[:used], each)[:taken]
            if len(fitting):
                _put(waiting, left, space, rows[used:], replace=True)
            last = taken - (used - 1) * each
            _put(waiting, left, space - each * length, rows[:used - (last < each)])
            if last < each:
                _put(waiting, left, space - last * length, rows[used - 1:used])
            group = group[taken:]
    return out


def _put(waiting: dict[int, list[np.ndarray]], left: np.ndarray, space: int, rows: np.ndarray, *,
         replace: bool = False) -> None:
    if replace:
        waiting[space] = []
    if len(rows) and space > 0:
        waiting.setdefault(space, []).append(rows)
    left[space] = bool(waiting.get(space))


# ---- storing ---------------------------------------------------------------------------------------------------------
def plan_path(folder: Path, split: str, seq_len: int, overlong: str) -> Path:
    """Where the plan of a split lies."""
    return folder / FOLDER / f"{split}-{seq_len}-{overlong}.plan"


def store_plan(path: Path, plan: Plan, fingerprint: str) -> None:
    """Write the plan of the data set with this fingerprint."""
    path.parent.mkdir(exist_ok=True)
    head = {"fingerprint": fingerprint, "xxh3": plan.digest, "pieces": len(plan.starts), "rows": len(plan),
            "left_out": plan.left_out, "truncated": plan.truncated, "emptied": plan.emptied, "tokens": plan.tokens,
            "capacity": plan.capacity}
    write_whole(path, json.dumps(head).encode() + b"\n" + b"".join(_arrays(plan)))


def load_plan(path: Path, fingerprint: str) -> Plan:
    """Read a stored plan. Raises DataError if it is damaged or of another data set."""
    content = path.read_bytes()
    line, _, body = content.partition(b"\n")
    try:
        head = json.loads(line)
        p, r = head["pieces"], head["rows"]
        starts, lengths, rows = (np.frombuffer(body, dtype, n, offset) for dtype, n, offset in
                                 (("<i8", p, 0), ("<i4", p, 8 * p), ("<i8", r + 1, 12 * p)))
        plan = Plan(starts, lengths, rows, *(head[k] for k in ("left_out", "truncated", "emptied", "tokens", "capacity")))
        whole = len(body) == 12 * p + 8 * (r + 1) and plan.digest == head["xxh3"]
    except (ValueError, KeyError, TypeError):
        head, whole = {}, False
    if not whole or head["fingerprint"] != fingerprint:
        why = "is of another version of the data set" if whole else "is damaged: it does not match its checksum"
        raise DataError(f"{path}: {why}. Make it again: officina data pack {path.parents[1]}, or remove the file: the same "
                        "plan is then made whenever a run starts.")
    return plan


def _arrays(plan: Plan) -> list[bytes]:
    return [plan.starts.astype("<i8").tobytes(), plan.lengths.astype("<i4").tobytes(), plan.rows.astype("<i8").tobytes()]
