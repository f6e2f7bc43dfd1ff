"""What a rank leaves behind: logs/rank-00000.log, and logs/rank-00000.failure.json if it died of an exception."""

import contextlib
import json
import os
import re
import socket
import sys
import time
import traceback
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from datetime import datetime
from pathlib import Path
from typing import TextIO

from officina.trainer.errors import EXIT_BUG, OfficinaError
from officina.trainer.rank_env import RankEnv

_CONSEQUENCE = re.compile(
    r"connection (was )?(closed|reset|refused) by (peer|remote)|connection reset|broken pipe|"
    r"remote process (has )?exited|socket (has )?closed|lost rank 0|could not reach rank 0|store.*timed? ?out|"
    r"watchdog.*timeout|ncclRemoteError|NCCL communicator was aborted", re.IGNORECASE)
"""What the surviving ranks say when another one is gone."""
_SPEAK_TO_RANKS = ("torch.", "deepspeed.", "officina.trainer.ranks.", "officina.trainer.parallel.")
"""What speaks to other ranks. A lost connection of which another module speaks, as the user's own, is no other rank's doing."""
SAY_FD = "OFFICINA_SAY_FD"
"""Variable with the pipe by which a rank tells the parent here how it left: one line, which needs no room on any disk."""


@dataclass(frozen=True, slots=True)
class Failure:
    """The exception that ended a rank."""

    rank: int
    host: str
    pid: int
    time_s: float
    """Seconds since 1970 by the rank's clock."""
    error: str
    """Type of the exception."""
    message: str
    exit_status: int
    consequence: bool
    """Does it only say that another rank was gone?"""
    traceback: str


def log_path(run_dir: Path, rank: int) -> Path:
    """Log of a rank: its stderr, and its stdout unless it is rank 0."""
    return run_dir / "logs" / f"rank-{rank:05d}.log"


def failure_path(run_dir: Path, rank: int) -> Path:
    """Where a rank says which exception ended it."""
    return run_dir / "logs" / f"rank-{rank:05d}.failure.json"


def open_log(run_dir: Path, rank: int) -> int:
    """File descriptor of a rank's log, for appending: a resumed run goes on in the same file."""
    path = log_path(run_dir, rank)
    path.parent.mkdir(parents=True, exist_ok=True)
    return os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o666)


def log_header(rank: int) -> bytes:
    """The line that each start of a rank writes first; lines after it need no prefix."""
    now = datetime.now().astimezone().isoformat(timespec="seconds")
    return f"==== rank {rank} on {socket.gethostname()}, pid {os.getpid()}, {now} ====\n".encode()


def begin_log(log: int, rank: int) -> None:
    """Write the header of this start; a full disk must not hold it up."""
    with contextlib.suppress(OSError):
        os.write(log, log_header(rank))


_terminal: TextIO | None = None
"""The stderr that this process had before `redirect_to_log`; None: a parent redirected us, and tells what happened."""


def redirect_to_log(run_dir: Path, rank: int) -> None:
    """Send this process's stderr (and stdout, but for rank 0) to its log; `leave` still speaks to the stderr it had.

    Done on file descriptors, so that C++ libraries and child processes write there too.
    """
    global _terminal
    log = open_log(run_dir, rank)
    begin_log(log, rank)
    _terminal = os.fdopen(os.dup(2), "w", buffering=1, errors="backslashreplace")
    sys.stderr.flush()
    os.dup2(log, 2)
    if rank != 0:
        sys.stdout.flush()
        os.dup2(log, 1)
    os.close(log)


def fill_standard_streams() -> None:
    """Where this process began without stdin, stdout or stderr (`>&-`), put the null device there: what is opened later would
    take their descriptors and get what is printed, and `sys.stdout` would be None."""
    for fd, name in enumerate(("stdin", "stdout", "stderr")):
        try:
            os.fstat(fd)
        except OSError:
            os.set_inheritable(os.open(os.devnull, os.O_RDWR), True)  # the lowest that is free: fd
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, "w" if fd else "r"))


def describe(env: RankEnv, error: BaseException) -> Failure:
    """The failure of this rank by `error`."""
    return Failure(rank=env.rank, host=socket.gethostname(), pid=os.getpid(), time_s=time.time(),
                   error=type(error).__name__, message=text_of(error),
                   exit_status=error.exit_status if isinstance(error, OfficinaError) else EXIT_BUG,
                   consequence=isinstance(error, RuntimeError | OSError | OfficinaError)
                   and bool(_CONSEQUENCE.search(text_of(error))) and f"{_raised_in(error)}.".startswith(_SPEAK_TO_RANKS),
                   traceback="".join(traceback.format_exception(error)))


def text_of(error: BaseException) -> str:
    """`str(error)`, or what is wrong with a user's exception that has none."""
    try:
        return str(error)
    except Exception as broken:
        return f"(its text cannot be told: __str__ raised {type(broken).__name__})"


def _raised_in(error: BaseException) -> str:
    """Name of the module whose code raised it."""
    frames = list(traceback.walk_tb(error.__traceback__))
    return str(frames[-1][0].f_globals.get("__name__", "")) if frames else ""


def told(run_dir: Path, failure: Failure) -> str:
    """The failure in words for a person, with the log; of another rank's death one line."""
    what = failure.message if failure.exit_status != EXIT_BUG else failure.traceback.rstrip()
    if failure.consequence:
        what = failure.message.partition("\n")[0]
    return (f"officina: rank {failure.rank} on {failure.host}: {failure.error}: {what}\n"
            f"  Log: {log_path(run_dir, failure.rank)}")


def tell_parent(said: Failure | int, environ: Mapping[str, str] = os.environ) -> None:
    """Tell the parent here, if there is one, by which failure this rank leaves, or with which status at the end of its work."""
    if fd := environ.get(SAY_FD):
        line = json.dumps({"left_with": said} if isinstance(said, int) else asdict(said))
        with contextlib.suppress(OSError):
            os.write(int(fd), line.encode() + b"\n")


def read_told(line: bytes) -> Failure | int | None:
    """What `tell_parent` told; None for nothing, or a rank that ended in the middle of it."""
    try:
        found = json.loads(line)
        return found["left_with"] if "left_with" in found else Failure(**found)
    except (ValueError, TypeError):
        return None


def write_failure(run_dir: Path, failure: Failure) -> None:
    """Leave `failure` for the parent to find. Never raises: a full disk must not hide the exception itself."""
    path = failure_path(run_dir, failure.rank)
    with contextlib.suppress(OSError):
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_suffix(".partial")
        partial.write_text(json.dumps(asdict(failure), indent=1))
        partial.replace(path)


def leave(run_dir: Path, failure: Failure) -> None:
    """Leave the failure as a file and in the log, and tell it where a person looks; none of these hides the others."""
    tell_parent(failure)
    write_failure(run_dir, failure)
    for stream, text in ((sys.stderr, failure.traceback), (_terminal, told(run_dir, failure))):
        with contextlib.suppress(OSError):  # a full disk, a terminal that is gone
            if stream is not None:
                print(text, file=stream, flush=True)


def clear_failures(run_dir: Path, rank: int | None = None) -> None:
    """Remove what earlier starts of the run left: of one rank, or of all."""
    pattern = "rank-*.failure.json" if rank is None else failure_path(run_dir, rank).name
    for path in (run_dir / "logs").glob(pattern):
        path.unlink(missing_ok=True)


def read_failures(run_dir: Path) -> list[Failure]:
    """All failures that lie in the run directory, in rank order."""
    found = []
    for path in sorted((run_dir / "logs").glob("rank-*.failure.json")):
        with contextlib.suppress(OSError, ValueError, TypeError):  # half gone with a full disk: the log still speaks
            found.append(Failure(**json.loads(path.read_text())))
    return found


def first_failure(failures: Iterable[Failure]) -> Failure | None:
    """The one that brought the others down: the earliest that is not itself the consequence of another rank's death."""
    return min(failures, key=lambda f: (f.consequence, f.time_s), default=None)
