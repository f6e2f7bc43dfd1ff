"""When a run must stop to be saved in time: by its own time limit, or by the end of its job, whichever comes first."""

import os
import time
from collections.abc import Mapping
from pathlib import Path

from officina.trainer.metrics import FILE, SaveMetrics, from_line

END_TIME = "OFFICINA_END_TIME"
"""Variable with the moment when the scheduler ends the job, seconds since 1970: the supervisor of a batch job sets it. Slurm
(23.02 and later) has SLURM_JOB_END_TIME, which we believe in tasks of srun only: it leaks into shells that outlive a job."""
SUPERVISED = "OFFICINA_ATTEMPT"
"""Variable that is set where the supervisor of a batch job started the ranks: what comes next is its to say."""
_MARGIN_S = 30.0
"""Between the last checkpoint and the end: the ranks leave, and the supervisor speaks with Slurm. It kills what is left 20 s
before the end."""
_TAIL_BYTES = 256 * 1024


class TimeLeft:
    """Watches the clock of one rank; what any rank finds is the group's vote.

    `time_limit_s` counts from `began_s` (monotonic) and asks for a stop when it is over. The job's end asks for one while
    there is still time to finish the step that is running and to save: `_MARGIN_S` + 1.5 of the longest save so far + the
    longest time between two questions (a step with its evaluation and periodic save), not counting the first, in which
    kernels are compiled. As long as no save has been measured, not even by an earlier start, one is taken to last
    `unknown_save_s`, but at most a fifth of the time that there is.
    """

    def __init__(self, *, time_limit_s: float | None, began_s: float, unknown_save_s: float, run_dir: Path,
                 launcher: str = "", environ: Mapping[str, str] = os.environ) -> None:
        self._limit_s = None if time_limit_s is None else began_s + time_limit_s
        end = environ.get(END_TIME) or (environ.get("SLURM_JOB_END_TIME", "") if launcher == "srun" else "")
        self._end_s = float(end) if end.replace(".", "", 1).isdigit() else None
        self._unknown_save_s = unknown_save_s
        if self._end_s is not None:
            self._unknown_save_s = min(unknown_save_s, 0.2 * max(self._end_s - time.time(), 0.0))
        self._longest_save_s = 0.0 if self._end_s is None else _longest_save_s(run_dir)
        self._longest_turn_s = 0.0
        self._turns, self._asked_s = 0, 0.0

    def saved(self, durable_s: float) -> None:
        """A save took so long, from its call to its commit."""
        self._longest_save_s = max(self._longest_save_s, durable_s)

    @property
    def reserve_s(self) -> float:
        """Seconds before the job's end at which the run asks for a stop."""
        return _MARGIN_S + 1.5 * (self._longest_save_s or self._unknown_save_s) + self._longest_turn_s

    def is_over(self) -> bool:
        """Is it time to stop? Asked once a step."""
        now = time.monotonic()
        if self._turns > 1:
            self._longest_turn_s = max(self._longest_turn_s, now - self._asked_s)
        self._turns, self._asked_s = self._turns + 1, now
        over = self._limit_s is not None and now > self._limit_s
        return over or (self._end_s is not None and time.time() + self.reserve_s >= self._end_s)


def _longest_save_s(run_dir: Path) -> float:
    """Of the latest saves of earlier starts; 0 if there are none. Only the end of a long file is read."""
    try:
        with open(Path(run_dir) / FILE, "rb") as file:
            file.seek(max(os.fstat(file.fileno()).st_size - _TAIL_BYTES, 0))
            records = map(from_line, file.read().splitlines())
            return max((r.durable_s for r in records if isinstance(r, SaveMetrics) and not r.problem), default=0.0)
    except OSError:
        return 0.0
