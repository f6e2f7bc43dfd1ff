"""Where this command runs: a lone machine, a login node, on or beside the nodes of a Slurm allocation."""

import os
import re
import shutil
import socket
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from officina.launch.devices import visible_devices
from officina.trainer.config import RunConfig
from officina.trainer.errors import LaunchError
from officina.trainer.rank_env import read_rank_env
from officina.trainer.slurm_env import ProcessFacts, expand_counts, expand_hosts, process_facts

_SLURM_CONFS = ("/etc/slurm/slurm.conf", "/etc/slurm-llnl/slurm.conf", "/run/slurm/conf/slurm.conf",
                "/opt/slurm/etc/slurm.conf")


@dataclass(frozen=True, slots=True)
class Allocation:
    """The Slurm job around this command."""

    job: str
    hosts: tuple[str, ...]
    here: bool
    """Does this command run on one of its nodes? An salloc shell may stand on the login node."""
    cpus_per_node: int
    """Of the smallest node; 0 = not known."""


def find_allocation(environ: Mapping[str, str], facts: ProcessFacts | None = None) -> Allocation | None:
    """The allocation that this process may use, None outside of one. `facts`: by default those of this process."""
    facts = facts or process_facts()
    job = environ.get("SLURM_JOB_ID", "")
    hosts = tuple(expand_hosts(environ.get("SLURM_JOB_NODELIST", "")))
    if not job or not hosts:
        return None
    if facts.step is None:  # the process tree is hidden: believe the variables
        here = "SLURMD_NODENAME" in environ
    else:
        here = facts.step.split(".")[0] == job
    here = here or socket.gethostname().split(".")[0] in {host.split(".")[0] for host in hosts}
    cpus = expand_counts(environ.get("SLURM_JOB_CPUS_PER_NODE", ""))
    return Allocation(job, hosts, here, min(cpus, default=0))


@dataclass(frozen=True, slots=True)
class Place:
    """Where a run's ranks will be, as seen from where the command was called."""

    world_size: int
    is_rank: bool = False
    """This process is one of them: srun, torchrun or mpirun started it."""
    ranks_per_node: int = 0
    allocation: Allocation | None = None
    """They will be one srun step over this allocation; None: this process, or its children on this machine."""


def find_place(run: RunConfig, environ: Mapping[str, str]) -> Place:
    """Ask the environment where the ranks of `run` will be. Raises LaunchError on a login node, unless `ranks` is given.

    A srun step of one task is no rank but a place like any other machine: it may see several GPUs.
    """
    env = read_rank_env(environ)
    here = run.ranks or (1 if run.device == "cpu" else visible_devices(environ)) or 1
    alone_in_step = env is not None and env.launcher == "srun" and env.world_size == 1
    if env is not None and not (alone_in_step and here > 1):
        return Place(env.world_size, is_rank=True)
    if alone_in_step:
        return Place(here)
    allocation = find_allocation(environ)
    if allocation is not None and (len(allocation.hosts) > 1 or not allocation.here):
        per_node = run.ranks or (1 if run.device == "cpu" else gpus_per_node(environ, allocation)) or 1
        if 0 < allocation.cpus_per_node < per_node:
            cpus = f"{allocation.cpus_per_node} CPU{'s' * (allocation.cpus_per_node > 1)}"
            raise LaunchError(f"job {allocation.job} has {cpus} of a node for {per_node} ranks, and each takes one at least. "
                              f"Ask for more: salloc --ntasks-per-node={per_node} --cpus-per-task=2 ..., or start fewer ranks: "
                              f"ranks={allocation.cpus_per_node}")
        return Place(per_node * len(allocation.hosts), ranks_per_node=per_node, allocation=allocation)
    if allocation is None and not run.ranks and on_login_node(environ):
        raise refuse_login_node()
    return Place(here)


def on_login_node(environ: Mapping[str, str], confs: tuple[str, ...] = _SLURM_CONFS) -> bool:
    """Is this a machine that submits to Slurm? It has sbatch, and knows a cluster: by a file, or by asking scontrol.

    A workstation with Slurm's programs but no cluster is none. Asked only outside an allocation.
    """
    if shutil.which("sbatch", path=environ.get("PATH")) is None:
        return False
    if any(Path(conf).is_file() for conf in (environ.get("SLURM_CONF", ""), *confs) if conf):
        return True
    try:  # clusters without a file on the client ("configless") answer by DNS
        asked = subprocess.run(["scontrol", "ping"], env=dict(environ), capture_output=True, timeout=5, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return False
    return asked.returncode == 0


def refuse_login_node() -> LaunchError:
    """The error for ranks that nobody asked for on a login node."""
    return LaunchError(
        f"{socket.gethostname()} is a login node of a Slurm cluster, and no ranks are started there unasked. Either submit:\n"
        "  officina submit site=NAME nodes=1 ...\n"
        "or take a node and start there:\n"
        f"  salloc --nodes=1 --time=1:00:00 --gpus-per-node=1 --account=PROJECT officina train ...\n"
        "or, for a few CPU ranks on this very machine, say how many: ranks=2")


def gpus_per_node(environ: Mapping[str, str], allocation: Allocation) -> int:
    """GPUs the allocation has on each node: as seen here, or as Slurm tells of nodes that are elsewhere."""
    if allocation.here:
        return visible_devices(environ)
    given = environ.get("SLURM_GPUS_ON_NODE") or environ.get("SLURM_GPUS_PER_NODE") or ""
    if match := re.search(r"(?:^|[:=])([0-9]+)$", given.split("(")[0]):  # h100 is one GPU of that type
        return int(match[1])
    try:
        shown = subprocess.run(["scontrol", "show", "job", "-o", allocation.job], env=dict(environ),
                               capture_output=True, text=True, timeout=20, check=False).stdout
    except (OSError, subprocess.TimeoutExpired):
        return 0
    found = re.search(r"gres/gpu(?::[^=,]+)?=([0-9]+)", shown)
    return int(found[1]) // len(allocation.hosts) if found else 0


def srun_words(allocation: Allocation, ranks_per_node: int, program: list[str]) -> list[str]:
    """The command of one step over the whole allocation, one task per rank.

    --overlap: the shell that asks may be a step that holds all of the job (srun --pty). --cpus-per-task: srun gives each task
    one core otherwise, whatever sbatch was asked for. --kill-on-bad-exit and --wait: a dead rank ends the step.
    """
    n_hosts, cpus = len(allocation.hosts), max(allocation.cpus_per_node // ranks_per_node, 1)
    return ["srun", f"--jobid={allocation.job}", f"--nodes={n_hosts}", f"--ntasks={n_hosts * ranks_per_node}",
            f"--ntasks-per-node={ranks_per_node}", f"--cpus-per-task={cpus}",
            "--overlap", "--mpi=none", "--kill-on-bad-exit=1", "--wait=60", "--unbuffered", *program]


def step_environ(environ: Mapping[str, str]) -> dict[str, str]:
    """`environ` without what describes the step or the wishes of the job we are in: srun would read them as options.

    Under `srun --unbuffered` the ranks have a terminal, whatever our own output is: TERM=dumb says where that is a file.
    """
    dropped = re.compile(r"SLURM_(STEP|PTY|NTASKS|NPROCS|TASKS_PER_NODE|CPUS_PER_TASK|DISTRIBUTION|GTIDS|CPU_BIND|"
                         r"PROCID|LOCALID|NODEID|TASK_PID|MEM_PER|TRES_PER_TASK|GPUS_PER_TASK)")
    kept = {name: value for name, value in environ.items() if not dropped.match(name)}
    return kept | {"PYTHONSAFEPATH": "1", "PYTHONUNBUFFERED": "1"} | ({} if os.isatty(1) else {"TERM": "dumb"})


def trainer_program(run_dir: Path) -> list[str]:
    """The words that start one rank."""
    return [sys.executable, "-m", "officina.trainer", os.fspath(run_dir)]
