"""Start a run's ranks: on this machine, or as one srun step over the allocation; take them all down together."""

import contextlib
import ctypes
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from officina.launch.allocation import find_place, srun_words, step_environ, trainer_program
from officina.launch.postmortem import Ended, explain, name_signal, oom_kills
from officina.launch.supervise import last_words
from officina.trainer import rank_log
from officina.trainer.config import RunConfig
from officina.trainer.errors import EXIT_BUG, EXIT_CONTINUE, EXIT_DONE, EXIT_NO_PROGRESS, EXIT_USER
from officina.trainer.rank_env import LOOPBACK
from officina.trainer.run_dir import METRICS, REQUEST, RESULTS, committed_steps, unwritable
from officina.trainer.signals import STOP_SIGNALS, catch_stops, leave_dead_terminal

_POLL_S = 0.02
_SETTLE_S = 1.0
"""After a rank died: time for the others to say what they saw, before they are killed."""
_SETTLE_TOGETHER_S = 5.0
"""The same where a rank left with a verdict that usually all reach (exit status 2 or 76), and write down."""
_INTERRUPTED = 128 + signal.SIGINT
_GOOD = (EXIT_DONE, EXIT_CONTINUE)
_KNOWN = (EXIT_BUG, EXIT_USER, EXIT_NO_PROGRESS)


def start(run_dir: Path, run: RunConfig, environ: Mapping[str, str]) -> int:
    """Train the run in `run_dir` from wherever this command was called; returns the exit status of the whole.

    A rank that srun, torchrun or mpirun started trains in this process. Otherwise ranks are started: on this machine,
    or by one srun step if we stand in an allocation of several nodes or beside it. On a login node only if `ranks` says
    so; else LaunchError.
    """
    place = find_place(run, environ)
    if place.is_rank:
        from officina.trainer.__main__ import main

        return main(run_dir)
    if place.allocation is not None:
        words = srun_words(place.allocation, place.ranks_per_node, trainer_program(run_dir))
        return run_step(run_dir, words, environ=step_environ(environ), grace_s=run.site.grace)
    return run_ranks(run_dir, place.world_size, environ=environ, grace_s=run.site.grace)


# ---- ranks on this machine -----------------------------------------------------------------------------------------
@dataclass(slots=True)
class _Rank:
    number: int
    process: subprocess.Popen
    pipe: int
    """What the rank tells of its end (`rank_log.tell_parent`), to be read without waiting."""
    line: bytes = b""
    """What has come out of the pipe."""
    status: int | None = None
    """As Popen gives it: negative for a signal."""
    died_s: float = 0.0
    """Seconds since 1970 when the parent saw it."""

    @property
    def failed(self) -> bool:
        """Has it ended otherwise than at the end of its work? Exit status 0 alone says nothing: user code may call os._exit."""
        return self.status is not None and (self.status not in _GOOD or rank_log.read_told(self.line) != self.status)


def run_ranks(run_dir: Path, n_ranks: int, *, environ: Mapping[str, str], grace_s: float,
              command: Sequence[str] | None = None) -> int:
    """Run `n_ranks` local ranks of the run to their end; returns EXIT_DONE, EXIT_CONTINUE or that of the first failure.

    Rank 0's stdout is ours; everything else goes to RUN/logs. SIGTERM, SIGINT, SIGUSR1 and SIGHUP to us ask the ranks to stop
    in good order, and after `grace_s`, or at a second Ctrl-C, kill them. If one dies, the others follow within seconds,
    and stderr says which was first and why. command: the program of a rank, by default the trainer; main thread only.
    """
    command = list(command or trainer_program(run_dir))
    rank_log.clear_failures(run_dir)
    kills_before = oom_kills()
    ranks: list[_Rank] = []
    with _Requests() as requests, socket.socket() as listener:
        listener.bind((LOOPBACK, 0))  # held open and handed to rank 0: no other program can take the port
        listener.listen(socket.SOMAXCONN)
        try:
            for number in range(n_ranks):
                ranks.append(_spawn(run_dir, number, n_ranks, command, environ, listener))
            late = _wait(ranks, requests, grace_s)
        finally:
            for rank in ranks:
                _kill_group(rank)
        return _conclude(run_dir, ranks, requests, late, grace_s, kills_before)


def _spawn(run_dir: Path, number: int, n_ranks: int, command: list[str], environ: Mapping[str, str],
           listener: socket.socket) -> _Rank:
    env = dict(environ) | {
        "OFFICINA_RANK": str(number), "OFFICINA_WORLD_SIZE": str(n_ranks), "OFFICINA_PARENT_PID": str(os.getpid()),
        "OFFICINA_PORT": str(listener.getsockname()[1]), "OFFICINA_LISTEN_FD": str(listener.fileno()),
        # Without PYTHONSAFEPATH a folder named `kernels` beside the user would hide packages of that name.
        "PYTHONSAFEPATH": "1", "PYTHONUNBUFFERED": "1"}
    try:
        log = rank_log.open_log(run_dir, number)
    except OSError as error:
        raise unwritable(run_dir, error) from error
    pipe, say = os.pipe()
    os.set_blocking(pipe, False)
    env[rank_log.SAY_FD] = str(say)
    parent = os.getpid()

    def prepare() -> None:
        """In the child. Stop signals wait until the trainer can take them: Python as it starts would die of them."""
        rank_log.begin_log(log, number)
        _die_with(parent, signal.SIGKILL)
        signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)

    try:
        process = subprocess.Popen(
            command, env=env, stdin=subprocess.DEVNULL, stdout=None if number == 0 else log, stderr=log,
            pass_fds=(say, listener.fileno()) if number == 0 else (say,),
            start_new_session=True,  # the terminal's Ctrl-C reaches us only; we pass it on as a request
            preexec_fn=prepare)
    finally:
        os.close(log)
        os.close(say)
    return _Rank(number, process, pipe)


def _die_with(parent_pid: int, number: signal.Signals) -> None:
    """In the child: let the kernel send `number` when the parent is gone. Without prctl the trainer itself watches."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, int(number), 0, 0, 0)  # PR_SET_PDEATHSIG
    if os.getppid() != parent_pid:
        os._exit(EXIT_BUG)


class _Requests:
    """Stop signals to this parent, counted while the `with` block runs."""

    def __init__(self) -> None:
        self.first: signal.Signals | None = None
        self.kill = False
        self.since_s = 0.0
        """time.monotonic() of the first."""

    def __enter__(self) -> "_Requests":
        self._before = catch_stops(self._receive)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _receive(self, number: int, _frame: object) -> None:
        if number == signal.SIGHUP:
            leave_dead_terminal()
        if self.first is None:
            self.first, self.since_s = signal.Signals(number), time.monotonic()
        elif number == signal.SIGINT:
            self.kill = True


def _wait(ranks: list[_Rank], requests: _Requests, grace_s: float) -> list[int]:
    """Wait until all ranks have ended or must be killed; returns those that did not stop when asked."""
    told, killed_at = False, float("inf")
    while alive := [rank for rank in ranks if _poll(rank) is None]:
        now = time.monotonic()
        if failed := [rank for rank in ranks if rank.failed]:
            together = all(rank.status in (EXIT_USER, EXIT_NO_PROGRESS) for rank in failed)
            killed_at = min(killed_at, now + _SETTLE_TOGETHER_S) if together else min(killed_at, now + _SETTLE_S)
        if requests.first is not None and not told:
            told = True
            for rank in alive:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(rank.process.pid, requests.first)
            _say_asked(requests.first, grace_s)
        if requests.kill or now >= killed_at:
            return []
        if told and now >= requests.since_s + grace_s:
            return [rank.number for rank in alive]
        time.sleep(_POLL_S)
    return []


def _poll(rank: _Rank) -> int | None:
    if rank.status is None:
        status = rank.process.poll()
        with contextlib.suppress(BlockingIOError):  # after the status: what it told before it ended is there
            while part := os.read(rank.pipe, 65536):
                rank.line += part
        if status is not None:
            rank.status, rank.died_s = status, time.time()
    return rank.status


def _kill_group(rank: _Rank) -> None:
    """End a rank and everything it started: the session is its own."""
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(rank.process.pid, signal.SIGKILL)
    rank.process.wait()
    os.close(rank.pipe)


def _conclude(run_dir: Path, ranks: list[_Rank], requests: _Requests, late: list[int], grace_s: float,
              kills_before: int | None) -> int:
    """The exit status of the whole; tells on stderr what went wrong."""
    leave_dead_terminal()
    if requests.kill:
        _say(f"officina: killed. {_what_is_left(run_dir)}")
        return _INTERRUPTED
    if failed := [rank for rank in ranks if rank.failed]:
        return _explain(run_dir, failed, len(ranks), kills_before)
    if late:
        _say(f"officina: {_shown(late)} did not stop within {grace_s:g} s of {requests.first.name} and had to be killed; "
             f"what was trained since the last checkpoint is lost. More time: site.grace={2 * grace_s:g}s")
        return EXIT_BUG
    return EXIT_CONTINUE if EXIT_CONTINUE in (rank.status for rank in ranks) else EXIT_DONE


def _explain(run_dir: Path, failed: list[_Rank], n_ranks: int, kills_before: int | None) -> int:
    """Tell which rank failed first and why; returns the exit status. What a full disk kept off the disk came by the pipe."""
    told = [said for rank in failed if isinstance(said := rank_log.read_told(rank.line), rank_log.Failure)]
    written = rank_log.read_failures(run_dir)
    first = rank_log.first_failure([*written, *told])
    if first is not None and not first.consequence and first not in written:
        _say(f"\n{rank_log.told(run_dir, first)}\n  (the disk took no record of it)")
        return first.exit_status
    status = explain(run_dir, [Ended(rank.number, rank.status, rank.died_s) for rank in failed], n_ranks, kills_before)
    if any(rank.status in _GOOD for rank in failed):
        _say("  This is no orderly end: before its work is done a rank leaves so only where some code calls os._exit")
    return EXIT_BUG if status in _GOOD else status


def _say(text: str) -> None:
    with contextlib.suppress(OSError):  # a terminal that is gone must not end the ranks
        print(text, file=sys.stderr, flush=True)


def _say_asked(number: signal.Signals, grace_s: float) -> None:
    _say(f"\nofficina: {number.name}: the ranks finish their step, save and leave (at most {grace_s:g} s). "
         f"Ctrl-C{' again' if number == signal.SIGINT else ''} kills them.")


def _what_is_left(run_dir: Path) -> str:
    """After a kill."""
    if (run_dir / REQUEST).exists():
        return "An evaluation changes nothing of its run: ask again"
    if committed_steps(run_dir):
        return f"The last checkpoint is intact: officina resume {run_dir}"
    return f"There was no checkpoint yet; from the beginning again: officina resume {run_dir}"


def _shown(numbers: list[int]) -> str:
    return f"rank {numbers[0]}" if len(numbers) == 1 else f"ranks {', '.join(map(str, numbers))}"


# ---- ranks as one srun step ----------------------------------------------------------------------------------------
def run_step(run_dir: Path, words: list[str], *, environ: Mapping[str, str], grace_s: float) -> int:
    """Run a step of ranks (`words`: srun ...) to its end; signals, failures and exit status as for `run_ranks`."""
    rank_log.clear_failures(run_dir)
    written_bytes = (run_dir / METRICS).stat().st_size if (run_dir / METRICS).exists() else 0
    with _Requests() as requests, _step(words, environ) as step:
        told = False
        while (status := step.poll()) is None:
            if requests.first is not None and not told:
                told = True
                step.send_signal(signal.SIGUSR1)  # srun passes USR1 on; SIGTERM and SIGINT make it kill the tasks
                _say_asked(requests.first, grace_s)
            if requests.kill or (told and time.monotonic() >= requests.since_s + grace_s):
                _end_step(step)
                _say(f"officina: the step was killed. {_what_is_left(run_dir)}")
                return _INTERRUPTED if requests.kill else EXIT_BUG
            time.sleep(_POLL_S)
    failure = rank_log.first_failure(rank_log.read_failures(run_dir))
    ended = (run_dir / RESULTS).exists() if (run_dir / REQUEST).exists() else (
        last_words(os.fspath(run_dir), written_bytes)[1] is not None)
    if status in _GOOD and failure is None and ended:
        return status
    if failure is not None:
        return explain(run_dir, [Ended(failure.rank, failure.exit_status, failure.time_s)], 0, None)
    killed_by = -status if status < 0 else status - 128 if 128 < status < 160 else 0
    how = f"by {name_signal(killed_by)}" if killed_by else f"with exit status {status}"
    how += " before the end of its work" if status in _GOOD else ""
    _say(f"officina: srun ended {how}, and no rank said why. Above is what srun said; the ranks' logs: "
         f"{rank_log.log_path(run_dir, 0).parent}")
    return status if status in _KNOWN else EXIT_BUG


@contextlib.contextmanager
def _step(words: list[str], environ: Mapping[str, str]) -> Iterator[subprocess.Popen]:
    parent = os.getpid()
    step = subprocess.Popen(words, env=dict(environ), stdin=subprocess.DEVNULL, start_new_session=True,
                            preexec_fn=lambda: _die_with(parent, signal.SIGTERM))  # on SIGTERM srun ends its tasks
    try:
        yield step
    finally:
        if step.poll() is None:
            _end_step(step)


def _end_step(step: subprocess.Popen) -> None:
    """srun kills its tasks on SIGTERM, and may then wait for nodes that do not answer."""
    step.terminate()
    try:
        step.wait(30.0)
    except subprocess.TimeoutExpired:
        step.kill()
        step.wait()
