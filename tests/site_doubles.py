"""Doubles of the sites: a real Slurm on this host whose nodes, partitions and rules are made from a site's profile.

The nodes have the site's names, shape and (fake) GPUs, and a name service of their own: slurmd runs in a mount namespace
with its own /etc/hosts. What the profile demands or forbids is enforced where sites do it, in job_submit.lua. `module` and the
container runtime are programs in the double's PATH: the first knows the modules of the profile, the second checks image and
binds and runs the command on the host.
"""

import contextlib
import os
import re
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from slurm import _SBIN, SlurmCluster, _free_ports, _start_munge, _stop

from officina.configs.site_profile import SiteProfile
from officina.configs.sites import Site, find_site

N_NODES = 4
_NOBODY = {"XDG_CONFIG_HOME": "/nowhere", "XDG_CONFIG_DIRS": ""}
_CONF = """\
ClusterName={cluster}
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
SelectTypeParameters=CR_Core_Memory
ReturnToService=2
SlurmdParameters=config_overrides
SlurmdTimeout=30
KillWait=5
JobRequeue=1
GresTypes=gpu
EnforcePartLimits=ALL
JobSubmitPlugins=lua
SchedulerParameters=batch_sched_delay=1,sched_interval=2
{nodes}
{partitions}
"""
_LUA = """\
-- Made from the profile of {site}.
local requires = {requires}
local forbids = {forbids}
local queues = {queues}
local none = 4294967294

local function refuse(text)
  slurm.log_user(text)
  return slurm.ERROR
end

function slurm_job_submit(job, partitions, uid)
  for _, name in ipairs(requires) do
    if (name == "account" or name == "qos" or name == "partition") and (job[name] == nil or job[name] == "") then
      return refuse(name .. " is missing")
    end
    if name == "time" and job.time_limit == none then return refuse("time is missing") end
  end
  for _, name in ipairs(forbids) do
    if string.sub(name, 1, 3) == "mem" and (job.min_mem_per_node ~= nil or job.min_mem_per_cpu ~= nil) then
      return refuse("memory must not be asked for")
    end
    if name == "qos" and job.qos ~= nil and job.qos ~= "" then return refuse("qos must not be given") end
  end
  if {pattern} ~= "" and not string.find(job.account or "", {pattern}) then return refuse("no such account") end
  local limits = queues[job.qos or ""]
  if limits ~= nil then
    local nodes = job.min_nodes
    if limits.time > 0 and job.time_limit ~= none and job.time_limit > limits.time then return refuse("qos: too long") end
    if limits.most > 0 and nodes ~= none and nodes > limits.most then return refuse("qos: too many nodes") end
    if limits.least > 0 and (nodes == none or nodes < limits.least) then return refuse("qos: too few nodes") end
  end
  return slurm.SUCCESS
end

function slurm_job_modify(job, record, partitions, uid)
  return slurm.SUCCESS
end

return slurm.SUCCESS
"""
_MODULE = """\
#!/bin/bash
# The double's modules: those that the profile loads, and no others.
[ "$1" = use ] && exit 0
[ "$1" = load ] || exit 1
for name in "${@:2}"; do
  case " MODULES " in *" $name "*) ;; *) echo "module $name is not there" >&2; exit 1 ;; esac
done
"""
_RUNTIME = """\
#!/bin/bash
# The double's container runtime: checks what it is given, then runs the command on the host.
[ "$1" = exec ] || exit 64
shift
while [ "${1#--}" != "$1" ]; do
  case $1 in
    --bind=*) IFS=, read -ra paths <<<"${1#--bind=}"; for p in "${paths[@]}"; do
      [[ -e $p || $p = /e || $p = /dev/shm ]] || { echo "bind $p is not there" >&2; exit 255; }; done ;;
    FLAG) ;;
    *) echo "unknown option $1" >&2; exit 64 ;;
  esac
  shift
done
[ -e "$1" ] || { echo "no image $1" >&2; exit 255; }
export PATH=PYTHON:$PATH  # the image's own Python
shift
exec "$@"
"""


def node_names(profile: SiteProfile) -> list[str]:
    """Names like those of the site's nodes."""
    stem = re.split(r"[\[*?]", profile.hosts[0])[0] if profile.hosts else "node"
    return [f"{stem}{i:04d}" for i in range(1, N_NODES + 1)]


@contextlib.contextmanager
def start_double(word: str) -> Iterator[SlurmCluster]:
    """The double of a site, up and idle. Its daemons end with the context."""
    site = find_site(word, _NOBODY)
    profile, names = site.profile, node_names(site.profile)
    path = os.pathsep.join([os.environ.get("PATH", ""), *_SBIN])
    root = Path(tempfile.mkdtemp(prefix="officina-double-"))
    root.chmod(0o755)
    host = socket.gethostname().split(".")[0]
    (root / "state").mkdir()
    for name in names:
        (root / "spool" / name).mkdir(parents=True)
    (root / "dev").mkdir()
    for i in range(profile.gpu.per_node):
        os.mknod(root / "dev" / f"gpu{i}", 0o20666, os.makedev(1, 3))
    ports = _free_ports(1 + N_NODES)
    (root / "slurm.conf").write_text(_CONF.format(
        cluster=re.sub("[^a-z0-9]", "", site.id), host=host, ports=ports, root=root,
        partitions="\n".join(_partitions(profile, names)),
        nodes="\n".join(_node(profile, name, host, port) for name, port in zip(names, ports[1:], strict=True))))
    (root / "gres.conf").write_text(f"NodeName={','.join(names)} Name=gpu{_gres_type(profile)} "
                                    f"File={root}/dev/gpu[0-{profile.gpu.per_node - 1}]\n")
    (root / "job_submit.lua").write_text(_lua(site))
    _programs(root, profile)
    (root / "hosts").write_text(Path("/etc/hosts").read_text() + "".join(
        f"{_address()} {name} {resolved(profile, name)}\n" for name in names))
    environ = {k: v for k, v in os.environ.items() if not k.startswith(("SLURM_", "OMPI_", "PMI", "SBATCH_"))}
    environ |= {"SLURM_CONF": str(root / "slurm.conf"), "PATH": f"{root}/bin:{path}"}
    cluster = SlurmCluster(root, environ)
    try:
        _start_munge(root, path)
        in_namespace = ["unshare", "--mount", "--propagation", "private", "sh", "-c",
                        f'mount --bind {root}/hosts /etc/hosts && exec "$@"', "sh"]
        for daemon in (["slurmctld", "-c", "-f", f"{root}/slurm.conf"],
                       *([*in_namespace, "slurmd", "-N", name, "-f", f"{root}/slurm.conf"] for name in names)):
            started = cluster.run(*daemon, timeout_s=30)
            assert started.returncode == 0, f"{daemon}: {started.stderr}"
        end = time.monotonic() + 60
        while cluster.run("sinfo", "-h", "-N", "-t", "idle", "-o", "%N").stdout.split().count(names[-1]) == 0 or \
                set(cluster.run("sinfo", "-h", "-N", "-t", "idle", "-o", "%N").stdout.split()) != set(names):
            logs = "\n".join(f.read_text()[-2000:] for f in sorted(root.glob("*.log")))
            assert time.monotonic() < end, f"nodes did not come up:\n{logs}"
            time.sleep(0.1)
        yield cluster
    finally:
        _stop(cluster)


def _address() -> str:
    """An IPv4 address of this host that is not a loopback one: the nodes' interface."""
    shown = subprocess.run(["hostname", "-I"], capture_output=True, text=True, check=True).stdout.split()
    return next(address for address in shown if re.fullmatch(r"[0-9.]+", address) and not address.startswith("127."))


def resolved(profile: SiteProfile, name: str) -> str:
    """The name that the site's rule makes of a host."""
    return profile.rendezvous.address.replace("{ipv4}", "{host}").replace("{host}", name) or name


# ---- slurm.conf ------------------------------------------------------------------------------------------------------------
def _gres_type(profile: SiteProfile) -> str:
    kind = profile.request.gres.partition(":")[2]
    return f" Type={kind}" if kind else ""


def _node(profile: SiteProfile, name: str, host: str, port: int) -> str:
    threads = profile.node.threads_per_core or 1
    memory = profile.node.slurm_memory_mb or int((profile.node.memory_gb or 256) * 1000)
    return (f"NodeName={name} NodeHostname={host} NodeAddr=127.0.0.1 Port={port} Sockets=1 CoresPerSocket={profile.node.cores} "
            f"ThreadsPerCore={threads} RealMemory={memory} Gres={profile.request.gres}:{profile.gpu.per_node}")


def _partitions(profile: SiteProfile, names: list[str]) -> Iterator[str]:
    """As the profile has them; one of the double's own where the partition follows from the qos."""
    nodes = f"Nodes={','.join(names)}"
    shared = "DefMemPerCPU=1000"
    for name, limits in profile.partitions.items():
        longest = max([limits.max_time or 0, *(q.max_time or 0 for q in profile.qos.values() if q.partition == name)])
        most = max([limits.max_nodes or 0, *(q.max_nodes or 0 for q in profile.qos.values() if q.partition == name)])
        yield " ".join(filter(None, (
            f"PartitionName={name}", nodes, shared, f"MaxTime={int(longest // 60)}" if longest else "",
            f"MinNodes={limits.min_nodes}" if limits.min_nodes else "", f"MaxNodes={most}" if most else "",
            "OverSubscribe=EXCLUSIVE" if limits.whole_nodes else "")))
    if not profile.partitions:
        yield f"PartitionName=implied {nodes} {shared} Default=YES"


def _lua(site: Site) -> str:
    def table(items: list[str]) -> str:
        return "{" + ", ".join(f'"{item}"' for item in items) + "}"

    profile, rules = site.profile, site.profile.request
    pattern = rules.account_pattern
    queues = ", ".join(
        f'["{name}"] = {{time = {int((q.max_time or 0) // 60)}, most = {q.max_nodes or 0}, least = {q.min_nodes or 0}}}'
        for name, q in profile.qos.items())
    limits = {name: p for name, p in profile.partitions.items() if p.max_time or p.max_nodes}
    default = next((p for name, p in limits.items() if name == profile.queues.train.partition), None)
    if default and profile.qos:  # a qos may lift the partition's limits, which then are those of no qos
        queues += f', [""] = {{time = {int((default.max_time or 0) // 60)}, most = {default.max_nodes or 0}, least = 0}}'
    return _LUA.format(site=site.id, requires=table(rules.requires), forbids=table(rules.forbids), queues="{" + queues + "}",
                       pattern=f'"^{pattern.replace("-", "%-")}$"' if pattern else '""')


def _programs(root: Path, profile: SiteProfile) -> None:
    lines = [*profile.software.setup, *profile.container.setup]
    modules = [name for line in lines if line.startswith("module load ") for name in line.split()[2:]]
    texts = {"module": _MODULE.replace("MODULES", " ".join(modules))}
    if profile.container.runtime:
        flag = profile.container.gpu_flag or ("--nv" if profile.gpu.vendor == "nvidia" else "--nothing")
        text = _RUNTIME.replace("FLAG", flag)
        texts[profile.container.runtime] = text.replace("PYTHON", str(Path(sys.executable).parent))
    (root / "bin").mkdir()
    for name, text in texts.items():
        (root / "bin" / name).write_text(text)
        (root / "bin" / name).chmod(0o755)
