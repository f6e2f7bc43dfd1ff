"""The supervisor of a batch job, without a Slurm: what it makes of how attempts end. With one: `test_job_life.py`."""

import ast
import itertools
import json
import os
import signal
import socket
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest

from officina.launch import supervise
from officina.launch.job_record import JOBS, JobRecord, append_job, read_jobs
from officina.launch.supervise import CONTINUE, CRASH, DONE, ENDED, LIMIT, NO_PROGRESS, USER, Ended
from officina.trainer import errors, rank_log
from officina.trainer.errors import LaunchError
from officina.trainer.run_dir import claim, committed_steps


def attempts(*said: dict) -> list[dict]:
    """Attempts as `read_attempts` gives them."""
    blank = {"outcome": None, "error": "", "signature": "", "status": None, "step": -1, "checkpoint": -1, "stop": "",
             "state": "", "from_checkpoint": -1}
    return [blank | {"number": i} | words for i, words in enumerate(said, 1)]


def crash(signature: str = "E", step: int = 5, start: int = 3, checkpoint: int = 3) -> dict:
    return {"outcome": CRASH, "error": signature, "signature": signature, "step": step, "from_checkpoint": start,
            "checkpoint": checkpoint}


def weighed(*said: dict, max_attempts: int = 3) -> tuple[str, int]:
    *past, now = attempts(*said)
    outcome, _, status = supervise.weigh(past, now, max_attempts)
    return outcome, status


def failure(**more) -> dict:
    return {"rank": 1, "host": "n2", "error": "ValueError", "message": "bad 17 at 0xfe", "exit_status": 1, "time_s": 1.0,
            "consequence": False} | more


# ---- the end of one attempt ------------------------------------------------------------------------------------
@pytest.mark.parametrize("left_with, outcome", [(0, DONE), (75, CONTINUE), (None, CRASH)])
@pytest.mark.parametrize("state", ["", "CANCELLED"])
def test_an_orderly_end_is_one_that_the_run_recorded(left_with, outcome, state):
    """Not every status 0 is one: user code may call os._exit(0)."""
    stop = "SIGTERM" if state else ""
    for status in (0, 75):
        found, error, _ = supervise.judge(Ended(status, stop, state, False), None, left_with)
        assert found == (ENDED if state and left_with is None else outcome)
        assert (f"exit status {status} before the run had recorded its end" in error) == (found == CRASH)


@pytest.mark.parametrize("ended, failed, outcome", [
    (Ended(137, "", "", False), failure(exit_status=2), USER),
    (Ended(137, "", "", False), failure(exit_status=76), NO_PROGRESS),
    (Ended(137, "", "", False), failure(exit_status=2, message="rank 0 on n1 cannot listen on port 20005: ..."), CRASH),
    (Ended(2, "", "", False), None, USER),
    (Ended(76, "", "", False), None, NO_PROGRESS),
    (Ended(137, "", "", False), failure(), CRASH),
    (Ended(137, "", "", False), None, CRASH),
    (Ended(-9, "", "", False), None, CRASH),
    (Ended(1, "", "", False), None, CRASH),
    (Ended(0, "", "", False), failure(), CRASH),
    (Ended(143, "SIGTERM", "COMPLETING", False), failure(), ENDED),
    (Ended(143, "SIGTERM", "TIMEOUT", False), failure(), LIMIT),
    (Ended(143, "SIGTERM", "RUNNING", False), failure(), CRASH),
    (Ended(143, "", "", True), failure(), LIMIT),
])
def test_an_attempt_is_judged_by_status_failure_and_state(ended, failed, outcome):
    assert supervise.judge(ended, failed)[0] == outcome


def test_errors_that_differ_in_numbers_are_the_same_error():
    ended = Ended(1, "", "", False)
    first = supervise.judge(ended, failure(message="bad 17 at 0xfe\nmore"))
    assert first[2] == supervise.judge(ended, failure(message="bad 3 at 0x0", rank=2))[2] == "ValueError: bad # at #"
    assert first[1] == "rank 1 on n2: ValueError: bad 17 at 0xfe"
    assert first[2] != supervise.judge(ended, failure(error="KeyError"))[2]


def test_a_rank_that_only_saw_another_one_go_is_not_the_cause():
    found = supervise.judge(Ended(137, "", "", False), failure(consequence=True, message="Connection closed by peer"))
    assert found[0] == CRASH and found[2] == "lost a rank by SIGKILL" and "rank 1 on n2" in found[1]


# ---- several attempts -------------------------------------------------------------------------------------------
@pytest.mark.parametrize("said, verdict", [
    ([crash()], (CRASH, 0)),
    ([crash(), crash()], (NO_PROGRESS, 76)),
    ([crash(start=-1), crash()], (NO_PROGRESS, 76)),  # the first one still brought the checkpoint that the second began from
    ([crash(), crash(step=6)], (CRASH, 0)),
    ([crash(), crash("F")], (CRASH, 0)),
    ([crash(step=-1, start=-1, checkpoint=-1)] * 2, (NO_PROGRESS, 76)),
    ([crash(), crash("F"), crash("G")], (CRASH, 1)),
    ([crash(), crash("F"), crash("G", step=9, checkpoint=8)], (CRASH, 0)),  # a newer checkpoint: it counts anew
    ([crash(), crash("F", step=9, checkpoint=8), crash("G", start=8, checkpoint=8)], (CRASH, 0)),
    ([crash(), {"from_checkpoint": 3}, crash("F")], (CRASH, 1)),  # the one in between ended without a word
    ([crash(), {"from_checkpoint": 3, "state": "COMPLETING"}, crash("F")], (CRASH, 0)),  # it was Slurm that ended it
    ([crash(), {"outcome": CONTINUE, "from_checkpoint": 3, "checkpoint": 5}, crash(start=5, checkpoint=5)], (CRASH, 0)),
])
def test_crashes_are_tried_again_until_they_lead_nowhere(said, verdict):
    assert weighed(*said) == verdict


def test_the_last_allowed_crash_is_told_as_such():
    assert weighed(crash(), max_attempts=1) == (CRASH, 1)
    _, error, _ = supervise.weigh([], attempts(crash())[0], 1)
    assert error == "E (attempt 1 of 1 without a newer checkpoint)"


def stop(start: int, checkpoint: int, **more) -> dict:
    return {"outcome": CONTINUE, "from_checkpoint": start, "checkpoint": checkpoint} | more


@pytest.mark.parametrize("said, verdict", [
    ([stop(-1, 8)], (CONTINUE, 75)),
    ([stop(-1, 0)], (CONTINUE, 75)),
    ([stop(-1, 0), stop(0, 0)], (NO_PROGRESS, 76)),
    ([stop(-1, 0), stop(0, 0, outcome=LIMIT)], (NO_PROGRESS, 76)),
    ([stop(3, 8), stop(8, 8)], (CONTINUE, 75)),
    ([stop(8, 8), stop(8, 9)], (CONTINUE, 75)),
    ([stop(8, 8, stop="SIGTERM"), stop(8, 8)], (CONTINUE, 75)),  # taken from it early: says nothing of the time it asks for
    ([stop(8, 8, stop="preemption"), stop(8, 8)], (CONTINUE, 75)),
])
def test_stops_go_on_unless_they_lead_nowhere(said, verdict):
    assert weighed(*said) == verdict


# ---- a whole job, of real processes but without a Slurm ----------------------------------------------------------------
def job(run_dir: Path, program: str, *options: str, env: dict | None = None) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, supervise.__file__, str(run_dir), *options, "--", sys.executable, "-c", program],
                          capture_output=True, text=True, timeout=60, env=os.environ | (env or {}), check=False)


def stop_record(status: object) -> str:
    """The line of metrics.jsonl by which rank 0 says that the run ends in good order."""
    return f'{{"event": "stop", "step": 1, "reason": "done", "exit_status": {status}}}\n'


def leave(status: int, run_dir: object = "RUN") -> str:
    """A program that ends as rank 0 does in good order."""
    return f"open('{run_dir}/metrics.jsonl', 'a').write({stop_record(status)!r}); exit({status})"


def told(run_dir: Path) -> list[str | None]:
    return [a["outcome"] for a in supervise.read_attempts(str(run_dir))]


def test_the_exit_status_is_that_of_the_training(tmp_path):
    for number, (program, status, outcomes) in enumerate((
            (leave(0), 0, [DONE]), (leave(75), 75, [CONTINUE]), ("exit(2)", 2, [USER]), ("exit(76)", 76, [NO_PROGRESS]),
            ("import os; os._exit(0)", 76, [CRASH, NO_PROGRESS]))):
        run_dir = tmp_path / str(number)
        run_dir.mkdir()
        assert job(run_dir, program.replace("RUN", str(run_dir))).returncode == status
        assert told(run_dir) == outcomes


def test_every_attempt_has_its_own_port_and_name_and_the_same_crash_twice_ends_it(tmp_path):
    program = ("import os\nprint(os.environ['MASTER_PORT'], os.environ['OFFICINA_ATTEMPT'], "
               f"file=open('{tmp_path}/env', 'a'))\nexit(9)")
    done = job(tmp_path, program, env={"SLURM_RESTART_COUNT": "2"})
    assert done.returncode == 76
    assert "no progress: the same error before the first step twice: the step ended with exit status 9" in done.stderr
    lines = [line.split() for line in (tmp_path / "env").read_text().splitlines()]
    assert len(lines) == 2 and len({port for port, _ in lines}) == 2 and all(20000 <= int(port) < 32000 for port, _ in lines)
    assert [name.split(".")[1:] for _, name in lines] == [["2", "1"], ["2", "2"]]


def test_a_port_on_which_somebody_listens_is_passed_over():
    port = supervise.free_port("7.0.1")
    assert supervise.free_port("7.0.1") == port, "it follows from the attempt's name"
    with socket.socket() as other:
        other.bind(("", port))
        assert supervise.free_port("7.0.1") != port


def test_crashes_that_differ_are_tried_up_to_the_cap_over_all_jobs(tmp_path):
    program = f"n = len(open('{tmp_path}/attempts.jsonl').readlines()); exit(20 + n)"
    assert job(tmp_path, program, "--max-attempts", "2").returncode == 1
    assert told(tmp_path) == [CRASH, CRASH]
    assert job(tmp_path, program, "--max-attempts", "5").returncode == 1, "what earlier jobs tried counts"
    assert told(tmp_path) == [CRASH] * 5


def test_a_stop_signal_reaches_the_step_as_usr1(tmp_path):
    ready = tmp_path / "ready"
    program = (f"import signal, time, pathlib\ndef stop(*_):\n    {leave(75, tmp_path)}\nsignal.signal(signal.SIGUSR1, stop)\n"
               f"pathlib.Path('{ready}').touch()\ntime.sleep(60)")
    for number in (signal.SIGTERM, signal.SIGUSR1):
        process = subprocess.Popen([sys.executable, supervise.__file__, str(tmp_path), "--", sys.executable, "-c", program],
                                   stderr=subprocess.PIPE, text=True)
        wait_for(ready.exists)
        process.send_signal(number)
        said = process.communicate(timeout=30)[1]
        assert process.returncode == 75 and f"{number.name}: the ranks finish their step" in said
        assert f"to be continued. Go on: officina submit resume {tmp_path}, with the words of the job" in said
        ready.unlink()


def test_a_crash_while_stopping_is_left_to_the_next_start(tmp_path):
    program = (f"import signal, time, pathlib\nsignal.signal(signal.SIGUSR1, lambda *_: exit(1))\n"
               f"pathlib.Path('{tmp_path}/ready').touch()\ntime.sleep(60)")
    process = subprocess.Popen([sys.executable, supervise.__file__, str(tmp_path), "--", sys.executable, "-c", program])
    wait_for((tmp_path / "ready").exists)
    process.send_signal(signal.SIGUSR1)
    assert process.wait(30) == 75 and told(tmp_path) == [CRASH]


def test_a_step_that_does_not_leave_is_killed_before_slurm_would(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(supervise, "_KILL_S", 0.2)
    ready, now_s = tmp_path / "ready", time.time()  # the job's last seconds begin when the step heeds no signal
    monkeypatch.setattr(supervise, "time", SimpleNamespace(sleep=time.sleep, time=lambda: time.time() + 1000 * ready.exists()))
    program = (f"import pathlib, signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); "
               f"pathlib.Path({str(ready)!r}).touch(); time.sleep(600)")
    with supervise.Signals() as signals:
        ended = supervise.run_step([sys.executable, "-c", program], dict(os.environ), signals,
                                   now_s + supervise._LAST_S + 600, "", on_term=print)
    assert ended == Ended(-9, "", "", True) and "the step still runs: it is killed" in capsys.readouterr().err


def slurm_says(folder: Path, body: str) -> dict[str, str]:
    """An environment in which this script stands for Slurm's programs and tells that job 7 runs."""
    folder.mkdir()
    for name in ("scontrol", "squeue", "scancel"):
        (folder / name).write_text(f"#!/bin/bash\necho $(basename $0) $* >>{folder}/asked\n{body}\n")
        (folder / name).chmod(0o755)
    return {"SLURM_JOB_ID": "7", "PATH": f"{folder}:{os.environ['PATH']}"}


@pytest.mark.parametrize("silent", ["slurm_load_jobs error: Unable to contact slurm controller (connect failure)",
                                    "Unexpected message received for job 7",
                                    "slurm_load_jobs error: Socket timed out on send/recv operation"])
def test_a_slurm_that_is_silent_for_a_while_still_requeues(tmp_path, silent):
    env = slurm_says(tmp_path / "bin", f"""
case "$*" in
  show*) if [ -e {tmp_path}/again ]; then echo JobState=PENDING; else echo JobState=RUNNING; fi ;;
  requeue*) if [ -e {tmp_path}/once ]; then touch {tmp_path}/again; else touch {tmp_path}/once; echo "{silent}"; exit 1; fi ;;
esac""")
    done = job(tmp_path, leave(75, tmp_path), "--requeue", env=env)
    assert done.returncode == 0 and "requeued: job 7" in done.stderr, done.stderr


def test_a_job_that_may_not_be_requeued_is_told_how_to_go_on(tmp_path):
    env = slurm_says(tmp_path / "bin", """
case "$*" in
  show*) echo JobState=RUNNING ;;
  requeue*) echo "Requested operation is presently disabled for job 7"; exit 1 ;;
esac""")
    done = job(tmp_path, leave(75, tmp_path), "--requeue", env=env)
    assert done.returncode == 75 and "presently disabled" in done.stderr
    assert f"to be continued. Go on: officina submit resume {tmp_path}" in done.stderr
    assert (tmp_path / "bin/asked").read_text().count("requeue 7") == 1, "what is refused is not asked again"


def test_names_that_are_no_text_end_no_supervisor(tmp_path):
    env = slurm_says(tmp_path / "bin", r"printf 'JobId=7 JobState=RUNNING WorkDir=/\xff\xfe\n'")
    done = job(tmp_path, leave(75, tmp_path), env=env)
    assert done.returncode == 75 and "Traceback" not in done.stderr


def test_one_start_at_a_time(tmp_path, monkeypatch):
    with claim(tmp_path):
        program = ("import sys; from officina.launch import supervise as s; s._CLAIM_S = 0.1\n"
                   f"sys.exit(s.main(['{tmp_path}', '--', 'true']))")
        done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert done.returncode == 2 and f"is being trained by another start (process {os.getpid()} on " in done.stderr
    with supervise.claimed(str(tmp_path)) as holder:
        assert holder == ""
        program = f"import pathlib; from officina.trainer.run_dir import claim\nwith claim(pathlib.Path('{tmp_path}')): pass"
        other = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert "LaunchError" in other.stderr and f"supervisor {os.getpid()} on " in other.stderr


@pytest.mark.parametrize(("restart", "status"), [("1", 0), ("0", 2), ("100", 2)])
def test_a_job_whose_earlier_start_lives_on_a_lost_node_waits_in_the_queue(tmp_path, monkeypatch, restart, status):
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    env = slurm_says(tmp_path / "bin", 'case "$*" in show*) echo JobState=PENDING ;; esac')
    program = ("import sys; from officina.launch import supervise as s; s._CLAIM_S = 0.1\n"
               f"sys.exit(s.main(['{tmp_path}', '--chain', '--', 'true']))")
    with supervise.claimed(str(tmp_path)):
        done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False,
                              env=dict(os.environ, **env, SLURM_RESTART_COUNT=restart))
    asked = tmp_path / "bin/asked"
    assert done.returncode == status, done.stderr
    assert (asked.exists() and "requeue 7" in asked.read_text()) is (status == 0)
    assert ("on a node that Slurm has lost" if status == 0 else "is being trained by another start") in done.stderr


def test_a_run_that_is_not_there_is_named(tmp_path):
    done = job(tmp_path / "no", "")
    assert done.returncode == 2 and "no: no such run directory. Submit the run anew: officina submit" in done.stderr
    assert job(tmp_path, "", "--requeue", "--chain").returncode == 2


def test_a_chain_member_that_could_not_be_cancelled_stops_by_itself(tmp_path):
    append_job(tmp_path, JobRecord(job_id="8", what="train", site="x", chain="7", submitted_at="2020-01-01T00:00:00+00:00"))
    assert job(tmp_path, "exit(2)", env={"SLURM_JOB_ID": "7"}).returncode == 2
    done = job(tmp_path, "exit(0)", env={"SLURM_JOB_ID": "8"})
    assert done.returncode == 2 and "the chain was stopped (user error): the ranks said why above" in done.stderr
    append_job(tmp_path, JobRecord(job_id="9", what="train", site="x"))  # submitted since: somebody mended it
    time.sleep(1)
    append_job(tmp_path, JobRecord(job_id="10", what="train", site="x"))
    assert job(tmp_path, leave(0, tmp_path), env={"SLURM_JOB_ID": "10"}).returncode == 0


def test_nodes_that_die_again_and_again_are_no_progress(tmp_path):
    for number in (1, 2):
        supervise.note(str(tmp_path), "begin", {"number": number, "job": "1", "restart": number, "from_checkpoint": -1})
    done = job(tmp_path, "exit(0)", "--max-attempts", "2")
    assert done.returncode == 76 and "2 attempts in a row brought no newer checkpoint than the start" in done.stderr
    assert job(tmp_path, leave(0, tmp_path), "--max-attempts", "2").returncode == 0, "who starts it by hand is not held back"


# ---- what is read ------------------------------------------------------------------------------------------------------
def test_it_is_written_in_the_words_of_python_3_6():
    source = Path(supervise.__file__).read_text()
    ast.parse(source, feature_version=(3, 6))
    newer = {"capture_output", "text", "missing_ok", "removeprefix", "removesuffix", "nullcontext", "dataclass"}
    used = {node.attr for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Attribute)}
    used |= {word.arg for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Call) for word in node.keywords}
    assert not used & newer
    imported = {name.name for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Import) for name in node.names}
    assert imported <= set(sys.stdlib_module_names)


def test_it_means_the_same_as_the_trainer(tmp_path):
    for name in ("EXIT_DONE", "EXIT_BUG", "EXIT_USER", "EXIT_CONTINUE", "EXIT_NO_PROGRESS"):
        assert getattr(supervise, name) == getattr(errors, name)
    found = [rank_log.Failure(rank=i, host="h", pid=1, time_s=t, error="E", message="m", exit_status=1, consequence=c,
                              traceback="") for i, (t, c) in enumerate(itertools.product((3.0, 1.0, 2.0), (True, False)))]
    for one in found:
        rank_log.write_failure(tmp_path, one)
    assert supervise.first_failure(str(tmp_path))["rank"] == rank_log.first_failure(found).rank == 3
    for name in ("step-00000005", "step-00000007.old", "step-00000008.damaged", "step-00000009"):
        (tmp_path / "checkpoints" / name).mkdir(parents=True)
        if name != "step-00000009":  # a kill came before its commit
            (tmp_path / "checkpoints" / name / "COMMIT").touch()
    assert supervise.newest_checkpoint(str(tmp_path)) == committed_steps(tmp_path)[-1] == 7


@pytest.mark.parametrize("text, found", [("2-03:04:05", 183845), ("03:04:05", 11045), ("4:05", 245), ("0:00", 0),
                                         ("UNLIMITED", None), ("INVALID", None), ("NOT_SET", None), ("", None)])
def test_time_left_is_read_as_slurm_writes_it(text, found):
    assert supervise.seconds(text) == found


def test_the_last_words_are_those_that_the_attempt_wrote(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 7}\n{"step": 7, "event": "stop", "exit_status": 75}\n')
    before, words = path.stat().st_size, supervise.last_words
    assert words(str(tmp_path), before) == (-1, None) and words(str(tmp_path), 0) == (7, 75)
    path.write_text(path.read_text() + '{"step": 8}\n{"step": 8, "event": "save"}\n{"torn')
    assert words(str(tmp_path), before) == (8, None)
    path.write_text(path.read_text() + '\n{"step": 8, "event": "stop", "exit_status": 0}\n')
    assert words(str(tmp_path), before) == (8, 0)
    assert words(str(tmp_path / "no"), 0) == (-1, None)


def test_a_torn_line_takes_no_other_with_it(tmp_path):
    for number in (1, 2):
        supervise.note(str(tmp_path), "begin", {"number": number})
        with open(tmp_path / supervise.ATTEMPTS, "a") as file:
            file.write('{"event": "end", "outc')
    assert [a["number"] for a in supervise.read_attempts(str(tmp_path))] == [1, 2]


def test_ranks_that_srun_killed_while_they_left_had_left_in_good_order():
    assert supervise.judge(Ended(137, "SIGUSR1", "", False), None, 75)[0] == CONTINUE
    assert supervise.judge(Ended(137, "", "", False), failure(), 75)[0] == CRASH, "such as a last save that failed"


def test_an_array_task_has_two_names():
    found = supervise.read_job({"SLURM_JOB_ID": "10", "SLURM_ARRAY_JOB_ID": "10", "SLURM_ARRAY_TASK_ID": "2"})
    assert found.names == ("10_2", "10") and found.restart == 0
    assert found.id == "10_2", "to Slurm 10 is the whole array: its steps would be ended and its tasks requeued"


# ---- RUN/jobs.jsonl ------------------------------------------------------------------------------------------------
def test_job_records_come_back(tmp_path):
    first = JobRecord(job_id="7", what="train", site="lumi-g", cluster="lumi", submitted_at="2026-01-02T03:04:05+00:00",
                      script="job.sh", nodes=4, chain="7", place=1)
    assert read_jobs(tmp_path) == []
    append_job(tmp_path, first)
    with open(tmp_path / JOBS, "a") as file:
        file.write('[1]\n{"job_id": "torn')
    append_job(tmp_path, replace(first, job_id="8_3", place=2, array_index=3))
    with open(tmp_path / JOBS, "a") as file:
        file.write(json.dumps({"job_id": "9", "what": "eval", "site": "x", "of_a_later_version": 1}) + "\n")
    assert read_jobs(tmp_path) == [first, replace(first, job_id="8_3", place=2, array_index=3),
                                   JobRecord(job_id="9", what="eval", site="x")]


def test_a_job_that_cannot_be_recorded_is_named(tmp_path):
    with pytest.raises(LaunchError, match=r"job 7 is submitted but not recorded\. .*scancel 7"):
        append_job(tmp_path / "no", JobRecord(job_id="7", what="train", site="x"))


def wait_for(happened) -> None:
    end = time.monotonic() + 30
    while not happened():
        assert time.monotonic() < end
        time.sleep(0.02)
