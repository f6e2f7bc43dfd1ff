"""The pool of ranks itself: what a distributed test relies on."""

import os
import subprocess
import sys
import time

import psutil
import pytest

from tests.distributed import ROOT, RankFailure, RankPool

HERE = "tests.test_distributed"


@pytest.fixture(scope="module")
def small():
    ranks = RankPool(3)
    yield ranks
    ranks.close()


def who(ranks, *extra):
    return ranks.rank, ranks.world_size, ranks.sum([1.0, ranks.rank]), extra


def process_of(ranks):
    return os.getpid()


def fail_on(ranks, rank):
    if ranks.rank == rank:
        raise KeyError(f"no {rank}")
    ranks.barrier()


def fail(ranks):
    raise ValueError(ranks.rank)


def die_on(ranks, rank):
    if ranks.rank == rank:
        os._exit(7)
    ranks.barrier()


def sleep(ranks, seconds):
    time.sleep(seconds)


def test_worlds_may_change_and_processes_stay(small):
    processes = small.run(3, f"{HERE}:process_of")
    for world in (1, 2, 3, 2, 3, 1):
        assert small.run(world, f"{HERE}:who", "x") == [
            (rank, world, [world, sum(range(world))], ("x",)) for rank in range(world)]
    assert small.run(3, f"{HERE}:process_of") == processes


def test_an_exception_names_its_rank_and_the_pool_recovers(small):
    with pytest.raises(RankFailure, match=r"(?s)fail_on on 3 ranks:.*rank 1: Traceback.*KeyError: 'no 1'"):
        small.run(3, f"{HERE}:fail_on", 1)
    assert len(small.run(2, f"{HERE}:who")) == 2


def test_ranks_that_all_raised_are_kept(small):
    processes = small.run(2, f"{HERE}:process_of")
    with pytest.raises(RankFailure, match=r"(?s)rank 0: .*ValueError.*rank 1: .*ValueError"):
        small.run(2, f"{HERE}:fail")
    assert small.run(2, f"{HERE}:process_of") == processes
    assert [found[2] for found in small.run(2, f"{HERE}:who")] == [[2, 1]] * 2


def test_a_dead_rank_is_named_and_the_pool_recovers(small):
    with pytest.raises(RankFailure, match=r"rank 2: died with exit status 7"):
        small.run(3, f"{HERE}:die_on", 2)
    assert len(small.run(3, f"{HERE}:who")) == 3


def test_silence_is_ended(small):
    with pytest.raises(RankFailure, match="no answer from rank 0, 1"):
        small.run(2, f"{HERE}:sleep", 60, timeout_s=0.5)


def test_more_ranks_than_there_are(small):
    with pytest.raises(ValueError, match="the pool has 3 ranks, 4 asked for"):
        small.run(4, f"{HERE}:who")


def test_no_rank_outlives_its_parent():
    code = ("from tests.distributed import RankPool; pool = RankPool(2)\n"
            f"print(*pool.run(2, '{HERE}:process_of'), flush=True); import os, signal; os.kill(os.getpid(), signal.SIGKILL)")
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False,
                          env=os.environ | {"PYTHONPATH": str(ROOT)})
    *_, last = done.stdout.splitlines() or [""]  # torch 2.9's gloo speaks on stdout before
    orphans = [int(pid) for pid in last.split()]
    assert len(orphans) == 2, done.stderr
    end = time.monotonic() + 20
    while any(psutil.pid_exists(pid) and psutil.Process(pid).status() != psutil.STATUS_ZOMBIE for pid in orphans):
        assert time.monotonic() < end, "ranks outlive their parent"
        time.sleep(0.1)
