"""The folder of an evaluation under srun: rank 0 makes it ready while the other ranks wait for it."""

from argparse import Namespace
from dataclasses import replace
from datetime import UTC, datetime
from types import SimpleNamespace

import pytest
from data_sets import make_run, write_tokens

from officina.launch import eval_commands
from officina.trainer.config import DecoderConfig, RunConfig
from officina.trainer.data.policy import Policy, write_policy
from officina.trainer.data.register import Going, enter
from officina.trainer.errors import ConfigError, LaunchError, OfficinaError
from officina.trainer.evaluation import Request, Results, read_request
from officina.trainer.run_dir import CONFIG, REQUEST, RESULTS, Start, append_history, load_config, save_config


def test_what_is_asked_again_is_ready_throughout(tmp_path, monkeypatch):
    """Ranks that find the earlier request go on at once: config and request must never be gone under them."""
    folder, run, request = tmp_path / "evals/one", RunConfig(), Request(step=3, tasks=[])
    eval_commands._make_ready(folder, run, request)
    (folder / RESULTS).write_text("{}")
    save, present = eval_commands.save_config, []
    monkeypatch.setattr(eval_commands, "save_config", lambda *given: (
        present.append([(folder / name).exists() for name in (CONFIG, REQUEST, RESULTS)]), save(*given)))
    eval_commands._make_ready(folder, run, request)
    assert present == [[True, True, False]], "and no results of before"
    eval_commands._wait_for(folder, run, request)


def test_a_rank_does_not_take_the_run_of_an_earlier_evaluation(tmp_path, monkeypatch):
    monkeypatch.setattr(eval_commands, "_WAIT_S", 0.2)
    folder, run, request = tmp_path / "evals/one", RunConfig(), Request(step=3, tasks=[])
    eval_commands._make_ready(folder, run, request)
    changed = replace(run, seed=run.seed + 1)
    with pytest.raises(LaunchError, match="must see the same run directory"):
        eval_commands._wait_for(folder, changed, request)
    eval_commands._make_ready(folder, changed, request)
    eval_commands._wait_for(folder, changed, request)
    assert load_config(folder).seed == changed.seed


def test_benchmarks_need_no_data_set(tmp_path, monkeypatch):
    """An imported model has none; the held-out loss is of one."""
    save_config(RunConfig(model=DecoderConfig(vocab_size=320), device="cpu"), tmp_path)
    monkeypatch.setattr(eval_commands, "list_checkpoints", lambda run_dir: [SimpleNamespace(step=0, status="complete")])
    monkeypatch.setattr(eval_commands, "find_spec", lambda name: name)
    started = []
    monkeypatch.setattr(eval_commands, "start", lambda folder, run, env: started.append(read_request(folder)) or 75)
    asked = Namespace(run=str(tmp_path), words=["tasks=one"], tasks_dir="", shots=None, limit=None)
    assert eval_commands.evaluate(asked) == 75 and started[0].tasks == ["one"]
    asked.run = f"{tmp_path}@0"
    assert eval_commands.evaluate(asked) == 75 and started[1] == started[0]
    asked.words = ["tasks=one", "step=1"]
    with pytest.raises(OfficinaError, match="@0 step=1 names two steps"):
        eval_commands.evaluate(asked)
    asked.words = []
    with pytest.raises(ConfigError, match=r"data\.sources: is empty"):
        eval_commands.evaluate(asked)


def test_an_evaluation_is_no_further_use_of_data_that_one_run_may_use(tmp_path, monkeypatch):
    """Nor do benchmarks read the run's data, whose time may be over."""
    monkeypatch.setattr(eval_commands, "list_checkpoints", lambda run_dir: [SimpleNamespace(step=5, status="complete")])
    monkeypatch.setattr(eval_commands, "find_spec", lambda name: name)
    monkeypatch.setattr(eval_commands, "start", lambda folder, run, env: 75)
    (tmp_path / "set").mkdir()
    policy = Policy(max_runs=1, not_after="2099-01-01")
    write_tokens(tmp_path / "set", {"train": [64], "validation": [20]}, policy_sha256=write_policy(tmp_path / "set", policy))
    run = replace(make_run({"s": (tmp_path / "set", 1)}, rows=2), name="one", steps=200, device="cpu")
    save_config(run, tmp_path)
    append_history(tmp_path, Start(run_id="aa", action="start", words=[], step=0, world_size=1, engine="single", commit=None))
    enter(run, Going("aa"))
    asked = Namespace(run=str(tmp_path), words=[], tasks_dir="", shots=None, limit=None)
    assert eval_commands.evaluate(asked) == 75
    monkeypatch.setattr("officina.trainer.data.gate.ends", lambda day: datetime(2020, 1, 1, tzinfo=UTC))
    with pytest.raises(ConfigError, match="2099-01-01"):
        eval_commands.evaluate(asked)
    asked.words = ["tasks=one"]
    assert eval_commands.evaluate(asked) == 75


def test_what_is_told_of_a_users_own_loss_is_no_perplexity(tmp_path, capsys):
    found = {"source": "tiles", "tokens": 1256, "loss_nats": 0.5, "languages": {}, "lost_blocks": 0}
    told = []
    for unit in ("records", "tokens"):
        eval_commands._tell(tmp_path, Results(step=3, run_id="a", engine="ddp", world_size=2, held_out=[found]), unit)
        told.append(capsys.readouterr().out)
    assert all(word in told[0] for word in ("records", "1,256", "0.5000"))
    assert not any(word in told[0] for word in ("token", "perplexity")) and "1.65" in told[1]
