"""Which rank failed first, and of what: said in a form that a person can act on."""

import signal
import socket
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from officina.trainer import rank_log
from officina.trainer.errors import EXIT_BUG, EXIT_CONTINUE, EXIT_NO_PROGRESS, EXIT_USER

_LAST_LINES = 12


@dataclass(frozen=True, slots=True)
class Ended:
    """A rank that ended badly."""

    rank: int
    status: int
    """Negative: killed by that signal."""
    time_s: float
    """Seconds since 1970 when it was seen."""


def oom_kills(vmstat: Path = Path("/proc/vmstat")) -> int | None:
    """Processes the kernel of this host has killed for lack of memory, those in cgroups too; None if unknown."""
    try:
        for line in vmstat.read_text().splitlines():
            if line.startswith("oom_kill "):
                return int(line.split()[1])
    except OSError:
        pass
    return None


def name_signal(number: int) -> str:
    """`SIGKILL (signal 9)`."""
    try:
        return f"{signal.Signals(number).name} (signal {number})"
    except ValueError:
        return f"signal {number}"


def explain(run_dir: Path, ended: Sequence[Ended], n_ranks: int, kills_before: int | None) -> int:
    """Tell on stderr which rank failed first and why; returns its exit status.

    ended: all ranks that failed by themselves, at least one. n_ranks: 0 if not known. kills_before: `oom_kills()` when
    the ranks were started.
    """
    failures = {failure.rank: failure for failure in rank_log.read_failures(run_dir)}
    first = min(ended, key=lambda e: _order(e, failures.get(e.rank)))
    failure = failures.get(first.rank)
    of = f" of {n_ranks}" if n_ranks else ""
    log = rank_log.log_path(run_dir, first.rank)
    if failure is not None:
        headline, _, details = failure.message.partition("\n")
        head = f"rank {first.rank}{of} on {failure.host} failed: {failure.error}: {headline}"
        body = details if failure.exit_status != EXIT_BUG else failure.traceback.rstrip()
        status = failure.exit_status
    else:
        head = f"rank {first.rank}{of} on {socket.gethostname()} {_how(first.status, kills_before)}"
        body = _last_lines(log)
        status = first.status if first.status in (EXIT_USER, EXIT_CONTINUE, EXIT_NO_PROGRESS) else EXIT_BUG
    told = [f"  Log: {log}", *([body] if body else [])]
    if failure is not None and failure.exit_status != EXIT_BUG:  # what follows is the rest of the message, not a traceback
        told.reverse()
    print(f"\nofficina: {head}", *told, sep="\n", file=sys.stderr, flush=True)
    return status


def _order(ended: Ended, failure: rank_log.Failure | None) -> tuple[int, float]:
    """Sorting key: what only follows from another's death comes last, then by time. A killed rank leaves no record, and
    the parent sees it a moment late: it goes before exceptions that speak of lost connections."""
    if failure is None:
        return 0, ended.time_s
    return (1 if failure.consequence else 0), failure.time_s


def _how(status: int, kills_before: int | None) -> str:
    if status >= 0:
        return f"ended with exit status {status} and left no exception"
    text = f"was killed by {name_signal(-status)}"
    if -status != signal.SIGKILL:
        return text
    kills_now = oom_kills()
    if kills_before is None or kills_now is None:
        return text + "; often that is the kernel out of memory: see dmesg, or ask for more memory"
    if kills_now > kills_before:
        return (f"{text}: this host's kernel killed {kills_now - kills_before} process(es) for lack of memory "
                "meanwhile. Ask the job for more memory (--mem), or start fewer ranks per host")
    return f"{text}; the kernel counted no out-of-memory kill on this host meanwhile: a person or a scheduler sent it"


def _last_lines(log: Path) -> str:
    try:
        lines = log.read_text(errors="replace").splitlines()
    except OSError:
        return ""
    start = max((i for i, line in enumerate(lines) if line.startswith("==== rank ")), default=0)
    shown = lines[start:][-_LAST_LINES:]
    return "\n".join("  | " + line for line in shown)
