"""Time and peak memory of functions that do the same on one device, called in turn.

On a GPU each call is timed by events of its own, and before it the L2 cache is emptied: a training step does not find its
inputs there either. The device idles first for as long as the host takes to queue a turn's calls, so that launching is not
what is measured.
"""

import multiprocessing
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from typing import Any

import torch

ROUNDS = 5
"""Turns of each entrant, so that a slow moment of the machine meets all of them."""
_L2_BYTES = 2**28
"""More than the L2 cache of any accelerator."""
_LEAD_S = 0.03
"""The longest head start that the host gets: more than it takes to fill the queue of launches."""
_EVENTS_S = 50e-6
"""What the host needs for a call besides the work: events, the cache, restoring inputs."""
_CLOCK_HZ = 2e9
"""At least the clock of a device, whose cycles are what it can be told to wait."""


@dataclass(frozen=True, slots=True)
class Work:
    """What one entrant does. before: done ahead of every call, untimed, such as restoring inputs that a call overwrites."""

    run: Callable[[], Any]
    before: Callable[[], Any] | None = None


@dataclass(frozen=True, slots=True)
class Timing:
    """Seconds of a call, and bytes that were allocated beyond what stood before it."""

    median_s: float
    p20_s: float
    p80_s: float
    calls: int
    peak_bytes: int | None
    """None where torch does not count, on a CPU."""


def measure(entrants: Mapping[str, Work], device: torch.device, *, round_s: float = 0.03) -> dict[str, Timing | str]:
    """Each entrant's timing, or the last line of its error: one that cannot do a case does not keep the others from it."""
    found: dict[str, Timing | str] = {}
    ready: dict[str, tuple[Work, int, float, int | None]] = {}
    for name, work in entrants.items():
        try:
            ready[name] = (work, *_prepare(work, device, round_s))
        except Exception as error:  # out of memory, not supported, not installed
            found[name] = failure(error)
    seconds: dict[str, list[float]] = {name: [] for name in ready}
    for turn in range(ROUNDS):
        for name in list(ready)[::-1 if turn % 2 else 1]:
            work, calls, lead_s, _ = ready[name]
            seconds[name] += _time(work, device, calls, lead_s)
    for name, values in seconds.items():
        p20, p80 = statistics.quantiles(values, n=5)[::3]
        found[name] = Timing(statistics.median(values), p20, p80, len(values), ready[name][3])
    return {name: found[name] for name in entrants}


def compile_ahead(jobs: Sequence[Callable[[], Any]], processes: int) -> None:
    """Do picklable jobs in several processes, so that Triton's cache holds what will be measured: one process takes minutes.

    What fails does so again where it is measured.
    """
    with ProcessPoolExecutor(processes, multiprocessing.get_context("spawn")) as pool:
        for job in [pool.submit(job) for job in jobs]:
            if job.exception():
                print(f"compile ahead: {failure(job.exception())}", file=sys.stderr)


def failure(error: BaseException) -> str:
    """The first line of an error."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:200]


def _prepare(work: Work, device: torch.device, round_s: float) -> tuple[int, float, int | None]:
    """Compile, warm up, and measure a call; calls a turn, seconds that the host takes to queue them, and bytes of a call."""
    _time(work, device, 1)
    host_s, peak = 0.0, None
    if device.type == "cuda":
        if work.before:
            work.before()
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before, began = torch.cuda.memory_allocated(), time.perf_counter()
        work.run()
        host_s = _EVENTS_S + time.perf_counter() - began
        peak = torch.cuda.max_memory_allocated() - before
    calls = max(2, min(100, int(round_s / max(_time(work, device, 2, min(_LEAD_S, 2 * host_s))[1], 1e-6))))
    return calls, min(_LEAD_S, calls * host_s), peak


def _time(work: Work, device: torch.device, calls: int, lead_s: float = 0.0) -> list[float]:
    if device.type != "cuda":
        return [_time_on_host(work) for _ in range(calls)]
    flush = torch.empty(_L2_BYTES, dtype=torch.int8, device=device)
    events = []
    torch.cuda._sleep(int(lead_s * _CLOCK_HZ))
    for _ in range(calls):
        if work.before:
            work.before()
        flush.zero_()
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        work.run()
        end.record()
        events.append((begin, end))
    torch.cuda.synchronize()
    return [begin.elapsed_time(end) / 1e3 for begin, end in events]


def _time_on_host(work: Work) -> float:
    if work.before:
        work.before()
    began = time.perf_counter()
    work.run()
    return time.perf_counter() - began


def copy_ceiling(device: torch.device, elements: int) -> float:
    """Bytes a second of a copy of bf16 numbers, read and written both counted."""
    source = torch.randn(elements, device=device).to(torch.bfloat16)
    target = torch.empty_like(source)
    timing = measure({"copy": Work(lambda: target.copy_(source))}, device)["copy"]
    return 2 * source.nbytes / timing.median_s


def matmul_ceiling(device: torch.device, shapes: list[tuple[int, int, int]]) -> float:
    """FLOP/s of the fastest of torch's bf16 products of random (m, k) and (k, n) matrices."""
    best = 0.0
    for m, n, k in shapes:
        a, b = (torch.randn(*shape, device=device).to(torch.bfloat16) for shape in ((m, k), (k, n)))
        timing = measure({"matmul": Work(lambda a=a, b=b: a @ b)}, device)["matmul"]
        best = max(best, 2 * m * n * k / timing.median_s)
    return best
