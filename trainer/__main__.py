"""One rank: `python -m officina.trainer RUN`, started by officina, srun, torchrun or mpirun.

Nothing heavy is imported before the stop signals are caught: a Ctrl-C while torch loads must not be lost.
"""

import argparse
import ctypes
import os
import signal
import socket
import sys
import threading
import time
from pathlib import Path

from officina.trainer import rank_log
from officina.trainer.errors import EXIT_BUG, EXIT_CONTINUE, EXIT_DONE, EXIT_USER, LaunchError, OfficinaError
from officina.trainer.rank_env import LONE, RankEnv, read_rank_env
from officina.trainer.signals import StopRequest

START_TIMEOUT_S = 300.0
"""Ranks of a large job start minutes apart (images, cold file systems)."""
_LEAVE_WITHIN_S = 15.0
_INTERRUPTED = 128 + signal.SIGINT


def main(run_dir: Path, *, start_timeout_s: float = START_TIMEOUT_S) -> int:
    """Be a rank of the run in `run_dir`, to the end. Returns the exit status; what went wrong lies in RUN/logs.

    Where no parent of ours watches (srun, torchrun, mpirun), the failure is also told on stderr.
    """
    with StopRequest():
        try:
            env = read_rank_env(os.environ) or LONE
            if env.launcher == "officina":
                end_with_parent(int(os.environ.get("OFFICINA_PARENT_PID", "0")))
        except LaunchError as error:
            print(f"officina: {error}", file=sys.stderr)
            return error.exit_status
        if env.launcher != "officina":
            rank_log.clear_failures(run_dir, env.rank)
            rank_log.redirect_to_log(run_dir, env.rank)
        try:
            status = _run(run_dir, env, start_timeout_s)
        except KeyboardInterrupt:
            return _INTERRUPTED
        except BaseException as error:  # SystemExit too: user code that ends the process has not ended the run
            _leave_soon(error)
            failure = rank_log.describe(env, error)
            rank_log.leave(run_dir, failure)
            return failure.exit_status
        rank_log.tell_parent(status)
        return status


def _run(run_dir: Path, env: RankEnv, start_timeout_s: float) -> int:
    from officina.trainer.memory import OutOfMemory, explain_oom, is_out_of_memory
    from officina.trainer.ranks import start_ranks, stop_ranks
    from officina.trainer.run_dir import REQUEST, load_config

    run = load_config(run_dir)
    ranks = start_ranks(env, device=run.device, threads=run.threads, timeout_s=start_timeout_s)
    try:
        if (run_dir / REQUEST).exists():
            from officina.trainer.eval_rank import evaluate

            status = evaluate(run_dir, ranks)
        else:
            from officina.trainer.loop import train

            status = train(run_dir, ranks)
        ranks.barrier()  # leave together: srun --kill-on-bad-exit kills the others when the first one leaves with 75
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        message = explain_oom(error, rank=env.rank, world_size=env.world_size, run=run, device=ranks.device)
        raise OutOfMemory(message) from error
    stop_ranks()
    return status


def _leave_soon(error: BaseException) -> None:
    """End this process even if a library waits at exit for ranks that are gone."""
    status = error.exit_status if isinstance(error, OfficinaError) else EXIT_BUG

    def leave() -> None:
        time.sleep(_LEAVE_WITHIN_S)
        os._exit(status)

    threading.Thread(target=leave, daemon=True, name="leave").start()


def end_with_parent(parent_pid: int) -> None:
    """Let the kernel kill this process when its parent dies, however. Without Linux a thread looks once a second."""
    if sys.platform == "linux":
        pr_set_pdeathsig = 1
        ctypes.CDLL(None, use_errno=True).prctl(pr_set_pdeathsig, int(signal.SIGKILL), 0, 0, 0)
    else:
        threading.Thread(target=_watch_parent, args=(parent_pid,), daemon=True, name="parent").start()
    if os.getppid() != parent_pid:
        raise LaunchError(f"the process {parent_pid} that started this rank is gone (OFFICINA_PARENT_PID). "
                          "Start the run anew: officina resume RUN")


def _watch_parent(parent_pid: int, every_s: float = 1.0) -> None:
    while os.getppid() == parent_pid:
        time.sleep(every_s)
    os._exit(EXIT_CONTINUE)


def cli(words: list[str] | None = None) -> int:
    """The command line of one rank."""
    rank_log.fill_standard_streams()
    parser = argparse.ArgumentParser(prog="python -m officina.trainer", description=__doc__)
    parser.add_argument("run_dir", type=Path, help="run directory with its config.yaml")
    parser.add_argument("--start-timeout-s", type=float, default=START_TIMEOUT_S,
                        help="seconds to wait for all ranks to start (default: %(default)g)")
    args = parser.parse_args(words)
    if not args.run_dir.is_dir():
        print(f"officina: {args.run_dir}: no such run directory on {socket.gethostname()}. If it is there on another node: "
              "name one that all nodes share, with --runs-dir. Else make one: officina train ...", file=sys.stderr)
        return EXIT_USER
    return main(args.run_dir, start_timeout_s=args.start_timeout_s)


if __name__ == "__main__":
    status = cli()
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except OSError:  # a full disk, or a terminal that is gone: Python would try again when it ends, and leave with 120
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
    if status not in (EXIT_DONE, EXIT_CONTINUE):
        os._exit(status)  # a failed rank leaves at once: at exit, libraries wait for ranks that are gone
    sys.exit(status)
