"""`profile=`: a torch trace and a memory snapshot of chosen steps on chosen ranks, under RUN/profile/."""

from collections.abc import Callable
from pathlib import Path

import torch

from officina.trainer.config import ProfileConfig

MEMORY_EVENTS = 200_000
"""Allocations and frees a memory snapshot keeps, the newest: about 100 MB on disk."""


class Profiler:
    """Records the steps from `config.steps[0]` to `config.steps[1]`, both included, on the ranks `config.ranks`.

    The loop calls `step(n)` before step n begins; on all other steps and ranks that costs one comparison.
    Writing the files may fail (a full disk): that is said through `say` and the run goes on.
    """

    def __init__(self, config: ProfileConfig, run_dir: Path, rank: int, *,
                 say: Callable[[str], None] = lambda text: None) -> None:
        wanted = bool(config.steps) and rank in config.ranks
        self._first, self._last = config.steps if wanted else (0, -1)
        self._folder = Path(run_dir) / "profile"
        self._stem = f"steps-{self._first:08d}-{self._last:08d}.rank-{rank:05d}"
        self._memory = config.memory and torch.cuda.is_available() and wanted
        self._say = say
        self._trace: torch.profiler.profile | None = None

    def __enter__(self) -> "Profiler":
        return self

    def __exit__(self, *exc: object) -> None:
        self._finish()

    def step(self, step: int) -> None:
        """Step `step` (the first is 1) begins now."""
        if self._trace is not None:
            if step <= self._last:
                self._trace.step()
            else:
                self._finish()
        elif self._first <= step <= self._last:  # also where a resume lands inside the range
            self._begin()

    def _begin(self) -> None:
        activities = [torch.profiler.ProfilerActivity.CPU]
        if torch.cuda.is_available():
            activities.append(torch.profiler.ProfilerActivity.CUDA)
        if self._memory:
            torch.cuda.memory._record_memory_history(enabled="all", max_entries=MEMORY_EVENTS)
        self._trace = torch.profiler.profile(activities=activities, record_shapes=True, profile_memory=True)
        self._trace.start()

    def _finish(self) -> None:
        if self._trace is None:
            return
        if torch.cuda.is_available():
            torch.cuda.synchronize()  # kernels of the last step belong to the trace
        self._trace.stop()
        trace, self._trace, self._last = self._trace, None, -1
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            file = self._folder / f"{self._stem}.trace.json.gz"
            trace.export_chrome_trace(str(file))
            self._say(f"Trace of steps written to profile/{file.name}: open it at https://ui.perfetto.dev")
            if self._memory:
                file = self._folder / f"{self._stem}.memory.pickle"
                torch.cuda.memory._dump_snapshot(str(file))
                self._say(f"Memory snapshot written to profile/{file.name}: open it at https://pytorch.org/memory_viz")
        except (OSError, RuntimeError) as error:
            self._say(f"The profile could not be written to profile/: {error}. Training goes on.")
        finally:
            if self._memory:
                torch.cuda.memory._record_memory_history(enabled=None)
