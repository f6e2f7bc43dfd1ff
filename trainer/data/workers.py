"""Runs a function on many jobs in processes of their own that end with this one, and counts what they have done."""

import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_EXCEPTION, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from typing import Any

from officina.trainer.errors import DataError

Report = Callable[[int], None]
"""Called by a job with the bytes done since its last call."""
_shared: dict[str, Any] = {}
"""In a worker: `done`, the count that all workers share, and `stop`, set when there is no use in going on."""


class _Stopped(Exception):
    """Another job has failed."""


def cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def run_jobs(function: Callable[[Any, Report], Any], jobs: Sequence[Any], workers: int,
             progress: Callable[[int], None]) -> list[Any]:
    """`function(job, report)` of each job, in the order of the jobs; one alone, or with one worker, runs in this process.

    With fewer jobs than workers, each gets several threads for its tokenizer. The first error is raised when the
    others have stopped; what they had finished stays on the disk. DataError if a worker is killed.
    """
    n = min(workers, len(jobs))
    if n <= 1:
        done = [0]

        def report(more_bytes: int) -> None:
            done[0] += more_bytes
            progress(done[0])

        return [function(job, report) for job in jobs]
    context = multiprocessing.get_context("forkserver")  # a fork of this one would take the tokenizer's threads along, stuck
    context.set_forkserver_preload([function.__module__])  # imported once for all
    count, stop = context.Value("q", 0), context.Event()
    with ProcessPoolExecutor(n, context, _begin, (count, stop, max(1, workers // n))) as pool:
        futures = [pool.submit(_work, function, job) for job in jobs]
        try:
            pending: Any = futures
            while pending:
                ended, pending = wait(pending, timeout=0.5, return_when=FIRST_EXCEPTION)
                for future in ended:
                    future.result()
                progress(count.value)
            return [future.result() for future in futures]
        except BaseException as exc:
            stop.set()
            pool.shutdown(wait=True, cancel_futures=True)
            if isinstance(exc, BrokenProcessPool):
                raise DataError("a worker process was killed, perhaps for want of memory. What is finished is kept: the same "
                                "command goes on with it, for example with fewer processes: "
                                f"--workers {max(1, n // 2)}") from exc
            raise


def _begin(count: Any, stop: Any, threads: int) -> None:
    """In a new worker: end with the parent, whatever ends it; leave Ctrl-C to it; take `threads` threads."""
    _shared.update(done=count, stop=stop)
    os.environ["RAYON_NUM_THREADS"] = str(threads)
    os.environ["TOKENIZERS_PARALLELISM"] = "true" if threads > 1 else "false"
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


def _work(function: Callable[[Any, Report], Any], job: Any) -> Any:
    return function(job, _report)


def _report(more_bytes: int) -> None:
    if _shared["stop"].is_set():
        raise _Stopped
    with _shared["done"].get_lock():
        _shared["done"].value += more_bytes
