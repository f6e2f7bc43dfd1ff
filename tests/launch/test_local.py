"""Local ranks for real: processes that end well, fail, hang, are stopped and are killed."""

import json
import os
import signal
import socket
import subprocess
import sys
import textwrap
import threading
import time
from pathlib import Path

import pytest

from officina.launch import postmortem
from officina.launch.local import run_ranks, run_step
from officina.trainer.config import RunConfig
from officina.trainer.errors import LaunchError
from officina.trainer.rank_env import RankEnv
from officina.trainer.rank_log import describe, failure_path, log_path, write_failure
from officina.trainer.run_dir import save_config
from tests.launch.test_supervise import stop_record

TINY = Path(__file__).with_name("tiny_rank.py")


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    path = tmp_path / "runs" / "one"
    path.mkdir(parents=True)
    save_config(RunConfig(device="cpu", threads=1), path / "config.yaml")
    return path


def launch(run_dir: Path, n_ranks: int, *deed: object, grace_s: float = 30) -> subprocess.Popen:
    """A parent process that runs `run_ranks` with tiny ranks, as `officina train` does."""
    program = f"""
        import os, sys
        from pathlib import Path
        from officina.launch.local import run_ranks
        run = Path({str(run_dir)!r})
        command = [sys.executable, {str(TINY)!r}, str(run), *{[str(word) for word in deed]!r}]
        sys.exit(run_ranks(run, {n_ranks}, environ=os.environ, grace_s={grace_s}, command=command))
    """
    return subprocess.Popen([sys.executable, "-c", textwrap.dedent(program)], stdout=subprocess.PIPE,
                            stderr=subprocess.PIPE, text=True, start_new_session=True)


def finish(parent: subprocess.Popen) -> tuple[int, str, str]:
    out, err = parent.communicate(timeout=60)
    return parent.returncode, out, err


def started(run_dir: Path, n_ranks: int, timeout_s: float = 60) -> list[int]:
    """PIDs of the ranks, once all of them train."""
    end, files = time.monotonic() + timeout_s, [run_dir / f"started-{rank}" for rank in range(n_ranks)]
    while not all(f.exists() and f.read_text().count("\n") == 2 for f in files):
        assert time.monotonic() < end, "the ranks did not start"
        time.sleep(0.02)
    return [int(f.read_text().splitlines()[0]) for f in files]


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def wait_gone(pids: list[int], timeout_s: float = 60) -> None:
    end = time.monotonic() + timeout_s
    while any(alive(pid) for pid in pids):
        assert time.monotonic() < end, f"orphans: {[pid for pid in pids if alive(pid)]}"
        time.sleep(0.02)


def test_ends_well_with_rank_0_on_the_terminal_and_all_else_in_logs(run_dir: Path):
    status, out, err = finish(launch(run_dir, 2, "done"))
    assert (status, out, err) == (0, "stdout of rank 0\n", "")
    first, second = (log_path(run_dir, rank).read_text() for rank in range(2))
    assert "stderr of rank 0" in first and "stdout of rank 0" not in first
    assert "stderr of rank 1" in second and "stdout of rank 1" in second
    for rank, text in enumerate((first, second)):
        assert text.splitlines()[0].startswith(f"==== rank {rank} on {os.uname().nodename}, pid ")
        assert text.count("====") == 2  # one header a start
    assert "launcher='officina'" in (run_dir / "started-1").read_text()
    assert (run_dir / "started-1").read_text().endswith("\n1"), "threads of the configuration"


def test_exception_in_one_rank_is_named_first_and_takes_the_others_down(run_dir: Path):
    parent = launch(run_dir, 3, "raise", 1)
    pids = started(run_dir, 3)
    began = time.monotonic()
    status, _, err = finish(parent)
    assert time.monotonic() - began < 60  # the others would have waited for ten minutes
    assert status == 1
    head = err.strip().splitlines()[0]
    assert head == f"officina: rank 1 of 3 on {os.uname().nodename} failed: ValueError: this shard is not mine"
    assert str(log_path(run_dir, 1)) in err.splitlines()[2]
    assert "Traceback" in err and "and a second line" in err
    record = json.loads(failure_path(run_dir, 1).read_text())
    known = [record[name] for name in ("rank", "error", "exit_status", "consequence")]
    assert known == [1, "ValueError", 1, False]
    assert "ValueError: this shard is not mine" in log_path(run_dir, 1).read_text()
    wait_gone(pids)


@pytest.mark.parametrize(("deed", "n_ranks", "said"), [
    ("kill", 2, "was killed by SIGKILL (signal 9); the kernel counted"),
    ("segv", 1, "was killed by SIGSEGV (signal 11)"),
    ("exit", 2, "ended with exit status 3 and left no exception"),
])
def test_dead_rank_is_named_first(run_dir: Path, deed: str, n_ranks: int, said: str):
    culprit = n_ranks - 1
    parent = launch(run_dir, n_ranks, deed, culprit)
    pids = started(run_dir, n_ranks)
    status, _, err = finish(parent)
    assert status == 1
    head = err.strip().splitlines()[0]
    assert head.startswith(f"officina: rank {culprit} of {n_ranks} on {os.uname().nodename} {said}")
    assert f"stderr of rank {culprit}" in err, "the end of the dead rank's log"
    wait_gone(pids)


@pytest.mark.parametrize(("deed", "status", "said"), [
    ("user", 2, "DataError: data.sources.a.path=/nowhere: there is no dataset.json.\nTry: officina data build\n  Log: "),
    ("no-progress", 76, "NoProgressError: 5 steps in a row had no finite gradient"),
])
def test_verdicts_pass_through_without_a_traceback(run_dir: Path, deed: str, status: int, said: str):
    got, _, err = finish(launch(run_dir, 1, deed))
    assert got == status
    assert said in err and "Traceback" not in err


def test_out_of_memory_names_rank_phase_parts_and_keys(run_dir: Path):
    status, _, err = finish(launch(run_dir, 2, "oom", 1))
    assert status == 2
    assert "rank 1 of 2 ran out of memory on cpu" in err
    assert "DefaultCPUAllocator" in err and "Traceback" not in err
    assert "parameters" in err and "moments" in err and "ulimit -v" in err
    assert "engine=fsdp2" in err


def test_rank_that_never_starts_is_named_with_the_address(run_dir: Path):
    parent = launch(run_dir, 3, "hang", 2)
    status, _, err = finish(parent)
    assert status == 2
    assert "2 of 3 ranks met at 127.0.0.1:" in err
    assert "missing after 6 s: rank 2" in err


@pytest.mark.parametrize(("number", "n_ranks"), [(signal.SIGINT, 2), (signal.SIGTERM, 1), (signal.SIGUSR1, 1)])
def test_stop_in_good_order(run_dir: Path, number: signal.Signals, n_ranks: int):
    parent = launch(run_dir, n_ranks, "train")
    pids = started(run_dir, n_ranks)
    parent.send_signal(number)
    status, _, err = finish(parent)
    assert status == 75
    assert f"officina: {number.name}: the ranks finish their step, save and leave" in err
    assert [(run_dir / f"stopped-{rank}").read_text() for rank in range(n_ranks)] == [number.name] * n_ranks
    wait_gone(pids)


def test_stop_while_the_ranks_are_still_starting(run_dir: Path):
    parent = launch(run_dir, 1, "train")
    while not log_path(run_dir, 0).exists():
        time.sleep(0.01)
    time.sleep(0.1)  # the rank's Python is up or not yet, its torch is not
    parent.send_signal(signal.SIGTERM)
    assert finish(parent)[0] == 75


def commit(run_dir: Path) -> None:
    (run_dir / "checkpoints" / "step-00000001").mkdir(parents=True)
    (run_dir / "checkpoints" / "step-00000001" / "COMMIT").touch()


def test_second_ctrl_c_kills(run_dir: Path):
    commit(run_dir)
    parent = launch(run_dir, 1, "stubborn", 0)
    pids = started(run_dir, 1)
    parent.send_signal(signal.SIGINT)
    assert any("the ranks finish their step" in line for line in parent.stderr), "the first one asks"
    assert parent.poll() is None
    parent.send_signal(signal.SIGINT)
    status, _, err = finish(parent)
    assert status == 130
    assert f"officina: killed. The last checkpoint is intact: officina resume {run_dir}" in err
    wait_gone(pids)


def test_ranks_that_do_not_stop_are_killed_and_named(run_dir: Path):
    parent = launch(run_dir, 2, "stubborn", 1, grace_s=1)
    pids = started(run_dir, 2)
    parent.send_signal(signal.SIGTERM)
    status, _, err = finish(parent)
    assert status == 1
    assert "did not stop within 1 s of SIGTERM and had to be killed" in err and "site.grace=2s" in err
    wait_gone(pids)


def test_kill_9_of_the_parent_leaves_no_orphan(run_dir: Path):
    parent = launch(run_dir, 2, "train")
    pids = started(run_dir, 2)
    assert all(alive(pid) for pid in pids)
    parent.kill()
    parent.wait()
    wait_gone(pids)


def test_a_rank_whose_parent_is_gone_refuses_to_start(run_dir: Path):
    environ = os.environ | {"OFFICINA_RANK": "0", "OFFICINA_WORLD_SIZE": "1", "OFFICINA_PORT": "1",
                            "OFFICINA_PARENT_PID": "1"}
    done = subprocess.run([sys.executable, "-m", "officina.trainer", run_dir], env=environ, capture_output=True,
                          text=True, timeout=60, check=False)
    assert done.returncode == 2
    assert "the process 1 that started this rank is gone (OFFICINA_PARENT_PID)" in done.stderr


def test_a_rank_with_no_run_directory_says_so(tmp_path: Path):
    done = subprocess.run([sys.executable, "-m", "officina.trainer", tmp_path / "no"], capture_output=True, text=True,
                          timeout=60, check=False)
    assert (done.returncode, done.stdout) == (2, "")
    assert f"{tmp_path / 'no'}: no such run directory on {socket.gethostname()}. If it is there on" in done.stderr


def test_failures_of_earlier_starts_are_not_blamed(run_dir: Path):
    failure_path(run_dir, 1).parent.mkdir()
    write_failure(run_dir, describe(RankEnv(1, 1, 2, 2, "officina"), ValueError("long ago")))
    log_path(run_dir, 0).write_text("==== rank 0 on elsewhere ====\n")
    status, _, err = finish(launch(run_dir, 1, "done"))
    assert (status, err) == (0, "")
    assert not failure_path(run_dir, 1).exists()
    assert log_path(run_dir, 0).read_text().count("==== rank 0 on ") == 2, "logs go on"


def test_oom_kills_are_counted_and_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture):
    (tmp_path / "vmstat").write_text("nr_free_pages 1\noom_kill 7\n")
    assert postmortem.oom_kills(tmp_path / "vmstat") == 7
    assert postmortem.oom_kills(tmp_path / "none") is None
    monkeypatch.setattr(postmortem, "oom_kills", lambda: 8)
    assert postmortem.explain(tmp_path, [postmortem.Ended(1, -9, 0.0)], 2, 7) == 1
    assert "this host's kernel killed 1 process(es) for lack of memory meanwhile" in capsys.readouterr().err
    assert postmortem.explain(tmp_path, [postmortem.Ended(1, -9, 0.0)], 2, None) == 1
    assert "often that is the kernel out of memory" in capsys.readouterr().err


def test_without_prctl_a_rank_watches_its_parent():
    program = "import os; from officina.trainer.__main__ import _watch_parent; _watch_parent(os.getppid() + 1)"
    assert subprocess.run([sys.executable, "-c", program], timeout=30, check=False).returncode == 75


# ---- ranks that are the trainer but for its run, so that no torch is loaded ----------------------------------------------
def light(deed: str) -> list[str]:
    """The command of a rank that comes to `deed` instead of a run."""
    program = ("import os, signal, sys, time\nfrom pathlib import Path\n"
               "from officina.trainer import __main__ as trainer\nfrom officina.trainer.errors import DataError\n"
               f"def run(run_dir, env, timeout_s):\n{textwrap.indent(textwrap.dedent(deed), '    ')}\n"
               "trainer._run = run\nstatus = trainer.cli()\nos._exit(status) if status not in (0, 75) else sys.exit(status)")
    return [sys.executable, "-c", program]


def run_light(run_dir: Path, n_ranks: int, deed: str) -> int:
    return run_ranks(run_dir, n_ranks, environ=os.environ, grace_s=20, command=[*light(deed), str(run_dir)])


LEFT = "ended with exit status {} and left no exception"


@pytest.mark.parametrize(("deed", "said"), [
    ("os._exit(0)", LEFT.format(0)), ("os._exit(75)", LEFT.format(75)), ("sys.exit(0)", "failed: SystemExit: 0"),
    ("raise GeneratorExit('of a user')", "failed: GeneratorExit: of a user")])
def test_a_rank_that_leaves_before_its_work_is_done_has_failed(run_dir: Path, capfd, deed: str, said: str):
    assert run_light(run_dir, 2, f"time.sleep(20 if env.rank == 0 else 0)\n{deed}") == 1
    err = capfd.readouterr().err
    assert err.startswith(f"\nofficina: rank 1 of 2 on {os.uname().nodename} {said}")
    assert ("This is no orderly end" in err) == ("os._exit" in deed)


@pytest.mark.parametrize("status", [0, 75])
def test_a_rank_that_came_to_the_end_of_its_work_says_so(run_dir: Path, status: int):
    assert run_light(run_dir, 1, f"return {status}") == status


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGHUP])
def test_a_stop_while_python_starts_waits_until_it_can_be_taken(run_dir: Path, capfd, number: signal.Signals):
    def stop() -> None:
        while not log_path(run_dir, 0).exists() or not log_path(run_dir, 0).stat().st_size:
            time.sleep(0.001)
        os.kill(os.getpid(), number)

    threading.Thread(target=stop).start()
    deed = """
        from officina.trainer.signals import StopRequest
        with StopRequest() as stop:
            while not stop.wanted:
                time.sleep(0.01)
        Path(run_dir, "stopped").write_text(stop.reason)
        return 75
    """
    assert run_light(run_dir, 1, deed) == 75
    assert (run_dir / "stopped").read_text() == number.name
    assert f"{number.name}: the ranks finish their step" in capfd.readouterr().err


def test_a_full_disk_hides_no_verdict(mount, capfd: pytest.CaptureFixture):
    disk = mount("size=1m")
    deed = """
        with open(run_dir / "ballast", "wb", buffering=0) as ballast:
            for size in (4096, 1):
                try:
                    while ballast.write(bytes(size)):
                        pass
                except OSError:
                    pass
        try:
            while os.write(2, b"x"):
                pass
        except OSError:
            pass
        raise DataError("data.sources.a.path=/nowhere: there is no dataset.json.\\nTry: officina data build")
    """
    assert run_light(disk, 1, deed) == 2 and not failure_path(disk, 0).exists()
    err = capfd.readouterr().err
    assert "DataError: data.sources.a.path=/nowhere: there is no dataset.json.\nTry: officina data build\n  Log: " in err
    assert "(the disk took no record of it)" in err and "Traceback" not in err


def test_a_log_that_cannot_be_made_is_no_bug(run_dir: Path):
    (run_dir / "logs").touch()
    with pytest.raises(LaunchError, match=f"{run_dir}/logs.*, so the run directory cannot be written"):
        run_light(run_dir, 1, "return 0")


def test_without_a_parent_a_rank_tells_even_what_may_be_a_consequence(run_dir: Path):
    """Also where neither stdin nor stdout are open, and the exception has no text in UTF-8."""
    deed = ("torch = type(os)('torch.distributed.x')\n"
            "exec('def lost(text): raise ConnectionResetError(104, text)', vars(torch))\n"
            "torch.lost('Connection reset by peer \\udcff')")
    done = subprocess.run(["sh", "-c", 'exec "$@" <&- >&-', "sh", *light(deed), run_dir], stderr=subprocess.PIPE, text=True,
                          timeout=60, check=False)
    assert done.returncode == 1 and done.stderr == (
        f"officina: rank 0 on {os.uname().nodename}: ConnectionResetError: [Errno 104] Connection reset by peer \\udcff\n"
        f"  Log: {log_path(run_dir, 0)}\n")
    assert json.loads(failure_path(run_dir, 0).read_text())["consequence"]
    done = subprocess.run(["sh", "-c", 'exec "$@" <&- >&- 2>&-', "sh", *light("return 0"), run_dir], timeout=60, check=False)
    assert done.returncode == 0


# ---- a step of ranks; with the real srun: test_slurm_start.py ------------------------------------------------------
@pytest.mark.parametrize(("words", "status", "said"), [
    ("say 0", 0, ""),
    ("say 75", 75, ""),
    ("exit 0", 1, "officina: srun ended with exit status 0 before the end of its work, and no rank said why."),
    ("exit 75", 1, "officina: srun ended with exit status 75 before the end of its work, and no rank said why."),
    ("exit 3", 1, "officina: srun ended with exit status 3, and no rank said why."),
    ("exit 143", 1, "officina: srun ended by SIGTERM (signal 15), and no rank said why."),
    ("kill -9 $$", 1, "officina: srun ended by SIGKILL (signal 9), and no rank said why."),
])
def test_end_of_a_step(run_dir: Path, capfd: pytest.CaptureFixture, words: str, status: int, said: str):
    (run_dir / "metrics.jsonl").write_text(stop_record(0))  # of an earlier start
    words = f"say() {{ echo '{stop_record('XX')}' | sed s/XX/$1/ >>{run_dir}/metrics.jsonl; exit $1; }}; {words}"
    assert run_step(run_dir, ["sh", "-c", words], environ=os.environ, grace_s=5) == status
    err = capfd.readouterr().err
    assert err.startswith(said) and (str(run_dir / "logs") in err) == bool(said)


@pytest.mark.parametrize(("number", "again", "grace_s", "status", "left"), [
    (signal.SIGTERM, None, 0.3, 1, "The last checkpoint is intact"),
    (signal.SIGINT, signal.SIGINT, 60, 130, "There was no checkpoint yet; from the beginning again"),
])
def test_step_that_does_not_stop_is_killed(run_dir: Path, capfd: pytest.CaptureFixture, number: signal.Signals,
                                           again: signal.Signals | None, grace_s: float, status: int, left: str):
    if "intact" in left:
        commit(run_dir)
    threading.Timer(0.5, os.kill, (os.getpid(), number)).start()
    if again is not None:
        threading.Timer(0.8, os.kill, (os.getpid(), again)).start()
    words = ["sh", "-c", "trap '' USR1; while :; do sleep 0.1; done"]
    assert run_step(run_dir, words, environ=os.environ, grace_s=grace_s) == status
    err = capfd.readouterr().err
    assert f"{number.name}: the ranks finish their step, save and leave" in err
    assert f"officina: the step was killed. {left}: officina resume {run_dir}" in err
