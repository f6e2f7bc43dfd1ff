"""Conditions of use over the life of a run: they end while it trains, and maxima are counted at its saves."""

from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from data_sets import write_tokens

from officina.launch.start import plan_resume, plan_train, write_start
from officina.trainer.config import DDPConfig, RunConfig, SingleConfig, SourceConfig
from officina.trainer.data.describe import change
from officina.trainer.data.ledger import audit
from officina.trainer.data.policy import Policy
from officina.trainer.data.register import Going, enter, read_entries
from officina.trainer.data.summary import summarise
from officina.trainer.errors import EXIT_DONE
from officina.trainer.metrics import read_metrics
from officina.trainer.run_dir import committed_steps, read_run_id
from tests.distributed import RankFailure
from tests.lives import begin, changed, plain_run


def make_run(folder: Path, policy: Policy, **changes: object) -> RunConfig:
    write_tokens(folder, {"train": [300, 500, 400], "validation": [90]}, dtype="u16", licence="MIT")
    change(folder, policy=policy)
    run = plain_run(folder, **changes)
    return replace(run, data=replace(run.data, sources={"text": SourceConfig(path=str(folder))}),
                   model=replace(run.model, vocab_size=2048))


def test_conditions_end_during_the_run(pool, tmp_path: Path) -> None:
    """One rank's clock passes the end: both stop after the same step, with a checkpoint, and say why and what to do."""
    run = make_run(tmp_path / "set", Policy(not_after="2999-12-31"), engine=DDPConfig())
    run_dir = tmp_path / "run"
    begin(run_dir, run)
    with pytest.raises(RankFailure) as failure:
        pool.run(2, "tests.lives:live", str(run_dir), fault="conditions end")
    told = str(failure.value)
    assert "stopped in good order after step 4, with a checkpoint: data.sources.text may be used until 3000-01-01" in told
    assert f"officina data describe {tmp_path / 'set'} --policy FILE" in told
    assert "'~data.sources.text'" in told
    assert committed_steps(run_dir) == [3, 4]
    stop = read_metrics(run_dir).generations[-1].stop
    assert (stop.reason, stop.exit_status) == ("conditions of use", 2)
    assert audit(run_dir).ok and summarise(run_dir).total == 4 * 7 * 32
    change(tmp_path / "set", policy=Policy(not_after="2999-12-30"))
    assert pool.run(2, "tests.lives:live", str(run_dir)) == [EXIT_DONE] * 2 and committed_steps(run_dir)[-1] == 8


def test_conditions_that_ended_before_the_first_step(pool, tmp_path: Path) -> None:
    """A rank that a launcher starts without asking the gate reads nothing for a step either."""
    run = make_run(tmp_path / "set", Policy(not_after="2020-01-01"), engine=SingleConfig())
    begin(tmp_path / "run", run)
    with pytest.raises(RankFailure, match="after step 0, with a checkpoint"):
        pool.run(1, "tests.lives:live", str(tmp_path / "run"))
    assert not (tmp_path / "run" / "ledger.jsonl").read_text()


def test_uses_are_counted_at_each_save(pool, tmp_path: Path) -> None:
    run = make_run(tmp_path / "set", Policy(max_tokens=8 * 7 * 32, max_days=9), engine=SingleConfig())
    run_dir = tmp_path / "run"
    begin(run_dir, run)
    enter(run, Going(read_run_id(run_dir)))
    pool.run(1, "tests.lives:live", str(run_dir), stop_after=5)
    [entry] = read_entries(tmp_path / "set" / "use")
    assert (entry.rows, entry.planned_rows, entry.row_tokens, entry.done) == (5 * 7, 8 * 7, 32, False)
    changed(run_dir)
    assert pool.run(1, "tests.lives:live", str(run_dir)) == [EXIT_DONE]
    [entry] = read_entries(tmp_path / "set" / "use")
    assert (entry.rows, entry.done) == (8 * 7, True) and entry.rows * entry.row_tokens == summarise(run_dir).total


def test_a_start_on_the_command_line_enters_the_register(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path))
    make_run(tmp_path / "set", Policy(max_runs=1, purpose=("research",)))
    words = ["steps=20", "model.vocab_size=2048", f"data.sources.text.path={tmp_path / 'set'}", "use=research",
             "lr_schedule.warmup_steps=1"]
    first = plan_train([*words, "name=one"], tmp_path / "runs", world_size=1).checked()
    write_start(first, 1)
    [entry] = read_entries(tmp_path / "set" / "use")
    assert entry.run == f"{read_run_id(tmp_path / 'runs' / 'one')}.one" and entry.purpose == "research"
    second = plan_train([*words, "name=two"], tmp_path / "runs", world_size=1)
    assert "may be used by 1 runs, and this would be number 2" in str(second.problems[0])
    assert plan_resume(tmp_path / "runs" / "one", [], world_size=1).problems == []
    product = plan_train([*words, "use=product"], tmp_path / "runs", world_size=1)
    assert "the purpose must be research" in str(product.problems[0])
    old = datetime.now(UTC) - timedelta(days=2)
    path = tmp_path / "set" / "use" / f"{entry.run}.json"
    path.write_text(path.read_text().replace(entry.last, old.strftime("%Y-%m-%dT%H:%M:%S.%fZ")))
    assert plan_train([*words, "name=two"], tmp_path / "runs", world_size=1).problems == []
