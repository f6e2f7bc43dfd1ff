"""Plans the steps of a rank, and has threads read what they need before they are made.

The order is known in advance, so a disk need not wait for the rows, nor the rows for the disk: blocks that were not met yet
are verified by threads of their own while the loader's thread makes the batches before them; blocks that lie in memory by that
thread itself, when their step comes, because threads that take turns at Python's lock need four times as long. Of blocks that
were met, the kernel is told which bytes come next, if the data are too large to have stayed in memory. How far ahead is bounded
in bytes and grows from nothing, so that the first batch waits for itself alone. Of data in a store whole pieces are fetched
ahead. If not all of them may stay, so few that they stay until they are needed.
"""

import os
import time
from collections import deque
from collections.abc import Callable, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from itertools import count, islice
from operator import attrgetter

import numpy as np

from officina.trainer.data import remote
from officina.trainer.data.plan import PlannedStep, plan_steps
from officina.trainer.data.reader import RowReader
from officina.trainer.data.shards import DTYPES, GRANULE_BYTES
from officina.trainer.data.storage import THREADS
from officina.trainer.errors import DataError

AHEAD_BYTES = 32 << 20
"""Of the rows that are read ahead."""
AHEAD_STEPS = 128
TASK_BLOCKS = 16
"""That a thread verifies in one go: its turn costs as much as the hashes of some."""
NODE_SHARE = 8
"""Ranks that may share the pieces of a store on a node: each reads ahead no more than this part of what may be kept."""
TASK_RANGES = 32
"""That a thread tells the kernel in one go."""
KEPT = 64
"""Of as many tasks of blocks that have to be waited for, one is done by the loader's thread."""
SLOW_BLOCK_S = 1e-4
"""A block that takes longer to verify had to wait for a disk or a network; from memory it takes a quarter of that."""


def memory_bytes() -> int:
    """Of this machine."""
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


class ReadAhead:
    """The steps of one rank, in order. One thread asks for them."""

    def __init__(self, reader: RowReader, rows: int, own: range) -> None:
        """rows: of a global batch; own: which of them the rank reads."""
        self._reader, self._rows, self._own = reader, rows, own
        self._steps: deque[PlannedStep] = deque()
        self._begun = 0  # how many of these are being read
        self._served = 0
        self._tasks: deque[Task] = deque()
        self._waits = False  # whether the blocks last verified here had to be waited for
        self._number = count(1)
        self._blocks = [_Blocks(reader, stored=stored) for stored in (False, True)] if not reader.records else []
        row_bytes = max(DTYPES[s.dataset.manifest.dtype].itemsize for s in reader.streams.values()) * reader.seq_len
        self._most = min(AHEAD_STEPS, max(1, AHEAD_BYTES // (max(len(own), 1) * row_bytes)))
        if budgets := [stream.pieces.budget_bytes for stream in reader.streams.values() if not stream.stays_here]:
            fetched = max(row_bytes, remote.PIECE_BYTES // reader.order.block)  # for a row that stands alone, a whole piece
            steps = min(budgets) // NODE_SHARE // (max(len(own), 1) * fetched)
            self._most, self._blocks = (min(self._most, steps), self._blocks) if steps else (self._most, self._blocks[:1])
        self._pool = ThreadPoolExecutor(THREADS, thread_name_prefix="officina-ahead")

    def next(self, position: int) -> PlannedStep:
        """The step that begins at `position`, with its blocks read if there was time before; waits for those under way."""
        if not self._steps or self._steps[0].first != position:
            self._steps.clear()
            self._begun = 0
            self._plan(position)
        ahead = min(self._most, 2 * self._served)
        if self._blocks and ahead and self._begun <= ahead // 2:
            while len(self._steps) <= ahead:
                self._plan(self._steps[-1].stop)
            steps = list(islice(self._steps, self._begun, ahead + 1))
            tasks = [task for blocks in self._blocks for task in blocks.work(steps, self._served + self._begun)]
            tasks.sort(key=attrgetter("step"))
            self._tasks += tasks
            self._to_threads(tasks if self._waits else [task for task in tasks if not task.blocks])
            self._begun = ahead + 1
        while self._tasks and self._tasks[0].step <= self._served:
            self._finish(self._tasks.popleft())
        self._begun, self._served = max(self._begun - 1, 0), self._served + 1
        return self._steps.popleft()

    def _to_threads(self, tasks: Iterable["Task"]) -> None:
        """Some of the blocks stay here: so it is found out when they need no more be waited for."""
        for task in tasks:
            if task.begun is None and (not task.blocks or next(self._number) % KEPT):
                task.begun = self._pool.submit(task.work)

    def _finish(self, task: "Task") -> None:
        if task.begun:
            task.begun.result()
            return
        begun = time.perf_counter()
        task.work()
        self._waits = time.perf_counter() - begun > SLOW_BLOCK_S * task.blocks
        if self._waits:
            self._to_threads(self._tasks)

    def close(self) -> None:
        """End the threads; what they have not begun is not read."""
        self._pool.shutdown(cancel_futures=True)

    def _plan(self, position: int) -> None:
        self._steps.extend(plan_steps(self._reader, position, self._rows, self._own))


@dataclass(slots=True)
class Task:
    """What is to be read for a step."""

    step: int
    """Number of the first one that waits for it."""
    work: Callable[[], object]
    blocks: int = 0
    """Of a local file that it verifies; 0: something else, which always has to be waited for."""
    begun: Future | None = None
    """By a thread."""


class _Blocks:
    """The blocks of all sources' shards, numbered end to end: which lie under which rows, and which were met.

    stored: of the sources in a store, in place of their blocks the pieces; else of all others.
    """

    def __init__(self, reader: RowReader, *, stored: bool = False) -> None:
        names, self._seq_len, self._stored = reader.order.names, reader.seq_len, stored
        streams = {number: reader.streams[name] for number, name in enumerate(names)
                   if name in reader.streams and (reader.streams[name].pieces is not None) is stored}
        self._block_bytes = remote.PIECE_BYTES if stored else GRANULE_BYTES
        self._shards = [(stream, i) for stream in streams.values() for i in range(len(stream.entries))]
        counts = np.asarray([len(stream.entries) for stream in streams.values()], np.int64)
        tokens = np.concatenate([np.empty(0, np.int64), *(np.diff(stream.token_starts) for stream in streams.values())])
        self._itemsize = np.repeat(
            np.asarray([DTYPES[stream.dataset.manifest.dtype].itemsize for stream in streams.values()], np.int64), counts)
        self._token_starts = np.append(0, np.cumsum(tokens))
        self._block_starts = np.append(0, np.cumsum(-(-tokens * self._itemsize // self._block_bytes)))
        self._base, self._cut = np.zeros(len(names), np.int64), np.zeros(len(names), bool)
        self._base[list(streams)] = self._token_starts[np.cumsum(counts) - counts]
        self._packed = {number: stream.plan for number, stream in streams.items() if stream.plan is not None}
        self._cut[[number for number in streams if number not in self._packed]] = True
        self._met = np.zeros(int(self._block_starts[-1]), bool)
        self._forgotten = not stored and int((tokens * self._itemsize).sum()) > memory_bytes() // 2
        self._stays = np.repeat(np.asarray([stream.stays_here for stream in streams.values()], bool), counts)

    def work(self, steps: list[PlannedStep], first: int) -> list[Task]:
        """What to read for `steps`, numbered from `first` on."""
        if not self._forgotten and self._met.all():
            return []
        source, row = (np.concatenate([getattr(step.places, name) for step in steps]) for name in ("source", "row"))
        shard, start, stop, step = self._ranges(source, row, np.repeat(np.arange(first, first + len(steps)),
                                                                       [len(step.own) for step in steps]))
        if not len(shard):
            return []
        size, base = self._itemsize[shard], self._block_starts[shard]
        low, high = base + start * size // self._block_bytes, base + (stop * size - 1) // self._block_bytes
        counts = high - low + 1
        before = np.cumsum(counts) - counts
        block = np.repeat(low - before, counts) + np.arange(counts.sum())
        new = ~self._met[block]
        tasks = self._to_meet(block[new], np.repeat(step, counts)[new]) if new.any() else []
        if self._forgotten:
            known = ~np.logical_or.reduceat(new, before)
            tasks += self._to_tell(shard[known], start[known], stop[known], step[known])
        return tasks

    def _ranges(self, source: np.ndarray, row: np.ndarray, step: np.ndarray) -> tuple[np.ndarray, ...]:
        """Shard, first token and end in it, and step, of all that lies under the rows (n,): (m,) int64 each."""
        here = self._cut[source]
        starts = [self._base[source[here]] + row[here] * self._seq_len]
        lengths, steps = [np.full(len(starts[0]), self._seq_len + 1)], [step[here]]
        for number, plan in self._packed.items():
            here = source == number
            piece, nth = plan.pieces(row[here])
            starts.append(self._base[number] + plan.starts[piece])
            lengths.append(plan.lengths[piece].astype(np.int64))
            steps.append(step[here][nth])
        start, step = np.concatenate(starts), np.concatenate(steps)
        stop = start + np.concatenate(lengths)
        found = []
        while True:  # a row that goes on in the next shard comes again
            shard = np.searchsorted(self._token_starts, start, side="right") - 1
            base, end = self._token_starts[shard], self._token_starts[shard + 1]
            found.append((shard, start - base, np.minimum(stop, end) - base, step))
            over = stop > end
            if not over.any():
                return tuple(np.concatenate(parts) for parts in zip(*found, strict=True))
            start, stop, step = end[over], stop[over], step[over]

    def _to_meet(self, block: np.ndarray, step: np.ndarray) -> list[Task]:
        order = np.lexsort((step, block))
        block, first = np.unique(block[order], return_index=True)
        step = step[order][first]
        shard = np.searchsorted(self._block_starts, block, side="right") - 1
        self._met[block] = self._stays[shard]
        by_step = np.argsort(step, kind="stable")
        inside = block - self._block_starts[shard]
        size = 1 if self._stored else TASK_BLOCKS
        return [Task(int(step[part[0]]), partial(self._meet, shard[part].tolist(), inside[part].tolist()),
                     0 if self._stored else len(part))
                for part in np.split(by_step, range(size, len(by_step), size))]

    def _meet(self, shards: list[int], blocks: list[int]) -> None:
        by_shard: dict[int, list[int]] = {}
        for shard, block in zip(shards, blocks, strict=True):
            by_shard.setdefault(shard, []).append(block)
        for shard, here in by_shard.items():
            stream, number = self._shards[shard]
            stream.meet(number, here)

    def _to_tell(self, shard: np.ndarray, start: np.ndarray, stop: np.ndarray, step: np.ndarray) -> list[Task]:
        if not len(shard):
            return []
        order = np.lexsort((start, shard))
        shard, start, stop, step = shard[order], start[order], stop[order], step[order]
        begins = np.flatnonzero(np.append(True, (np.diff(shard) != 0) | (start[1:] > stop[:-1])))
        stop, step = np.maximum.reduceat(stop, begins), np.minimum.reduceat(step, begins)
        ranges = list(zip(shard[begins].tolist(), start[begins].tolist(), stop.tolist(), strict=True))
        by_step = np.argsort(step, kind="stable").tolist()
        return [Task(int(step[by_step[i]]), partial(self._tell, [ranges[k] for k in by_step[i:i + TASK_RANGES]]))
                for i in range(0, len(by_step), TASK_RANGES)]

    def _tell(self, ranges: Iterable[tuple[int, int, int]]) -> None:
        for shard, start, stop in ranges:
            stream, number = self._shards[shard]
            try:
                stream.shard(number).will_need(start, stop)
            except DataError:
                continue  # a shard that cannot be opened: the row that needs it says so
