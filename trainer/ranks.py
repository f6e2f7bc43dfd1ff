"""The ranks as one group: started, counted, and able to sum, to wait and to exchange text.

torch is imported inside functions only: login nodes import this module to ask whether they are a rank.
"""

from __future__ import annotations

import ctypes
import dataclasses
import json
import os
import socket
import time
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import TYPE_CHECKING

from officina.trainer.errors import LaunchError
from officina.trainer.rank_env import (
    LONE,
    LOOPBACK,
    RankEnv,
    how_to_name_rank_0,
    is_loopback,
    port_of,
    read_rank_env,
    resolve_ipv4,
)

if TYPE_CHECKING:
    import torch
    from torch.distributed import Store

__all__ = ["LONE", "RankEnv", "Ranks", "read_rank_env", "start_ranks", "stop_ranks"]

COLLECTIVE_TIMEOUT_S = 1800.0
"""A rank gives up after this long in one collective: longer than any save of one rank that others wait for."""
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3
"""Of malloc.h: free bytes at the heap's end that are given back, and bytes from which a block is a mapping of its own."""
_VERDICT_MARGIN_S = 5.0
"""How much longer than rank 0 waits for ranks the others wait for what it found."""


@dataclass(frozen=True, slots=True)
class Ranks:
    """All ranks of the run. With one rank there is no process group unless `ensure_group` was asked for."""

    env: RankEnv
    device: torch.device
    threads: int = 0
    """CPU threads of this rank's arithmetic; 0 = not set by us."""

    @property
    def rank(self) -> int:
        return self.env.rank

    @property
    def world_size(self) -> int:
        return self.env.world_size

    def sum(self, numbers: Sequence[float]) -> list[float]:
        """Sums over all ranks of a few float64 numbers: one collective on the CPU group, no device sync."""
        import torch

        if self.world_size == 1:
            return [float(number) for number in numbers]
        packed = torch.tensor(numbers, dtype=torch.float64)
        torch.distributed.all_reduce(packed)
        return packed.tolist()

    def barrier(self) -> None:
        """Return when every rank is here (on the CPU group)."""
        self.sum([0.0])

    def gather_text(self, text: str) -> list[str]:
        """Every rank's text, in rank order, on every rank. Two collectives on the CPU group."""
        import torch

        if self.world_size == 1:
            return [text]
        payload = text.encode()
        lengths = [int(n) for n in self._gather(torch.tensor([len(payload)]))]
        padded = torch.zeros(max(lengths), dtype=torch.uint8)
        if payload:
            padded[:len(payload)] = torch.frombuffer(bytearray(payload), dtype=torch.uint8)
        rows = self._gather(padded) if max(lengths) else [padded] * self.world_size
        return [bytes(row[:n].tolist()).decode() for row, n in zip(rows, lengths, strict=True)]

    def _gather(self, mine: torch.Tensor) -> list[torch.Tensor]:
        """Every rank's tensor of one shape and dtype, on the CPU group."""
        import torch

        rows = [torch.empty_like(mine) for _ in range(self.world_size)]
        torch.distributed.all_gather(rows, mine)
        return rows

    def broadcast_text(self, text: str) -> str:
        """Rank 0's text on every rank; what the others pass is ignored. Two collectives on the CPU group."""
        import torch

        if self.world_size == 1:
            return text
        payload = text.encode() if self.rank == 0 else b""
        length = torch.tensor([len(payload)])
        torch.distributed.broadcast(length, src=0)
        packed = torch.zeros(int(length), dtype=torch.uint8)
        if self.rank == 0 and payload:
            packed = torch.frombuffer(bytearray(payload), dtype=torch.uint8)
        torch.distributed.broadcast(packed, src=0)
        return bytes(packed.tolist()).decode()

    def ensure_group(self) -> None:
        """Make sure a torch process group exists. FSDP2 and ZeRO want one even for a single rank."""
        import torch

        if not torch.distributed.is_initialized():
            _init_group(self.env, self.device, torch.distributed.HashStore())


def start_ranks(env: RankEnv, *, device: str = "auto", threads: int = 0, timeout_s: float = 300.0) -> Ranks:
    """Meet the other ranks. Sets this process's device, CPU threads, on a CPU how it allocates, and for libraries RANK,
    MASTER_ADDR and so on.

    device: `auto`, `cpu` or `cuda`. threads: CPU threads of this rank; 0 = its fair share of the cores it may use.
    timeout_s: how long to wait for the others. Raises LaunchError with address, port and the ranks that did not come.
    """
    import torch

    end = time.monotonic() + timeout_s
    chosen = _pick_device(env, device)
    env = _locate(env)
    os.environ.update(RANK=str(env.rank), LOCAL_RANK=str(env.local_rank), WORLD_SIZE=str(env.world_size),
                      LOCAL_WORLD_SIZE=str(env.local_world_size), MASTER_ADDR=env.master_addr, MASTER_PORT=str(env.master_port))
    if env.world_size > 1:
        store = _open_store(env, end, timeout_s)
        _meet(store, env, end, timeout_s)
        _choose_interface(env, store)
        try:
            _init_group(env, chosen, torch.distributed.PrefixStore("officina/group", store))
        except RuntimeError as error:
            interface = os.environ.get("GLOO_SOCKET_IFNAME", "the default interface")
            raise LaunchError(
                f"rank {env.rank} on {socket.gethostname()} met the others at {_where(env)}, but could not connect to "
                f"them over {interface}: {error}. Set GLOO_SOCKET_IFNAME to the interface of the cluster's network, "
                "as ip -4 addr shows it") from error
    ranks = Ranks(env, chosen)
    n_threads = _agree_on_hosts(ranks, threads)
    torch.set_num_threads(n_threads)
    if chosen.type == "cpu":
        _keep_freed_memory()
    return dataclasses.replace(ranks, threads=n_threads)


def stop_ranks() -> None:
    """Leave the group, if there is one. After a failure just end the process instead: others may never come."""
    import torch

    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


def _init_group(env: RankEnv, device: torch.device, store: Store) -> None:
    import torch

    # Both on GPUs: the loop's small collectives on the CPU never wait for the device.
    backend = "gloo" if device.type == "cpu" else "cpu:gloo,cuda:nccl"
    torch.distributed.init_process_group(backend, store=store, rank=env.rank, world_size=env.world_size,
                                         timeout=timedelta(seconds=COLLECTIVE_TIMEOUT_S))


# ---- device and threads ---------------------------------------------------------------------------------------
def _keep_freed_memory() -> None:
    """Have glibc keep what the tensors of a step leave for those of the next one, up to a limit.

    Else it gives blocks back to the kernel, more or fewer by how they happen to lie, and takes thousands of page faults a step
    to get them again. Other C libraries are left as they are. Source: mallopt(3).
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None:
        return
    mallopt(_M_TRIM_THRESHOLD, 2**31 - 1)
    if not mallopt(_M_MMAP_THRESHOLD, 2**30):
        mallopt(_M_MMAP_THRESHOLD, 2**25)  # the most before glibc 2.35


def _pick_device(env: RankEnv, device: str) -> torch.device:
    import torch

    host, n_visible = socket.gethostname(), torch.cuda.device_count() if device != "cpu" else 0
    if device == "cpu" or (device == "auto" and n_visible == 0):
        return torch.device("cpu")
    if n_visible == 0:
        raise LaunchError(f"device=cuda: rank {env.rank} on {host} sees no GPU with torch {torch.__version__}. "
                          "Ask the job for GPUs, install a torch for this GPU, or use device=cpu")
    # One visible GPU among several local ranks: the launcher gave each its own. `_refuse_bad_devices` checks it.
    index = 0 if n_visible == 1 else env.local_rank
    if index >= n_visible:
        raise LaunchError(f"local rank {env.local_rank} on {host} has no GPU: {env.local_world_size} ranks, "
                          f"{n_visible} GPUs visible. Start {n_visible} ranks per host, or use device=cpu")
    torch.cuda.set_device(index)
    return torch.device("cuda", index)


def _agree_on_hosts(ranks: Ranks, threads: int) -> int:
    """Compare host, device and cores of all ranks: refuses two on one GPU; returns CPU threads for this rank."""
    import torch

    host = socket.gethostname()
    cores = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else list(range(os.cpu_count() or 1))
    gpu = str(torch.cuda.get_device_properties(ranks.device).uuid) if ranks.device.type == "cuda" else ""
    mine = json.dumps([host, ranks.device.type, gpu, cores])
    everyone = [json.loads(text) for text in ranks.gather_text(mine)]
    _refuse_bad_devices(everyone)
    return threads or _fair_threads(cores, [other[3] for other in everyone if other[0] == host])


def _refuse_bad_devices(everyone: list[list]) -> None:
    """everyone: [host, device type, GPU uuid, cores] per rank."""
    if len({kind for _, kind, _, _ in everyone}) > 1:
        on_cpu = next(rank for rank, other in enumerate(everyone) if other[1] == "cpu")
        raise LaunchError(f"rank {on_cpu} on {everyone[on_cpu][0]} sees no GPU, others do. "
                          "Ask for GPUs on every node, or use device=cpu")
    holder: dict[tuple[str, str], int] = {}
    for rank, (host, _, gpu, _) in enumerate(everyone):
        if gpu and holder.setdefault((host, gpu), rank) != rank:
            raise LaunchError(f"ranks {holder[host, gpu]} and {rank} on {host} share one GPU ({gpu}). "
                              "Start one rank per GPU, or use device=cpu")


def _fair_threads(cores: list[int], cores_of_local_ranks: list[list[int]]) -> int:
    """This rank's share of its cores: one that k ranks may use counts 1/k. A core's hardware threads count once."""
    import psutil

    share = sum(1 / max(sum(core in other for other in cores_of_local_ranks), 1) for core in cores)
    threads_per_core = (psutil.cpu_count() or 1) / (psutil.cpu_count(logical=False) or psutil.cpu_count() or 1)
    return max(1, int(share / threads_per_core + 1e-6))


# ---- meeting --------------------------------------------------------------------------------------------------
def _where(env: RankEnv) -> str:
    return f"{env.master_addr}:{env.master_port}"


def _locate(env: RankEnv) -> RankEnv:
    """The same rank, with rank 0's IPv4 address and port known."""
    if env.world_size == 1:
        port = env.master_port or port_of(str(os.getpid()))
        return dataclasses.replace(env, master_addr=LOOPBACK, master_port=port)
    if not env.master_addr:
        return _locate_by_mpi(env)
    address = resolve_ipv4(env.master_addr)
    beside_rank_0 = env.local_rank == env.rank  # all below it are on this host: there Debian's /etc/hosts says 127.0.1.1
    if is_loopback(address) and not is_loopback(env.master_addr) and env.n_hosts > 1 and not beside_rank_0:
        raise LaunchError(
            f"{socket.gethostname()} takes {env.master_addr} for itself ({address}, see /etc/hosts), but rank 0 may be "
            f"on another of {env.n_hosts} hosts. {how_to_name_rank_0()}")
    return dataclasses.replace(env, master_addr=address)


def _locate_by_mpi(env: RankEnv) -> RankEnv:
    """Rank 0's address and a free port of its host, told to all over MPI: mpirun on several hosts says neither."""
    try:
        from mpi4py import MPI
    except (ImportError, RuntimeError) as error:  # RuntimeError: mpi4py without an MPI library
        raise LaunchError(
            f"mpirun started {env.world_size} ranks on several hosts and does not say where rank 0 is ({error}). "
            "Install mpi4py (pip install 'officina[mpi]'), or pass the address of the first host: "
            "mpirun -x MASTER_ADDR=$(hostname) ...") from None
    mine = None
    if env.rank == 0:
        with socket.socket() as probe:
            probe.bind(("", 0))
            mine = (socket.gethostname(), probe.getsockname()[1])
    n_hosts = len(set(MPI.COMM_WORLD.allgather(socket.gethostname())))
    name, port = MPI.COMM_WORLD.bcast(mine, root=0)
    address = LOOPBACK if n_hosts == 1 else resolve_ipv4(name)
    return dataclasses.replace(env, master_addr=address, master_port=port, n_hosts=n_hosts)


def _open_store(env: RankEnv, end: float, timeout_s: float) -> Store:
    """The key-value store in which the ranks meet: rank 0 (or torchrun's agent) serves it, the others connect."""
    import torch

    host, remaining = socket.gethostname(), timedelta(seconds=max(end - time.monotonic(), 0.1))
    by_agent = env.launcher == "torchrun" and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    serves = env.rank == 0 and not by_agent
    listen_fd = int(os.environ["OFFICINA_LISTEN_FD"]) if serves and env.launcher == "officina" else None
    try:
        store = torch.distributed.TCPStore(
            env.master_addr, env.master_port, is_master=serves, wait_for_workers=False, timeout=remaining,
            master_listen_fd=listen_fd)
    except torch.distributed.DistError as error:
        if serves:
            raise LaunchError(
                f"rank 0 on {host} cannot listen on port {env.master_port}: {error}. If another program has it, choose "
                f"one for all ranks: export MASTER_PORT={port_of(str(time.time()))}") from error
        raise LaunchError(
            f"rank {env.rank} on {host} could not reach rank 0 at {_where(env)} within {timeout_s:g} s. Either rank 0 "
            f"never started (its log says why), or this address is not its own. {how_to_name_rank_0()}") from error
    attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") if env.launcher == "torchrun" else "0"
    return torch.distributed.PrefixStore(f"officina/start-{attempt}", store)


def _meet(store: Store, env: RankEnv, end: float, timeout_s: float) -> None:
    """Return when all ranks are in the store; after the time every rank that came raises, naming those missing."""
    import torch

    try:
        missing = _wait_for_all(store, env, end) if env.rank == 0 else _ask_rank_0(store, env, end)
    except torch.distributed.DistError as error:
        raise LaunchError(
            f"rank {env.rank} on {socket.gethostname()} lost rank 0 at {_where(env)} while it waited for the other "
            f"ranks to start ({str(error).splitlines()[0]}). Rank 0's log says why") from error
    if missing:
        shown = ", ".join(map(str, missing[:16])) + (f" and {len(missing) - 16} more" if len(missing) > 16 else "")
        raise LaunchError(
            f"{env.world_size - len(missing)} of {env.world_size} ranks met at {_where(env)}; missing after "
            f"{timeout_s:g} s: {'rank' if len(missing) == 1 else 'ranks'} {shown}. Their logs say why; if these are "
            "empty, the ranks never started or cannot reach this address")


def _wait_for_all(store: Store, env: RankEnv, end: float) -> list[int]:
    """On rank 0: the ranks that did not come."""
    store.set("here/0", _own_address(env))
    n_here = store.add("n_here", 1)
    while n_here < env.world_size and time.monotonic() < end:
        time.sleep(0.01)
        n_here = store.add("n_here", 0)
    missing = []
    if n_here < env.world_size:
        missing = [rank for rank in range(env.world_size) if not store.check([f"here/{rank}"])]
    store.set("missing", json.dumps(missing))
    while missing and store.add("n_told", 0) < n_here - 1 and time.monotonic() < end + 2:
        time.sleep(0.01)  # the others must read it before the store goes with this process
    return missing


def _ask_rank_0(store: Store, env: RankEnv, end: float) -> list[int]:
    """On the others: what rank 0 found."""
    store.set(f"here/{env.rank}", _own_address(env))
    store.add("n_here", 1)
    store.set_timeout(timedelta(seconds=max(end - time.monotonic(), 0) + _VERDICT_MARGIN_S))
    missing = json.loads(store.get("missing"))
    store.add("n_told", 1)
    return missing


def _choose_interface(env: RankEnv, store: Store) -> None:
    """Tell gloo the interface that leads to rank 0. Its own choice follows the host's name, which often is 127.0.1.1
    or cannot be resolved at all; on one host loopback is always right. Beside rank 0 loopback may lead there too: of
    several hosts it takes the one that leads to a rank elsewhere."""
    if env.n_hosts != 1 and os.environ.get("GLOO_SOCKET_IFNAME"):
        return
    import psutil

    own = _own_address(env)
    if env.n_hosts != 1 and is_loopback(own):
        addresses = [address.decode() for address in store.multi_get([f"here/{rank}" for rank in range(env.world_size)])]
        own = next((_address_towards(address, env) for address in addresses if not is_loopback(address)), own)
    for name, addresses in psutil.net_if_addrs().items():
        if any(a.family == socket.AF_INET and a.address == own for a in addresses):
            os.environ["GLOO_SOCKET_IFNAME"] = name
            return


def _own_address(env: RankEnv) -> str:
    """This host's address as rank 0's host sees it."""
    return _address_towards(LOOPBACK if env.n_hosts == 1 else env.master_addr, env)


def _address_towards(host: str, env: RankEnv) -> str:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        probe.connect((host, env.master_port))  # sends nothing
        return str(probe.getsockname()[0])
