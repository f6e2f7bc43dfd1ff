"""A step that does not end: which rank holds it up, and that all ranks leave. With real ranks of the real trainer."""

import os
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
from data_sets import write_tokens

from officina.launch.local import run_ranks
from officina.trainer import stall
from officina.trainer.config import DDPConfig
from officina.trainer.errors import EXIT_BUG, EXIT_DONE
from officina.trainer.metrics import read_metrics
from officina.trainer.rank_env import LONE
from officina.trainer.rank_log import failure_path, log_path
from tests.lives import begin, plain_run

STALLED = Path(__file__).with_name("stalled_rank.py")


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    write_tokens(tmp_path / "set", {"train": [300] * 12, "validation": [90]}, dtype="u16")
    run = plain_run(tmp_path / "set", engine=DDPConfig(), steps=9, stall_after=4.0)
    begin(tmp_path / "run", replace(run, model=replace(run.model, vocab_size=4096), data=replace(run.data, prefetch_batches=1)))
    return tmp_path / "run"


def live(run_dir: Path, deed: str) -> int:
    return run_ranks(run_dir, 2, environ=os.environ, grace_s=20, command=[sys.executable, str(STALLED), str(run_dir), deed])


@pytest.mark.parametrize(("deed", "said", "frame"), [
    ("data", "rank 1 of 2 on {} failed: Stalled: step 6 has not ended after ", "in hang\n"),
    ("stopped", "rank 0 of 2 on {} failed: Stalled: nothing was heard of rank 1, and step 6 has not ended after ", "loop.py")])
def test_a_stall_names_who_holds_it_up_and_the_run_goes_on(run_dir: Path, capfd, deed: str, said: str, frame: str) -> None:
    assert live(run_dir, deed) == EXIT_BUG
    first, *rest = capfd.readouterr().err.strip().splitlines()
    assert first.startswith("officina: " + said.format(os.uname().nodename)), first
    assert ("This rank stands in next_step, " in first) == (deed == "data")
    assert ("This rank waits for others in " in first) == (deed == "stopped")
    assert frame in "\n".join(rest) and frame in log_path(run_dir, int(deed == "data")).read_text()
    assert read_metrics(run_dir).steps[-1].step == 5
    assert live(run_dir, "none") == EXIT_DONE and read_metrics(run_dir).steps[-1].step == 9


def test_a_disk_that_takes_no_record_does_not_hold_the_rank(run_dir: Path, capfd) -> None:
    """Opening the pipe that lies where the record would be written never ends, as with files of a server that is gone."""
    log_path(run_dir, 1).parent.mkdir()
    os.mkfifo(failure_path(run_dir, 1).with_suffix(".partial"))
    assert live(run_dir, "data") == EXIT_BUG
    err = capfd.readouterr().err
    assert "rank 1 on " in err and "Stalled: step 6 has not ended" in err and "(the disk took no record of it)" in err


@pytest.mark.parametrize(("first_s", "stands_still"), [([60.0, 28.0, 14.0], False), ([60.0, 0.02, 0.02], True)])
def test_what_lasts_long_is_measured_by_what_is_usual(tmp_path: Path, monkeypatch, first_s: list[float], stands_still: bool):
    ended = []
    monkeypatch.setattr(stall, "_EVERY_S", 0.01)
    monkeypatch.setattr(stall.Watch, "_end", lambda self, turn, *_: ended.append(turn[0]))
    with stall.Watch(tmp_path, LONE, stall_after_s=0.1, on_gpu=False) as watch:
        for number, seconds in enumerate(first_s, 1):
            watch.step(number)
            time.sleep(0.3)  # none of the first is watched
            watch.stepped(seconds)
        watch.step(4)
        end = time.monotonic() + (60 if stands_still else 1)
        while not ended and time.monotonic() < end:
            time.sleep(0.01)
    assert set(ended) == ({4} if stands_still else set())


def test_a_suspended_run_has_not_stalled(run_dir: Path) -> None:
    """As by `scontrol suspend`, or a laptop that slept."""
    assert live(run_dir, "suspended") == EXIT_DONE
    assert max(step.step_time_s for step in read_metrics(run_dir).steps) > 4


