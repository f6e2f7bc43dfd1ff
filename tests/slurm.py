"""A real Slurm of four nodes on this one host, as a pytest fixture. Needs root, slurm-wlm and munge.

Everything (key, sockets, spool, logs, ports) lives in a temporary directory, so test runs side by side do not meet.
A test imports the fixture by name: `from slurm import slurm_cluster` works through `tests/conftest.py`.
"""

import contextlib
import os
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

N_NODES = 4
_PROGRAMS = ("slurmctld", "slurmd", "munged", "srun", "sbatch", "salloc", "scontrol")
_SBIN = ("/usr/sbin", "/usr/local/sbin", "/sbin")

_CONF = """\
ClusterName={name}
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={ports[0]}
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
SelectTypeParameters=CR_Core
ReturnToService=2
SlurmdParameters=config_overrides
JobRequeue=1
SlurmdTimeout=10
KillWait=5
SchedulerParameters=batch_sched_delay=1,sched_interval=2
{extra}
{nodes}
PartitionName=test Nodes=n[1-4] Default=YES MaxTime=60 State=UP
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


def _missing() -> str:
    """Why no cluster can be started here; empty if it can."""
    path = os.pathsep.join([os.environ.get("PATH", ""), *_SBIN])
    absent = [name for name in _PROGRAMS if shutil.which(name, path=path) is None]
    if absent:
        return f"needs {', '.join(absent)} (apt-get install slurm-wlm munge)"
    return "" if os.geteuid() == 0 else "needs root: slurmd starts steps as their users"


def _free_ports(n: int) -> list[int]:
    with contextlib.ExitStack() as held:
        sockets = [held.enter_context(socket.socket()) for _ in range(n)]
        for s in sockets:
            s.bind(("", 0))
        return [s.getsockname()[1] for s in sockets]


def _start_munge(root: Path, path: str) -> None:
    (root / "munge.key").write_bytes(os.urandom(128))
    (root / "munge.key").chmod(0o600)
    files = {"socket": "munge.socket", "key-file": "munge.key", "pid-file": "munged.pid", "log-file": "munged.log",
             "seed-file": "munged.seed"}
    subprocess.run([shutil.which("munged", path=path), "--force", "--num-threads=2",
                    *(f"--{option}={root / name}" for option, name in files.items())], check=True, timeout=20)


@contextlib.contextmanager
def start_cluster(extra: str = "", *, cpus: int = 4, name: str = "officina") -> Iterator[SlurmCluster]:
    """The cluster, up and idle; `extra` is added to slurm.conf."""
    path = os.pathsep.join([os.environ.get("PATH", ""), *_SBIN])
    root = Path(tempfile.mkdtemp(prefix="officina-slurm-"))
    root.chmod(0o755)
    host = socket.gethostname().split(".")[0]
    (root / "state").mkdir()
    for i in range(N_NODES):
        (root / "spool" / f"n{i + 1}").mkdir(parents=True)
    ports = _free_ports(1 + N_NODES)
    nodes = "\n".join(
        f"NodeName=n{i + 1} NodeHostname={host} NodeAddr=127.0.0.1 Port={ports[i + 1]} CPUs={cpus} RealMemory=4000"
        for i in range(N_NODES))
    conf = root / "slurm.conf"
    conf.write_text(_CONF.format(host=host, ports=ports, root=root, nodes=nodes, extra=extra, name=name))
    environ = {k: v for k, v in os.environ.items() if not k.startswith(("SLURM_", "OMPI_", "PMI"))}
    environ |= {"SLURM_CONF": str(conf), "PATH": path}
    cluster = SlurmCluster(root, environ)
    try:
        _start_munge(root, path)
        daemons = [["slurmctld", "-c", "-f", str(conf)],
                   *(["slurmd", "-N", f"n{i + 1}", "-f", str(conf)] for i in range(N_NODES))]
        for daemon in daemons:
            started = cluster.run(*daemon, timeout_s=20)
            assert started.returncode == 0, f"{daemon}: {started.stderr}"
        end = time.monotonic() + 40
        while cluster.run("sinfo", "-h", "-t", "idle", "-o", "%D").stdout.strip() != str(N_NODES):
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
    """Four nodes n1 to n4 of 4 CPUs each. Skipped where it cannot run; in CI (variable CI) that is a failure."""
    if why := _missing():
        if os.environ.get("CI"):
            pytest.fail(f"the Slurm tests must run in CI: {why}")
        pytest.skip(f"no Slurm here: {why}")
    with start_cluster() as cluster:
        yield cluster
