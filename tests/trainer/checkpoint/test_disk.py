"""Full disk, no inodes, read-only file system: the save fails in words, training goes on, the last good one stays."""

import os

import pytest

from officina.benchmarks.checkpoint_faults import cut, holds, on_ranks, state_at
from officina.trainer.checkpoint.disk import free_space, reserve
from officina.trainer.checkpoint.layout import TrainState, step_dir
from officina.trainer.checkpoint.read import open_checkpoint
from officina.trainer.checkpoint.write import Saver
from officina.trainer.config import CheckpointConfig

STATE = state_at(1)  # 6.7 MB


def train(run_dir, steps, asynchronous, prepare, before_step=lambda step: None):
    """Save at each step from two ranks; outcomes by rank."""
    def work(ranks):
        saver = Saver(run_dir, ranks, CheckpointConfig(asynchronous=asynchronous, keep_last=10), "run")
        if prepare:
            saver.prepare(cut(STATE, ranks.rank, 2))
        outcomes = []
        for step in steps:
            if ranks.rank == 0:
                before_step(step)
            ranks.sum([0.0])
            outcome = saver.save(step, cut(STATE, ranks.rank, 2), TrainState(step=step))
            outcomes.append(saver.wait() or outcome)
        return outcomes

    return on_ranks(2, work)


@pytest.mark.parametrize("asynchronous", [False, True])
@pytest.mark.parametrize("prepare", [False, True])
def test_full_disk(mount, asynchronous, prepare):
    run_dir = mount("size=16m")
    needed = 0
    for outcomes in train(run_dir, (1, 2, 3), asynchronous, prepare):
        assert [o.status for o in outcomes] == ["saved", "saved", "failed"]
        needed = outcomes[2].bytes
        problem = outcomes[2].problem
        assert "No space left on device (ENOSPC)" in problem and str(step_dir(run_dir, 3)) in problem
        assert f"{needed} bytes needed, {free_space(run_dir).bytes} bytes free at {run_dir}" in problem
        assert "checkpoint.keep_last=1" in problem
        assert "there is too little space" in problem  # asked beforehand, not met while writing
    assert needed >= sum(t.nbytes for t in STATE.values()) > free_space(run_dir).bytes
    assert not step_dir(run_dir, 3).exists()
    with open_checkpoint(run_dir) as opened:
        assert opened.step == 2 and holds(opened, STATE)


def test_a_first_save_of_unknown_size_meets_the_full_disk_while_writing(mount):
    run_dir = mount("size=4m")
    for (outcome,) in train(run_dir, (1,), False, False):
        assert outcome.status == "failed" and "ENOSPC" in outcome.problem and "could not write" in outcome.problem
        assert outcome.bytes > 6_000_000  # what it would have needed, although it was never all written
    assert free_space(run_dir).bytes == 4 << 20  # nothing is left behind


@pytest.mark.parametrize("asynchronous", [False, True])
def test_training_goes_on_and_saves_again_when_there_is_room(mount, asynchronous):
    run_dir = mount("size=16m")
    ballast = run_dir / "somebody-elses-data"

    def before_step(step):
        if step == 2:
            ballast.write_bytes(bytes(8 << 20))
        elif step == 3:
            ballast.unlink()

    for outcomes in train(run_dir, (1, 2, 3), asynchronous, False, before_step):
        assert [o.status for o in outcomes] == ["saved", "failed", "saved"]
    with open_checkpoint(run_dir) as opened:
        assert opened.step == 3


def test_no_inodes(mount):
    run_dir = mount("size=64m,nr_inodes=12")
    for outcomes in train(run_dir, (1, 2), False, True):
        assert [o.status for o in outcomes] == ["saved", "failed"]
        assert "7 files needed, 4 inodes free" in outcomes[1].problem
    with open_checkpoint(run_dir) as opened:
        assert opened.step == 1 and holds(opened, STATE)


@pytest.mark.parametrize("asynchronous", [False, True])
def test_read_only_file_system(mount, asynchronous):
    run_dir = mount("size=64m")

    def before_step(step):
        mount("ro" if step == 2 else "rw", again=True)

    for outcomes in train(run_dir, (1, 2, 3), asynchronous, False, before_step):
        assert [o.status for o in outcomes] == ["saved", "failed", "saved"]
        assert "Read-only file system (EROFS)" in outcomes[1].problem
        assert f"{outcomes[1].bytes} bytes needed" in outcomes[1].problem and outcomes[1].bytes > 6_000_000
    with open_checkpoint(run_dir) as opened:
        assert opened.step == 3


def test_a_read_only_checkpoint_can_be_loaded(mount):
    run_dir = mount("size=64m")
    train(run_dir, (1,), False, False)
    mount("ro", again=True)
    with open_checkpoint(run_dir) as opened:
        assert holds(opened, STATE)


def test_reserve_sees_a_full_disk_before_a_byte_is_sent(mount):
    path = mount("size=1m")
    fd = os.open(path / "file", os.O_WRONLY | os.O_CREAT)
    try:
        with pytest.raises(OSError, match="No space left"):
            reserve(fd, 0, 2 << 20)
        reserve(fd, 0, 4096)
    finally:
        os.close(fd)
