"""What a site would refuse, or let start and fail: told before sbatch, each fault with a word that works."""

import os
import re
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

from officina.configs.job import expand
from officina.configs.site_profile import Partition, Qos, SiteProfile
from officina.launch.image_facts import machine_of
from officina.launch.job_cost import money_problems
from officina.launch.job_places import storage_area
from officina.launch.job_request import IMAGE_FILE, PYXIS, Request
from officina.launch.site_rows import time_words
from officina.trainer.errors import Problem

OURS = {
    "job-name": "name=NAME", "account": "account=NAME", "partition": "partition=NAME", "qos": "qos=NAME", "nodes": "nodes=N",
    "ntasks-per-node": "gpus=N", "ntasks": "gpus=N", "cpus-per-task": "cpus=N", "time": "time=8h",
    "gres": "gpus=N", "gpus": "gpus=N", "gpus-per-node": "gpus=N", "gpus-per-task": "gpus=N", "output": "",
    "error": "", "open-mode": "", "signal": "stop_before=5m", "requeue": "", "no-requeue": "", "dependency": "jobs=N",
    "array": "optim.lr=1e-3,1e-4", "chdir": "", "export": "env.extra.NAME=VALUE", "wrap": "", "parsable": "",
    "test-only": "--dry-run"}
"""sbatch options that officina sets, and the word that changes each."""
SHORT = {"-A": "account", "-p": "partition", "-q": "qos", "-N": "nodes", "-n": "ntasks", "-c": "cpus-per-task", "-t": "time",
         "-G": "gpus", "-o": "output", "-e": "error", "-J": "job-name", "-d": "dependency", "-a": "array", "-D": "chdir"}
RANK_VARIABLES = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "OFFICINA_", "SLURM_",
                  "SRUN_CPUS_PER_TASK", "PET_", "TORCHELASTIC_")
"""Variables by which ranks find each other: set by the script, by Slurm or by torchrun."""
_LATEST_SIGNAL_S = 65_535
"""Slurm keeps the time of --signal in 16 bits."""
_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")


def site_problems(request: Request) -> list[Problem]:
    """Every fault of a request against its site's profile."""
    if request.profile.scheduler == "none":
        return [Problem("site", request.site.id, "has no scheduler to submit to", "officina train ..., which starts ranks")]
    return [*_required(request), *_shape(request), *_limits(request), *_time(request), *_binding(request), *_launcher(request),
            *_image(request), *_extra(request), *_variables(request), *money_problems(request)]


# ---- who, where ----------------------------------------------------------------------------------------------------
def _required(request: Request) -> Iterator[Problem]:
    rules, profile = request.profile.request, request.profile
    if "account" in rules.requires and not request.account:
        yield Problem("account", None, f"{profile.name} takes no job without the project that is charged",
                      f"account={example_account(profile)}")
    elif rules.account_pattern and request.account and not re.fullmatch(rules.account_pattern, request.account):
        yield Problem("account", request.account, f"accounts of {profile.name} look like {example_account(profile)}",
                      f"account={example_account(profile)}")
    if "qos" in rules.requires and not request.qos:
        known = _first([profile.queues.train.qos, *profile.qos]).replace("{account}", request.account or "PROJECT")
        yield Problem("qos", None, f"{profile.name} takes no job without a qos", f"qos={known}")
    if "partition" in rules.requires and not request.partition:
        yield Problem("partition", None, f"{profile.name} takes no job without a partition, and it is not known which one "
                      f"is for {'such commands' if request.what != 'train' else 'this qos'}",
                      f"partition={_first([profile.queues.train.partition, *profile.partitions])}")
    for option, value in (("qos", request.qos), ("partition", request.partition)):
        if value and option in rules.forbids:
            yield Problem(option, value, f"must not be given on {profile.name}", f"leave {option} out")
    if request.job.queue and not (request.partition or request.qos):
        yield Problem("queue", request.job.queue, f"it is not known where such jobs go on {profile.name}", "partition=NAME")


def example_account(profile: SiteProfile) -> str:
    """A name that the site's accounts could have."""
    pattern = profile.request.account_pattern
    return re.sub(r"\.[+*]", "X", pattern) if pattern else "PROJECT"


def _first(names: list[str]) -> str:
    return next((name for name in names if name), "NAME")


# ---- nodes, GPUs, tasks --------------------------------------------------------------------------------------------
def _shape(request: Request) -> Iterator[Problem]:
    profile, limits = request.profile, request.partition_limits
    per_node = profile.gpu.per_node
    wants_gpus = request.gpus or request.job.gpus
    if per_node and (request.job.gpus or 0) > per_node:
        yield Problem("gpus", request.job.gpus, f"nodes of {profile.name} have {per_node} GPUs", f"gpus={per_node}")
    if wants_gpus and (limits.gpus is False or request.qos_limits.gpus is False):
        where = f"partition {request.partition}" if limits.gpus is False else f"qos {request.qos}"
        train = profile.queues.train
        yield Problem("partition" if limits.gpus is False else "qos", request.partition or request.qos,
                      f"nodes of {where} have no GPUs, and {request.what} runs on them",
                      f"partition={train.partition}" if limits.gpus is False else f"qos={train.qos}")
    if request.wants_gpus and not request.gpus and profile.request.gpus == "none":
        yield Problem("device", None, f"nodes of {profile.name} have no GPUs, and the run is not said to be for CPUs",
                      "device=cpu ranks=2, so many ranks on each node")
    elif request.wants_gpus and not request.gpus:
        yield Problem("gpus", None, f"it is not known how many GPUs a node of {profile.name} has", "gpus=4")
    elif request.gpus and not request.cpus_per_rank:
        yield Problem("cpus", None, f"it is not known how many CPUs go with a GPU on {profile.name}, and "
                      "srun gives one, silently", "cpus=8")
    if per_node and request.gpus and request.gpus < per_node:
        if limits.whole_nodes:
            shared = [name for name, other in profile.partitions.items() if other.gpus and other.whole_nodes is False]
            yield Problem("gpus", request.gpus, f"partition {request.partition} gives whole nodes of {per_node} GPUs, and "
                          "all of them are charged", f"gpus={per_node}" + (f", or partition={shared[0]}" if shared else ""))
        elif request.nodes > 1 and request.exclusive:
            yield Problem("gpus", request.gpus, f"jobs of several nodes take whole nodes on {profile.name}", f"gpus={per_node}")
    cores = profile.node.cores or 0
    cpus = cores * (profile.node.threads_per_core or 1)
    if request.job.cpus and cpus and request.cpus_per_rank * max(request.gpus, 1) > cpus:
        yield Problem("cpus", request.job.cpus, f"{request.gpus} GPUs a node would take "
                      f"{request.cpus_per_rank * request.gpus} CPUs, and a node has {cpus}",
                      f"cpus={profile.request.cpus_per_gpu or cpus // max(request.gpus, 1)}")


def _limits(request: Request) -> Iterator[Problem]:
    profile = request.profile
    for what, name, limits in _queues(request):
        least, most = limits.min_nodes, limits.max_nodes
        if least and request.nodes < least:
            other = _fits(request, what)
            yield Problem("nodes", request.nodes, f"{what} {name} is for {least} nodes and more",
                          f"nodes={least}" + (f", or {other}" if other else ""))
        if most and request.nodes > most:
            other = _fits(request, what)
            yield Problem("nodes", request.nodes, f"{what} {name} gives a job at most {most} node{'s' * (most > 1)}",
                          f"nodes={most}" + (f", or {other}" if other else ""))
        if limits.max_gpus is not None and request.gpus * request.nodes > limits.max_gpus:
            fewer = max(limits.max_gpus // max(request.gpus, 1), 1)
            remedy = _fits(request, what) if not limits.max_gpus else f"nodes={fewer}"
            yield Problem("nodes", request.nodes, f"{what} {name} gives a job at most {limits.max_gpus} GPUs, and these are "
                          f"{request.gpus * request.nodes}", remedy or f"{what}={_first([profile.queues.train.qos])}")
    there = request.partition_limits.nodes or profile.node.count
    if there and request.nodes > there and not any(
            limits.max_nodes and request.nodes > limits.max_nodes for limits in (request.qos_limits, request.partition_limits)):
        yield Problem("nodes", request.nodes, f"{profile.name} has {there} such nodes", f"nodes={there}")


def _queues(request: Request) -> list[tuple[str, str, Qos | Partition]]:
    """(kind, name, limits) of what the job waits in. What a qos limits, it limits in place of its partition."""
    qos, partition = request.qos_limits, request.partition_limits
    if qos.max_nodes:
        partition = replace(partition, max_nodes=None)
    if qos.max_time:
        partition = replace(partition, max_time=None)
    return [("qos", request.qos, qos), ("partition", request.partition, partition)]


def _fits(request: Request, what: str) -> str:
    """A qos or partition of the site that would take this number of nodes for this time."""
    table = request.profile.qos if what == "qos" else request.profile.partitions
    current = request.qos if what == "qos" else request.partition
    for name, limits in table.items():
        gpus_fit = limits.gpus is not False if what == "qos" else bool(limits.gpus)
        if (name != current and gpus_fit and "{" not in name
                and (limits.min_nodes or 1) <= request.nodes <= (limits.max_nodes or 10**9)
                and (limits.max_gpus is None or request.gpus * request.nodes <= limits.max_gpus)
                and request.time_s <= (limits.max_time or float("inf")) and not getattr(limits, "on_request", None)):
            return f"{what}={name}"
    if what == "partition":
        return _fits(request, "qos")
    return ""


# ---- time ----------------------------------------------------------------------------------------------------------
def _time(request: Request) -> Iterator[Problem]:
    known = [(f"{what} {name}", limits.max_time) for what, name, limits in _queues(request) if limits.max_time]
    where, most = min(known, key=lambda item: item[1], default=("", 0.0))
    if request.time_s <= 0:
        yield Problem("time", None if request.job.time is None else f"{request.time_s:g}s", "is the longest time the job may "
                      "take, and must be said", f"time={time_words(min(most or 28_800, 28_800))}")
        return
    if most and request.time_s > most:
        longer = [f"{what}={name}" for what, table in (("qos", request.profile.qos), ("partition", request.profile.partitions))
                  for name, limits in table.items() if (limits.max_time or 0) >= request.time_s and "{" not in name
                  and request.nodes <= (limits.max_nodes or 10**9) and request.nodes >= (limits.min_nodes or 1)
                  and (what == "qos" or bool(limits.gpus) == bool(request.gpus)) and limits.gpus is not bool(not request.gpus)]
        more = f" jobs={-(-int(request.time_s) // int(most))} (a chain)" if request.what in ("train", "resume") else ""
        yield Problem("time", time_words(request.time_s), f"{where} ends jobs after {time_words(most)}",
                      f"time={time_words(most)}{more}" + (f", or {longer[0]}" if longer else ""))
    if request.what in ("train", "resume") and 0 < request.time_s <= request.job.stop_before:
        early, whole = request.job.stop_before, time_words(request.time_s)
        yield Problem("stop_before", time_words(early), f"would end the job before it began: it has {whole} in all",
                      f"stop_before={time_words(max(request.time_s // 4, 1))}")
    elif request.job.stop_before > _LATEST_SIGNAL_S:
        yield Problem("stop_before", time_words(request.job.stop_before), "is longer than Slurm can count: at most "
                      f"{_LATEST_SIGNAL_S} s", "stop_before=18h")


# ---- the step ------------------------------------------------------------------------------------------------------
def _binding(request: Request) -> Iterator[Problem]:
    bind, profile = request.job.cpu_bind, request.profile
    masks = [text for text in [bind, *request.job.slurm.extra] if "mask_cpu" in text or "map_cpu" in text]
    if masks and profile.binding.whole_nodes_only and not request.whole_nodes:
        yield Problem("cpu_bind" if bind else "slurm.extra", masks[0], f"masks name cores of a whole node, and {request.gpus} "
                      f"of {profile.gpu.per_node} GPUs leave the job others: tasks would be bound wrongly or refused",
                      f"cpu_bind=cores, or gpus={profile.gpu.per_node} in a partition of whole nodes")


def _launcher(request: Request) -> Iterator[Problem]:
    name, known = request.job.launcher, request.profile.slurm.launchers
    if known and name not in known:
        yield Problem("launcher", name, f"does not work on {request.profile.name}; {' and '.join(known)} do",
                      f"launcher={known[0]}")
    if name == "mpirun" and request.image_kind == PYXIS:
        yield Problem("launcher", name, "cannot start ranks in an image that Slurm's plugin runs", "launcher=srun")


# ---- images and Pythons --------------------------------------------------------------------------------------------
def _image(request: Request) -> Iterator[Problem]:
    container, profile = request.profile.container, request.profile
    image, kind = request.job.container, request.image_kind
    if kind == PYXIS and container.pyxis is not True:
        known = f"{container.runtime or 'singularity'} images" if container.runtime else "no such plugin that we know of"
        yield Problem("container", image, f"is for Slurm's plugin pyxis, and {profile.name} has {known}",
                      "container=image.sif" if container.runtime else f"leave {image} out")
    if kind == IMAGE_FILE and not container.runtime:
        yield Problem("container", image, f"it is not known which program runs images on {profile.name}",
                      "site=./my.yaml with container: {runtime: apptainer}")
    if kind and (not request.job.venv) and request.what not in ("train", "resume") and kind == PYXIS:
        yield Problem("container", image, f"{request.what} is started without a Slurm step of its own", "container=image.sif")
    arch = profile.node.arch
    for key, path in (("container", image), ("venv", request.job.venv)):
        found = machine_of(path) if path else None
        if arch and found and found != arch:
            kind = "an image" if key == "container" else "an environment"
            yield Problem(key, path, f"is for {found}, and the nodes of {profile.name} are {arch}",
                          f"{key}={Path(path).parent}/{arch}{Path(path).suffix}, or {kind} by another name made on such a node")


def missing_paths(request: Request) -> list[Problem]:
    """Image and virtual environment that are not there, seen from this host: wrong if this is where the job is submitted."""
    found = []
    image, venv = request.job.container, request.job.venv
    if request.image_kind == IMAGE_FILE and not expand(image).exists():
        shown = request.profile.container.images
        found.append(Problem("container", image, "there is no such image", f"container={shown or 'PATH.sif'}"))
    python = expand(venv) / "bin/python"
    if venv and not (os.path.lexists(python) if request.image_kind else python.exists()):  # made in an image: a link into it
        made = f"python3 -m venv {venv} && {venv}/bin/pip install officina"
        if request.image_kind == IMAGE_FILE:
            runtime = request.profile.container.runtime or "apptainer"
            made = (f"{runtime} exec {image} sh -c 'python3 -m venv --system-site-packages {venv} && "
                    f"{venv}/bin/pip install officina'")
        found.append(Problem("venv", venv, "is no virtual environment: there is no bin/python in it", made))
    return found


def _cache_in_home(request: Request, name: str, value: str) -> str:
    """The site's home that this variable would put a cache into, with its limits; empty for all else."""
    if not re.search(r"CACHE|_EXTENSIONS_DIR$|^(HF|TORCH|TRITON)_HOME$|^MIOPEN_USER_DB", name):
        return ""
    area = storage_area(request, expand(value))
    home = request.profile.storage.get("home")
    limits = [f"{home.quota_gb:,.0f} GB" if home.quota_gb else "",
              f"{home.quota_files:,} files" if home.quota_files else ""] if home else []
    return f"a home of {' and '.join(filter(None, limits))}" if area and area[0] == "home" and any(limits) else ""


# ---- what passes through -------------------------------------------------------------------------------------------
def _extra(request: Request) -> Iterator[Problem]:
    rules = request.profile.request
    for text in request.job.slurm.extra:
        word = text.split("=")[0].split(" ")[0]
        name = SHORT.get(word) or word.removeprefix("--")
        if "\n" in text or not re.match(r"--?[A-Za-z]", text):
            yield Problem("slurm.extra", text, "is no option of sbatch", "slurm.extra=[--reservation=NAME]")
        elif name in rules.forbids:
            yield Problem("slurm.extra", text, f"must not be given on {request.profile.name}", f"leave {text} out")
        elif name in OURS:
            yield Problem("slurm.extra", text, "is set by officina itself",
                          f"leave {text} out" + (f", and say {OURS[name]}" if OURS[name] else ""))


def _variables(request: Request) -> Iterator[Problem]:
    env = request.profile.env
    for name, value in request.job.env.extra.items():
        if not _NAME.fullmatch(name) or "\n" in value:
            yield Problem(f"env.extra.{name}", value, "is no variable: letters, digits and _, and one line",
                          "env.extra.NCCL_DEBUG=INFO")
        elif name in env.forbid:
            yield Problem(f"env.extra.{name}", value, f"is known to be bad on {request.profile.name}: {env.forbid[name]}",
                          f"leave {name} out")
        elif in_home := _cache_in_home(request, name, value):
            yield Problem(f"env.extra.{name}", value, f"puts a cache into {in_home}, which it fills, and which all ranks share",
                          f"leave {name} out, which is on the node then")
        elif any(name == ours or (ours.endswith("_") and name.startswith(ours)) for ours in RANK_VARIABLES):
            yield Problem(f"env.extra.{name}", value, "tells ranks how to find each other, and is set by officina or Slurm",
                          "rendezvous.address in a profile of the site (officina sites new NAME writes one)"
                          if name == "MASTER_ADDR" else f"leave {name} out")
    for line in request.job.prologue + (request.job.setup or []):
        for name, why in env.forbid.items():
            if re.search(rf"\b{name}=", line):
                yield Problem("prologue" if line in request.job.prologue else "setup", line, f"sets {name}, which is known to "
                              f"be bad on {request.profile.name}: {why}", f"leave {name} out")
        if re.match(r"\s*#SBATCH", line):
            yield Problem("prologue", line, "comes too late: Slurm reads its options at the top",
                          "slurm.extra=[--reservation=NAME]")
