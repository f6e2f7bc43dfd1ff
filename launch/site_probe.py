"""What Slurm says of its own cluster, and how that differs from a site's profile. Reads only; starts no job."""

import datetime
import re
import subprocess
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from officina.configs.sites import Site
from officina.launch.site_rows import GRADE_WORDS, as_words
from officina.trainer.errors import LaunchError
from officina.trainer.quantities import parse_duration_s

_QOS_FIELDS = ("Name", "MaxWall", "MaxTRES", "MinTRES", "MaxTRESPU", "MaxJobsPU", "MaxSubmitPU")
COMMANDS = {
    "config": ("scontrol", "show", "config"),
    "partition": ("scontrol", "--oneliner", "show", "partition"),
    "node": ("scontrol", "--oneliner", "show", "node"),
    "sinfo": ("sinfo", "--noheader", "--format=%R|%D|%G"),
    "qos": ("sacctmgr", "--parsable2", "show", "qos", f"format={','.join(_QOS_FIELDS)}"),
}
_LIMITS = ("max_time", "max_nodes", "min_nodes", "max_gpus")
_NEEDED = ("config", "partition", "node")
_LEFT_OUT = {"qos": "limits of QOS", "sinfo": "GPUs of nodes that are hidden"}
_TIMEOUT_S = 60
Key = tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Probe:
    """What Slurm said, as values of a profile by key, and what a person should know of how it said it."""

    cluster: str
    values: dict[Key, object]
    gpu_partitions: list[str]
    """Those with GPUs, the one with the most nodes first."""
    other_partitions: list[str]
    remarks: list[str]


# ---- asking ----------------------------------------------------------------------------------------------------------
def ask_slurm(environ: Mapping[str, str]) -> Probe:
    """Run the commands. Raises LaunchError where there is no Slurm, or it does not answer."""
    said, remarks = {}, []
    for name, command in COMMANDS.items():
        try:
            done = subprocess.run(command, env=dict(environ), capture_output=True, text=True, timeout=_TIMEOUT_S, check=False)
            said[name], fault = done.stdout, ""
            if done.returncode:
                said[name], fault = "", " ".join((done.stderr or done.stdout).split()) or f"status {done.returncode}"
        except FileNotFoundError:
            fault = "there is no such program here"
        except subprocess.TimeoutExpired:
            fault = f"did not answer in {_TIMEOUT_S} s"
        if fault and name in _NEEDED:
            raise LaunchError(f"{' '.join(command)}: {fault}. Run the same command of officina on a login node of the cluster")
        if fault:
            remarks.append(f"Not known: {_LEFT_OUT[name]}, for {command[0]} fails: {fault}")
    return read_probe(said, remarks)


def read_probe(said: Mapping[str, str], remarks: list[str] | None = None) -> Probe:
    """The outputs of COMMANDS, by name, as values of a profile. `sinfo` and `qos` may be missing."""
    remarks = list(remarks or [])
    config = dict(re.findall(r"^(\w+)\s*=\s*(.*?)\s*$", said["config"], re.MULTILINE))
    partitions = [_pairs(line) for line in said["partition"].splitlines() if line.startswith("PartitionName=")]
    nodes = [_pairs(line) for line in said["node"].splitlines() if line.startswith("NodeName=")]
    with_gpus = Counter(name for node in nodes if _gpus(node) for name in node.get("Partitions", "").split(","))
    for line in said.get("sinfo", "").splitlines():  # some sites hide the nodes; what sinfo says of them will do
        name, count, gres = (line.split("|") + ["", ""])[:3]
        if "gpu" in gres and name not in with_gpus and count.isdigit():
            with_gpus[name] = int(count)
    values: dict[Key, object] = dict(_of_cluster(config))
    up = [p for p in partitions if p.get("State", "UP") == "UP"]
    down = [p["PartitionName"] for p in partitions if p.get("State", "UP") != "UP"]
    if down:
        remarks.append(f"not up, so left out: {', '.join(down)}")
    qos = {row["Name"]: dict(_of_qos(row)) for row in _table(said.get("qos", ""))}
    for partition in up:
        name = partition["PartitionName"]
        limits = qos.get(partition.get("QoS", ""), {}) | dict(_of_partition(partition, name in with_gpus))
        values |= {("partitions", name, field): value for field, value in limits.items()}
    names = [p["PartitionName"] for p in up]
    gpu_partitions = sorted((n for n in names if n in with_gpus), key=lambda n: -with_gpus[n])
    shapes = Counter(tuple(_of_node(node)) for node in nodes
                     if not gpu_partitions or gpu_partitions[0] in node.get("Partitions", "").split(","))
    if shapes:
        (shape, many), *others = shapes.most_common()
        values |= dict(shape)
        if others:
            remarks.append(f"nodes of {gpu_partitions[0] if gpu_partitions else 'the cluster'} differ; this is the shape of "
                           f"{many} of {sum(shapes.values())}")
    values |= {("qos", name, field): value for name, limits in qos.items() for field, value in limits.items()}
    return Probe(config.get("ClusterName", ""), values, gpu_partitions, [n for n in names if n not in with_gpus], remarks)


def _pairs(line: str) -> dict[str, str]:
    """`A=1 B=x=2 C=(null)` -> {"A": "1", "B": "x=2"}."""
    found = re.findall(r"(?:^|\s)([A-Za-z_:/]+)=(.*?)(?=\s+[A-Za-z_:/]+=|\s*$)", line)
    return {name: value for name, value in found if value not in ("(null)", "N/A", "n/a", "")}


def _table(text: str) -> Iterator[dict[str, str]]:
    lines = [line.rstrip("|").split("|") if line.count("|") > 1 else [] for line in text.splitlines()]
    header = next((line for line in lines if line[:1] == ["Name"]), [])
    for line in lines[lines.index(header) + 1:] if header else []:
        row = dict(zip(header, [*line, *[""] * len(header)], strict=False))
        if row.get("Name"):
            yield row


# ---- reading ---------------------------------------------------------------------------------------------------------
def _of_cluster(config: Mapping[str, str]) -> Iterator[tuple[Key, object]]:
    if version := config.get("SLURM_VERSION"):
        yield ("slurm", "version"), version
    for name, key in (("JobRequeue", "requeue"), ("KillOnBadExit", "kill_on_bad_exit")):
        if config.get(name) in ("0", "1"):
            yield ("slurm", key), config[name] == "1"


def _of_partition(partition: Mapping[str, str], gpus: bool) -> Iterator[tuple[str, object]]:
    yield "gpus", gpus
    if nodes := _number(partition.get("TotalNodes")):
        yield "nodes", nodes
    if (least := _number(partition.get("MinNodes"))) and least > 1:
        yield "min_nodes", least
    if most := _number(partition.get("MaxNodes")):
        yield "max_nodes", most
    for name, field in (("MaxTime", "max_time"), ("DefaultTime", "default_time")):
        if limit := _time(partition.get(name)):
            yield field, limit
    if share := partition.get("OverSubscribe"):
        yield "whole_nodes", share == "EXCLUSIVE" or partition.get("Exclusive") == "NODE"


def _of_node(node: Mapping[str, str]) -> Iterator[tuple[Key, object]]:
    if node.get("Arch"):
        yield ("node", "arch"), node["Arch"]
    sockets, cores = _number(node.get("Sockets")), _number(node.get("CoresPerSocket"))
    if sockets and cores:
        yield ("node", "cores"), sockets * cores - (_number(node.get("CoreSpecCount")) or 0)
    if threads := _number(node.get("ThreadsPerCore")):
        yield ("node", "threads_per_core"), threads
    if memory := _number(node.get("RealMemory")):
        yield ("node", "slurm_memory_mb"), memory
    if gpus := _gpus(node):
        yield ("gpu", "per_node"), gpus


def _gpus(node: Mapping[str, str]) -> int:
    """GPUs of `Gres=gpu:a100:4(S:0-1),tmpfs:...`, all types together."""
    return sum(int(n) for n in re.findall(r"(?:^|,)(?:gres/)?gpu(?::[^:,()]+)?:([0-9]+)", node.get("Gres", "")))


def _of_qos(row: Mapping[str, str]) -> Iterator[tuple[str, object]]:
    if limit := _time(row.get("MaxWall")):
        yield "max_time", limit
    for column, prefix in (("MaxTRES", "max"), ("MinTRES", "min")):
        limits = dict(part.split("=", 1) for part in row.get(column, "").split(",") if "=" in part)
        if nodes := _number(limits.get("node")):
            yield f"{prefix}_nodes", nodes
        if prefix == "max" and (limits.get("gres/gpu") or "").isdigit():
            yield "max_gpus", int(limits["gres/gpu"])
    for column, field in (("MaxJobsPU", "max_running"), ("MaxSubmitPU", "max_jobs")):
        if most := _number(row.get(column)):
            yield field, most


def _number(text: str | None) -> int | None:
    return int(text) if text and text.isdigit() and int(text) else None


def _time(text: str | None) -> str | None:
    """Slurm's time as one writes it in a profile: `2d`, `12h`, `30m`."""
    if not text or not re.fullmatch(r"(?:[0-9]+-)?[0-9]+:[0-9:]+", text):
        return None
    minutes = int(parse_duration_s(text)) // 60
    for size, unit in ((1440, "d"), (60, "h"), (1, "m")):
        if minutes and minutes % size == 0:
            return f"{minutes // size}{unit}"
    return None


# ---- telling ---------------------------------------------------------------------------------------------------------
def difference(site: Site, probe: Probe, host: str) -> tuple[str, int]:
    """A profile that lies over `site` with what differs, each beside what stood there; and how many values differ."""
    changed, missing = {}, []
    known = {*site.profile.partitions, *probe.gpu_partitions, *([] if site.profile.partitions else probe.other_partitions)}
    limiting = {key[1] for key in probe.values if key[0] == "qos" and key[2] in _LIMITS}  # clusters have dozens of empty qos
    for key, value in probe.values.items():
        fact = site.facts.get(".".join(key))
        if key[0] == "partitions" and key[1] not in known:
            continue
        if key[0] == "qos" and key[1] not in limiting | set(site.profile.qos):
            continue
        if fact is None or not _same(key, fact.value, value):
            was = f"was {as_words(key[-1], fact.value)} ({GRADE_WORDS[fact.grade]}, {fact.date})" if fact else "new"
            changed[key] = (value, was)
    said = {key[1] for key in probe.values if key[0] == "partitions"}
    if said:
        missing = [name for name in site.profile.partitions if name not in said]
    changed |= {("partitions", name): (None, "Slurm knows no such partition that is up") for name in missing}
    others = [name for name in probe.other_partitions if name not in known]
    head = [f"# What Slurm says on {host} where it differs from {site.id}.",
            *(f"# {remark}" for remark in probe.remarks),
            *([f"# Partitions without GPUs, not in the profile: {', '.join(others)}"] if others else [])]
    if not changed:
        return "\n".join([*head, f"# Nothing differs: {len(probe.values)} values compared.", f"extends: {site.id}", ""]), 0
    return "\n".join([*head, f"extends: {site.id}", *_source(host, probe), *_tree(changed), ""]), len(changed)


def _same(key: Key, old: object, new: object) -> bool:
    if key[-1].endswith("_time"):
        return parse_duration_s(old) == parse_duration_s(new)
    return old == new


def new_profile(name: str, probe: Probe, host: str) -> str:
    """A profile of its own for a cluster that none of ours describes."""
    values = {key: (value, "") for key, value in probe.values.items()}
    gpus = probe.values.get(("gpu", "per_node"), 0)
    if gpus:
        cores = int(probe.values.get(("node", "cores"), 0)) * int(probe.values.get(("node", "threads_per_core"), 1))
        if cores >= int(gpus):
            values["request", "cpus_per_gpu"] = (cores // int(gpus), "CPUs of a node / its GPUs")
    else:
        values["request", "gpus"] = ("none", "no node has GPUs")
    train = next(iter([*probe.gpu_partitions, *probe.other_partitions]), "")
    if train:
        values["queues", "train", "partition"] = (train, "change it to where your jobs go")
    if probe.other_partitions:
        values["queues", "data", "partition"] = (probe.other_partitions[0], "CPU jobs: data sets, conversions")
    pattern = re.sub(r"[0-9]+", "*", host.split(".")[0])
    return "\n".join([
        f"# Written by officina sites new {name} on {host}. Add what Slurm does not know: GPU model and memory, network,",
        "# environment variables, containers, quotas, billing. The keys are those of officina sites lumi.",
        *(f"# {remark}" for remark in probe.remarks), "extends: slurm", f"name: {_scalar(name)}", "aliases: []",
        *_source(host, probe), *_tree({("hosts",): ([pattern] if "*" in pattern else [host.split(".")[0]], "")} | values), ""])


def _source(host: str, probe: Probe) -> list[str]:
    title = f"officina sites probe on {host}, cluster {probe.cluster or 'without a name'}"
    return ["sources:", f"  probe: {{grade: official, date: {datetime.date.today()}, title: {_scalar(title)}}}"]


def _tree(values: Mapping[Key, tuple[object, str]]) -> list[str]:
    """YAML lines, `# remark` behind each value; every section names the source."""
    lines: list[str] = []
    open_: Key = ()
    for key in sorted(values, key=lambda k: (list(dict.fromkeys(k[0] for k in values)).index(k[0]), k[:-1])):
        value, remark = values[key]
        stem = key[:-1]
        shared = next((i for i, (a, b) in enumerate(zip(open_, stem, strict=False)) if a != b), min(len(open_), len(stem)))
        for i in range(shared, len(stem)):
            lines.append(f"{'  ' * i}{_scalar(stem[i])}:")
            if i == 0:
                lines.append("  source: probe")
        open_ = stem
        written = _scalar(value) if stem else f"{{value: {_scalar(value)}, source: probe}}"
        lines.append(f"{'  ' * len(stem)}{_scalar(key[-1])}: {written}{f'  # {remark}' if remark else ''}")
    return lines


def _scalar(value: object) -> str:
    """A value in YAML's flow form, quoted where it must be."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, list):
        return "[" + ", ".join(_scalar(item) for item in value) + "]"
    text = str(value)
    plain = re.fullmatch(r"[A-Za-z_][A-Za-z0-9_. +/-]*|[0-9]+[dhm]", text) and text.lower() not in (
        "null", "true", "false", "yes", "no", "on", "off", "y", "n")
    return text if isinstance(value, int | float) or plain else '"' + text.replace("\\", "\\\\").replace('"', '\\"') + '"'
