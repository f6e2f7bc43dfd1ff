"""Which rank this process is: the only reader of RANK, SLURM_* and OMPI_* variables. No torch: login nodes use it."""

import ipaddress
import os
import socket
import zlib
from collections.abc import Mapping
from dataclasses import dataclass

from officina.trainer.errors import LaunchError
from officina.trainer.slurm_env import ProcessFacts, expand_counts, expand_hosts, is_task, process_facts

LOOPBACK = "127.0.0.1"
_FIRST_PORT, _N_PORTS = 20_000, 12_000
"""Ports derived from a job: below 32768, where Linux starts to give ports to outgoing connections."""


@dataclass(frozen=True, slots=True)
class RankEnv:
    """This process among the others, as the launcher's environment tells."""

    rank: int
    local_rank: int
    world_size: int
    local_world_size: int
    launcher: str
    """`officina` (started by the parent here), `torchrun`, `srun`, `mpirun`, or `none` for a lone process."""
    n_hosts: int = 1
    """Hosts the ranks are on; 0 if the launcher does not tell."""
    master_addr: str = LOOPBACK
    """Name or address of the host where rank 0 listens; "" if the ranks must find it out together over MPI."""
    master_port: int = 0
    """Port where rank 0 listens; 0 if not yet known."""


LONE = RankEnv(0, 0, 1, 1, "none")
"""A process that no launcher started."""


def read_rank_env(environ: Mapping[str, str], facts: ProcessFacts | None = None) -> RankEnv | None:
    """The rank that a launcher made of this process; None if none did, so that ranks are still to be started.

    The innermost launcher wins: officina's parent, then torchrun, mpirun, srun. `facts`: by default this process's.
    Raises LaunchError if the variables contradict each other or would let the ranks miss each other.
    """
    if "OFFICINA_RANK" in environ:
        n = _number(environ, "OFFICINA_WORLD_SIZE")
        env = RankEnv(_number(environ, "OFFICINA_RANK"), _number(environ, "OFFICINA_RANK"), n, n, "officina",
                      master_port=_number(environ, "OFFICINA_PORT"))
    elif "TORCHELASTIC_RUN_ID" in environ:
        env = _read_torchrun(environ)
    elif "OMPI_COMM_WORLD_RANK" in environ:
        env = _read_mpirun(environ)
    elif is_task(environ, facts or process_facts()):
        env = _read_srun(environ)
    else:
        _refuse_unknown_launcher(environ)
        return None
    if not (0 <= env.rank < env.world_size and 0 <= env.local_rank < env.local_world_size <= env.world_size):
        raise LaunchError(f"{env.launcher} says rank {env.rank} of {env.world_size}, local rank {env.local_rank} of "
                          f"{env.local_world_size}: ranks count from 0 and stay below their number. "
                          "Start the ranks anew from a clean environment")
    return env


def _read_torchrun(environ: Mapping[str, str]) -> RankEnv:
    world, local_world = _number(environ, "WORLD_SIZE"), _number(environ, "LOCAL_WORLD_SIZE")
    return RankEnv(_number(environ, "RANK"), _number(environ, "LOCAL_RANK"), world, local_world, "torchrun",
                   n_hosts=1 if local_world == world else 0,
                   master_addr=environ.get("MASTER_ADDR", "").strip(), master_port=_number(environ, "MASTER_PORT"))


def _read_srun(environ: Mapping[str, str]) -> RankEnv:
    node, n_hosts = _number(environ, "SLURM_NODEID"), _number(environ, "SLURM_STEP_NUM_NODES")
    per_node = expand_counts(environ["SLURM_STEP_TASKS_PER_NODE"])
    if node >= len(per_node):
        raise LaunchError(f"SLURM_NODEID={node}, but SLURM_STEP_TASKS_PER_NODE={environ['SLURM_STEP_TASKS_PER_NODE']} "
                          f"has {len(per_node)} nodes. Start the step anew: srun --nodes={n_hosts} ...")
    job, step = _number(environ, "SLURM_JOB_ID"), _number(environ, "SLURM_STEP_ID")
    port = _number(environ, "MASTER_PORT") if environ.get("MASTER_PORT") else port_of(f"{job}.{step}")
    return RankEnv(_number(environ, "SLURM_PROCID"), _number(environ, "SLURM_LOCALID"),
                   _number(environ, "SLURM_STEP_NUM_TASKS"), per_node[node], "srun", n_hosts=n_hosts,
                   master_addr=_srun_master(environ, n_hosts), master_port=port)


def _srun_master(environ: Mapping[str, str], n_hosts: int) -> str:
    """MASTER_ADDR if it can be right, else the step's first host. A loopback address never is where there are several
    hosts: each would meet only itself. The exception is a cluster whose nodes are all one machine (a test's), which
    srun reaches over loopback and whose node names nobody can resolve."""
    if n_hosts == 1:
        return LOOPBACK
    given = environ.get("MASTER_ADDR", "").strip()
    if given and not is_loopback(given):
        return given
    first = next(expand_hosts(environ["SLURM_STEP_NODELIST"]))
    if is_loopback(environ.get("SLURM_LAUNCH_NODE_IPADDR", "")) and not _resolves(first):
        return LOOPBACK
    return first


def _read_mpirun(environ: Mapping[str, str]) -> RankEnv:
    world, local_world = _number(environ, "OMPI_COMM_WORLD_SIZE"), _number(environ, "OMPI_COMM_WORLD_LOCAL_SIZE")
    one_host = local_world == world
    given = environ.get("MASTER_ADDR", "").strip()
    addr = LOOPBACK if one_host else "" if is_loopback(given) else given
    # PMIX_NAMESPACE is Open MPI 4's and 5's name of the job: the same for all ranks, another for each mpirun.
    port = environ.get("MASTER_PORT") and _number(environ, "MASTER_PORT")
    return RankEnv(_number(environ, "OMPI_COMM_WORLD_RANK"), _number(environ, "OMPI_COMM_WORLD_LOCAL_RANK"), world,
                   local_world, "mpirun", n_hosts=1 if one_host else 0, master_addr=addr,
                   master_port=port or port_of(environ.get("PMIX_NAMESPACE", "mpirun")))


def _refuse_unknown_launcher(environ: Mapping[str, str]) -> None:
    """RANK of N without a launcher we know: starting ranks here would run N trainings into one directory."""
    if environ.get("WORLD_SIZE", "1") in ("", "1") or not environ.get("RANK") or not environ.get("MASTER_ADDR"):
        return
    raise LaunchError(f"RANK={environ['RANK']} and WORLD_SIZE={environ['WORLD_SIZE']} are set, but not by torchrun, "
                      "srun or mpirun. Start the ranks with one of these, for example torchrun --nproc-per-node=4 -m "
                      "officina.trainer RUN; or, if they are left over from something else: unset RANK WORLD_SIZE")


def port_of(job: str) -> int:
    """A port that all ranks of a job derive alike; jobs that share a host seldom meet."""
    return _FIRST_PORT + zlib.crc32(job.encode()) % _N_PORTS


def is_loopback(host: str) -> bool:
    """Does this name or address mean the host itself, whichever it is?"""
    try:
        return ipaddress.ip_address(host.strip()).is_loopback
    except ValueError:
        return host.strip().split(".")[0] in ("localhost", "localhost4", "localhost6", "ip6-localhost")


def resolve_ipv4(host: str) -> str:
    """The IPv4 address of a host. Raises LaunchError. IPv6 is left out: with both, stores and ranks miss each other."""
    try:
        return str(socket.getaddrinfo(host, None, socket.AF_INET, socket.SOCK_STREAM)[0][4][0])
    except OSError as error:
        raise LaunchError(f"MASTER_ADDR: {socket.gethostname()} finds no IPv4 address for {host!r} ({error}). "
                          f"{how_to_name_rank_0()}") from None


def how_to_name_rank_0() -> str:
    """What a person can do where the address is wrong. The script of a job sets MASTER_ADDR itself, by the site's profile."""
    if "OFFICINA_ATTEMPT" in os.environ:
        return ("In the site's profile, rendezvous.address is the nodes' name in the network that all of them share, such as "
                "'{host}-ib'; officina sites new NAME writes a profile")
    return ("Set MASTER_ADDR to the first node's IPv4 address in the network that all nodes share, as ip -4 addr shows it "
            "there, before the ranks start: export MASTER_ADDR=10.0.0.1")


def _resolves(host: str) -> bool:
    try:
        return bool(resolve_ipv4(host))
    except LaunchError:
        return False


def _number(environ: Mapping[str, str], name: str) -> int:
    value = environ.get(name, "").strip()
    if not value.isdigit():
        raise LaunchError(f"{name}={value or '(not set)'}: must be a whole number. A launcher sets it; start the ranks "
                          "with officina train, srun, torchrun or mpirun and leave it alone")
    return int(value)
