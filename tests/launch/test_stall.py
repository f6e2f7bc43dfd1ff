"""A step that does not end: which rank holds it up, and that all ranks leave. With real ranks of the real trainer."""

import os
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from data_sets import write_tokens

from officina.launch.local import run_ranks
from officina.trainer.config import DDPConfig
from officina.trainer.errors import EXIT_BUG, EXIT_DONE
from officina.trainer.metrics import read_metrics
from officina.trainer.rank_log import log_path
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


def test_a_suspended_run_has_not_stalled(run_dir: Path) -> None:
    """As by `scontrol suspend`, or a laptop that slept."""
    assert live(run_dir, "suspended") == EXIT_DONE
    assert max(step.step_time_s for step in read_metrics(run_dir).steps) > 4


