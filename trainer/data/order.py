"""Which row of which source a global sample index stands for: a pure function, computed anew wherever it is asked.

    global sample index k -> (source, cursor) by the mixture -> (epoch, row) by a keyed permutation of the
    source

The mixture is a repeating pattern of at most `MAX_PERIOD` samples, made so that after any number of samples each source has had
its share to within one row. A cursor counts a source's own rows from the start of the run; a new stage of the timeline goes on
counting where the one before it stopped, so that a change of weights neither loses nor repeats a row. Nothing is stored and
nothing is built per sample: memory is O(MAX_PERIOD) per stage, time O(1) per sample.
"""

import hashlib
import heapq
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from functools import lru_cache
from itertools import pairwise

import numpy as np

from officina.trainer.config import DataConfig, RunConfig, SourceConfig, TimelineStage
from officina.trainer.errors import DataError

MAX_PERIOD = 1 << 16
"""Longest pattern. Weights whose shares have a smaller common denominator (0.7, 0.2, 0.1: 10) are met exactly, others
to 1/65536."""
SMALL = 1 << 14
"""Sources with at most this many rows get a true random permutation: a Feistel network on a tiny domain is no good one."""
FEISTEL_ROUNDS = 4


# ---- permutation -------------------------------------------------------------------------------------------
def round_keys(seed: int, fingerprint: str, epoch: int) -> tuple[int, ...]:
    """The permutation's keys, four 64-bit numbers, from the run's seed, the data's fingerprint and the epoch."""
    digest = hashlib.sha256(f"officina order 1|{seed}|{fingerprint}|{epoch}".encode()).digest()
    return tuple(int.from_bytes(digest[8 * i:8 * i + 8], "little") for i in range(FEISTEL_ROUNDS))


def _mix(x: np.ndarray) -> np.ndarray:
    """splitmix64's finaliser (Steele, Lea, Flood, OOPSLA 2014) on uint64, wrapping around."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


@lru_cache(maxsize=64)
def _small_permutation(size: int, keys: tuple[int, ...]) -> np.ndarray:
    """(size,) uint16, since 64 of them are kept: the places sorted by a keyed 64-bit hash."""
    x = np.arange(size, dtype=np.uint64)
    for key in keys:
        x = _mix(x + np.uint64(key))
    return np.argsort(x, kind="stable").astype(np.uint16)


def permute(indices: np.ndarray, size: int, keys: tuple[int, ...]) -> np.ndarray:
    """Where a keyed permutation of 0..size-1 sends `indices`, (n,) int64 each.

    Feistel network over pairs below ceil(sqrt(size)) (generalised to any side: Black and Rogaway, CT-RSA 2002), walked on until
    the result lies below `size`; the domain exceeds `size` by 2 sqrt(size) at most, so that walks are rare.
    """
    if size <= SMALL:
        return _small_permutation(size, keys)[indices].astype(np.int64)
    side = np.uint64(math.isqrt(size - 1) + 1)
    out = _feistel(indices.astype(np.uint64), side, keys)
    while (outside := np.flatnonzero(out >= np.uint64(size))).size:
        out[outside] = _feistel(out[outside], side, keys)
    return out.astype(np.int64)


def _feistel(x: np.ndarray, side: np.uint64, keys: tuple[int, ...]) -> np.ndarray:
    """One pass over the domain side**2; `side` fits 32 bits, so that a 32-bit hash scales into it without division."""
    left, right = x // side, x % side
    for key in keys:
        left = left + ((_mix(right + np.uint64(key)) >> np.uint64(32)) * side >> np.uint64(32))
        left, right = right, np.where(left >= side, left - side, left)
    return left * side + right


def permute_blocks(indices: np.ndarray, size: int, block: int, keys: tuple[int, ...]) -> np.ndarray:
    """Like `permute`, but `block` neighbours stay together: blocks in keyed order, each in a keyed order of its own.

    The blocks begin at a keyed place: what is left over after whole ones, and comes last, is another part for other keys.
    """
    whole, (number, inside) = size // block, np.divmod(indices, block)
    shift = int(_mix(np.asarray([keys[0] ^ keys[1]], np.uint64))[0]) % size
    out = np.empty_like(indices)
    if (full := number < whole).any():
        blocks = permute(number[full], whole, keys)
        turned = _mix(blocks.astype(np.uint64) + np.uint64(keys[2])) % np.uint64(block)
        out[full] = blocks * block + (permute(inside[full], block, keys) + turned.astype(np.int64)) % block
    if not full.all():
        out[~full] = whole * block + permute(inside[~full], size - whole * block, keys)
    return (out + shift) % size


# ---- mixture -----------------------------------------------------------------------------------------------
def _pattern_counts(weights: Sequence[float]) -> tuple[int, ...]:
    """Rows of each source in one pattern; their sum is its length. Every source has at least one."""
    shares = [Fraction(repr(float(w))) for w in weights]  # repr: 0.7 is meant as 7/10
    total = sum(shares)
    shares = [s / total for s in shares]
    period = math.lcm(*(s.denominator for s in shares))
    if period <= MAX_PERIOD:
        return tuple(int(s * period) for s in shares)
    counts = [max(1, int(s * MAX_PERIOD)) for s in shares]
    by_shortfall = sorted(range(len(shares)), key=lambda i: (counts[i] - shares[i] * MAX_PERIOD, i))
    missing = MAX_PERIOD - sum(counts)
    for i in by_shortfall[:max(missing, 0)]:
        counts[i] += 1
    counts[counts.index(max(counts))] += min(missing, 0)  # the largest pays for tiny ones rounded up
    return tuple(counts)


@lru_cache(maxsize=64)
def _pattern(counts: tuple[int, ...]) -> tuple[np.ndarray, np.ndarray]:
    """Source of each place of the pattern, and how many rows of that source come before it: (period,) int64 each.

    Row j of a source with n of M places may stand from floor(j M/n) up to ceil((j+1) M/n): earliest deadline
    first keeps every deadline as the shares sum to one, hence each source is within one row of its share
    everywhere (Baruah et al., Algorithmica 15, 1996).
    """
    period = sum(counts)
    released: list[list[int]] = [[] for _ in range(period)]
    for source, n in enumerate(counts):
        for j in range(n):
            released[j * period // n].append(source)
    waiting: list[tuple[int, int]] = []
    used = [0] * len(counts)
    sources, before = np.empty(period, np.int64), np.empty(period, np.int64)
    pending = [0] * len(counts)
    for place in range(period):
        for source in released[place]:
            pending[source] += 1
            heapq.heappush(waiting, (-(-pending[source] * period // counts[source]), source))
        _, source = heapq.heappop(waiting)
        sources[place], before[place] = source, used[source]
        used[source] += 1
    return sources, before


@dataclass(frozen=True, slots=True)
class _Stage:
    first: int
    """First global sample index."""
    counts: np.ndarray
    """(sources,) rows of each source in one pattern."""
    sources: np.ndarray
    """(period,) source of each place."""
    before: np.ndarray
    """(period,) rows of that source before it in the pattern."""
    cursors: np.ndarray
    """(sources,) rows of each source before the stage."""

    def rows_before(self, sample: int) -> np.ndarray:
        """(sources,) rows of each source before global sample index `sample` of this stage."""
        whole, part = divmod(sample - self.first, len(self.sources))
        in_part = np.bincount(self.sources[:part], minlength=len(self.counts))
        return self.cursors + whole * self.counts + in_part


class Mixture:
    """The timeline's stages in closed form. Sources are numbered by their sorted names."""

    def __init__(self, timeline: Sequence[TimelineStage]) -> None:
        self.names: list[str] = sorted({name for stage in timeline for name in stage.weights})
        firsts = [stage.from_sample for stage in timeline]
        if not firsts or firsts[0] != 0 or any(a >= b for a, b in pairwise(firsts)):
            raise DataError(f"data.timeline: stages start at samples {firsts}, but must start at 0 and rise. "
                            "Take the timeline that `officina resume` writes, or leave it empty.")
        self._firsts = np.asarray(firsts)
        self._stages: list[_Stage] = []
        for stage in timeline:
            present = [i for i, name in enumerate(self.names) if name in stage.weights]
            if not present:
                raise DataError(f"data.timeline: the stage from sample {stage.from_sample} has no source. "
                                "Give data.sources at least one data set.")
            pattern_counts = _pattern_counts([stage.weights[self.names[i]] for i in present])
            sources, before = _pattern(pattern_counts)
            counts = np.zeros(len(self.names), np.int64)
            counts[present] = pattern_counts
            cursors = self.cursors(stage.from_sample) if self._stages else np.zeros(len(self.names), np.int64)
            numbered = np.asarray(present)[sources]
            self._stages.append(_Stage(stage.from_sample, counts, numbered, before, cursors))

    def cursors(self, sample: int) -> np.ndarray:
        """(sources,) int64: rows of each source before global sample index `sample`."""
        stage = max((s for s in self._stages if s.first <= sample), key=lambda s: s.first)
        return stage.rows_before(sample)

    def rows_given(self, sample: int) -> dict[str, int]:
        """Rows of each source before global sample index `sample`, by sorted name; of those alone that gave any."""
        return {name: int(n) for name, n in zip(self.names, self.cursors(sample), strict=True) if n}

    def place(self, samples: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Source number and cursor of each global sample index, (n,) int64 each."""
        source, cursor = np.empty(len(samples), np.int64), np.empty(len(samples), np.int64)
        of_stage = np.searchsorted(self._firsts, samples, side="right") - 1
        for number in np.unique(of_stage):
            stage, here = self._stages[number], np.flatnonzero(of_stage == number)
            whole, part = np.divmod(samples[here] - stage.first, len(stage.sources))
            found = stage.sources[part]
            source[here] = found
            cursor[here] = stage.cursors[found] + whole * stage.counts[found] + stage.before[part]
        return source, cursor

    def sources_from(self, sample: int) -> set[str]:
        """Names of the sources that give rows at or after global sample index `sample`."""
        current = np.searchsorted(self._firsts, sample, side="right") - 1
        return {self.names[i] for stage in self._stages[current:] for i in np.flatnonzero(stage.counts)}


# ---- order -------------------------------------------------------------------------------------------------
@dataclass(frozen=True, slots=True)
class SourceRows:
    """What the order must know of a source."""

    fingerprint: str
    rows: int


@dataclass(frozen=True, slots=True)
class Places:
    """Where global samples lie: (n,) int64 each."""

    source: np.ndarray
    """Number of the source in `Order.names`."""
    cursor: np.ndarray
    """How many rows of the source come before in this run."""
    epoch: np.ndarray
    row: np.ndarray
    """Row of the source's split."""


class Order:
    """Global sample index -> row of a source."""

    def __init__(self, mixture: Mixture, sources: Mapping[str, SourceRows], *, seed: int, shuffle: bool,
                 block: int = 1) -> None:
        self.mixture, self.names = mixture, mixture.names
        self._sources, self._seed, self._shuffle, self.block = sources, seed, shuffle, block

    def place(self, samples: np.ndarray) -> Places:
        """Source, cursor, epoch and row of each global sample index in `samples`, (n,) int64."""
        source, cursor = self.mixture.place(samples)
        epoch, row = np.empty_like(cursor), np.empty_like(cursor)
        for number in np.unique(source):
            here = np.flatnonzero(source == number)
            known = self._sources[self.names[number]]
            epochs, index = np.divmod(cursor[here], known.rows)
            epoch[here] = epochs
            for e in np.unique(epochs) if self._shuffle and known.rows > 1 else ():
                of_epoch = np.flatnonzero(epochs == e)
                index[of_epoch] = self.rows_of_epoch(self.names[number], int(e), index[of_epoch])
            row[here] = index
        return Places(source, cursor, epoch, row)

    def rows_of_epoch(self, name: str, epoch: int, index: np.ndarray) -> np.ndarray:
        """Rows that a source gives in one of its epochs at `index`, (n,) int64 from 0 to its rows: (n,) int64."""
        known = self._sources[name]
        if not self._shuffle or known.rows == 1:
            return index
        keys = round_keys(self._seed, known.fingerprint, epoch)
        if self.block > 1:
            return permute_blocks(index, known.rows, self.block, keys)
        return permute(index, known.rows, keys)


class Skips:
    """The ranges of `data.skip`, merged."""

    def __init__(self, ranges: Sequence[Sequence[int]]) -> None:
        merged: list[tuple[int, int]] = []
        for a, b in sorted((int(r[0]), int(r[1])) for r in ranges):
            if b <= a:
                continue
            if merged and a <= merged[-1][1]:
                merged[-1] = (merged[-1][0], max(b, merged[-1][1]))
            else:
                merged.append((a, b))
        self.ranges = merged

    def indices(self, first: int, places: np.ndarray) -> np.ndarray:
        """Global sample index of the `places`-th samples at or after `first` that are not left out: (n,) int64."""
        out = places + first
        for a, b in self.ranges:
            if b > first:
                a = max(a, first)
                out = np.where(out >= a, out + (b - a), out)  # ranges rise: earlier ones are counted
        return out

    def within(self, first: int, stop: int) -> list[list[int]]:
        """The left-out ranges inside [first, stop), clipped to it."""
        return [[max(a, first), min(b, stop)] for a, b in self.ranges if a < stop and b > first]


# ---- timeline ----------------------------------------------------------------------------------------------
def timeline_of(data: DataConfig) -> list[TimelineStage]:
    """The stages of the mixture: those written by resume, or one with the sources' weights."""
    if data.timeline:
        return list(data.timeline)
    if not data.sources:
        raise DataError("data.sources is empty, but a run needs at least one data set. "
                        "Try: data.sources.main.path=DIR, with a DIR made by `officina data build DIR`")
    return [TimelineStage(from_sample=0, weights={name: s.weight for name, s in data.sources.items()})]


def sources_in_use(data: DataConfig, position: int = 0) -> list[str]:
    """Sources that a run at global sample `position` still reads: not those that have left its mixture and stay for the audit.

    position: as for `still_to_come`.
    """
    if not data.timeline:
        return sorted(data.sources)
    named = {name for stage in data.timeline for name in stage.weights}
    from_now_on = {name for stage in [*still_to_come(data, position), *data.stages] for name in stage.weights}
    return sorted(name for name in data.sources if name in from_now_on or name not in named)


def still_to_come(data: DataConfig, position: int = 0) -> list[TimelineStage]:
    """The stage of sample `position` and those behind it, also where that is before the last decision on the mixture: a run may
    go on from an older checkpoint. 0 = not known: from the last decision on."""
    timeline, at = timeline_of(data), position or data.planned_at
    if at is None:
        return timeline[-1:]
    return [stage for stage, after in zip(timeline, [*timeline[1:], None], strict=True)
            if after is None or after.from_sample > at]


def plan_stages(run: RunConfig, step: int, position: int) -> RunConfig:
    """`run` with its stages written into the timeline; it has done `step` steps and stands at sample `position`.

    What was planned before from there on is dropped. The sources' weights become those of the last stage, as they are wherever
    there is a timeline.
    """
    data = run.data
    if not data.stages:
        return run
    rows = [(stage.from_step - step) * run.batch.rows for stage in data.stages]
    firsts = Skips(data.skip).indices(position, np.asarray(rows)).tolist()
    so_far = [stage for stage in timeline_of(data) if stage.from_sample <= position and stage.from_sample < firsts[0]]
    planned = [TimelineStage(from_sample=first, weights=stage.weights)
               for first, stage in zip(firsts, data.stages, strict=True)]
    last, used = planned[-1].weights, {name for stage in so_far + planned for name in stage.weights}
    sources = {name: replace(source, weight=last.get(name, source.weight)) for name, source in data.sources.items()
               if name in used}
    return replace(run, data=replace(data, sources=sources, timeline=so_far + planned, stages=[], planned_at=position))


def extend_timeline(data: DataConfig, position: int, sources: Mapping[str, SourceConfig]) -> DataConfig:
    """`data` with the mixture `sources` (all of them, not only the new ones) from global sample `position` on.

    What was planned from `position` on is dropped; what was read before keeps its stages, so that every source goes on at its
    own next row. Sources that are gone from the mixture stay in `sources` for the ledger's audit.
    """
    weights = {name: source.weight for name, source in sources.items()}
    past = [stage for stage in timeline_of(data) if stage.from_sample < position]
    if past and _same_mixture(past[-1].weights, weights):
        timeline = past
    else:
        timeline = [*past, TimelineStage(from_sample=position, weights=weights)]
    used = {name for stage in timeline for name in stage.weights}
    kept = {name: source for name, source in {**data.sources, **sources}.items() if name in used}
    plain = len(timeline) == 1 and set(kept) == set(timeline[0].weights)
    return replace(data, sources=kept, timeline=[] if plain else timeline, planned_at=None)


def _same_mixture(a: Mapping[str, float], b: Mapping[str, float]) -> bool:
    return a.keys() == b.keys() and _pattern_counts([a[n] for n in sorted(a)]) == _pattern_counts(
        [b[n] for n in sorted(b)])
