"""When a run stops by the clock."""

import json
import time

import pytest

from officina.trainer import time_left
from officina.trainer.time_left import END_TIME, TimeLeft


@pytest.fixture
def clock(monkeypatch):
    """Both clocks of the module, moved by hand."""
    now = [1000.0]
    monkeypatch.setattr(time_left.time, "monotonic", lambda: now[0])
    monkeypatch.setattr(time_left.time, "time", lambda: now[0])
    return now


def watch(tmp_path, end: float | None = None, *, limit: float | None = None, unknown: float = 60.0) -> TimeLeft:
    environ = {} if end is None else {END_TIME: f"{end:.0f}"}
    return TimeLeft(time_limit_s=limit, began_s=1000.0, unknown_save_s=unknown, run_dir=tmp_path, environ=environ)


def test_without_a_limit_it_is_never_time(tmp_path, clock):
    left = watch(tmp_path)
    clock[0] = 1e12
    assert not left.is_over()


def test_the_runs_own_limit_is_kept(tmp_path, clock):
    left = watch(tmp_path, limit=100)
    clock[0] = 1100.0
    assert not left.is_over()
    clock[0] = 1100.1
    assert left.is_over()


def test_a_save_that_was_never_measured_is_taken_to_last_the_grace_time(tmp_path, clock):
    left = watch(tmp_path, 2000.0)
    assert left.reserve_s == 30 + 1.5 * 60
    clock[0] = 1879.0
    assert not left.is_over()
    clock[0] = 1880.0
    assert left.is_over()


def test_a_short_job_is_not_all_reserve(tmp_path, clock):
    assert watch(tmp_path, 1100.0).reserve_s == 30 + 1.5 * 20


def test_the_reserve_follows_measured_saves_and_turns(tmp_path, clock):
    left = watch(tmp_path, 10_000.0)
    assert not left.is_over()
    clock[0] += 500  # the first step compiles: not to be expected again
    assert not left.is_over()
    clock[0] += 3
    assert not left.is_over()
    clock[0] += 7  # a step with an evaluation after it
    assert not left.is_over()
    clock[0] += 2
    assert not left.is_over()
    left.saved(4.0)
    left.saved(2.0)
    assert left.reserve_s == 30 + 1.5 * 4 + 7
    clock[0] = 10_000.0 - 30 - 6 - 7 - 3
    left._asked_s = clock[0] - 1
    assert not left.is_over()
    clock[0] += 3
    assert left.is_over()


def test_saves_of_earlier_starts_count(tmp_path, clock):
    save = {"event": "save", "step": 1, "path": "p", "bytes": 1, "stall_s": 1.0, "durable_s": 20.0}
    lines = [save, save | {"durable_s": 900.0, "problem": "disk full"}, save | {"durable_s": 8.0}]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines) + '{"torn')
    assert watch(tmp_path, 10_000.0).reserve_s == 30 + 1.5 * 20


@pytest.mark.parametrize("text", ["", "soon", "-5", "1e9", "inf"])
def test_an_end_that_is_no_time_counts_as_unknown(tmp_path, text):
    left = TimeLeft(time_limit_s=None, began_s=time.monotonic(), unknown_save_s=60, run_dir=tmp_path, environ={END_TIME: text})
    assert not left.is_over()


def test_the_end_that_slurm_tells_counts_in_tasks_of_srun_only(tmp_path, clock):
    def watched(launcher: str, **environ: str) -> bool:
        return TimeLeft(time_limit_s=None, began_s=1000.0, unknown_save_s=60, run_dir=tmp_path, launcher=launcher,
                        environ=environ).is_over()
    assert watched("srun", SLURM_JOB_END_TIME="1020")
    assert not watched("officina", SLURM_JOB_END_TIME="1020"), "left over from another job"
    assert not watched("srun", SLURM_JOB_END_TIME="1020", OFFICINA_END_TIME="5000")
