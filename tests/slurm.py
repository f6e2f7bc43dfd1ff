"""A real Slurm of several nodes on this one host; four of them as a pytest fixture. Needs root, slurm-wlm and munge.

Everything (key, sockets, spool, logs, ports) lives in a temporary directory, so test runs side by side do not meet.
A test imports the fixture by name: `from slurm import slurm_cluster` works through `tests/conftest.py`.
"""

import contextlib
import os
import re
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType

import pytest

PLAIN_NODES = MappingProxyType({f"n{i}": "CPUs=4 RealMemory=4000" for i in range(1, 5)})
_PROGRAMS = ("slurmctld", "slurmd", "munged", "srun", "sbatch", "salloc", "scontrol")
_SBIN = ("/usr/sbin", "/usr/local/sbin", "/sbin")

_CONF = """\
ClusterName={name}
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={port}
SlurmUser=root
AuthType=auth/munge
AuthInfo=socket={root}/munge.socket
StateSaveLocation={root}/state
SlurmdSpoolDir={root}/spool/%n
SlurmdPidFile={root}/%n.pid
SlurmctldPidFile={root}/slurmctld.pid
SlurmctldLogFile={root}/slurmctld.log
SlurmdLogFile={root}/%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
MpiDefault=none
SelectType=select/cons_tres
ReturnToService=2
SlurmdParameters=config_overrides
JobRequeue=1
KillWait=5
SchedulerParameters=batch_sched_delay=1,sched_interval=2
"""
_PLAIN = """\
SelectTypeParameters=CR_Core
SlurmdTimeout=10
PartitionName=test Nodes=ALL Default=YES MaxTime=60 State=UP
"""


@dataclass(frozen=True)
class SlurmCluster:
    """The running cluster. `environ` reaches it; everything else of the environment is as the tests'."""

    root: Path
    environ: dict[str, str]

    def run(self, *command: str, timeout_s: float = 60, **more) -> subprocess.CompletedProcess[str]:
        """A client command (srun, sbatch, scontrol, ...) with its output as text."""
        more.setdefault("env", self.environ)
        return subprocess.run(command, capture_output=True, text=True, timeout=timeout_s, check=False, **more)

    def start_node(self, node: str) -> None:
        """Its slurmd, in a mount namespace with the nodes' /etc/hosts."""
        script = f"mount --bind {self.root}/hosts /etc/hosts && exec slurmd -N {node} -f $SLURM_CONF"
        started = self.run("unshare", "--mount", "--propagation", "private", "sh", "-c", script)
        assert started.returncode == 0, f"{node}: {started.stderr}"

    def idle(self) -> set[str]:
        """Names of the nodes that are up and free."""
        return set(self.run("sinfo", "-h", "-N", "-t", "idle", "-o", "%N").stdout.split())

    def sbatch(self, body: str, *options: str, folder: Path, env: dict[str, str] | None = None,
               timeout_s: float = 60) -> tuple[str, str]:
        """Submit a script, wait for its end: its final job state, and its stdout and stderr together."""
        script, output = folder / "job.sh", folder / "job.out"
        script.write_text("#!/bin/bash\n" + body)
        sent = self.run("sbatch", "--parsable", f"--output={output}", f"--chdir={folder}", *options, str(script),
                        env=env or self.environ)
        assert sent.returncode == 0, sent.stderr
        job, end = sent.stdout.strip(), time.monotonic() + timeout_s
        while time.monotonic() < end:
            shown = self.run("scontrol", "show", "job", "-o", job).stdout
            state = shown.split("JobState=")[1].split()[0] if "JobState=" in shown else "UNKNOWN"
            if state not in ("PENDING", "CONFIGURING", "RUNNING", "COMPLETING"):
                return state, output.read_text() if output.exists() else ""
            time.sleep(0.1)
        self.run("scancel", job)
        raise AssertionError(f"job {job} not done after {timeout_s} s: {shown}\n{output.read_text()}")


def need_slurm() -> None:
    """Skip the test where no cluster can be started; in CI (variable CI) that is a failure."""
    path = os.pathsep.join([os.environ.get("PATH", ""), *_SBIN])
    absent = [name for name in _PROGRAMS if shutil.which(name, path=path) is None]
    why = f"needs {', '.join(absent)} (apt-get install slurm-wlm munge)" if absent else (
        "needs root: slurmd starts steps as their users" if os.geteuid() else "")
    if why and os.environ.get("CI"):
        pytest.fail(f"the Slurm tests must run in CI: {why}")
    if why:
        pytest.skip(f"no Slurm here: {why}")


def _free_ports(n: int) -> list[int]:
    with contextlib.ExitStack() as held:
        sockets = [held.enter_context(socket.socket()) for _ in range(n)]
        for s in sockets:
            s.bind(("", 0))
        return [s.getsockname()[1] for s in sockets]


def _address() -> str:
    """An IPv4 address of this host that is not a loopback one, if it has any: the nodes' interface."""
    shown = subprocess.run(["hostname", "-I"], capture_output=True, text=True, check=True).stdout.split()
    own = [address for address in shown if re.fullmatch(r"[0-9.]+", address) and not address.startswith("127.")]
    return own[0] if own else "127.0.0.1"


def _start_munge(root: Path, path: str) -> None:
    (root / "munge.key").write_bytes(os.urandom(128))
    (root / "munge.key").chmod(0o600)
    files = {"socket": "munge.socket", "key-file": "munge.key", "pid-file": "munged.pid", "log-file": "munged.log",
             "seed-file": "munged.seed"}
    subprocess.run([shutil.which("munged", path=path), "--force", "--num-threads=2",
                    *(f"--{option}={root / name}" for option, name in files.items())], check=True, timeout=20)


@contextlib.contextmanager
def start_cluster(conf: str = _PLAIN, *, name: str = "officina", nodes: Mapping[str, str] = PLAIN_NODES,
                  names: Mapping[str, str] = MappingProxyType({}), prepare: Callable[[Path], None] = lambda root: None,
                  ) -> Iterator[SlurmCluster]:
    """The cluster, up and idle; its daemons end with the context.

    conf: what slurm.conf holds beside its daemons and nodes. nodes: the shape of each by its name. names: further names by node
    for the nodes' own /etc/hosts: slurmd and its jobs run in a mount namespace. prepare: writes what else must lie beside
    slurm.conf before the daemons start; programs in ROOT/bin come first in PATH.
    """
    path = os.pathsep.join([os.environ.get("PATH", ""), *_SBIN])
    root = Path(tempfile.mkdtemp(prefix=f"{name}-slurm-"))
    root.chmod(0o755)
    host = socket.gethostname().split(".")[0]
    for folder in ("state", "bin", *(f"spool/{node}" for node in nodes)):
        (root / folder).mkdir(parents=True)
    port, *ports = _free_ports(1 + len(nodes))
    lines = [f"NodeName={node} NodeHostname={host} NodeAddr=127.0.0.1 Port={own} {shape}"
             for (node, shape), own in zip(nodes.items(), ports, strict=True)]
    (root / "slurm.conf").write_text("\n".join([_CONF.format(host=host, port=port, root=root, name=name), *lines, conf]))
    version = subprocess.run([shutil.which("slurmctld", path=path), "-V"], capture_output=True, text=True, check=True).stdout
    if int(re.search(r"\d+", version)[0]) >= 24:  # looks for cgroups, which a container may lack; older ones do not know this
        (root / "cgroup.conf").write_text("CgroupPlugin=disabled\n")
    (root / "hosts").write_text(Path("/etc/hosts").read_text() + "".join(
        f"{_address()} {node} {names.get(node, '')}\n" for node in nodes))
    prepare(root)
    environ = {k: v for k, v in os.environ.items() if not k.startswith(("SLURM_", "OMPI_", "PMI", "SBATCH_"))}
    environ |= {"SLURM_CONF": str(root / "slurm.conf"), "PATH": f"{root}/bin:{path}"}
    cluster = SlurmCluster(root, environ)
    try:
        _start_munge(root, path)
        daemon = cluster.run("slurmctld", "-c", timeout_s=30)
        assert daemon.returncode == 0, daemon.stderr
        for node in nodes:
            cluster.start_node(node)
        end = time.monotonic() + 60
        while cluster.idle() != set(nodes):
            logs = "\n".join(f.read_text()[-2000:] for f in sorted(root.glob("*.log")))
            assert time.monotonic() < end, f"nodes did not come up:\n{logs}"
            time.sleep(0.1)
        yield cluster
    finally:
        _stop(cluster)


def _stop(cluster: SlurmCluster) -> None:
    """End jobs, then the daemons by their pid files."""
    with contextlib.suppress(subprocess.TimeoutExpired):
        cluster.run("scancel", "--user=root", "--signal=KILL", "--full", timeout_s=10)
        cluster.run("scancel", "--user=root", timeout_s=10)
    pids = [int(f.read_text()) for f in cluster.root.glob("*.pid") if f.read_text().strip()]
    for number in (signal.SIGTERM, signal.SIGKILL):
        for pid in pids:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, number)
        end = time.monotonic() + 10
        while time.monotonic() < end and any(Path(f"/proc/{pid}").exists() for pid in pids):
            time.sleep(0.05)
    shutil.rmtree(cluster.root, ignore_errors=True)


@pytest.fixture(scope="session")
def slurm_cluster() -> Iterator[SlurmCluster]:
    """Four nodes n1 to n4 of 4 CPUs each."""
    need_slurm()
    with start_cluster() as cluster:
        yield cluster
