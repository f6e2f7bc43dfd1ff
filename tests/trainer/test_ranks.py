"""Which rank a process is, in every environment we know of; and ranks that meet, or say why not."""

import dataclasses
import json
import os
import platform
import socket
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import psutil
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from officina.trainer import rank_env, ranks, slurm_env
from officina.trainer.errors import LaunchError
from officina.trainer.rank_env import LONE, LOOPBACK, RankEnv, port_of, read_rank_env
from officina.trainer.slurm_env import ProcessFacts, expand_counts, expand_hosts

IN_STEP = {
    "SLURM_JOB_ID": "77", "SLURM_JOB_NODELIST": "n[1-2]", "SLURM_STEP_ID": "3", "SLURM_STEP_NODELIST": "n[1-2]",
    "SLURM_STEP_NUM_NODES": "2", "SLURM_STEP_NUM_TASKS": "3", "SLURM_STEP_TASKS_PER_NODE": "2,1", "SLURM_NTASKS": "3",
    "SLURM_PROCID": "2", "SLURM_LOCALID": "0", "SLURM_NODEID": "1", "SLURM_TASK_PID": "500",
    "SLURM_LAUNCH_NODE_IPADDR": "10.0.0.1",
}
TASK = ProcessFacts(step="77.3", on_terminal=False, pid=500)
OFFICINA = {"OFFICINA_RANK": "1", "OFFICINA_WORLD_SIZE": "2", "OFFICINA_PORT": "4000"}
TORCHRUN = {"TORCHELASTIC_RUN_ID": "none", "RANK": "5", "LOCAL_RANK": "1", "WORLD_SIZE": "8", "LOCAL_WORLD_SIZE": "4",
            "MASTER_ADDR": "n1 ", "MASTER_PORT": "29500"}
MPIRUN = {"OMPI_COMM_WORLD_RANK": "1", "OMPI_COMM_WORLD_SIZE": "2", "OMPI_COMM_WORLD_LOCAL_RANK": "1",
          "OMPI_COMM_WORLD_LOCAL_SIZE": "2", "PMIX_NAMESPACE": "prterun-n1-7@1"}
OUTSIDE = ProcessFacts(step="", on_terminal=True, pid=1)


# ---- launchers -----------------------------------------------------------------------------------------------------
def test_no_launcher():
    assert read_rank_env({}, OUTSIDE) is None
    assert read_rank_env({"RANK": "3"}, OUTSIDE) is None, "a left-over RANK alone is nobody's"
    assert read_rank_env({"RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "x"}, OUTSIDE) is None


def test_officina_parent():
    assert read_rank_env(OFFICINA, OUTSIDE) == RankEnv(1, 1, 2, 2, "officina", master_port=4000)


def test_torchrun():
    assert read_rank_env(TORCHRUN, OUTSIDE) == RankEnv(5, 1, 8, 4, "torchrun", 0, "n1", 29500), "address stripped"
    assert read_rank_env(TORCHRUN | {"RANK": "1", "WORLD_SIZE": "4"}, OUTSIDE).n_hosts == 1


def test_mpirun():
    assert read_rank_env(MPIRUN, OUTSIDE) == RankEnv(1, 1, 2, 2, "mpirun", 1, LOOPBACK, port_of("prterun-n1-7@1"))
    several = MPIRUN | {"OMPI_COMM_WORLD_LOCAL_SIZE": "1", "OMPI_COMM_WORLD_LOCAL_RANK": "0"}
    assert read_rank_env(several, OUTSIDE).master_addr == "", "to be asked over MPI"
    assert read_rank_env(several | {"MASTER_ADDR": "localhost"}, OUTSIDE).master_addr == ""
    given_env = read_rank_env(several | {"MASTER_ADDR": "n1", "MASTER_PORT": "123"}, OUTSIDE)
    assert (given_env.master_addr, given_env.master_port) == ("n1", 123)


def test_innermost_launcher_wins():
    assert read_rank_env(IN_STEP | MPIRUN, TASK).launcher == "mpirun"
    assert read_rank_env(IN_STEP | MPIRUN | TORCHRUN, TASK).launcher == "torchrun"
    assert read_rank_env(IN_STEP | MPIRUN | TORCHRUN | OFFICINA, TASK).launcher == "officina"


# ---- srun ----------------------------------------------------------------------------------------------------------
def test_srun():
    assert read_rank_env(IN_STEP, TASK) == RankEnv(2, 0, 3, 1, "srun", 2, "n1", port_of("77.3"))
    first = IN_STEP | {"SLURM_PROCID": "1", "SLURM_LOCALID": "1", "SLURM_NODEID": "0"}
    assert read_rank_env(first, TASK) == RankEnv(1, 1, 3, 2, "srun", 2, "n1", port_of("77.3"))


@pytest.mark.parametrize(("change", "facts", "why"), [
    ({}, ProcessFacts("", False, 500), "no slurmstepd above: a login node with leftovers"),
    ({}, ProcessFacts("78.batch", False, 500), "the body of another job's script, variables leaked by sbatch"),
    ({}, ProcessFacts("77.batch", False, 500), "the body of this job's script"),
    ({}, ProcessFacts("77.interactive", True, 500), "the shell of salloc"),
    ({"SLURM_STEP_ID": "4294967290"}, ProcessFacts(None, True, 501), "the shell of salloc, in a container"),
    ({"SLURM_PTY_PORT": "1"}, ProcessFacts("77.3", True, 501), "started from a shell under srun --pty"),
    ({"SLURM_PTY_PORT": "1"}, ProcessFacts(None, True, 501), "the same in a container"),
    ({"SLURM_JOB_NODELIST": "n[5-6]"}, ProcessFacts(None, False, 501), "leaked, seen in a container by the hosts"),
    ({"SLURM_NTASKS": "8"}, ProcessFacts(None, False, 501), "leaked, seen in a container by the tasks"),
    ({"SLURM_STEP_NUM_TASKS": None}, ProcessFacts("77.3", False, 500), "variables of a step are missing"),
    ({"SLURM_STEP_ID": None}, ProcessFacts(None, False, 500), "a batch script in a container"),
])
def test_not_a_task_of_srun(change: dict, facts: ProcessFacts, why: str):
    environ = {name: value for name, value in (IN_STEP | change).items() if value is not None}
    assert read_rank_env(environ, facts) is None, why


@pytest.mark.parametrize(("change", "facts", "why"), [
    ({}, ProcessFacts(None, False, 9), "a task in a container with its own PIDs"),
    ({"SLURM_PTY_PORT": "1"}, ProcessFacts("77.3", False, 501), "a step from a pty shell: the variable leaks"),
    ({"SLURM_PTY_PORT": "1"}, ProcessFacts("77.3", True, 500), "srun --pty officina train: the task itself"),
    ({}, ProcessFacts("77.3", True, 501), "a task that opened a terminal of its own"),
    ({"ENVIRONMENT": "BATCH"}, ProcessFacts("77.3", False, 501), "a step of a batch script"),
])
def test_task_of_srun(change: dict, facts: ProcessFacts, why: str):
    assert read_rank_env(IN_STEP | change, facts) is not None, why


@pytest.mark.parametrize(("change", "address"), [
    ({"MASTER_ADDR": "10.1.2.3 "}, "10.1.2.3"),
    ({"MASTER_ADDR": "localhost"}, "n1"),
    ({"MASTER_ADDR": "127.0.0.1"}, "n1"),
    ({"MASTER_ADDR": "localhost.localdomain"}, "n1"),
    ({"MASTER_ADDR": "::1"}, "n1"),
    ({"SLURM_STEP_NODELIST": "jpbo-001-[07-08]"}, "jpbo-001-07"),
    ({"SLURM_STEP_NUM_NODES": "1", "MASTER_ADDR": "elsewhere", "SLURM_STEP_TASKS_PER_NODE": "3", "SLURM_NODEID": "0"},
     LOOPBACK),
    ({"SLURM_LAUNCH_NODE_IPADDR": "127.0.0.1", "SLURM_STEP_NODELIST": "no-such-host.invalid,n2"}, LOOPBACK),
    ({"SLURM_LAUNCH_NODE_IPADDR": "127.0.0.1", "SLURM_STEP_NODELIST": "localhost,n2"}, "localhost"),
])
def test_address_of_rank_0_under_srun(change: dict, address: str):
    assert read_rank_env(IN_STEP | change, TASK).master_addr == address


def test_port_follows_the_job_and_the_step():
    ports = {port_of(f"{job}.{step}") for job in range(1000, 1100) for step in range(3)}
    assert len(ports) > 280 and all(20_000 <= port < 32_000 for port in ports)
    assert read_rank_env(IN_STEP | {"MASTER_PORT": "1234"}, TASK).master_port == 1234


@given(st.lists(st.tuples(st.sampled_from(["n", "lrdn", "as01r1b"]), st.integers(0, 99), st.integers(0, 5),
                          st.integers(1, 4), st.sampled_from(["", "-ib0", "i"])), min_size=1, max_size=5))
def test_hostlists(groups: list[tuple]):
    written, expected = [], []
    for name, first, more, width, suffix in groups:
        written.append(f"{name}[{first:0{width}d}-{first + more:0{width}d},{first + 200:0{width}d}]{suffix}")
        expected += [f"{name}{i:0{width}d}{suffix}" for i in (*range(first, first + more + 1), first + 200)]
    assert list(expand_hosts(",".join(written))) == expected


def test_hostlists_as_scontrol_shows_them():
    assert list(expand_hosts("n[1-2,07],login3")) == ["n1", "n2", "n07", "login3"]
    assert list(expand_hosts("r[1-2]n[3-4]")) == ["r1n3", "r1n4", "r2n3", "r2n4"]
    assert list(expand_hosts("")) == []
    assert expand_counts("2(x3),1") == [2, 2, 2, 1] and expand_counts("") == []


def test_facts_of_this_process():
    facts = slurm_env.process_facts()
    assert facts.pid == os.getpid()
    assert facts.step in ("", None) or "." in facts.step
    assert slurm_env.process_facts(2**22 + 1).step is None, "a process that cannot be seen"


# ---- contradictions ------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(("environ", "said"), [
    (OFFICINA | {"OFFICINA_RANK": "2"}, "officina says rank 2 of 2, local rank 2 of 2: ranks count from 0"),
    (TORCHRUN | {"WORLD_SIZE": "three"}, "WORLD_SIZE=three: must be a whole number"),
    (TORCHRUN | {"LOCAL_RANK": ""}, "LOCAL_RANK=(not set): must be a whole number"),
    ({"RANK": "3", "WORLD_SIZE": "8", "MASTER_ADDR": "n1"}, "RANK=3 and WORLD_SIZE=8 are set, but not by torchrun"),
    (IN_STEP | {"SLURM_NODEID": "2"}, "SLURM_NODEID=2, but SLURM_STEP_TASKS_PER_NODE=2,1 has 2 nodes"),
])
def test_contradictions_are_refused(environ: dict, said: str):
    with pytest.raises(LaunchError) as caught:
        read_rank_env(environ, TASK)
    assert said in str(caught.value)


def test_host_without_an_ipv4_address():
    with pytest.raises(LaunchError, match=r"finds no IPv4 address for 'no-such-host.invalid'.*export MASTER_ADDR="):
        rank_env.resolve_ipv4("no-such-host.invalid")


def test_host_name_that_means_another_machine_on_each(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(ranks, "resolve_ipv4", lambda host: "127.0.1.1")
    env = RankEnv(2, 0, 3, 1, "srun", 2, "n1", 4000)
    with pytest.raises(LaunchError, match=r"takes n1 for itself \(127.0.1.1, see /etc/hosts\)"):
        ranks._locate(env)
    assert ranks._locate(dataclasses.replace(env, rank=0)).master_addr == "127.0.1.1", "rank 0 may"
    beside = dataclasses.replace(env, rank=1, local_rank=1, local_world_size=2)
    assert ranks._locate(beside).master_addr == "127.0.1.1", "and those beside it"


def test_mpirun_over_hosts_without_mpi4py(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "mpi4py", None)
    with pytest.raises(LaunchError, match=r"does not say where rank 0 is .*pip install 'officina\[mpi\]'"):
        ranks._locate(RankEnv(0, 0, 2, 1, "mpirun", 0, "", 4000))


# ---- devices and threads -------------------------------------------------------------------------------------------
def test_cuda_without_a_gpu_is_refused(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    with pytest.raises(LaunchError, match=r"device=cuda: rank 0 on .* sees no GPU with torch .* use device=cpu"):
        ranks.start_ranks(LONE, device="cuda")
    assert ranks._pick_device(LONE, "auto") == torch.device("cpu")


def test_each_local_rank_gets_its_gpu(monkeypatch: pytest.MonkeyPatch):
    chosen = []
    monkeypatch.setattr(torch.cuda, "set_device", chosen.append)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert ranks._pick_device(RankEnv(1, 1, 3, 3, "srun"), "auto") == torch.device("cuda", 1)
    with pytest.raises(LaunchError, match=r"local rank 2 on .* has no GPU: 3 ranks, 2 GPUs visible. Start 2 ranks"):
        ranks._pick_device(RankEnv(2, 2, 3, 3, "srun"), "auto")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    assert ranks._pick_device(RankEnv(1, 1, 2, 2, "srun"), "cuda") == torch.device("cuda", 0), "srun --gpus-per-task=1"
    assert chosen == [1, 0]


def test_two_ranks_on_one_gpu_are_refused():
    fine = [["n1", "cuda", "A", [0]], ["n1", "cuda", "B", [0]], ["n2", "cuda", "A", [0]]]
    ranks._refuse_bad_devices(fine)
    with pytest.raises(LaunchError, match=r"ranks 1 and 3 on n1 share one GPU \(B\)"):
        ranks._refuse_bad_devices([*fine, ["n1", "cuda", "B", [0]]])
    with pytest.raises(LaunchError, match="rank 3 on n3 sees no GPU, others do"):
        ranks._refuse_bad_devices([*fine, ["n3", "cpu", "", [0]]])


@pytest.mark.parametrize(("mine", "all_local", "threads"), [
    (range(8), [range(8)], 8),
    (range(8), [range(8)] * 4, 2),
    (range(2, 4), [range(2), range(2, 4)], 2),  # srun bound each to its own
    (range(1), [range(1)] * 4, 1),
    (range(6), [range(6), range(4, 8)], 5),
])
def test_fair_threads(monkeypatch: pytest.MonkeyPatch, mine: range, all_local: list[range], threads: int):

    monkeypatch.setattr(psutil, "cpu_count", lambda logical=True: 8)
    assert ranks._fair_threads(list(mine), [list(cores) for cores in all_local]) == threads
    monkeypatch.setattr(psutil, "cpu_count", lambda logical=True: 8 if logical else 4)
    assert ranks._fair_threads(list(mine), [list(cores) for cores in all_local]) == max(1, threads // 2)


# ---- ranks that meet -----------------------------------------------------------------------------------------------
def test_exchange(pool):
    for rank, got in enumerate(pool.run(3, "tests.trainer.rank_cases:exchange")):
        assert got == {"sum": [3.0, 3.0, 3 * 2.0**40 + 3], "gathered": ["", "é", "éé"], "nothing": ["", "", ""],
                       "broadcast": "zażółć", "broadcast_nothing": ""}, f"rank {rank}"


def _program(text: str, env: RankEnv) -> list[str]:
    head = "from officina.trainer.ranks import *\nfrom officina.trainer import ranks as r\n"
    return [sys.executable, "-c", f"{head}env = {env!r}\n{textwrap.dedent(text)}"]


def _run(text: str, *envs: RankEnv, more: dict[str, str] | None = None) -> list[subprocess.CompletedProcess]:
    """One process per env, at once."""
    started = [subprocess.Popen(_program(text, env), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
                                env=os.environ | (more or {})) for env in envs]
    done = []
    for process in started:
        out, err = process.communicate(timeout=90)
        done.append(subprocess.CompletedProcess(process.args, process.returncode, out, err))
    return done


def test_one_rank_has_a_group_only_if_asked():
    done, = _run("""
        import os, torch
        ranks = start_ranks(env, device="cpu", threads=3)
        assert not torch.distributed.is_initialized() and torch.get_num_threads() == ranks.threads == 3
        assert ranks.sum([1, 2]) == [1.0, 2.0] and ranks.gather_text("a") == ["a"] and ranks.broadcast_text("b") == "b"
        ranks.barrier()
        ranks.ensure_group(); ranks.ensure_group()
        assert torch.distributed.get_world_size() == 1 and torch.distributed.get_backend() == "gloo"
        x = torch.ones(2); torch.distributed.all_reduce(x); assert x.tolist() == [1, 1]
        assert os.environ["WORLD_SIZE"] == "1" and os.environ["RANK"] == os.environ["LOCAL_RANK"] == "0"
        stop_ranks(); stop_ranks()
        assert not torch.distributed.is_initialized()
        """, LONE)
    assert done.returncode == 0, done.stderr


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="mallopt is glibc's")
@pytest.mark.parametrize("megabytes", [4, 64])
def test_a_step_on_a_cpu_finds_the_memory_of_the_one_before(megabytes):
    done, = _run(f"""
        import resource, torch
        start_ranks(env, device="cpu")
        def fill():
            tensors = [torch.ones({megabytes} << 18) for _ in range(3)]
        for _ in range(8):
            fill()
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        for _ in range(4):
            fill()
        print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
        """, LONE)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) < 100  # pages, of 12 tensors


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind((LOOPBACK, 0))
        return probe.getsockname()[1]


def test_taken_port_is_named():
    with socket.socket() as taken:
        taken.bind(("", 0))
        taken.listen()
        port = taken.getsockname()[1]
        said = rf"rank 0 on {socket.gethostname()} cannot listen on port {port}: .*export MASTER_PORT="
        with pytest.raises(LaunchError, match=said):
            ranks._open_store(RankEnv(0, 0, 2, 1, "srun", 1, LOOPBACK, port), time.monotonic() + 2, 2)


@pytest.mark.parametrize("remedy", ["Set MASTER_ADDR", "rendezvous.address"])
def test_unreachable_rank_0_is_named(remedy: str, monkeypatch: pytest.MonkeyPatch):
    if remedy == "rendezvous.address":  # the script of a job sets MASTER_ADDR, whatever it was
        monkeypatch.setenv("OFFICINA_ATTEMPT", "7.0.1")
    port = _free_port()
    said = rf"rank 1 on {socket.gethostname()} could not reach rank 0 at 127.0.0.1:{port} within 1 s.*{remedy}"
    with pytest.raises(LaunchError, match=said):
        ranks._open_store(RankEnv(1, 0, 2, 1, "srun", 1, LOOPBACK, port), time.monotonic() + 1, 1)


def test_wrong_interface_is_named():
    port = _free_port()
    envs = [RankEnv(rank, 0, 2, 1, "srun", 0, LOOPBACK, port) for rank in range(2)]
    wrong = {"GLOO_SOCKET_IFNAME": "nonsense7"}
    first, second = _run("start_ranks(env, device='cpu', timeout_s=60)", *envs, more=wrong)
    assert "could not connect to them over nonsense7" in first.stderr and "ip -4 addr" in first.stderr
    assert "could not connect to them over nonsense7" in second.stderr or "lost rank 0 at" in second.stderr


def test_a_first_host_that_is_loopback_to_itself_takes_the_interface_of_the_others():
    """As with Debian's /etc/hosts: `127.0.1.1 n1` on n1."""
    found = [(name, a.address) for name, addresses in psutil.net_if_addrs().items() for a in addresses
             if a.family == socket.AF_INET and not rank_env.is_loopback(a.address)]
    if not found:
        pytest.skip("this host has the loopback interface only")
    name, address = found[0]
    port = _free_port()
    envs = [RankEnv(0, 0, 3, 2, "srun", 2, "n1", port), RankEnv(1, 1, 3, 2, "srun", 2, "n1", port),
            RankEnv(2, 0, 3, 1, "srun", 2, "n1", port)]
    for done in _run(f"""
            import os
            r.resolve_ipv4 = lambda host: "127.0.1.1" if env.rank < 2 else "{address}"
            assert start_ranks(env, device="cpu", timeout_s=60).sum([1.0]) == [3.0]
            print(os.environ["GLOO_SOCKET_IFNAME"])
            """, *envs):
        assert (done.returncode, done.stdout) == (0, f"{name}\n"), done.stderr


def test_rank_0_that_dies_while_others_start_is_named(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(ranks, "_VERDICT_MARGIN_S", 0.2)
    server = torch.distributed.TCPStore(LOOPBACK, 0, is_master=True, wait_for_workers=False)
    env = RankEnv(1, 0, 2, 1, "srun", 1, LOOPBACK, server.port)
    end = time.monotonic()
    store = ranks._open_store(env, end + 5, 5)
    with pytest.raises(LaunchError, match=rf"lost rank 0 at 127.0.0.1:{server.port} while it waited.*Rank 0's log"):
        ranks._meet(store, env, end, 5)


def test_asking_which_rank_this_is_needs_no_torch():
    program = ("import sys, os, json; from officina.trainer.ranks import read_rank_env; read_rank_env(os.environ); "
               "import officina.launch.local, officina.trainer.__main__, officina.trainer.memory; "
               "print(json.dumps(sorted({'torch', 'numpy', 'psutil'} & set(sys.modules))))")
    clean = {name: value for name, value in os.environ.items() if not name.startswith(("SLURM", "OMPI", "TORCH"))}
    said = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, env=clean).stdout
    assert json.loads(said) == []


def test_a_rank_reads_its_terminal_from_the_kernel(tmp_path: Path):
    """`on_terminal` for real: in a pseudo-terminal, and without one."""
    program = ("from officina.trainer.slurm_env import process_facts; "
               f"open('{tmp_path}/said', 'w').write(str(process_facts().on_terminal))")
    pid, terminal = os.forkpty()
    if pid == 0:
        os.execv(sys.executable, [sys.executable, "-c", program])
    os.waitpid(pid, 0)
    os.close(terminal)
    assert (tmp_path / "said").read_text() == "True"
    subprocess.run([sys.executable, "-c", program], check=True, start_new_session=True)
    assert (tmp_path / "said").read_text() == "False"
