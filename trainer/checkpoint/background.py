"""One save on one rank: staged here, hashed and written by a thread, which never calls a collective."""

import errno
import queue
import threading
import time
from collections.abc import Iterator
from pathlib import Path

from officina.trainer.checkpoint.layout import TrainState
from officina.trainer.checkpoint.rank_file import RankFile
from officina.trainer.checkpoint.stage import Pool, Segment, Tally, stage
from officina.trainer.state import Piece


class Writing:
    """A save under way. `started_s` is on the clock of time.perf_counter."""

    def __init__(self, directory: Path, train_state: TrainState, pool: Pool) -> None:
        self.directory = directory
        self.train_state = train_state
        self.started_s = time.perf_counter()
        self.stall_s = 0.0
        """Time the loop stood still for this save so far."""
        self.tally = Tally()
        self.manifest_hash = ""
        """Of the finished file."""
        self.error: BaseException | None = None
        self._pool = pool
        self._queue: queue.SimpleQueue[Segment | None] = queue.SimpleQueue()
        self._thread: threading.Thread | None = None

    def feed(self, pieces: Iterator[Piece]) -> None:
        """Stage all pieces for the thread; a host without memory is the save's error, not the caller's."""
        try:
            for segment in stage(pieces, self._pool, self.tally):
                self._queue.put(segment)
        except MemoryError as e:
            self._fail(e)
        finally:
            self._queue.put(None)

    def start(self, run_id: str, rank: int, world_size: int, expected_bytes: int) -> None:
        """Begin to write; what is fed later is written as it comes."""
        self._thread = threading.Thread(target=self._write, args=(run_id, rank, world_size, expected_bytes),
                                        name="checkpoint", daemon=True)
        self._thread.start()

    def done(self) -> bool:
        """The thread has nothing more to do, with or without success."""
        return self._thread is not None and not self._thread.is_alive()

    def join(self) -> None:
        """Wait for the thread."""
        if self._thread is not None:
            self._thread.join()
        if not self.manifest_hash:
            self.error = self.error or RuntimeError("the thread that writes it ended before the file was finished")

    def discard(self) -> None:
        """Give the staged segments back unwritten."""
        while (segment := self._queue.get()) is not None:
            self._pool.give(segment.buffer)

    def _fail(self, error: BaseException) -> None:
        """The first error counts. A host without memory is a failed save, as a full disk is, and no bug."""
        self.error = self.error or (OSError(errno.ENOMEM, str(error)) if isinstance(error, MemoryError) else error)

    def _write(self, run_id: str, rank: int, world_size: int, expected_bytes: int) -> None:
        file: RankFile | None = None
        try:
            file = RankFile(self.directory, run_id, self.train_state.step, rank, world_size, expected_bytes)
        except BaseException as e:  # also SystemExit, of which a thread ends without a word
            self._fail(e)
        while (segment := self._queue.get()) is not None:  # drained in any case: the other side waits for the buffers
            if self.error is None:
                try:
                    file.write(segment)
                except BaseException as e:
                    self._fail(e)
            self._pool.give(segment.buffer)
        try:
            if self.error is None:
                self.manifest_hash = file.finish()
        except BaseException as e:
            self._fail(e)
        finally:
            if file is not None:
                file.abandon()
