"""`officina jobs`, `logs` and `cancel`, on a real Slurm where Slurm is asked."""

import threading
import time
from pathlib import Path

import pytest
from slurm import SlurmCluster

from officina.launch import job_commands, job_queue
from officina.launch.cli import main
from officina.launch.job_queue import QueueState, query, reason_words
from officina.launch.job_record import JobRecord, append_job
from officina.launch.supervise import note
from officina.trainer.config import RunConfig
from officina.trainer.errors import LaunchError
from officina.trainer.metrics import StartMetrics, StepMetrics, to_line
from officina.trainer.run_dir import save_config


@pytest.mark.parametrize("reason, words", [
    ("None", ""),
    ("Priority", "others are before it"),
    ("Resources", "waits for nodes to become free"),
    ("BeginTime", "after a requeue Slurm holds a job for about two minutes"),
    ("ReqNodeNotAvail, UnavailableNodes:n1", "before a maintenance"),
    ("AssocGrpGRESMinutes", "budget is used up"),
    ("AssocGrpBillingMinutes", "budget is used up"),
    ("QOSMaxJobsPerUserLimit", "a limit of the project or QOS is reached"),
    ("AssocMaxNodePerJobLimit", "a limit of the project or QOS is reached"),
    ("JobHeldUser", "scontrol release"),
    ("SomethingNew", "Slurm says SomethingNew"),
])
def test_reasons_are_told_in_words(reason, words):
    assert words in reason_words(reason) and bool(words) == bool(reason_words(reason))


def test_states_are_told_in_words():
    assert QueueState("PENDING", "Priority", None).words() == "waiting: others are before it in the queue"
    assert QueueState("SIGNALING", "", 60).words() == "running" and QueueState("SIGNALING", "", 60).active
    assert QueueState("NODE_FAIL", "", None).words() == "node fail" and not QueueState("NODE_FAIL", "", None).active


def made_run(folder: Path, *, steps_done: int = 0, job: str = "", **record) -> Path:
    """A run directory as a submitted run has it."""
    folder.mkdir(parents=True)
    save_config(RunConfig(steps=100), folder)
    lines = [to_line(StartMetrics(step=0, action="start", engine="single", world_size=1, device="cpu", precision="fp32"))]
    lines += [to_line(StepMetrics(step=i, tokens=50, loss_nats=3.0 - i / 100, grad_norm=1.0, lr=1e-3, step_time_s=0.5,
                                  data_wait_s=0.0, tokens_per_s=100.0, time=1e9 + 2 * i)) for i in range(1, steps_done + 1)]
    (folder / "metrics.jsonl").write_text("\n".join(lines) + "\n")
    if job:
        append_job(folder, JobRecord(**({"job_id": job, "what": "train", "site": "slurm"} | record)))
    return folder


def test_progress_is_that_of_the_latest_steps(tmp_path):
    assert job_commands._progress(made_run(tmp_path / "a", steps_done=10)) == ("10/100", "2.900", "100 tok/s", "3:00")
    assert job_commands._progress(made_run(tmp_path / "b")) == ("0/100", "", "", "")
    assert job_commands._progress(made_run(tmp_path / "c", steps_done=100))[3] == "done"
    with open(tmp_path / "a" / "metrics.jsonl", "a") as file:  # a later start went back to step 5: its pace counts
        for i in (6, 7):
            file.write(to_line(StepMetrics(step=i, tokens=50, loss_nats=1.0, grad_norm=1.0, lr=1e-3, step_time_s=5.0,
                                           data_wait_s=0.0, tokens_per_s=10.0, time=2e9 + 10 * i)) + "\n")
    assert job_commands._progress(tmp_path / "a") == ("7/100", "1.000", "10 tok/s", "15:30")


def test_the_time_between_two_jobs_is_not_that_of_a_step(tmp_path):
    run_dir = made_run(tmp_path / "a", steps_done=10)

    def add(*records):
        with open(run_dir / "metrics.jsonl", "a") as file:
            file.writelines(to_line(record) + "\n" for record in records)

    add(StartMetrics(step=10, action="resume", engine="single", world_size=1, device="cpu", precision="fp32"))
    assert job_commands._progress(run_dir)[0] == "10/100", "as long as the later start has no step"
    add(*(StepMetrics(step=i, tokens=50, loss_nats=1.0, grad_norm=1.0, lr=1e-3, step_time_s=0.5, data_wait_s=0.0,
                      tokens_per_s=100.0, time=5e9 + 2 * i) for i in (11, 12)))
    assert job_commands._progress(run_dir) == ("12/100", "1.000", "100 tok/s", "2:56")


def test_runs_without_jobs_are_said_to_have_none(tmp_path, capsys):
    assert main(["jobs", "--runs-dir", str(tmp_path)]) == 0 and "submit experiment=demo ranks=0 " in capsys.readouterr().out
    assert main(["jobs", str(tmp_path / "no")]) == 2 and "no such run directory" in capsys.readouterr().err
    run_dir = made_run(tmp_path / "run")
    assert main(["cancel", str(run_dir)]) == 2
    said = capsys.readouterr().err
    assert f"no job was submitted for it (jobs.jsonl is missing). Submit it: officina submit resume {run_dir}" in said
    (run_dir / "jobs.jsonl").write_bytes(b"\xff\xfe\n")
    assert main(["logs", "-f", str(run_dir)]) == 2 and "(jobs.jsonl names none)" in capsys.readouterr().err


def test_a_folder_of_runs_that_is_not_there_is_no_folder_without_jobs(tmp_path, capsys):
    assert main(["jobs", "--runs-dir", str(tmp_path / "nope")]) == 2 and "no such folder" in capsys.readouterr().err


def test_the_log_of_a_rank_needs_no_job(tmp_path, capfdbinary):
    run_dir = made_run(tmp_path / "run")
    (run_dir / "logs").mkdir(exist_ok=True)
    (run_dir / "logs/rank-00001.log").write_text("said here\n")
    assert main(["logs", str(run_dir), "--rank", "1"]) == 0 and capfdbinary.readouterr().out == b"said here\n"
    assert main(["logs", str(run_dir)]) == 2 and b"--rank N" in capfdbinary.readouterr().err


def test_a_damaged_run_is_named_and_the_others_are_listed(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(job_commands, "cluster_name", lambda: "here")
    monkeypatch.setattr(job_commands, "query", lambda ids: {"2": QueueState("PENDING", "Priority", None)})
    runs = [made_run(tmp_path / f"run-{i}", job=str(i), steps_done=10) for i in range(6)]
    (runs[1] / "config.yaml").write_text("steps: [")
    (runs[2] / "config.yaml").write_bytes(b"\xff\xfe\x00")
    (runs[3] / "metrics.jsonl").write_bytes(b"\xff\xfe\x00\n{}\n")
    (runs[3] / "attempts.jsonl").write_bytes(b"\xff\xfe\x00\n{}\n[]\n{\"number\": []}\n{\"number\": 1, \"event\": \"end\"}\n")
    (runs[4] / "jobs.jsonl").unlink()
    (runs[4] / "jobs.jsonl").mkdir()
    (runs[5] / "jobs.jsonl").write_bytes(b"\xff\n" + (runs[5] / "jobs.jsonl").read_bytes())
    (made_run(tmp_path / "run-6") / "jobs.jsonl").write_text("{\n")
    assert main(["jobs", "--runs-dir", str(tmp_path)]) == 2
    out, err = capsys.readouterr()
    shown = {line.split()[0]: line.split() for line in out.splitlines()[1:]}
    assert list(shown) == [str(run) for run in runs if run != runs[4]]
    assert shown[str(runs[0])][1:4] == ["0", "10/100", "2.900"] and shown[str(runs[5])][1:4] == ["5", "10/100", "2.900"]
    assert shown[str(runs[2])][1:3] == ["2", "waiting:"], "what Slurm says of it needs none of its files"
    assert [line.removeprefix("officina jobs: ").split(" ")[0] for line in err.splitlines()] == [
        f"{runs[4]}/jobs.jsonl", f"{tmp_path}/run-6/jobs.jsonl", f"{runs[1]}/config.yaml", f"{runs[2]}/config.yaml"]


def test_a_run_that_is_done_is_not_shown_by_members_that_were_not_needed(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(job_commands, "cluster_name", lambda: "here")
    monkeypatch.setattr(job_commands, "query", lambda ids: {"3": QueueState("CANCELLED", "", None)})
    run_dir = made_run(tmp_path / "run", steps_done=100)
    for place in (1, 2, 3):
        append_job(run_dir, JobRecord(job_id=str(place), what="train", site="slurm", chain="1", place=place))
    for job, outcome in ((1, "to be continued"), (2, "done")):
        note(str(run_dir), "end", {"number": job, "job": str(job), "outcome": outcome, "error": "", "from_checkpoint": 0})
    assert main(["jobs", str(run_dir)]) == 0
    [line] = capsys.readouterr().out.splitlines()[1:]
    assert line.split()[1:] == ["2", "(2", "of", "3)", "100/100", "2.000", "100", "tok/s", "done", "done"]
    (run_dir / "attempts.jsonl").write_text("")
    note(str(run_dir), "end", {"number": 1, "job": "3", "outcome": "to be continued", "error": "", "from_checkpoint": 0})
    assert main(["jobs", str(run_dir)]) == 0
    assert capsys.readouterr().out.rstrip().endswith(f"to be continued: officina submit resume {run_dir} ...")


def test_without_a_slurm_it_says_so(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    assert main(["jobs", str(made_run(tmp_path / "run", job="1"))]) == 2
    assert "this is no host of a Slurm cluster" in capsys.readouterr().err


def programs(folder: Path, monkeypatch, **bodies: str) -> None:
    """Shell scripts in the place of Slurm's programs."""
    folder.mkdir(exist_ok=True)
    for name, body in bodies.items():
        (folder / name).write_text(f"#!/bin/sh\n{body}\n")
        (folder / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}:/usr/bin:/bin")


def test_a_slurm_that_does_not_tell_its_name_has_not_ended_the_jobs(tmp_path, capsys, monkeypatch):
    programs(tmp_path / "bin", monkeypatch, scontrol="echo 'Unable to contact slurm controller' >&2; exit 1",
             squeue="echo '7|RUNNING|None|1:00:00'", scancel="exit 0")
    run_dir = made_run(tmp_path / "run", job="7", cluster="here")
    for command in ("cancel", "jobs"):
        assert main([command, str(run_dir)]) == 2, "not: no job waits or runs"
        assert "Slurm does not answer: Unable to contact slurm controller" in capsys.readouterr().err


def test_several_clusters_are_answered_with_a_line_for_each(tmp_path, capsys, monkeypatch):
    programs(tmp_path / "bin", monkeypatch, scontrol="exit 0", squeue="echo 'CLUSTER: here'; echo '7|PENDING|Priority|1:00:00'")
    assert main(["jobs", str(made_run(tmp_path / "run", job="7"))]) == 0 and "Priority" not in capsys.readouterr().err


def test_logs_go_on_while_slurm_is_silent(tmp_path, capfd, monkeypatch):
    monkeypatch.setattr(job_commands, "_ASK_SLURM_S", 0.1)
    monkeypatch.setattr(job_commands, "_FOLLOW_S", 0.02)
    run_dir = made_run(tmp_path / "run", job="7")
    (run_dir / "logs").mkdir()
    log, n = run_dir / "logs/slurm-7.out", tmp_path / "n"
    log.write_text("one\n")
    silent = f"echo >>{n}; case $(wc -l <{n}) in 1) echo '7|RUNNING|None|1:00:00';; 2) echo two >>{log}; exit 1;; esac"
    programs(tmp_path / "bin", monkeypatch, scontrol="exit 0", squeue=silent)
    assert main(["logs", "-f", str(run_dir)]) == 0 and capfd.readouterr().out == "one\ntwo\n"
    programs(tmp_path / "bin", monkeypatch, squeue="exit 1")
    assert main(["logs", "-f", str(run_dir)]) == 2, "one that never answered is told"


def test_a_log_that_is_not_there_is_named(tmp_path, capsys):
    run_dir = made_run(tmp_path / "run", job="7")
    assert main(["logs", str(run_dir)]) == 2 and "no job of the run has printed yet" in capsys.readouterr().err
    assert main(["logs", str(run_dir), "--rank", "3"]) == 2 and "rank-00003.log is not there" in capsys.readouterr().err
    (run_dir / "logs").mkdir()
    (run_dir / "logs" / "slurm-7.out").write_text("printed\n")
    assert main(["logs", str(run_dir)]) == 0 and capsys.readouterr().out == "printed\n"


# ---- with a Slurm ------------------------------------------------------------------------------------------------------
@pytest.fixture
def here(slurm_cluster: SlurmCluster, monkeypatch) -> SlurmCluster:
    """This process is on the login node."""
    for name in ("SLURM_CONF", "PATH"):
        monkeypatch.setenv(name, slurm_cluster.environ[name])
    return slurm_cluster


def sent(cluster: SlurmCluster, run_dir: Path, body: str, *options: str, **record) -> str:
    """A job of the run with this body, submitted and recorded."""
    (run_dir / "logs").mkdir(exist_ok=True)
    done = cluster.run("sbatch", "--parsable", f"--output={run_dir}/logs/slurm-%j.out", *options, f"--wrap={body}")
    assert done.returncode == 0, done.stderr
    job = done.stdout.strip()
    append_job(run_dir, JobRecord(**({"job_id": job, "what": "train", "site": "slurm", "cluster": "officina"} | record)))
    return job


def until(happened) -> None:
    end = time.monotonic() + 40
    while not happened():
        assert time.monotonic() < end
        time.sleep(0.05)


@pytest.mark.slurm
def test_jobs_lists_them_and_cancel_ends_them_all(here, tmp_path, capsys):
    run_dir = made_run(tmp_path / "mine", steps_done=10)
    chain = ("--job-name=chained", "--dependency=singleton", "--time=5")
    first = sent(here, run_dir, "sleep 300", *chain)
    second = sent(here, run_dir, "sleep 300", *chain, chain=first, place=2)
    held = sent(here, run_dir, "sleep 300", "--hold", what="eval")
    elsewhere = made_run(tmp_path / "moved", job=first, cluster="other")
    note(str(elsewhere), "begin", {"number": 1, "job": first, "restart": 0, "from_checkpoint": -1})
    note(str(elsewhere), "end", {"number": 1, "job": first, "outcome": "no progress", "error": "the same error twice"})
    until(lambda: query([first])[first].state == "RUNNING")

    assert main(["jobs", "--runs-dir", str(tmp_path)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split() == "run job step loss rate job ends in run ends in state".split()
    [mine] = [line for line in lines if str(run_dir) in line]
    assert f"{first} " in mine and "10/100" in mine and "2.900" in mine and "100 tok/s" in mine and mine.endswith("running")
    assert any(second in line and line.endswith("waiting: for the job before it in its chain") for line in lines)
    assert any(held in line and "eval: waiting: is held by its owner: scontrol release" in line for line in lines)
    assert any(str(elsewhere) in line and line.endswith("no progress: the same error twice") for line in lines)

    assert main(["cancel", str(elsewhere)]) == 0 and "no job waits or runs" in capsys.readouterr().out
    assert query([first])[first].state == "RUNNING", "an id of another cluster means another job here"
    assert main(["cancel", str(run_dir)]) == 0
    out = capsys.readouterr().out
    assert f"jobs {second}, {held} will not start" in out and f"job {first} told to save and end" in out
    until(lambda: all(not state.active for state in query([first, second, held]).values()))
    assert main(["jobs", str(run_dir), "--all"]) == 0 and capsys.readouterr().out.count("cancelled") == 3


@pytest.mark.slurm
def test_logs_follow_into_the_next_job_and_end_with_the_last(here, tmp_path, capfdbinary, monkeypatch):
    monkeypatch.setattr(job_commands, "_ASK_SLURM_S", 0.5)
    monkeypatch.setattr(job_commands, "_FOLLOW_S", 0.05)
    run_dir, go = made_run(tmp_path / "run"), tmp_path / "go"
    chain = ("--job-name=logged", "--dependency=singleton")
    first = sent(here, run_dir, f"echo one; until [ -e {go} ]; do sleep 0.1; done; echo two", *chain)
    second = sent(here, run_dir, "echo three", *chain)
    until(lambda: (run_dir / "logs" / f"slurm-{first}.out").exists())
    threading.Timer(1.0, go.touch).start()
    assert main(["logs", "-f", str(run_dir)]) == 0
    assert capfdbinary.readouterr().out.decode() == f"one\ntwo\n==== slurm-{second}.out\nthree\n"


@pytest.mark.slurm
def test_logs_of_a_job_that_waits_say_why(here, tmp_path, capfd, monkeypatch):
    monkeypatch.setattr(job_commands, "_ASK_SLURM_S", 0.5)
    run_dir = made_run(tmp_path / "run")
    job = sent(here, run_dir, "echo one", "--hold")
    threading.Timer(2.0, lambda: here.run("scontrol", "release", job)).start()
    assert main(["logs", "-f", str(run_dir)]) == 0
    out, err = capfd.readouterr()
    assert out == "one\n" and err.startswith(f"job {job}: waiting: is held by its owner: scontrol release {job}\n")


@pytest.mark.slurm
def test_jobs_that_slurm_has_forgotten_are_no_error(here, tmp_path, capsys):
    run_dir = made_run(tmp_path / "old", job="999999")
    assert query(["999999"]) == {} and main(["jobs", str(run_dir)]) == 0
    assert "ended; how, only its cluster knows: sacct -j 999999" in capsys.readouterr().out


@pytest.mark.slurm
def test_a_slurm_that_does_not_answer_is_told(here, monkeypatch, tmp_path):
    broken = tmp_path / "slurm.conf"
    conf = Path(here.environ["SLURM_CONF"]).read_text()
    broken.write_text(conf.replace("SlurmctldPort=", "MessageTimeout=2\nSlurmctldPort=9 #"))
    monkeypatch.setenv("SLURM_CONF", str(broken))
    with pytest.raises(LaunchError, match="Slurm does not answer"):
        query(["1"])


def test_nothing_is_asked_without_jobs(monkeypatch):
    monkeypatch.setattr(job_queue, "ask", lambda *words: pytest.fail(f"asked {words}"))
    assert query([]) == {}
