"""`start` on a real Slurm: what it takes for a rank, and what it starts itself, from every place a person may stand."""

import json
import os
import pty
import select
import subprocess
import sys
import time
from pathlib import Path

import pytest
from slurm import SlurmCluster

from officina.trainer.config import RunConfig
from officina.trainer.run_dir import save_config

pytestmark = pytest.mark.slurm
HERE = Path(__file__).parent
PROBE = f"{sys.executable} {HERE / 'start_probe.py'} meet"
"""Ranks that really meet and sum."""
LOOK = f"{sys.executable} {HERE / 'start_probe.py'} look"
"""Ranks that only say what they take themselves for: no torch, so cheap."""


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    path = tmp_path / "run"
    path.mkdir()
    save_config(RunConfig(device="cpu", threads=1), path / "config.yaml")
    return path


def with_ranks(run_dir: Path, n: int) -> None:
    save_config(RunConfig(device="cpu", threads=1, ranks=n), run_dir / "config.yaml")


def probed(run_dir: Path) -> list[dict]:
    """What each process that trained said about itself, by rank."""
    return sorted((json.loads(f.read_text()) for f in run_dir.glob("probe-*.json")), key=lambda p: p["rank"])


def shape(run_dir: Path) -> list[tuple]:
    """(launcher, rank, world_size, local_rank, local_world_size) of each."""
    return [(p["launcher"], p["rank"], p["world_size"], p["local_rank"], p["local_world_size"])
            for p in probed(run_dir)]


def in_terminal(command: list[str], words: str, env: dict[str, str], timeout_s: float = 90) -> str:
    """Run an interactive command in a pseudo-terminal, type `words` into it, return all that was shown."""
    pid, terminal = pty.fork()
    if pid == 0:
        os.execvpe(command[0], command, env)
    shown, end, typed = b"", time.monotonic() + timeout_s, False
    while time.monotonic() < end:
        ready, _, _ = select.select([terminal], [], [], 0.1)
        if ready:
            try:
                chunk = os.read(terminal, 65536)
            except OSError:
                break
            if not chunk:
                break
            shown += chunk
        if not typed and b"READY>" in shown:
            typed = True
            os.write(terminal, words.encode() + b"\nexit\n")
    else:
        os.kill(pid, 9)
        os.waitpid(pid, 0)
        raise AssertionError(f"the terminal did not end: {shown.decode(errors='replace')}")
    os.waitpid(pid, 0)
    return shown.decode(errors="replace")


SHELL = ["env", "PS1=READY>", "bash", "--norc", "--noprofile", "-i"]


def test_srun_tasks_are_ranks_over_nodes(slurm_cluster: SlurmCluster, run_dir: Path):
    done = slurm_cluster.run("srun", "-N2", "-n3", "--mpi=none", *PROBE.split(), str(run_dir))
    assert done.returncode == 0, done.stderr
    assert done.stdout == "stdout of rank 0\n", "the other ranks' stdout is in their logs"
    by_rank = shape(run_dir)
    assert [p[:3] for p in by_rank] == [("srun", 0, 3), ("srun", 1, 3), ("srun", 2, 3)]
    assert sorted(p[3:5] for p in by_rank) == [(0, 1), (0, 2), (1, 2)]
    assert all(p["sum"] == [3.0, 3.0] for p in probed(run_dir)), "all three really met"


def test_srun_of_one_task_is_a_rank_alone(slurm_cluster: SlurmCluster, run_dir: Path):
    done = slurm_cluster.run("srun", "-n1", "--mpi=none", *LOOK.split(), str(run_dir))
    assert done.returncode == 0, done.stderr
    assert shape(run_dir) == [("srun", 0, 1, 0, 1)]


def test_srun_of_one_task_with_several_devices_starts_them_all(slurm_cluster: SlurmCluster, run_dir: Path):
    with_ranks(run_dir, 2)
    done = slurm_cluster.run("srun", "-n1", "--mpi=none", *LOOK.split(), str(run_dir))
    assert done.returncode == 0, done.stderr
    assert shape(run_dir) == [("officina", r, 2, r, 2) for r in range(2)]


def test_wrapped_srun_tasks_are_ranks(slurm_cluster: SlurmCluster, run_dir: Path):
    """Container runtimes and binding scripts stand between srun and the rank."""
    done = slurm_cluster.run("srun", "-N2", "-n2", "--mpi=none", "bash", "-c", f"{LOOK} {run_dir}; exit $?")
    assert done.returncode == 0, done.stderr
    assert [p[:3] for p in shape(run_dir)] == [("srun", 0, 2), ("srun", 1, 2)]


def test_batch_body_on_one_node_starts_local_ranks(slurm_cluster: SlurmCluster, run_dir: Path):
    with_ranks(run_dir, 2)
    state, said = slurm_cluster.sbatch(f"env | grep SLURM_PROCID\n{LOOK} {run_dir}\n", "-N1", "-n4", folder=run_dir)
    assert state == "COMPLETED", said
    assert "SLURM_PROCID=0" in said, "the trap is set"
    assert shape(run_dir) == [("officina", r, 2, r, 2) for r in range(2)]


def test_batch_body_on_two_nodes_starts_one_step_over_them(slurm_cluster: SlurmCluster, run_dir: Path):
    state, said = slurm_cluster.sbatch(f"{LOOK} {run_dir}\n", "-N2", "-n4", folder=run_dir)
    assert state == "COMPLETED", said
    assert shape(run_dir) == [("srun", r, 2, 0, 1) for r in range(2)]
    assert len({p["node"] for p in probed(run_dir)}) == 2


def test_salloc_shell_beside_the_nodes_starts_a_step_on_them(slurm_cluster: SlurmCluster, run_dir: Path):
    done = slurm_cluster.run("salloc", "-N1", "-n1", *LOOK.split(), str(run_dir))
    assert done.returncode == 0, done.stderr
    assert shape(run_dir) == [("srun", 0, 1, 0, 1)]
    assert probed(run_dir)[0]["node"].startswith("n"), "on a node, not where salloc was typed"


def test_salloc_shell_over_two_nodes_starts_ranks_per_node(slurm_cluster: SlurmCluster, run_dir: Path):
    with_ranks(run_dir, 2)
    done = slurm_cluster.run("salloc", "-N2", "--ntasks-per-node=2", *LOOK.split(), str(run_dir))
    assert done.returncode == 0, done.stderr
    assert shape(run_dir) == [("srun", r, 4, r % 2, 2) for r in range(4)]


@pytest.mark.parametrize("tasks", [1, 3])
def test_shell_under_srun_pty_starts_local_ranks(slurm_cluster: SlurmCluster, run_dir: Path, tasks: int):
    with_ranks(run_dir, 2)
    shown = in_terminal(["srun", "-N1", f"-n{tasks}", "--mpi=none", "--pty", *SHELL], f"{LOOK} {run_dir}",
                        slurm_cluster.environ)
    assert shape(run_dir) == [("officina", r, 2, r, 2) for r in range(2)], shown


def test_interactive_step_of_salloc_starts_a_step_over_its_nodes(slurm_cluster: SlurmCluster, run_dir: Path):
    """What salloc does where the site set LaunchParameters=use_interactive_step, as on most of EuroHPC."""
    shown = in_terminal(["salloc", "-N2", "-n2", "srun", "--interactive", "--preserve-env", "--pty", *SHELL],
                        f"{LOOK} {run_dir}", slurm_cluster.environ)
    assert [p[:3] for p in shape(run_dir)] == [("srun", 0, 2), ("srun", 1, 2)], shown


def test_variables_leaked_by_sbatch_from_a_pty_shell(slurm_cluster: SlurmCluster, run_dir: Path, tmp_path: Path):
    """A shell under srun --pty exports its step's variables into the job it submits."""
    with_ranks(run_dir, 2)
    script = tmp_path / "job.sh"
    script.write_text(f"#!/bin/bash\nenv | grep -E 'SLURM_STEP_ID|SLURM_PTY_PORT|STEP_NUM_TASKS'\n{LOOK} {run_dir}\n")
    shown = in_terminal(["srun", "-N1", "-n3", "--mpi=none", "--pty", *SHELL],
                        f"sbatch -W -N1 -n2 -o {tmp_path}/job.out {script}", slurm_cluster.environ)
    said = (tmp_path / "job.out").read_text()
    leaked = "SLURM_STEP_ID=0" in said or "SLURM_STEP_ID=-5" in said  # newer ones say that it is a batch script
    assert leaked and "SLURM_STEP_NUM_TASKS=3" in said, f"the trap is set: {said} {shown}"
    assert shape(run_dir) == [("officina", r, 2, r, 2) for r in range(2)], said


def test_step_from_a_pty_shell_is_ranks(slurm_cluster: SlurmCluster, run_dir: Path):
    """SLURM_PTY_PORT leaks into it, yet its tasks are ranks."""
    shown = in_terminal(["srun", "-N1", "-n2", "--mpi=none", "--pty", *SHELL],
                        f"srun --overlap --mpi=none -n2 {LOOK} {run_dir} </dev/null", slurm_cluster.environ)
    assert shape(run_dir) == [("srun", r, 2, r, 2) for r in range(2)], shown
    assert all(p["pty_port"] for p in probed(run_dir)), "the trap is set"


def test_torchrun_in_a_batch_body(slurm_cluster: SlurmCluster, run_dir: Path):
    state, said = slurm_cluster.sbatch(
        f"{sys.executable} -m torch.distributed.run --nproc-per-node=2 {HERE / 'start_probe.py'} meet {run_dir}\n",
        "-N1", "-n2", folder=run_dir)
    assert state == "COMPLETED", said
    assert shape(run_dir) == [("torchrun", r, 2, r, 2) for r in range(2)]
    assert all(p["sum"] == [2.0, 1.0] for p in probed(run_dir)), "they really met"


def test_mpirun_in_a_batch_body(slurm_cluster: SlurmCluster, run_dir: Path, mpirun: list[str]):
    state, said = slurm_cluster.sbatch(f"{' '.join(mpirun)} -n 2 {LOOK} {run_dir}\n", "-N1", "-n2", folder=run_dir)
    assert state == "COMPLETED", said
    assert shape(run_dir) == [("mpirun", r, 2, r, 2) for r in range(2)]


def test_login_node_refuses_unasked_ranks(slurm_cluster: SlurmCluster, run_dir: Path):
    done = slurm_cluster.run(*LOOK.split(), str(run_dir))
    assert done.returncode == 2
    assert "is a login node of a Slurm cluster, and no ranks are started there unasked" in done.stderr
    assert "salloc --nodes=1" in done.stderr and "officina submit" in done.stderr and "ranks=2" in done.stderr
    assert probed(run_dir) == []


def test_login_node_starts_ranks_that_were_asked_for(slurm_cluster: SlurmCluster, run_dir: Path):
    with_ranks(run_dir, 1)
    done = slurm_cluster.run(*LOOK.split(), str(run_dir))
    assert done.returncode == 0, done.stderr
    assert shape(run_dir) == [("officina", 0, 1, 0, 1)]


def test_login_node_is_not_fooled_by_leftovers_of_a_step(slurm_cluster: SlurmCluster, run_dir: Path):
    """Variables of a step, pasted or kept by a tmux that was started inside one."""
    left = {"SLURM_PROCID": "0", "SLURM_LOCALID": "0", "SLURM_NODEID": "0", "SLURM_STEP_ID": "0",
            "SLURM_STEP_NUM_TASKS": "4", "SLURM_STEP_NUM_NODES": "1", "SLURM_STEP_NODELIST": "n1",
            "SLURM_STEP_TASKS_PER_NODE": "4", "SLURM_NTASKS": "4"}
    done = slurm_cluster.run(*LOOK.split(), str(run_dir), env=slurm_cluster.environ | left | {"SLURM_JOB_ID": "1"})
    assert done.returncode == 2, done.stdout
    assert "is a login node" in done.stderr


def test_dead_rank_of_a_step_is_named_and_the_status_kept(slurm_cluster: SlurmCluster, run_dir: Path):
    done = slurm_cluster.run("salloc", "-N2", "-n2", *PROBE.split(), str(run_dir), "no-progress", "1")
    assert done.returncode == 76, done.stderr
    assert "officina: rank 1 on " in done.stderr and "NoProgressError: step 7 again" in done.stderr


def test_stop_request_reaches_the_ranks_of_a_step(slurm_cluster: SlurmCluster, run_dir: Path):
    body = (f"{PROBE} {run_dir} train &\n"
            f"for i in $(seq 600); do [ -e {run_dir}/probe-0.json -a -e {run_dir}/probe-1.json ] && break; sleep 0.1; done\n"
            "sleep 0.3; kill -TERM $!; wait $!; echo status $?\n")
    state, said = slurm_cluster.sbatch(body, "-N2", "-n2", folder=run_dir)
    assert "status 75" in said, said
    assert state == "COMPLETED"
    assert (run_dir / "stopped-0").read_text() == (run_dir / "stopped-1").read_text() == "SIGUSR1"


@pytest.fixture(scope="module")
def mpirun() -> list[str]:
    from shutil import which

    if which("mpirun") is None:
        if os.environ.get("CI"):
            pytest.fail("the MPI tests must run in CI: apt-get install openmpi-bin")
        pytest.skip("no mpirun here (apt-get install openmpi-bin)")
    return ["mpirun", "--allow-run-as-root", "--oversubscribe"]


def test_mpi_tells_where_rank_0_is(mpirun: list[str], tmp_path: Path):
    """Several hosts under mpirun: no variable names rank 0's; mpi4py does. One host is made to look unknown."""
    if os.environ.get("CI") is None:
        pytest.importorskip("mpi4py")
    program = ("import dataclasses, os; from officina.trainer.ranks import *\n"
               "env = dataclasses.replace(read_rank_env(os.environ), master_addr='', master_port=0, n_hosts=0)\n"
               "ranks = start_ranks(env, device='cpu', threads=1)\n"
               "said = f'{ranks.env.master_port} {ranks.sum([1, ranks.rank])}'\n"
               f"open(f'{tmp_path}/{{ranks.rank}}', 'w').write(said)\n"
               "stop_ranks()")
    done = subprocess.run([*mpirun, "-n", "4", sys.executable, "-c", program], capture_output=True, text=True,
                          timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    [said] = {(tmp_path / str(rank)).read_text() for rank in range(4)}
    assert said.endswith("[4.0, 6.0]") and int(said.split()[0]) > 0
