"""`officina submit` on a plain Slurm, site=slurm: a run, its continuation by another job, and what sbatch refuses."""

import re
import subprocess
import sys
import time
from pathlib import Path

import pytest
from data_sets import tokenizer_info, write_tokens
from slurm import SlurmCluster

from officina.launch import cli
from officina.launch.job_record import read_jobs
from officina.launch.submit import clean_environ
from officina.trainer.run_dir import load_config, read_history

pytestmark = pytest.mark.slurm
WORDS = ["name=mine", "model=tiny", "model.n_layers=1", "model.d_model=32", "model.n_heads=2", "model.d_ff=64",
         "model.vocab_size=2048", "engine=fsdp2", "steps=3", "batch.seq_len=32", "batch.global_tokens=256",
         "lr_schedule.warmup_steps=1", "device=cpu", "threads=1", "precision=fp32", "logging.tensorboard=false",
         "data.sources.text.path=data"]
SUBMIT = [sys.executable, "-m", "officina.launch.cli", "submit"]
JOB = ["site=slurm", "time=10m", "stop_before=30s", "attempts=1"]


@pytest.fixture
def project(tmp_path, monkeypatch):
    folder = tmp_path / "a folder's name"  # Slurm and shell must take it as one word
    write_tokens(folder / "data", {"train": [300] * 6, "validation": [64]}, tokenizer=tokenizer_info("0" * 64, 2048))
    monkeypatch.chdir(folder)
    return folder


def submit(cluster: SlurmCluster, folder: Path, *given: str) -> str:
    environ = cluster.environ | {"XDG_CONFIG_HOME": "/nowhere", "SBATCH_NODELIST": "n[3-4]", "SLURM_NTASKS": "7"}
    sent = cluster.run(*SUBMIT, *given, env=environ, cwd=folder)
    assert sent.returncode == 0, sent.stderr
    job = re.search(r"batch job ([0-9]+)", sent.stdout)[1]
    end = time.monotonic() + 200
    while (state := re.search(r"JobState=(\w+)", cluster.run("scontrol", "show", "job", "-o", job).stdout)[1]) in (
            "RUNNING", "PENDING", "COMPLETING", "CONFIGURING"):
        assert time.monotonic() < end, state
        time.sleep(0.2)
    log = (folder / f"runs/mine/logs/slurm-{job}.out").read_text()
    assert state == "COMPLETED", log
    return job


def test_a_run_goes_on_in_another_job_with_other_words(slurm_cluster: SlurmCluster, project):
    first = submit(slurm_cluster, project, *WORDS, *JOB, "nodes=2", "ranks=1", "account=one")
    run_dir = project / "runs/mine"
    again = submit(slurm_cluster, project, "resume", "runs/mine", "steps=5", "ranks=1", *JOB, "nodes=1", "account=other",
                   "engine=single")
    assert [r.job_id for r in read_jobs(run_dir)] == [first, again]
    assert [r.script for r in read_jobs(run_dir)] == ["job.sbatch", "job-2.sbatch"]
    assert [r.what for r in read_jobs(run_dir)] == ["train", "resume"]
    assert read_jobs(run_dir)[0].cluster == "officina"
    assert cli.main(["data", "audit", str(run_dir)]) == 0
    assert load_config(run_dir).steps == 5 and [h["world_size"] for h in read_history(run_dir)] == [2, 1]
    config = (run_dir / "config.yaml").read_text()
    assert "other" not in config and str(project) not in config, "nothing of the job is in the run"
    text = (run_dir / "job-2.sbatch").read_text()
    assert "#SBATCH --account=other" in text and "resume runs/mine" in text


def test_what_sbatch_refuses_is_told(slurm_cluster: SlurmCluster, project):
    environ = slurm_cluster.environ | {"XDG_CONFIG_HOME": "/nowhere"}
    sent = slurm_cluster.run(*SUBMIT, *WORDS, *JOB, "ranks=1", "partition=nowhere", env=environ, cwd=project)
    assert sent.returncode == 2 and "sbatch refused" in sent.stderr and "invalid partition" in sent.stderr
    assert "officina sites probe" in sent.stderr and "Traceback" not in sent.stderr
    assert read_jobs(project / "runs/mine") == []


def test_a_new_run_is_not_written_over_another(slurm_cluster: SlurmCluster, project):
    (project / "runs/mine/checkpoints/step-00000003").mkdir(parents=True)
    environ = slurm_cluster.environ | {"XDG_CONFIG_HOME": "/nowhere"}
    sent = slurm_cluster.run(*SUBMIT, *WORDS, *JOB, "ranks=1", env=environ, cwd=project)
    assert sent.returncode == 2 and "officina resume runs/mine" in sent.stderr


def stand_ins(project: Path, monkeypatch, **bodies: str) -> None:
    """Shell scripts in the place of Slurm's programs."""
    (project / "bin").mkdir(exist_ok=True)
    for name, body in bodies.items():
        (project / "bin" / name).write_text(f"#!/bin/sh\n{body}\n")
        (project / "bin" / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{project}/bin:/usr/bin:/bin")
    monkeypatch.setenv("XDG_CONFIG_HOME", "/nowhere")


def test_a_new_run_does_not_take_the_place_of_one_that_waits(project, monkeypatch, capsys):
    """Jobs read config.yaml when they start: the one in the queue would have trained with the words of the other."""
    stand_ins(project, monkeypatch, sbatch="echo 41", scontrol="exit 0", squeue="echo '41|PENDING|Priority|1:00'")
    assert cli.main(["submit", *WORDS, *JOB, "ranks=1", "optim.lr=1e-3"]) == 0
    assert cli.main(["submit", *WORDS, *JOB, "ranks=1", "optim.lr=1e-4"]) == 2
    said = capsys.readouterr().err
    assert "name=mine: runs/mine has job 41 in the queue" in said
    assert "Try: name=mine-2, or first: officina cancel runs/mine" in said
    assert load_config(project / "runs/mine").optim.lr == 1e-3 and len(read_jobs(project / "runs/mine")) == 1
    assert cli.main(["submit", "resume", "runs/mine", *JOB, "optim.lr=1e-4"]) == 0
    assert "note: job 41 of runs/mine will go on with these words, too" in capsys.readouterr().err
    stand_ins(project, monkeypatch, squeue="echo '41|CANCELLED|None|1:00'")
    assert cli.main(["submit", *WORDS, *JOB, "ranks=1", "optim.lr=1e-2"]) == 0, "one that has ended before it began a step"


def test_the_words_of_a_job_may_stand_before_the_run_that_goes_on(project, monkeypatch, capsys):
    stand_ins(project, monkeypatch, sbatch="echo 41", scontrol="exit 0", squeue="exit 0")
    assert cli.main(["submit", *WORDS, *JOB, "ranks=1"]) == 0
    assert cli.main(["submit", *JOB, "steps=4", "resume", "runs/mine", "--dry-run"]) == 0
    assert "resume runs/mine" in capsys.readouterr().out
    assert cli.main(["submit", *JOB, "resume", "steps=4"]) == 2
    assert "resume: names no run directory" in capsys.readouterr().err


def test_a_dry_run_says_that_its_script_needs_the_run_directory(project, monkeypatch, capsys):
    monkeypatch.setenv("XDG_CONFIG_HOME", "/nowhere")
    assert cli.main(["submit", *WORDS, *JOB, "ranks=1", "--dry-run"]) == 0
    out, err = capsys.readouterr()
    assert f"note: nothing is written: the script needs what these words, without --dry-run, put into {project}/runs" in err
    assert "note:" not in out and not (project / "runs").exists()


@pytest.mark.parametrize("words, said", [
    (["data", "build"], "the following arguments are required"),
    (["eval"], "the following arguments are required: RUN"),
    (["eval", "runs/mine", "--shotz", "5"], "does not know --shotz"),
])
def test_words_that_the_command_would_refuse_do_not_wait_in_the_queue(project, monkeypatch, capsys, words, said):
    stand_ins(project, monkeypatch, sbatch="echo 41")
    with pytest.raises(SystemExit) as left:
        cli.main(["submit", *JOB, "gpus=1", "cpus=1", *words])
    assert left.value.code == 2 and said in capsys.readouterr().err and not (project / "runs").exists()


def test_what_ends_a_sweep_ends_all_of_its_runs(project, monkeypatch, capsys):
    stand_ins(project, monkeypatch, sbatch="echo 41")
    assert cli.main(["submit", *WORDS, *JOB, "ranks=1", "seed=range(0,3)", "--runs-dir", "my runs"]) == 0
    said = capsys.readouterr().out
    assert said.endswith("its output: officina logs 'my runs/mine-0' -f; end it: officina cancel 'my runs/mine-'{0..2}\n")
    shell = ["bash", "-c", f"printf '%s,' {said.split('cancel ')[1]}"]
    seen = subprocess.run(shell, capture_output=True, text=True, check=True).stdout
    assert seen == "my runs/mine-0,my runs/mine-1,my runs/mine-2,"
    assert [read_jobs(project / f"my runs/mine-{i}")[0].job_id for i in range(3)] == ["41_0", "41_1", "41_2"]


def test_a_run_that_is_not_there_is_not_evaluated(project, monkeypatch, capsys):
    stand_ins(project, monkeypatch, sbatch="echo 41")
    job = [word for word in JOB if not word.startswith(("stop", "attempts"))]
    assert cli.main(["submit", *job, "eval", "runs/mien", "device=cpu"]) == 2
    said = capsys.readouterr().err
    assert "eval=runs/mien: there is no such run directory" in said and "gpus" not in said, "and device=cpu takes no GPU"
    (project / "runs/mien").mkdir(parents=True)
    assert cli.main(["submit", *job, "eval", "runs/mien@100", "device=cpu"]) == 0


def test_a_folder_that_cannot_be_written_is_named(project, monkeypatch, capsys):
    stand_ins(project, monkeypatch, sbatch="echo 41")
    (project / "runs").write_text("a file")
    assert cli.main(["submit", "site=slurm", "time=10m", "data", "verify", "data"]) == 2
    assert "runs/data-verify-1/logs: Not a directory, so the run directory cannot be made" in capsys.readouterr().err


def test_a_chain_that_is_refused_halfway_is_known_as_far_as_it_came(project, monkeypatch, capsys):
    """A queue that is full after the first job: sbatch stands for itself here, a real one cannot be made to do it at will."""
    programs = project / "bin"
    programs.mkdir()
    (programs / "sbatch").write_text("#!/bin/sh\nif [ -e sent ]; then echo 'sbatch: error: queue full' >&2; exit 1; fi\n"
                                     "touch sent; echo 41\n")
    (programs / "sbatch").chmod(0o755)
    monkeypatch.setenv("PATH", f"{programs}:/usr/bin:/bin")
    monkeypatch.setenv("XDG_CONFIG_HOME", "/nowhere")
    assert cli.main(["submit", *WORDS, *JOB, "ranks=1", "jobs=3"]) == 2
    said = capsys.readouterr().err
    assert "queue full" in said and "3 jobs 1 are submitted and will run: officina jobs runs/mine" in said
    assert [(r.job_id, r.place, r.chain) for r in read_jobs(project / "runs/mine")] == [("41", 1, "41")]


def test_runs_lie_where_the_job_looks_for_them(project, monkeypatch):
    """`--runs-dir=~/runs` comes as it was typed: no shell expands it."""
    programs = project / "bin"
    programs.mkdir()
    (programs / "sbatch").write_text("#!/bin/sh\necho 41\n")
    (programs / "sbatch").chmod(0o755)
    monkeypatch.setenv("PATH", f"{programs}:/usr/bin:/bin")
    monkeypatch.setenv("XDG_CONFIG_HOME", "/nowhere")
    monkeypatch.setenv("HOME", str(project / "home"))
    assert cli.main(["submit", *WORDS, *JOB, "ranks=1", "--runs-dir=~/runs"]) == 0
    there = {path.name for path in (project / "home/runs/mine").iterdir()}
    assert there >= {"config.yaml", "supervise.py", "job.sbatch", "jobs.jsonl", "logs"}


def test_without_sbatch(project, monkeypatch, capsys):
    monkeypatch.setenv("PATH", "/nowhere")
    assert cli.main(["submit", *WORDS, *JOB, "ranks=1"]) == 2
    assert "has no sbatch" in capsys.readouterr().err and not (project / "runs").exists()


def test_the_environment_of_another_job_stays_outside():
    before = {"SBATCH_PARTITION": "x", "SLURM_JOB_ID": "1", "SRUN_CPUS_PER_TASK": "2", "SLURM_CONF": "/c", "HOME": "/h"}
    left = clean_environ(before)
    assert left == {"SLURM_CONF": "/c", "HOME": "/h"}
