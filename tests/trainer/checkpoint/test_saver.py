"""What is kept, what makes way, what is skipped; and that a failure is agreed on by all ranks."""

import errno
import os
import stat
import threading
import time
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from officina.benchmarks.checkpoint_faults import cut, holds, on_ranks, save_step, state_at
from officina.trainer.checkpoint import background, rank_file, stage, write
from officina.trainer.checkpoint.keep import superseded
from officina.trainer.checkpoint.layout import COMMIT, TrainState, step_dir
from officina.trainer.checkpoint.read import latest_valid, list_checkpoints, open_checkpoint
from officina.trainer.checkpoint.verify import Alone
from officina.trainer.checkpoint.write import Saver
from officina.trainer.config import CheckpointConfig
from officina.trainer.state import Piece


def save(saver, step, state=None, rank=0, world_size=1):
    return saver.save(step, cut(state or state_at(step, 3000), rank, world_size), TrainState(step=step))


def names(run_dir):
    return sorted(p.name for p in (run_dir / "checkpoints").iterdir())


@given(steps=st.sets(st.integers(1, 60)), newest=st.integers(1, 60), keep_last=st.integers(1, 4), keep_every=st.integers(0, 7))
def test_retention_keeps_what_it_says(steps, newest, keep_last, keep_every):
    gone = superseded(steps | {newest}, newest, keep_last=keep_last, keep_every=keep_every)
    left = (steps | {newest}) - set(gone)
    assert newest in left
    assert all(s in left for s in steps if s > newest)
    past = sorted(s for s in steps | {newest} if s <= newest)
    assert left >= set(past[-keep_last:])
    assert all(s in past[-keep_last:] or s > newest or (keep_every and s % keep_every == 0) for s in left)


def test_keep_last_and_keep_every(tmp_path):
    saver = Saver(tmp_path, Alone(), CheckpointConfig(keep_last=2, keep_every=20), "run")
    for step in (10, 20, 30, 40, 50, 60, 70):
        assert save(saver, step).path == step_dir(tmp_path, step)
    assert [i.step for i in list_checkpoints(tmp_path)] == [20, 40, 60, 70]


def test_permissions_follow_umask(tmp_path):
    before = os.umask(0o007)
    try:
        save(Saver(tmp_path, Alone(), CheckpointConfig(), "run"), 1)
    finally:
        os.umask(before)
    for file in step_dir(tmp_path, 1).iterdir():
        assert stat.S_IMODE(file.stat().st_mode) == 0o660, file
    assert stat.S_IMODE(step_dir(tmp_path, 1).stat().st_mode) == 0o770


def test_leftovers_are_removed_before_the_first_save(tmp_path):
    save(Saver(tmp_path, Alone(), CheckpointConfig(), "run"), 1)
    for step in (2, 3):
        step_dir(tmp_path, step).mkdir()
        (step_dir(tmp_path, step) / "rank-00000.bin").write_bytes(b"half")
    assert [(i.step, i.status) for i in list_checkpoints(tmp_path)] == [
        (1, "complete"), (2, "incomplete"), (3, "incomplete")]
    assert save(Saver(tmp_path, Alone(), CheckpointConfig(), "run"), 3).status == "saved"
    assert names(tmp_path) == ["step-00000001", "step-00000003"]


def test_damaged_one_of_the_same_step_is_set_aside(tmp_path):
    save(Saver(tmp_path, Alone(), CheckpointConfig(), "run"), 1)
    data = step_dir(tmp_path, 1) / "rank-00000.bin"
    raw = bytearray(data.read_bytes())
    raw[-100] ^= 1
    data.write_bytes(raw)
    assert save(Saver(tmp_path, Alone(), CheckpointConfig(), "run"), 1).status == "saved"
    assert names(tmp_path) == ["step-00000001", "step-00000001.damaged"]
    assert (step_dir(tmp_path, 1).with_suffix(".damaged") / "rank-00000.bin").read_bytes() == raw
    with open_checkpoint(tmp_path) as opened:
        assert holds(opened, state_at(1, 3000)) and not opened.passed_over
    assert [i.status for i in list_checkpoints(tmp_path)] == ["complete", "damaged"]


def test_damaged_ones_that_a_resume_found_are_set_aside(tmp_path):
    for step in (1, 2):
        save(Saver(tmp_path, Alone(), CheckpointConfig(), "run"), step)
    (step_dir(tmp_path, 2) / "rank-00000.json").unlink()
    with open_checkpoint(tmp_path) as opened:
        assert opened.step == 1 and opened.damaged == (step_dir(tmp_path, 2),)
    saver = Saver(tmp_path, Alone(), CheckpointConfig(keep_last=2), "run", damaged=opened.damaged)
    assert save(saver, 3).status == "saved"
    assert names(tmp_path) == ["step-00000001", "step-00000002.damaged", "step-00000003"]


def test_whole_one_of_the_same_step_is_replaced_and_comes_back_if_that_fails(tmp_path, monkeypatch):
    first, second = state_at(1, 3000), state_at(2, 3000)
    save(Saver(tmp_path, Alone(), CheckpointConfig(), "run"), 5, first)
    with monkeypatch.context() as m:
        m.setattr(rank_file, "write_at", _raise(errno.EIO))
        outcome = save(Saver(tmp_path, Alone(), CheckpointConfig(), "run"), 5, second)
    assert outcome.status == "failed" and names(tmp_path) == ["step-00000005"]
    with open_checkpoint(tmp_path) as opened:
        assert holds(opened, first)
    assert save(Saver(tmp_path, Alone(), CheckpointConfig(), "run"), 5, second).status == "saved"
    assert names(tmp_path) == ["step-00000005"]
    with open_checkpoint(tmp_path) as opened:
        assert holds(opened, second)


def test_a_kill_between_making_way_and_commit_loses_nothing(tmp_path):
    save(Saver(tmp_path, Alone(), CheckpointConfig(), "run"), 5)
    step_dir(tmp_path, 5).rename(step_dir(tmp_path, 5).with_suffix(".old"))
    step_dir(tmp_path, 5).mkdir()
    with open_checkpoint(tmp_path, step=5) as opened:
        assert opened.path.name == "step-00000005.old" and holds(opened, state_at(5, 3000))
    assert "incomplete" in opened.passed_over[0]


def _raise(code):
    def fail(*_):
        raise OSError(code, os.strerror(code))
    return fail


@pytest.mark.parametrize("asynchronous", [False, True])
@pytest.mark.parametrize("code", [errno.EIO, errno.EDQUOT, errno.EACCES])
def test_an_error_on_one_rank_is_the_failure_of_all(tmp_path, monkeypatch, code, asynchronous):
    save_step(tmp_path, 1, world_size=2)
    real = rank_file.RankFile.write

    def write_on_rank_1(self, segment):
        if self._about[3] == 1:
            raise OSError(code, os.strerror(code))
        real(self, segment)

    monkeypatch.setattr(rank_file.RankFile, "write", write_on_rank_1)

    def work(ranks):
        saver = Saver(tmp_path, ranks, CheckpointConfig(asynchronous=asynchronous), "run")
        outcome = save(saver, 2, state_at(2), ranks.rank, 2)
        failed = saver.wait() or outcome
        with monkeypatch.context() as m:
            ranks.sum([0.0])
            m.setattr(rank_file.RankFile, "write", real)
            again = save(saver, 3, state_at(3), ranks.rank, 2)
            again = saver.wait() or again
            ranks.sum([0.0])
        return failed, again

    for failed, again in on_ranks(2, work):
        assert failed.status == "failed" and failed.path is None
        assert errno.errorcode[code] in failed.problem and "rank 1 could not write" in failed.problem
        assert str(step_dir(tmp_path, 2) / "rank-00001.bin") in failed.problem
        assert f"{failed.bytes} bytes needed" in failed.problem and "bytes free" in failed.problem
        assert again.status == "saved"
    assert names(tmp_path) == ["step-00000001", "step-00000003"]
    with open_checkpoint(tmp_path, step=1) as opened:
        assert holds(opened, state_at(1))


def test_commit_that_cannot_be_written(tmp_path, monkeypatch):
    save_step(tmp_path, 1)
    monkeypatch.setattr(write, "write_durably", _raise(errno.ENOSPC))
    outcome = save(Saver(tmp_path, Alone(), CheckpointConfig(), "run"), 2)
    assert outcome.status == "failed" and f"{step_dir(tmp_path, 2) / COMMIT}" in outcome.problem
    assert names(tmp_path) == ["step-00000001"]


def test_pieces_that_do_not_make_up_a_tensor_are_not_committed(tmp_path):
    t = torch.ones(10)
    whole = Piece("w", "param", (10,), 0, 10, t)
    for pieces, fault in [([Piece("w", "param", (10,), 0, 4, t[:4])], "elements 4 to 10 are in no file"),
                          ([Piece("w", "param", (10,), 4, 10, t[4:])], "elements 0 to 4 are in no file"),
                          ([whole, Piece("w", "param", (10,), 3, 5, t[3:5])], "elements 3 to 5 are there twice"),
                          ([whole, Piece("w", "param", (10,), 10, 11, t[:1])], "10 to 11 are beyond its shape")]:
        outcome = Saver(tmp_path, Alone(), CheckpointConfig(), "run").save(1, iter(pieces), TrainState(step=1))
        assert outcome.status == "failed" and fault in outcome.problem
    pieces = [Piece("w", "param", (10,), 0, 5, t[:5]), Piece("w", "param", (5, 2), 5, 10, t[5:])]
    outcome = Saver(tmp_path, Alone(), CheckpointConfig(), "run").save(1, iter(pieces), TrainState(step=1))
    assert "[10] float32 in rank-00000.bin and [5, 2] float32" in outcome.problem
    with pytest.raises(ValueError, match="says elements 0 to 10, holds 4"):
        Saver(tmp_path, Alone(), CheckpointConfig(), "run").save(
            1, iter([Piece("w", "param", (10,), 0, 10, t[:4])]), TrainState(step=1))


def test_files_of_a_rank_that_rank_0_cannot_see(tmp_path, monkeypatch):
    """Nodes that do not share the run directory: the other rank's file is elsewhere."""
    real = background.RankFile

    def elsewhere(directory, run_id, step, rank, world_size, expected):
        there = directory if rank == 0 else tmp_path / "other-node" / directory.name
        return real(there, run_id, step, rank, world_size, expected)

    monkeypatch.setattr(background, "RankFile", elsewhere)
    outcomes = on_ranks(2, lambda r: save(Saver(tmp_path / "run", r, CheckpointConfig(), "run"), 1, None, r.rank, 2))
    assert [o.status for o in outcomes] == ["failed", "failed"]
    assert "all nodes share" in outcomes[0].problem and "see its log" in outcomes[1].problem


def test_no_host_memory_for_a_copy(tmp_path, monkeypatch):
    def none(self):
        raise MemoryError("none left")

    monkeypatch.setattr(stage.Pool, "_make", none)
    drained = []

    def pieces(rank):
        yield from cut(state_at(1), rank, 2)
        drained.append(rank)

    def work(ranks):
        saver = Saver(tmp_path, ranks, CheckpointConfig(asynchronous=True), "run")
        return saver.save(1, pieces(ranks.rank), TrainState(step=1))

    for outcome in on_ranks(2, work):
        assert outcome.status == "failed" and "2 ranks have no host memory" in outcome.problem
        assert outcome.bytes > 6_000_000
    assert sorted(drained) == [0, 1]


def test_a_bug_is_raised_and_not_hidden(tmp_path, monkeypatch):
    for bug in (ZeroDivisionError("of ours"), SystemExit(3)):  # no OfficinaError: nothing that a user could mend
        for method in ("__init__", "write", "finish"):
            with monkeypatch.context() as m, pytest.raises(RuntimeError, match=type(bug).__name__) as caught:
                m.setattr(rank_file.RankFile, method, _raise_it(bug))
                save(Saver(tmp_path, Alone(), CheckpointConfig(), "run"), 1)
            assert caught.value.__cause__ is bug and latest_valid(tmp_path) is None
    with monkeypatch.context() as m, pytest.raises(RuntimeError, match="ended before the file was finished"):
        m.setattr(background.Writing, "_write", lambda *_: None)
        save(Saver(tmp_path, Alone(), CheckpointConfig(), "run"), 1)
    with pytest.raises(ValueError, match="train_state is of step 2, to be saved as step 1"):
        Saver(tmp_path, Alone(), CheckpointConfig(), "run").save(1, iter(()), TrainState(step=2))
    with pytest.raises(ValueError, match="run id of 600 characters"):
        Saver(tmp_path, Alone(), CheckpointConfig(), "x" * 600)


def _raise_it(error):
    def fail(*_):
        raise error
    return fail


@pytest.mark.parametrize(("error", "asynchronous", "remedy"), [
    (MemoryError("no segment"), True, "Save without a copy of the state: checkpoint.asynchronous=false"),
    (MemoryError("no segment"), False, "Mend that"), (OSError(errno.EIO, "x"), False, "Mend that"),
    (OSError(errno.EDQUOT, "x"), False, "Make room, or keep fewer: checkpoint.keep_last=1")])
def test_a_failed_save_says_what_helps(tmp_path, monkeypatch, error, asynchronous, remedy):
    monkeypatch.setattr(rank_file.RankFile, "write", _raise_it(error))
    saver = Saver(tmp_path, Alone(), CheckpointConfig(asynchronous=asynchronous), "run")
    outcome = save(saver, 1)
    outcome = saver.wait() or outcome
    assert outcome.status == "failed" and remedy in outcome.problem
    assert errno.errorcode[getattr(error, "errno", errno.ENOMEM)] in outcome.problem


def test_links_are_removed_and_not_what_they_lead_to(tmp_path):
    archive, run_dir = tmp_path / "archive", tmp_path / "run"
    saver = Saver(run_dir, Alone(), CheckpointConfig(keep_last=1), "run")
    save(saver, 1)
    archive.mkdir()
    step_dir(run_dir, 1).rename(archive / "one")
    step_dir(run_dir, 1).symlink_to(archive / "one")
    before = {path.name: path.read_bytes() for path in (archive / "one").iterdir()}
    step_dir(run_dir, 2).symlink_to(tmp_path / "nowhere")
    outcome = save(saver, 2)
    assert outcome.status == "saved" and outcome.note is None and not step_dir(run_dir, 2).is_symlink()
    assert names(run_dir) == ["step-00000002"]
    assert {path.name: path.read_bytes() for path in (archive / "one").iterdir()} == before and COMMIT in before


def test_what_made_way_before_a_kill_is_removed_when_superseded(tmp_path):
    save(Saver(tmp_path, Alone(), CheckpointConfig(), "run"), 1)
    step_dir(tmp_path, 1).rename(step_dir(tmp_path, 1).with_suffix(".old"))
    saver = Saver(tmp_path, Alone(), CheckpointConfig(keep_last=2), "run")
    save(saver, 2)
    assert names(tmp_path) == ["step-00000001.old", "step-00000002"]
    save(saver, 3)
    assert names(tmp_path) == ["step-00000002", "step-00000003"]


def test_asynchronous_save_copies_settles_and_skips(tmp_path, monkeypatch):
    real, skipped_on = rank_file.RankFile.finish, threading.Semaphore(0)

    def slow(self):
        assert skipped_on.acquire(timeout=60)
        return real(self)

    monkeypatch.setattr(rank_file.RankFile, "finish", slow)

    def work(ranks):
        saver = Saver(tmp_path, ranks, CheckpointConfig(asynchronous=True), "run")
        state = state_at(1)
        saver.prepare(cut(state, ranks.rank, 2))
        first = save(saver, 1, state, ranks.rank, 2)
        for t in state.values():
            t.zero_()  # training goes on in the same memory
        skipped = save(saver, 2, state, ranks.rank, 2)
        skipped_on.release()
        settled = None
        while settled is None:
            settled = saver.settle(ranks.sum([saver.pending_vote()])[0])
            time.sleep(0.01)
        assert saver.settle(ranks.sum([saver.pending_vote()])[0]) is None
        assert saver.wait() is None
        return first, skipped, settled, saver.skipped

    for first, skipped, settled, count in on_ranks(2, work):
        assert first.status == "pending"
        assert skipped.status == "skipped" and count == 1
        assert "step 1 is still being written" in skipped.problem and "checkpoint.every_steps=1000" in skipped.problem
        assert settled.status == "saved" and settled.step == 1 and settled.durable_s > settled.stall_s
    with open_checkpoint(tmp_path) as opened:
        assert holds(opened, state_at(1))


def test_old_checkpoint_that_cannot_be_removed_is_a_note(tmp_path, monkeypatch):
    from officina.trainer.checkpoint import keep

    saver = Saver(tmp_path, Alone(), CheckpointConfig(keep_last=1), "run")
    save(saver, 1)
    monkeypatch.setattr(keep, "remove_checkpoint", _raise(errno.EACCES))
    outcome = save(saver, 2)
    assert outcome.status == "saved" and outcome.problem is None
    assert "step-00000001 is superseded and could not be removed: Permission denied" in outcome.note


@pytest.mark.parametrize("asynchronous", [False, True])
def test_the_commit_appears_when_all_else_is_on_the_disk(tmp_path, monkeypatch, asynchronous):
    """No power is cut here: what a cut would lose is counted, from the calls that change the disk and those that sync it."""
    lost, synced, at_commit, paths = set(), set(), [], {}

    def watch(name, note):
        real = getattr(os, name)

        def watched(*args, **kwargs):
            found = real(*args, **kwargs)
            note(found, *args)
            return found

        monkeypatch.setattr(os, name, watched)

    def opened(fd, path, flags, *_):
        paths[fd] = Path(path)
        if flags & os.O_CREAT and Path(path).suffix != ".tmp":  # a name that does not have to last
            lost.add(Path(path).parent)

    def renamed(_, old, new):
        if Path(new).name == COMMIT:
            at_commit.append(sorted(lost))
        lost.add(Path(new).parent)

    def fsynced(_, fd):
        lost.discard(paths[fd])
        synced.add(paths[fd].relative_to(tmp_path).as_posix())

    watch("open", opened)
    watch("mkdir", lambda _, path, *mode: lost.add(Path(path).parent))
    watch("pwrite", lambda _, fd, *rest: lost.add(paths[fd]))
    watch("ftruncate", lambda _, fd, size: lost.add(paths[fd]))
    watch("fsync", fsynced)
    watch("rename", renamed)
    watch("replace", renamed)

    def work(ranks):
        for steps in ((1, 2), (2,)):  # the second start writes step 2 anew
            saver = Saver(tmp_path, ranks, CheckpointConfig(asynchronous=asynchronous), "run")
            for step in steps:
                outcome = save(saver, step, None, ranks.rank, 2)
                assert (saver.wait() or outcome).status == "saved"

    on_ranks(2, work)
    assert at_commit == [[], [], []] and not lost
    step = "checkpoints/step-00000002"
    assert {".", "checkpoints", step, f"{step}/rank-00000.bin", f"{step}/rank-00001.json", f"{step}/COMMIT.tmp"} <= synced


def test_a_rank_that_holds_nothing(tmp_path):
    state = state_at(1, 3000)
    on_ranks(3, lambda r: Saver(tmp_path, r, CheckpointConfig(), "run").save(
        1, cut(state, 0, 1) if r.rank == 1 else iter(()), TrainState(step=1)))
    with open_checkpoint(tmp_path) as opened:
        assert opened.world_size == 3 and holds(opened, state)
