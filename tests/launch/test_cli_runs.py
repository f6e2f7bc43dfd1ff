"""Whole runs by the console script: start, resume, branch; alone and as ranks of torchrun."""

import json
import subprocess
import sys
import threading
import time
from pathlib import Path
from unittest import mock

import pytest
import yaml

from officina.configs.compose import compose
from officina.launch import cli
from officina.launch.start import plan_train, wait_for_start, write_start
from officina.trainer.data.ledger import read_ledger
from officina.trainer.errors import EXIT_CONTINUE, EXIT_USER, LaunchError
from officina.trainer.run_dir import committed_steps, load_config, read_history, save_config

BIN = Path(sys.executable).parent
TINY = ["experiment=demo", "model.n_layers=1", "model.d_model=32", "model.n_heads=2", "model.n_kv_heads=1", "model.d_ff=64",
        "steps=4", "batch.seq_len=32", "batch.global_tokens=256", "lr_schedule.warmup_steps=1", "checkpoint.every_steps=2",
        "eval.every_steps=0", "logging=files", "engine=single", "ranks=1", "threads=1", "precision=fp32", "device=cpu"]


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """A folder with two small data sets of one tokenizer."""
    folder = tmp_path_factory.mktemp("home")
    text = folder / "text"
    text.mkdir()
    for path in sorted(Path(json.__file__).parent.glob("*.py")):
        (text / path.name).write_text(path.read_text())
    officina(folder, "data", "build", "one", "text", "--include", "*.py", "--vocab-size", "300", "--validation", "0.3")
    officina(folder, "data", "build", "two", "text", "--include", "*.py", "--tokenizer", "one/tokenizer.json",
             "--validation", "0.5")
    return folder


def officina(folder, *words, status=0, launcher=()):
    done = subprocess.run([*launcher, BIN / "officina", *words], cwd=folder, capture_output=True, text=True, timeout=240)
    assert done.returncode == status, f"{words}: {done.returncode}\n{done.stdout}\n{done.stderr}"
    return done


@pytest.fixture(scope="module")
def run(home):
    officina(home, "train", *TINY, "data.sources.python.path=one", "name=first")
    return home / "runs/first"


def test_a_start_leaves_its_configuration_and_history(home, run):
    assert load_config(run) == compose([*TINY, "data.sources.python.path=one", "name=first"])
    [start] = read_history(run)
    assert (start["action"], start["step"], start["world_size"], start["engine"]) == ("start", 0, 1, "single")
    assert "steps=4" in start["words"] and start["versions"]["python"] and start["run_id"]
    assert committed_steps(run) == [2, 4]
    assert len((run / "metrics.jsonl").read_text().splitlines()) >= 4
    if start["diff"]:
        assert (run / start["diff"]).stat().st_size


def test_a_run_with_checkpoints_is_not_written_over(home, run):
    before = (run / "config.yaml").read_text()
    told = officina(home, "train", *TINY, "data.sources.python.path=one", "name=first", status=EXIT_USER).stderr
    assert "officina resume runs/first" in told and "name=first-2" in told
    assert (run / "config.yaml").read_text() == before and len(read_history(run)) == 1


def test_a_run_that_is_done_is_left_alone_and_a_chain_of_jobs_ends_well(home, run):
    assert "is done" in officina(home, "resume", "runs/first").stdout
    assert "steps=5" in officina(home, "resume", "runs/first", "seed=0", "logging=files", status=EXIT_USER).stderr
    assert len(read_history(run)) == 1


def test_planned_stages_are_read_as_planned_and_planned_anew(home):
    """A source that is held back for the end; then, from the middle, another plan with a source that joins."""
    words = [*TINY, "data.sources.python.path=one", "data.sources.more.path=two", "name=staged"]
    stages = "data.stages=[{from_step:0,weights:{python:1}},{from_step:3,weights:{more:1}}]"
    assert "from sample 24 more (two)" in officina(home, "check", *words, stages).stdout
    officina(home, "train", *words, stages)
    assert [entry.source_rows for entry in read_ledger(home / "runs/staged")[0]] == [{"python": 8}] * 3 + [{"more": 8}]

    again = ["from=runs/staged@2", "name=anew", "steps=6", "data.sources.third.path=two"]
    told = officina(home, "train", *again, status=EXIT_USER).stderr
    assert "data.stages" in told and "from sample 24 on another mixture is planned" in told and "from_step: 2" in told
    officina(home, "train", *again, "data.stages=[{from_step:2,weights:{third:1}},{from_step:5,weights:{python:1}}]")
    assert [entry.source_rows for entry in read_ledger(home / "runs/anew")[0]] == [{"third": 8}] * 3 + [{"python": 8}]
    assert "none twice, none missing" in officina(home, "data", "audit", "runs/anew").stdout


def test_resume_with_another_mixture_and_branch_of_it(home, run):
    """One run's life: longer, another mixture and rate; then a WSD decay branched from its middle."""
    officina(home, "resume", "runs/first", "steps=6", "optim.lr=1e-3", "data.sources.more.path=two")
    again = load_config(run)
    assert [(s.from_sample, s.weights) for s in again.data.timeline] == [
        (0, {"python": 1.0}), (32, {"python": 1.0, "more": 1.0})]
    start, resume = read_history(run)
    assert (resume["action"], resume["step"], resume["run_id"]) == ("resume", 4, start["run_id"])
    assert {"key": "optim.lr", "old": 0.004, "new": 0.001} in resume["changes"]
    assert "none twice, none missing" in officina(home, "data", "audit", "runs/first").stdout

    told = officina(home, "check", "from=runs/first@4", "name=decay", "lr_schedule=wsd", "lr_schedule.decay_steps=2").stdout
    assert "runs/first at step 4" in told and "lr_schedule.kind: cosine -> wsd" in told
    officina(home, "train", "from=runs/first@4", "name=decay", "lr_schedule=wsd", "lr_schedule.decay_steps=2")
    branch = home / "runs/decay"
    [record] = read_history(branch)
    assert (record["action"], record["step"], record["origin"]["name"]) == ("branch", 4, "first")
    assert record["run_id"] == start["run_id"] and committed_steps(branch) == [4, 6]
    steps = [json.loads(line)["step"] for line in (branch / "metrics.jsonl").read_text().splitlines()
             if '"loss_nats"' in line]
    assert steps and min(steps) == 5
    one, other = (home / f"runs/{name}/checkpoints/step-00000004/COMMIT" for name in ("first", "decay"))
    assert one.read_bytes() == other.read_bytes()


@pytest.mark.parametrize(("words", "says"), [
    (["train", "from=runs/first@3"], "there are:"), (["train", "from=runs/first@x"], "STEP must be a number"),
    (["train", "from=runs/none"], "no run directory"), (["resume", "runs/none"], "no run directory"),
    (["train", "from=runs/first", "from=runs/other"], "more than one run"),
    (["resume", "runs/first", "seed=9"], "cannot change"),
    (["resume", "runs/first", "precision=bf16", "steps=9"], "--force"),
    (["resume", "runs/first", "experiment=demo"], "when a run is started"),
    (["resume", "runs/first", "steps=9", "optm.lr=1"], "optim.lr=1"),
    (["resume", "runs/first", "steps=9", "ranks=2"], "engine=fsdp2"),
    (["train", "from=runs/first", "name=first", "steps=9"], "is a run with checkpoints")])
def test_what_a_resume_or_branch_refuses(home, run, words, says):
    before = (run / "config.yaml").read_text()
    told = officina(home, *words, status=EXIT_USER).stderr
    assert says in told and "Traceback" not in told
    assert (run / "config.yaml").read_text() == before


def test_nothing_is_left_where_nothing_could_start(home):
    officina(home, "train", *TINY, "data.sources.python.path=one", "name=never", "steps=0", status=EXIT_USER)
    assert not (home / "runs/never").exists()


def test_a_place_that_cannot_be_written(home):
    (home / "file").write_text("")
    told = officina(home, "train", *TINY, "data.sources.python.path=one", "--runs-dir", "file/runs", status=EXIT_USER).stderr
    assert "--runs-dir" in told and "file/runs" in told


def test_one_start_at_a_time(home):
    """A second start beside one that trains would append to the same files: it is refused and changes nothing."""
    run = home / "runs/busy"
    words = [*TINY, "data.sources.python.path=one", "steps=1000000", "checkpoint.every_steps=0", "name=busy"]
    first = subprocess.Popen([BIN / "officina", "train", *words], cwd=home, stdout=subprocess.DEVNULL)
    try:
        deadline = time.monotonic() + 120
        while not (run / "metrics.jsonl").exists() and time.monotonic() < deadline:
            time.sleep(0.1)
        before = (run / "config.yaml").read_bytes()
        for again in (["resume", "runs/busy", "optim.lr=1e-4"], ["train", *words]):
            told = officina(home, *again, status=EXIT_USER).stderr
            assert f"runs/busy is being trained by another start (process {first.pid} on " in told
        assert (run / "config.yaml").read_bytes() == before and len(read_history(run)) == 1
    finally:
        first.terminate()
        status = first.wait(120)
    assert status == EXIT_CONTINUE
    officina(home, "resume", "runs/busy", f"steps={committed_steps(run)[-1] + 1}")
    assert (run / ".claim").read_text() == ""


def test_a_start_that_never_saved_may_be_repeated(home):
    words = [*TINY, "data.sources.python.path=one", "name=again"]
    plan = plan_train([w.replace("=one", f"={home}/one") for w in words], home / "runs", world_size=None).checked()
    with mock.patch("officina.launch.start.sync_folder") as sync:
        write_start(plan, 1)
    assert [call.args for call in sync.call_args_list] == [(plan.run_dir,), (plan.run_dir.parent,)]
    (plan.run_dir / "metrics.jsonl").write_text('{"step": 1}\n')
    officina(home, "train", *words)
    history = read_history(plan.run_dir)
    assert [start["action"] for start in history] == ["start", "start"] and len({s["run_id"] for s in history}) == 1
    assert '{"step": 1}' not in (plan.run_dir / "metrics.jsonl").read_text()


# ---- as ranks of a launcher ----------------------------------------------------------------------------------------
def test_ranks_of_torchrun_are_one_run(home):
    torchrun = [BIN / "torchrun", "--nproc-per-node", "2", "--no-python"]
    officina(home, "train", *TINY, "engine=fsdp2", "data.sources.python.path=one", "name=two-ranks", launcher=torchrun)
    [start] = read_history(home / "runs/two-ranks")
    assert (start["world_size"], start["engine"]) == (2, "fsdp2")
    assert committed_steps(home / "runs/two-ranks") == [2, 4]


def test_a_rank_waits_for_the_configuration_it_came_to(tmp_path):
    plan = plan_train([*TINY, "data.sources.python.path=x"], tmp_path, world_size=2)
    other = compose([*TINY, "seed=7"])
    plan.run_dir.mkdir()
    save_config(other, plan.run_dir)
    with pytest.raises(LaunchError, match="holds another run"):
        wait_for_start(plan, wait_s=0.2)
    writer = threading.Thread(target=lambda: (time.sleep(0.3), save_config(plan.run, plan.run_dir)))
    writer.start()
    wait_for_start(plan, wait_s=30)
    writer.join()
    (plan.run_dir / "config.yaml").unlink()
    with pytest.raises(LaunchError, match="has not appeared"):
        wait_for_start(plan, wait_s=0.2)


def test_only_rank_0_tells_what_is_wrong(monkeypatch, capsys, tmp_path):
    monkeypatch.chdir(tmp_path)
    for name, value in {"TORCHELASTIC_RUN_ID": "x", "RANK": "1", "LOCAL_RANK": "1", "WORLD_SIZE": "2",
                        "LOCAL_WORLD_SIZE": "2",
                        "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29999"}.items():
        monkeypatch.setenv(name, value)
    assert cli.main(["train", "steps=0"]) == EXIT_USER
    assert capsys.readouterr().err == ""
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("LOCAL_RANK", "0")
    assert cli.main(["train", "steps=0"]) == EXIT_USER
    assert "steps=0" in capsys.readouterr().err


def test_the_launchers_number_of_ranks_counts(home, monkeypatch, capsys):
    monkeypatch.chdir(home)
    for name, value in {"TORCHELASTIC_RUN_ID": "x", "RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "3",
                        "LOCAL_WORLD_SIZE": "3",
                        "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29999"}.items():
        monkeypatch.setenv(name, value)
    assert cli.main(["train", *TINY, "data.sources.python.path=one", "name=three"]) == EXIT_USER
    assert "there are 3 ranks" in capsys.readouterr().err


def test_config_yaml_is_what_was_asked_for(run):
    values = yaml.safe_load((run / "config.yaml").read_text())
    assert values["model"]["n_layers"] == 1 and values["engine"]["kind"] == "single"
