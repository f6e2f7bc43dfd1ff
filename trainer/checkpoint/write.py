"""Saving: all ranks write, all ranks agree, and only then rank 0 commits. A failed save never stops the training.

Asynchronous saves copy the state, return, and write in a thread. The thread calls no collective: each rank adds
`pending_vote()` to the sum that the loop makes every step anyway, and gives the result to `settle`, which commits at
that step's border once all ranks have written. A save that falls due while one is still being written is skipped and
counted (a disk that is too slow must not queue copies without bound); a last save is preceded by `wait()`.
"""

import copy
import errno
import os
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from officina.trainer.checkpoint.background import Writing
from officina.trainer.checkpoint.disk import free_space, remove_checkpoint, sync_dir, why, write_durably
from officina.trainer.checkpoint.index import build_index
from officina.trainer.checkpoint.keep import clear_leftovers, make_way, tidy, undo
from officina.trainer.checkpoint.layout import (
    COMMIT,
    Commit,
    TrainState,
    checkpoints_dir,
    data_name,
    header,
    manifest_hash,
    manifest_name,
    pack_commit,
    step_dir,
    unpack_manifest,
)
from officina.trainer.checkpoint.stage import Pool, staged_bytes
from officina.trainer.checkpoint.verify import RankGroup, verify
from officina.trainer.config import CheckpointConfig
from officina.trainer.state import Piece

_BUG, _REFUSED = 1000, 1001
"""Codes beside errno in what the ranks tell each other."""
_SYNC_SEGMENTS = 4
"""Host buffers (32 MiB each) of a synchronous save: one is filled while others are written."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SaveOutcome:
    """What became of one save; the same on all ranks but for `stall_s`, and for `note`, which rank 0 has."""

    step: int
    status: Literal["saved", "pending", "skipped", "failed"]
    """`pending`: copied, and `settle` or `wait` will tell; `skipped`: the one before is still being written."""
    path: Path | None = None
    """The committed directory; None unless saved."""
    bytes: int = 0
    """Size of the data files of all ranks, or what it would have been."""
    stall_s: float = 0.0
    """Time the loop of this rank stood still."""
    durable_s: float = 0.0
    """From the call of `save` until the commit was on disk."""
    problem: str | None = None
    """Why there is no checkpoint, with path, bytes needed and bytes free. Training may go on."""
    note: str | None = None
    """Something that does not harm this checkpoint, such as an old one that could not be removed."""


class Saver:
    """Writes a run's checkpoints. All methods but `pending_vote` are collective: every rank calls them alike."""

    def __init__(self, run_dir: Path, ranks: RankGroup, config: CheckpointConfig, run_id: str, *,
                 damaged: Sequence[Path] = (), pinned: bool | None = None) -> None:
        """damaged: `OpenCheckpoint.damaged`, set aside at the first save. pinned: state on a GPU (None: as ranks)."""
        header(run_id, 0, ranks.world_size, ranks.rank)  # refuses a run id that is too long
        self.skipped = 0
        """Asynchronous saves left out because the one before was still being written."""
        self._run_dir, self._ranks, self._config, self._run_id = Path(run_dir), ranks, config, run_id
        self._damaged = tuple(damaged)
        if pinned is None:
            pinned = getattr(getattr(ranks, "device", None), "type", "cpu") == "cuda"
        self._pool = Pool(pinned=pinned, limit=None if config.asynchronous else _SYNC_SEGMENTS)
        self._expected_bytes = 0
        self._pending: Writing | None = None
        self._helper: threading.Thread | None = None
        self._note: str | None = None
        self._first = True

    def prepare(self, pieces: Iterator[Piece]) -> int:
        """Learn the size of this rank's file, so that the first save can ask for its space before it writes.

        With asynchronous saves the host buffers are made in the background meanwhile. Returns the bytes.
        """
        self._expected_bytes = staged_bytes(pieces)
        if self._config.asynchronous:
            self._start_helper(self._pool.fill_up, self._expected_bytes)
        return self._expected_bytes

    def save(self, step: int, pieces: Iterator[Piece], train_state: TrainState,
             before: Callable[[], None] | None = None) -> SaveOutcome:
        """Save this rank's pieces (`engine.export_state()`); rank 0's train_state is the one that is stored.

        before: called on rank 0 for what must be on the disk first; its OSError is why there is no checkpoint.
        Raises only what is a bug, never because of a disk. Without `prepare`, a process's first synchronous save does
        not know its size and meets a full disk while reserving blocks; every other save asks beforehand.
        """
        if train_state.step != step:
            raise ValueError(f"train_state is of step {train_state.step}, to be saved as step {step}")
        if self._pending is not None:
            self.skipped += 1
            return SaveOutcome(step=step, status="skipped", problem=(
                f"step {step} was not saved: step {self._pending.train_state.step} is still being written after "
                f"{time.perf_counter() - self._pending.started_s:.0f} s; {self.skipped} skipped so far. Save less "
                f"often, e.g. checkpoint.every_steps={2 * (self._config.every_steps or 100)}"))
        job = Writing(step_dir(self._run_dir, step), copy.deepcopy(train_state), self._pool)
        if self._config.asynchronous:
            job.feed(pieces)
            self._expected_bytes = job.tally.bytes
        self._join_helper()
        refusal = self._clear_the_way(job, before)
        if refusal is not None:
            if self._config.asynchronous:
                job.discard()
            else:
                job.tally.bytes = staged_bytes(pieces)
            total = int(self._ranks.sum([float(job.tally.bytes)])[0])
            return self._failed(job, total, *refusal)
        job.start(self._run_id, self._ranks.rank, self._ranks.world_size, self._expected_bytes)
        if self._config.asynchronous:
            self._pending = job
            job.stall_s = time.perf_counter() - job.started_s
            return SaveOutcome(step=step, status="pending", stall_s=job.stall_s)
        job.feed(pieces)
        self._expected_bytes = job.tally.bytes
        return self._conclude(job)

    def pending_vote(self) -> float:
        """1 if this rank has written its share of the pending save (or failed to), else 0: to be summed over ranks."""
        return float(self._pending is not None and self._pending.done())

    def settle(self, summed: float) -> SaveOutcome | None:
        """Given the sum of all ranks' votes: commit the pending save if all have written, and say what became of it."""
        if self._pending is None or summed < self._ranks.world_size - 0.5:
            return None
        return self._finish()

    def wait(self) -> SaveOutcome | None:
        """Finish the pending save now, if there is one: before a last save and at the end of the run."""
        outcome = self._finish()
        self._join_helper()
        return outcome

    def _finish(self) -> SaveOutcome | None:
        job, self._pending = self._pending, None
        if job is None:
            return None
        resumed_s = time.perf_counter()
        outcome = self._conclude(job)
        return replace(outcome, stall_s=job.stall_s + time.perf_counter() - resumed_s)

    # ---- one save, in order ----------------------------------------------------------------------------------------
    def _clear_the_way(self, job: Writing, before: Callable[[], None] | None) -> tuple[int, str, Path] | None:
        """Make room for the directory and ask for the space. Returns (code, what, path) if there can be no save."""
        code, exists, free, inodes = 0, False, 0, 0
        root = checkpoints_dir(self._run_dir)
        if self._ranks.rank == 0:
            try:
                if before is not None:
                    before()
                root.mkdir(parents=True, exist_ok=True)
                if self._first:
                    sync_dir(root.parent)
                    clear_leftovers(self._run_dir, self._damaged)
                if os.path.lexists(job.directory) and not (job.directory / COMMIT).exists():  # also a link to nowhere
                    remove_checkpoint(job.directory)
                exists = job.directory.exists()
                space = free_space(root)
                free, inodes = space.bytes, -1 if space.inodes is None else space.inodes
            except OSError as e:
                code = e.errno or _BUG
        table = [float(code), float(exists), float(free), float(inodes), float(self._expected_bytes),
                 float(job.error is not None)]
        code, exists, free, inodes, needed, no_memory = (int(x) for x in self._ranks.sum(table))
        if not code and no_memory:
            return errno.ENOMEM, f"{no_memory} ranks have no host memory for a copy of their state", root
        if not code and exists:
            whole = verify(job.directory, step=job.train_state.step, ranks=self._ranks)[0] is not None
            if self._ranks.rank == 0:
                try:
                    make_way(job.directory, whole)
                except OSError as e:
                    code = e.errno or _BUG
            code = int(self._ranks.sum([float(code)])[0])
        if code:
            return code, "rank 0 cannot write the ledger or make the directory", job.directory
        files = 2 * self._ranks.world_size + 3
        if needed > free or 0 <= inodes < files:
            what = f"{files} files needed, {inodes} inodes free" if 0 <= inodes < files else "there is too little space"
            return errno.ENOSPC, what, job.directory
        return None

    def _conclude(self, job: Writing) -> SaveOutcome:
        """All ranks tell how it went; rank 0 commits, or all have failed together."""
        job.join()
        world, me = self._ranks.world_size, self._ranks.rank
        error = job.error
        code = 0 if error is None else (error.errno or _BUG) if isinstance(error, OSError) else _BUG
        table = [0.0] * (6 * world)
        digits = job.manifest_hash or "0" * 32
        words = [float(int(digits[8 * i:8 * i + 8], 16)) for i in range(4)]  # exact through a float64 sum
        table[6 * me:6 * me + 6] = [float(code), float(job.tally.bytes), *words]
        table = self._ranks.sum(table)
        rows = [table[6 * r:6 * r + 6] for r in range(world)]
        if code == _BUG:
            raise RuntimeError(f"saving step {job.train_state.step} failed on rank {me}: {error!r}") from error
        total = int(sum(row[1] for row in rows))
        bad = [(r, int(row[0])) for r, row in enumerate(rows) if row[0]]
        if bad:
            rank, code = bad[0]
            more = f" (and {len(bad) - 1} more ranks)" if len(bad) > 1 else ""
            what = f"rank {rank}{more} could not write"
            return self._failed(job, total, code, what, job.directory / data_name(rank))
        hashes = ["".join(f"{int(w):08x}" for w in row[2:]) for row in rows]
        return self._commit(job, total, [int(row[1]) for row in rows], hashes)

    def _commit(self, job: Writing, total: int, sizes: list[int], hashes: list[str]) -> SaveOutcome:
        code, refused = 0, ""
        if self._ranks.rank == 0:
            try:
                refused = self._seen_from_here(job.directory, sizes, hashes)
                if refused:
                    code = _REFUSED
                else:
                    state = job.train_state
                    commit = Commit(self._run_id, state.step, self._ranks.world_size, total, tuple(hashes), state)
                    sync_dir(job.directory.parent)
                    write_durably(job.directory / COMMIT, pack_commit(commit))
            except OSError as e:
                code = e.errno or _BUG
        code = int(self._ranks.sum([float(code)])[0])
        if code:
            return self._failed(job, total, code, refused or "rank 0 could not write", job.directory / COMMIT)
        durable_s = time.perf_counter() - job.started_s
        self._first = False
        if self._ranks.rank == 0:
            self._start_helper(self._tidy, job.train_state.step)
            if not self._config.asynchronous:
                self._join_helper()
        note, self._note = self._note, None
        return SaveOutcome(step=job.train_state.step, status="saved", path=job.directory, bytes=total,
                           stall_s=time.perf_counter() - job.started_s, durable_s=durable_s, note=note)

    def _seen_from_here(self, directory: Path, sizes: list[int], hashes: list[str]) -> str:
        """On rank 0 before the commit: are all files here, and (once a process) is every element there exactly once?"""
        for r, size in enumerate(sizes):
            found = os.stat(directory / data_name(r)).st_size if (directory / data_name(r)).exists() else None
            if found != size:
                seen = "no file" if found is None else f"{found} bytes"
                return (f"rank 0 sees {seen} where rank {r} wrote {size}; is the run directory on a file system that "
                        f"all nodes share? Not committed")
        if self._first:  # later saves of a process have the same layout
            manifests = []
            for r, stated in enumerate(hashes):
                raw = (directory / manifest_name(r)).read_bytes()
                if manifest_hash(raw) != stated:
                    return f"{manifest_name(r)} does not read back as rank {r} wrote it. Not committed"
                manifests.append(unpack_manifest(raw))
            problems = build_index(manifests)[1]
            if problems:
                return f"the engine's pieces do not make up its tensors: {'; '.join(problems[:4])}. Not committed"
        return ""

    def _failed(self, job: Writing, total: int, code: int, what: str, path: Path) -> SaveOutcome:
        """Remove what was written, put back what was there, and find the words. The same on all ranks."""
        free = 0
        if self._ranks.rank == 0:
            try:
                undo(job.directory)
            except OSError:
                pass  # a read-only or vanished file system; without COMMIT the directory does not count
            try:
                free = free_space(self._run_dir).bytes
            except OSError:
                free = -1
        free = int(self._ranks.sum([float(free)])[0])
        if code == _REFUSED:
            reason = what if self._ranks.rank == 0 else "rank 0 refused to commit it; see its log"
        else:
            reason = f"{what}: {why(code)}" if code < _BUG else f"{what}: see that rank's traceback"
        left = f"{free} bytes free" if free >= 0 else "free space unknown"
        problem = (f"step {job.train_state.step} was not saved to {path}: {reason}. {total} bytes needed, {left} at "
                   f"{self._run_dir}. Training goes on and the checkpoints before are untouched. "
                   f"{self._remedy(code)}")
        stall_s = time.perf_counter() - job.started_s
        return SaveOutcome(step=job.train_state.step, status="failed", bytes=total, stall_s=stall_s, problem=problem)

    def _remedy(self, code: int) -> str:
        if code in (errno.ENOSPC, errno.EDQUOT):
            return "Make room, or keep fewer: checkpoint.keep_last=1"
        if code == errno.ENOMEM and self._config.asynchronous:
            return "Save without a copy of the state: checkpoint.asynchronous=false"
        return "Mend that, and the next save succeeds"

    # ---- the helper thread: memory beforehand, removal afterwards ----------------------------------------------------
    def _tidy(self, step: int) -> None:
        try:
            self._note = tidy(self._run_dir, step, keep_last=self._config.keep_last, keep_every=self._config.keep_every)
        except OSError as e:
            self._note = f"old checkpoints could not be removed: {e}"

    def _start_helper(self, work, *args) -> None:
        self._join_helper()
        self._helper = threading.Thread(target=work, args=args, name="checkpoint-helper", daemon=True)
        self._helper.start()

    def _join_helper(self) -> None:
        if self._helper is not None:
            self._helper.join()
            self._helper = None
