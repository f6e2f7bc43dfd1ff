"""Whole runs by the console script: start, resume, branch; alone and as ranks of torchrun."""

import json
import os
import re
import shutil
import subprocess
import sys
import threading
import time
from pathlib import Path
from unittest import mock

import pytest
import yaml

from officina.configs.compose import compose
from officina.launch import cli, commands, eval_commands
from officina.launch.start import plan_resume, plan_train, refuse_existing, refuse_foreign, wait_for_start, write_start
from officina.trainer.data.ledger import read_ledger
from officina.trainer.data.manifest import open_dataset
from officina.trainer.data.removal import remove
from officina.trainer.errors import EXIT_CONTINUE, EXIT_USER, ConfigError, LaunchError
from officina.trainer.evaluation import Results
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


def test_a_learning_rate_that_goes_up_again_is_told(home, run, monkeypatch):
    monkeypatch.chdir(home)
    [note] = plan_resume(run, ["steps=40"], world_size=1).checked().notes()
    assert re.match(r"the learning rate goes up from 4\.00e-04 to 3\.\d\de-03 at step 4, where .*runs/first had", note)
    for words in (["steps=40", "optim.lr=1e-4"], ["steps=40", "lr_schedule=constant", "optim.lr=4e-4"]):
        assert plan_resume(run, words, world_size=1).checked().notes() == []
    assert plan_train(["from=runs/first@2", "name=early"], home / "runs", world_size=1).checked().notes() == []


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


def test_a_branch_leaves_out_mixtures_and_names_settings_that_came_later(home, run, monkeypatch, capsys):
    """runs/first has been gone on with from step 4: another rate, and a second source."""
    monkeypatch.chdir(home)
    words = ["from=runs/first@4", "name=early"]
    assert cli.main(["check", *words]) == 0
    told = capsys.readouterr().out
    assert "optim.lr: 0.001, which runs/first got after step 4; then it was optim.lr=0.004" in told
    assert "steps: 6, which" in told and "mixtures that runs/first got after step 4 are left out" in told
    assert "python (one)" in told and "two" not in told
    assert cli.main(["check", *words, "optim.lr=0.004"]) == 0 and "optim.lr: 0.001, which" not in capsys.readouterr().out
    assert cli.main(["check", "from=runs/first", "name=late", "steps=9"]) == 0
    told = capsys.readouterr().out
    assert "which runs/first got" not in told and "more (two) 50.00%" in told
    branch = plan_train(words, home / "runs", world_size=1).checked().run
    assert branch.data == compose([*TINY, "data.sources.python.path=one"]).data and branch.optim.lr == 0.001


def test_a_copy_with_fewer_removed_documents_than_the_run_has_heeded_is_refused(home, tmp_path, monkeypatch):
    monkeypatch.chdir(home)
    copies = [tmp_path / name for name in ("before", "after")]
    for copy in copies:
        shutil.copytree(home / "one", copy)
    remove(copies[1], [f"{open_dataset(copies[1]).shards[0].path}:0"])
    for copy, status in ((copies[1], 0), (copies[0], EXIT_USER), (copies[1], 0)):
        steps = 3 + len(read_history(home / "runs/heeds")) if (home / "runs/heeds").exists() else 2
        words = ["resume", "runs/heeds"] if steps > 2 else ["train", *TINY, "name=heeds"]
        told = officina(home, *words, f"steps={steps}", f"data.sources.python.path={copy}", status=status)
        assert ("0 lists of removed documents, and the run has heeded 1" in told.stderr) is bool(status)


@pytest.mark.parametrize(("words", "says"), [
    (["resume", "runs/first", "steps=9", "data.sources.python.path=two"], "and the run has read"),
    (["train", "from=runs/first", "name=x", "steps=9", "data.sources.python.path=two"], "=one, and beside it data.sources.NEW"),
    (["resume", "runs/first", "steps=9", "~data.sources"], "data.sources: is empty"),
    (["resume", "runs/first", "steps=9", "init_from=runs/first"], "not come or go"),
    (["resume", "runs/first", "from=runs/first@2"], "officina train from=runs/first@2"),
    (["train", "from=runs/first@\N{SUPERSCRIPT TWO}"], "STEP must be a number"),
    (["eval", "runs/first", "step=\N{SUPERSCRIPT TWO}"], "has checkpoints of steps"),
    (["eval", "runs/first", "model.d_model=64"], "Try: model.d_model=32"),
    (["train", *TINY, "data.sources.python.path=one", "name=one", "--runs-dir", "."], "one is a data set. Try: name=one-2"),
    (["check", *TINY, "data.sources.python.path=one", "name=text", "--runs-dir", "."], "text holds files of no run"),
    (["train", "from=runs/first", "steps=9", "name=text", "--runs-dir", "."], "text holds files of no run")])
def test_what_is_refused_before_anything_is_written(home, run, words, says, monkeypatch, capsys):
    monkeypatch.chdir(home)
    before = {path: path.stat().st_mtime_ns for path in home.rglob("*")}
    assert cli.main(words) == EXIT_USER
    assert says in capsys.readouterr().err
    assert {path: path.stat().st_mtime_ns for path in home.rglob("*")} == before


def test_what_an_evaluation_changed_stands_beside_its_numbers(home, run, monkeypatch, capsys):
    monkeypatch.chdir(home)
    monkeypatch.setattr(eval_commands, "start", lambda *_: 0)
    monkeypatch.setattr(eval_commands, "read_results", lambda _: Results(step=6, run_id="a", engine="ddp", world_size=1))
    for words, told in ((["model.rope.theta=1e6"], ["with model.rope.theta=1e+06, which is 10000 in the run"]), ([], []),
                        (["data.overlong=leave_out"], ["with data.overlong=leave_out, which is auto in the run"]),
                        (["ranks=2", "engine=ddp"], [])):
        assert cli.main(["eval", "runs/first", *words]) == 0
        assert [line for line in capsys.readouterr().out.splitlines() if line.startswith("with ")] == told


@pytest.mark.parametrize("names", [[], [".claim"], [".claim", "code"], [".claim", "checkpoints", "base"], ["history.jsonl"]])
def test_what_a_start_of_ours_left_may_be_begun_again(tmp_path, names):
    plan = plan_train([*TINY, "data.sources.python.path=x", "name=again"], tmp_path, world_size=1)
    plan.run_dir.mkdir()
    for name in names:
        (plan.run_dir / name).write_text('{"run_id": "a"}\n') if "." in name else (plan.run_dir / name).mkdir()
    refuse_foreign(plan)
    (plan.run_dir / "dataset.json").write_text("{}")
    with pytest.raises(ConfigError, match="is a data set"):
        refuse_foreign(plan)


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


def test_a_kill_while_a_step_was_saved_anew_loses_no_checkpoint(home, run, tmp_path, monkeypatch):
    monkeypatch.chdir(home)
    again = tmp_path / "again"
    shutil.copytree(run, again)
    step = committed_steps(run)[-1]
    newest = again / f"checkpoints/step-{step:08d}"
    newest.rename(newest.with_suffix(".old"))
    newest.mkdir()  # make_way, and no COMMIT yet
    origin = plan_resume(again, [], world_size=1).origin
    assert origin.step == step and origin.position == plan_resume(run, [], world_size=1).origin.position > 0
    branch = plan_train([f"from={again}", f"steps={step + 1}", "name=of-old"], tmp_path, world_size=1).checked()
    write_start(branch, 1)
    assert committed_steps(tmp_path / "of-old") == [step]


def test_a_branch_that_was_killed_while_it_started_may_be_started_again(home, run, tmp_path, monkeypatch):
    monkeypatch.chdir(home)
    first, last = committed_steps(run)[-2:]

    def branch(step):
        return plan_train([f"from=runs/first@{step}", "steps=9", "name=cut"], tmp_path, world_size=1).checked()

    for killed_in in ("append_history", "os.replace", "save_config"):
        with monkeypatch.context() as m, pytest.raises(KeyboardInterrupt):
            m.setattr(f"officina.launch.start.{killed_in}", mock.Mock(side_effect=KeyboardInterrupt))
            write_start(branch(last), 1)
        assert not (tmp_path / "cut/config.yaml").exists()
        refuse_existing(branch(first))
    assert committed_steps(tmp_path / "cut") == [last]
    write_start(branch(first), 1)
    assert committed_steps(tmp_path / "cut") == [first] and [s["step"] for s in read_history(tmp_path / "cut")] == [first]
    with pytest.raises(ConfigError, match="is a run with checkpoints"):
        refuse_existing(branch(first))
    (tmp_path / "cut/config.yaml").unlink()
    (tmp_path / "cut/metrics.jsonl").touch()
    with pytest.raises(ConfigError, match="is a run with checkpoints"):  # it trained: somebody removed its configuration
        refuse_existing(branch(first))


def test_a_report_that_fails_does_not_hide_how_the_run_ended(home, run, monkeypatch, capsys):
    monkeypatch.chdir(home)
    monkeypatch.setattr("officina.launch.local.start", lambda *_: EXIT_CONTINUE)
    monkeypatch.setattr("officina.launch.report.write_report", mock.Mock(side_effect=OSError(28, "No space left on device")))
    steps = committed_steps(run)[-1] + 1
    assert cli.main(["resume", "runs/first", f"steps={steps}"]) == EXIT_CONTINUE
    told = capsys.readouterr().err
    assert "no report (OSError: [Errno 28] No space left on device)" in told and "officina report runs/first" in told


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
    monkeypatch.setattr(commands, "_RANK_0_ALSO_S", 0.2)
    assert cli.main(["train", "steps=0"]) == EXIT_USER
    assert capsys.readouterr().err == ""
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("LOCAL_RANK", "0")
    assert cli.main(["train", "steps=0"]) == EXIT_USER
    assert "steps=0" in capsys.readouterr().err


def test_another_rank_tells_what_it_meets_alone(home, monkeypatch, capsys):
    """As on a node that lacks the data, or another file system."""
    monkeypatch.chdir(home)
    for name, value in {"TORCHELASTIC_RUN_ID": "x", "RANK": "1", "LOCAL_RANK": "0", "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "1",
                        "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29999"}.items():
        monkeypatch.setenv(name, value)
    words = [*TINY, "engine=fsdp2", "name=alone", "data.sources.python.path=nowhere"]
    plan = plan_train(words, Path("runs"), world_size=2)
    plan.run_dir.mkdir(parents=True)
    save_config(plan.run, plan.run_dir)  # rank 0 has the data
    assert cli.main(["train", *words]) == EXIT_USER
    host = os.uname().nodename
    err = capsys.readouterr().err
    assert err.startswith(f"officina: rank 1 on {host}: ") and "data.sources.python.path=nowhere: is no data set" in err
    monkeypatch.setattr(commands, "wait_for_start", lambda plan, wait_s=0: wait_for_start(plan, wait_s=0.2))
    assert cli.main(["train", *TINY, "engine=fsdp2", "name=apart", "data.sources.python.path=one"]) == EXIT_USER
    err = capsys.readouterr().err
    assert err.startswith(f"officina: rank 1 on {host}: ") and "is on a shared file system" in err


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
