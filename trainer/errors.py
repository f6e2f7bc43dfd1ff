"""Errors a user can mend, and the exit statuses of every officina command."""

import traceback
from collections.abc import Sequence
from dataclasses import dataclass

EXIT_DONE = 0
EXIT_BUG = 1
"""Our bug: a traceback follows."""
EXIT_USER = 2
"""The user can mend it: one clear message on stderr, no traceback."""
EXIT_CONTINUE = 75
"""Stopped in good order (signal, time limit) and to be continued: EX_TEMPFAIL."""
EXIT_NO_PROGRESS = 76
"""The same failure again and again; starting the run once more would not help."""


def listed(faults: Sequence[str], most: int = 8) -> str:
    """A line each, and how many there are besides."""
    return "\n  ".join([*faults[:most], *([f"... and {len(faults) - most} more"] if len(faults) > most else [])])


class OfficinaError(Exception):
    """What the user can mend. The message names the key or file, its value, the rule and a value that works."""

    exit_status = EXIT_USER


@dataclass(frozen=True, slots=True)
class Problem:
    """One fault of a configuration."""

    key: str
    """Dotted key as it is written on the command line, e.g. `optim.lr`."""
    value: object
    """The value found there; `None` if the key is missing."""
    rule: str
    """The rule it breaks, as a sentence without a full stop."""
    remedy: str
    """A value or a command that works, e.g. `optim.lr=3e-4`."""

    def __str__(self) -> str:
        shown = "" if self.value is None else f"={self.value}"
        return f"{self.key}{shown}: {self.rule}. Try: {self.remedy}"


class ConfigError(OfficinaError):
    """One or more faults of a configuration, all of them at once."""

    def __init__(self, problems: list[Problem], source: str = "the configuration") -> None:
        self.problems = problems
        head = "1 problem" if len(problems) == 1 else f"{len(problems)} problems"
        super().__init__(f"{head} in {source}:\n" + "\n".join(f"  - {p}" for p in problems))


class DataError(OfficinaError):
    """A data set or shard is missing, damaged or not what its manifest says."""


class CheckpointError(OfficinaError):
    """No checkpoint could be written or read; names the path and what is wrong with it."""


class LaunchError(OfficinaError):
    """Ranks could not be started here, or one of them died."""


class NoProgressError(OfficinaError):
    """The run stopped itself because it made no progress; the last good checkpoint is intact."""

    exit_status = EXIT_NO_PROGRESS


def told_by_place(exc: BaseException) -> str:
    """What a user's code raised, by type, file and line: its words may quote the data, and stand in no message or log."""
    frame = traceback.extract_tb(exc.__traceback__)[-1]
    return f"{type(exc).__name__} at {frame.filename}:{frame.lineno}"
