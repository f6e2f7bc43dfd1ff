"""Logs and failure files of ranks."""

import dataclasses
import os
import subprocess
import sys
from pathlib import Path

import pytest

from officina.trainer import rank_log
from officina.trainer.errors import DataError, LaunchError
from officina.trainer.memory import is_out_of_memory
from officina.trainer.rank_env import LONE, RankEnv

SECOND = RankEnv(1, 1, 2, 2, "officina")


def failure(error: BaseException, env: RankEnv = SECOND, module: str = __name__) -> rank_log.Failure:
    """The failure of a rank by an error that was raised in `module`."""
    there = {"__name__": module}
    exec(compile("def fail(error): raise error", __file__, "exec"), there)
    try:
        there["fail"](error.with_traceback(None))
    except BaseException as raised:
        return rank_log.describe(env, raised)


def test_written_and_read_again(tmp_path: Path):
    written = failure(DataError("shard 3 is cut short"))
    rank_log.write_failure(tmp_path, written)
    assert rank_log.read_failures(tmp_path) == [written]
    assert (written.rank, written.error, written.exit_status) == (1, "DataError", 2)
    assert written.message == "shard 3 is cut short"
    assert "test_rank_log.py" in written.traceback
    rank_log.clear_failures(tmp_path, 0)
    assert rank_log.read_failures(tmp_path) == [written]
    rank_log.clear_failures(tmp_path)
    assert rank_log.read_failures(tmp_path) == []


def test_a_damaged_record_is_left_out(tmp_path: Path):
    rank_log.write_failure(tmp_path, failure(ValueError("x")))
    rank_log.failure_path(tmp_path, 0).write_text('{"rank": 0, "ho')
    rank_log.failure_path(tmp_path, 2).write_text('{"rank": 2}')
    assert [f.rank for f in rank_log.read_failures(tmp_path)] == [1]


def test_a_record_that_cannot_be_written_does_not_hide_the_exception(tmp_path: Path):
    (tmp_path / "logs").write_text("a file where the folder should be")
    rank_log.write_failure(tmp_path, failure(ValueError("x")))


@pytest.mark.parametrize(("error", "consequence"), [
    (RuntimeError("[../gloo/transport/tcp/pair.cc:538] Connection closed by peer [127.0.0.1]:4711"), True),
    (RuntimeError("Connection reset by peer"), True),
    (ConnectionResetError(104, "Connection reset by peer"), True),
    (BrokenPipeError(32, "Broken pipe"), True),
    (RuntimeError("NCCL error: remote process exited or there was a network error"), True),
    (LaunchError("rank 1 on n1 lost rank 0 at 10.0.0.1:4000 while it waited"), True),
    (ValueError("the shard speaks of a broken pipe"), False),
    (RuntimeError("CUDA error: device-side assert triggered"), False),
])
def test_consequences_of_another_rank_s_death_are_known(error: Exception, consequence: bool):
    """And only where it was a module that speaks to other ranks which raised: a user's code has connections of its own."""
    for module in ("torch.distributed.distributed_c10d", "deepspeed.comm.torch", "officina.trainer.ranks"):
        assert failure(error, module=module).consequence is consequence
    for module in ("torch_model", "officina.trainer.data.remote"):
        assert not failure(error, module=module).consequence


def test_the_cause_comes_before_its_consequences_and_then_the_earliest():
    cause, later = failure(ValueError("bad")), failure(KeyError("worse"))
    early = failure(RuntimeError("Connection closed by peer"), module="torch.distributed.x")
    early = dataclasses.replace(early, time_s=cause.time_s - 5)
    assert rank_log.first_failure([early, later, cause]) == cause
    assert rank_log.first_failure([early]) == early
    assert rank_log.first_failure([]) is None


class Mute(RuntimeError):
    def __str__(self):
        raise ValueError("no text")


def test_an_exception_without_a_text_is_recorded_too(tmp_path: Path):
    rank_log.write_failure(tmp_path, failure(Mute()))
    [found] = rank_log.read_failures(tmp_path)
    assert (found.error, found.message) == ("Mute", "(its text cannot be told: __str__ raised ValueError)")
    assert "in fail" in found.traceback and not is_out_of_memory(Mute())


def test_redirect_takes_the_descriptors(tmp_path: Path):
    """C++ libraries and child processes write to descriptors, not to sys.stderr. A failure is still told where it was."""
    program = ("import os, sys; from pathlib import Path; from officina.trainer import errors, rank_log\n"
               "from officina.trainer.rank_env import LONE\n"
               "run_dir = Path(sys.argv[1]); rank_log.redirect_to_log(run_dir, int(sys.argv[2]))\n"
               "os.write(2, b'raw stderr\\n'); os.system('echo of a child')\n"
               "rank_log.leave(run_dir, rank_log.describe(LONE, errors.DataError('mend this')))")
    for rank, out in ((0, "of a child\n"), (1, "")):
        done = subprocess.run([sys.executable, "-c", program, tmp_path, str(rank)], capture_output=True, text=True, check=True)
        log = rank_log.log_path(tmp_path, rank).read_text()
        assert done.stdout == out
        assert done.stderr.startswith(f"officina: rank 0 on {os.uname().nodename}: DataError: mend this\n")
        assert "DataError: mend this" in log and rank_log.read_failures(tmp_path)[0].message == "mend this"
        assert log.splitlines()[0].startswith(f"==== rank {rank} on {os.uname().nodename}, pid ")
        assert "raw stderr" in log and ("of a child" in log) == (rank != 0)


def test_header_is_one_line():
    assert rank_log.log_header(LONE.rank).count(b"\n") == 1
