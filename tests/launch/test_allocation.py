"""Where a command runs, from variables and from clients that answer as Slurm's do. The real: test_slurm_start.py."""

import os
import socket
import sys
from pathlib import Path

import pytest

from officina.launch import allocation
from officina.launch.allocation import (
    Allocation,
    find_allocation,
    find_place,
    gpus_per_node,
    on_login_node,
    srun_words,
    step_environ,
)
from officina.trainer.config import RunConfig
from officina.trainer.errors import LaunchError
from officina.trainer.slurm_env import ProcessFacts

JOB = {"SLURM_JOB_ID": "9", "SLURM_JOB_NODELIST": "n[1-2]", "SLURM_JOB_CPUS_PER_NODE": "72(x1),64"}
NOWHERE = ProcessFacts("", True, 1)


def client(folder: Path, name: str, body: str) -> None:
    (folder / name).write_text(f"#!/bin/sh\n{body}\n")
    (folder / name).chmod(0o755)


@pytest.mark.parametrize(("environ", "facts", "found"), [
    ({}, NOWHERE, None),
    ({"SLURM_JOB_ID": "9"}, NOWHERE, None),
    (JOB, NOWHERE, Allocation("9", ("n1", "n2"), False, 64)),
    (JOB, ProcessFacts("9.batch", False, 1), Allocation("9", ("n1", "n2"), True, 64)),
    (JOB, ProcessFacts("8.batch", False, 1), Allocation("9", ("n1", "n2"), False, 64)),
    (JOB | {"SLURMD_NODENAME": "n1"}, ProcessFacts(None, False, 1), Allocation("9", ("n1", "n2"), True, 64)),
    (JOB | {"SLURM_JOB_NODELIST": socket.gethostname()}, NOWHERE, Allocation("9", (socket.gethostname(),), True, 64)),
])
def test_allocation(environ: dict, facts: ProcessFacts, found: Allocation | None):
    assert find_allocation(environ, facts) == found


def test_login_node(tmp_path: Path):
    path = {"PATH": str(tmp_path)}
    assert not on_login_node(path, confs=()), "no Slurm at all"
    client(tmp_path, "sbatch", "exit 0")
    client(tmp_path, "scontrol", "exit 1")
    assert not on_login_node(path, confs=()), "a workstation with the programs and no cluster"
    (tmp_path / "slurm.conf").touch()
    assert on_login_node(path, confs=(str(tmp_path / "slurm.conf"),))
    assert on_login_node(path | {"SLURM_CONF": str(tmp_path / "slurm.conf")}, confs=())
    client(tmp_path, "scontrol", 'test "$1" = ping')
    assert on_login_node(path, confs=()), "no file: the cluster answers"
    (tmp_path / "scontrol").unlink()
    assert not on_login_node(path, confs=())


@pytest.mark.parametrize(("environ", "shown", "n"), [
    ({"SLURM_GPUS_ON_NODE": "4"}, "", 4),
    ({"SLURM_GPUS_PER_NODE": "a100:8"}, "", 8),
    ({"SLURM_GPUS_PER_NODE": "gpu:4(S:0-1)"}, "", 4),
    ({"SLURM_GPUS_PER_NODE": "h100"}, "JobId=9 TRES=cpu=4,node=2,gres/gpu:h100=2,gres/gpu=2", 1),
    ({}, "JobId=9 TRES=cpu=144,mem=8G,node=2,billing=2,gres/gpu=8 Nodes=2", 4),
    ({}, "JobId=9 AllocTRES=cpu=144,node=2,gres/gpu:gh200=8,gres/gpu=8", 4),
    ({}, "JobId=9 TRES=cpu=4,node=2", 0),
])
def test_gpus_of_nodes_elsewhere(tmp_path: Path, environ: dict, shown: str, n: int):
    client(tmp_path, "scontrol", f"echo '{shown}'")
    environ = environ | {"PATH": f"{tmp_path}:/bin:/usr/bin"}
    assert gpus_per_node(environ, Allocation("9", ("n1", "n2"), False, 64)) == n


def test_gpus_of_nodes_elsewhere_without_an_answer(tmp_path: Path):
    assert gpus_per_node({"PATH": str(tmp_path)}, Allocation("9", ("n1",), False, 64)) == 0


def test_gpus_here(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(allocation, "visible_devices", lambda environ: 3)
    assert gpus_per_node({"SLURM_GPUS_PER_NODE": "8"}, Allocation("9", ("n1",), True, 64)) == 3


def test_fewer_cpus_than_ranks_are_refused_before_srun_does():
    """`salloc --nodes=2 --gpus-per-node=4` gives one CPU a node at most sites."""
    environ = JOB | {"SLURM_JOB_CPUS_PER_NODE": "2(x2)"}
    with pytest.raises(LaunchError, match=r"job 9 has 2 CPUs of a node for 4 ranks, .*salloc --ntasks-per-node=4 .*ranks=2$"):
        find_place(RunConfig(device="cpu", ranks=4), environ)
    assert find_place(RunConfig(device="cpu", ranks=2), environ).world_size == 4


def test_srun_words():
    words = srun_words(Allocation("9", ("n1", "n2"), True, 72), 4, [sys.executable, "-m", "officina.trainer", "RUN"])
    assert words[:6] == ["srun", "--jobid=9", "--nodes=2", "--ntasks=8", "--ntasks-per-node=4", "--cpus-per-task=18"]
    assert {"--overlap", "--mpi=none", "--kill-on-bad-exit=1"} < set(words)
    assert "--cpus-per-task=1" in srun_words(Allocation("9", ("n1",), True, 0), 4, [])


def test_step_environ_keeps_the_job_and_drops_the_step(monkeypatch: pytest.MonkeyPatch):
    kept = JOB | {"HOME": "/h", "SLURM_CONF": "/c"}
    dropped = {"SLURM_STEP_ID": "0", "SLURM_PROCID": "0", "SLURM_NTASKS": "9", "SLURM_PTY_PORT": "1",
               "SLURM_CPUS_PER_TASK": "1", "SLURM_DISTRIBUTION": "cyclic", "SLURM_NTASKS_PER_NODE": "3"}
    monkeypatch.setattr(os, "isatty", lambda fd: True)
    assert step_environ(kept | dropped) == kept | {"PYTHONSAFEPATH": "1", "PYTHONUNBUFFERED": "1"}
    monkeypatch.setattr(os, "isatty", lambda fd: False)
    assert step_environ({"TERM": "xterm"})["TERM"] == "dumb", "srun --unbuffered gives ranks a terminal that is a log"
