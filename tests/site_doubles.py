"""Doubles of the sites: a real Slurm on this host whose nodes, partitions and rules are made from a site's profile.

The nodes have the site's names, shape and (fake) GPUs, and a name service of their own. What the profile demands or forbids
is enforced where sites do it, in job_submit.lua. `module` and the container runtime are programs in the double's PATH: the
first knows the modules of the profile, the second checks image and binds and runs the command on the host.
"""

import contextlib
import os
import re
import sys
from collections.abc import Iterator
from pathlib import Path

from slurm import SlurmCluster, start_cluster

from officina.configs.site_profile import SiteProfile
from officina.configs.sites import Site, find_site

N_NODES = 4
_NOBODY = {"XDG_CONFIG_HOME": "/nowhere", "XDG_CONFIG_DIRS": ""}
_CONF = """\
SelectTypeParameters=CR_Core_Memory
SlurmdTimeout=30
GresTypes=gpu
EnforcePartLimits=ALL
JobSubmitPlugins=lua
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

    def prepare(root: Path) -> None:
        (root / "dev").mkdir()
        for i in range(profile.gpu.per_node):
            os.mknod(root / "dev" / f"gpu{i}", 0o20666, os.makedev(1, 3))
        (root / "gres.conf").write_text(f"NodeName={','.join(names)} Name=gpu{_gres_type(profile)} "
                                        f"File={root}/dev/gpu[0-{profile.gpu.per_node - 1}]\n")
        (root / "job_submit.lua").write_text(_lua(site))
        _programs(root, profile)

    with start_cluster(_CONF + "\n".join(_partitions(profile)), name=re.sub("[^a-z0-9]", "", site.id),
                       nodes=dict.fromkeys(names, _shape(profile)), names={name: resolved(profile, name) for name in names},
                       prepare=prepare) as cluster:
        yield cluster


def resolved(profile: SiteProfile, name: str) -> str:
    """The name that the site's rule makes of a host."""
    return profile.rendezvous.address.replace("{ipv4}", "{host}").replace("{host}", name) or name


# ---- slurm.conf ------------------------------------------------------------------------------------------------------------
def _gres_type(profile: SiteProfile) -> str:
    kind = profile.request.gres.partition(":")[2]
    return f" Type={kind}" if kind else ""


def _shape(profile: SiteProfile) -> str:
    memory = profile.node.slurm_memory_mb or int((profile.node.memory_gb or 256) * 1000)
    return (f"Sockets=1 CoresPerSocket={profile.node.cores} ThreadsPerCore={profile.node.threads_per_core or 1} "
            f"RealMemory={memory} Gres={profile.request.gres}:{profile.gpu.per_node}")


def _partitions(profile: SiteProfile) -> Iterator[str]:
    """As the profile has them; one of the double's own where the partition follows from the qos."""
    nodes, shared = "Nodes=ALL", "DefMemPerCPU=1000"
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
    for name, text in texts.items():
        (root / "bin" / name).write_text(text)
        (root / "bin" / name).chmod(0o755)
