"""One readable sbatch script from a request: every line that is not obvious says why it is there. A pure function of its input.

A run's script ends in one command, the supervisor, which starts each attempt as one step (`officina.launch.supervise`).
"""

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from officina.launch.job_cost import chain_length
from officina.launch.job_request import IMAGE_FILE, RANKED, Request
from officina.launch.step_script import caches, image_words, quote, step_lines, step_words


@dataclass(frozen=True, slots=True)
class Script:
    """What a script needs beside the request."""

    request: Request
    name: str
    """Of the job; those of a chain share it."""
    folder: Path
    """Run directory, or the folder of another command's job: absolute."""
    words: tuple[str, ...]
    """As typed after `officina submit`."""
    command: tuple[str, ...] = ()
    """Of a command that is no run: what follows `officina`."""
    python: str = "python"
    """The interpreter that runs officina where the ranks are."""
    venv: str = ""
    """Virtual environment to put first in PATH."""
    run_dirs: tuple[Path, ...] = ()
    """Of a sweep: a run for each task of the array."""
    binds: tuple[str, ...] = ()
    """Folders that an image must see beside those of the site."""
    chdir: Path = Path("/")
    """Where the words were typed: relative paths start there."""


def render(script: Script) -> str:
    """The sbatch script."""
    blocks = [_head(script), _directives(script), _safety(), _software(script), _environment(script), _address(script),
              _prologue(script), _run(script) if script.request.what in RANKED else _command(script)]
    return "\n\n".join("\n".join(block) for block in (list(b) for b in blocks) if block) + "\n"


# ---- what Slurm reads ------------------------------------------------------------------------------------------------
def _head(script: Script) -> Iterator[str]:
    request, profile = script.request, script.request.profile
    gpus = f" of {request.gpus} {profile.gpu.model or 'GPUs'}" if request.gpus else ""
    ranks = f": {request.world_size} rank{'s' * (request.world_size > 1)}, started by {request.job.launcher}"
    yield "#!/bin/bash"
    yield from _comment(f"officina submit {' '.join(quote(word) for word in script.words)}")
    yield (f"# {profile.name}: {request.nodes} node{'s' * (request.nodes > 1)}{gpus}"
           + (ranks if request.what in RANKED else ""))


def _comment(text: str, width: int = 126) -> Iterator[str]:
    """Text as comment lines, cut between words."""
    line = "#"
    for word in text.replace("\n", " ").split(" "):
        if len(line) + len(word) > width and line != "#":
            yield line
            line = "#  "
        line += f" {word}"
    yield line


def directives(script: Script) -> Iterator[tuple[str, str, str]]:
    """(option, value, why) of each sbatch option; an empty value is a flag, an empty why needs none."""
    request, profile = script.request, script.request.profile
    run = request.what in RANKED
    array = len(script.run_dirs)
    chained = chain_length(request) > 1 and not request.job.requeue
    yield "job-name", script.name, "jobs of one name form a chain" if chained else ""
    if request.account:
        yield "account", request.account, "who is charged"
    if request.partition and "partition" not in profile.request.forbids:
        yield "partition", request.partition, ""
    if request.qos and "qos" not in profile.request.forbids:
        yield "qos", request.qos, "" if request.partition else "the partition follows from it"
    if array:
        at_once = f"%{request.job.at_once}" if request.job.at_once else ""
        yield "array", f"0-{array - 1}{at_once}", "one run a task: see the list below"
    yield "nodes", str(request.nodes), ""
    ranked = request.tasks_per_node == request.ranks_per_node and run
    yield "ntasks-per-node", str(request.tasks_per_node), (
        ("one rank a GPU" if request.gpus else "one rank each") if ranked and request.tasks_per_node > 1
        else "one torchrun a node, which starts the ranks" if run and request.job.launcher == "torchrun" else "")
    if request.cpus_per_task:
        why = f"{request.cpus_per_rank} for each rank" if request.tasks_per_node != request.ranks_per_node and run else ""
        yield "cpus-per-task", str(request.cpus_per_task), why
    if profile.request.threads_per_core:
        yield "threads-per-core", str(profile.request.threads_per_core), "a core counts once, not each of its hardware threads"
    if request.gpu_option:
        yield *request.gpu_option, ""
    if request.memory:
        yield *request.memory, "" if request.memory[0] == "mem-per-gpu" else "of each node"
    if request.exclusive:
        yield "exclusive", "", "nodes of its own"
    yield "time", slurm_time(request.time_s), ""
    folder, runs = (str(path).replace("%", "%%") for path in (script.folder, script.folder.parent))  # Slurm replaces %j
    logs = f"{runs}/{script.name}-%a/logs/slurm-%A_%a" if array else f"{folder}/logs/slurm-%j"
    yield "output", f"{logs}.out", (
        "ranks have files of their own beside it" if run else "")
    yield "open-mode", "append", "a requeued job goes on in the same file"
    yield "chdir", str(script.chdir), "where the words were typed: relative paths start there"
    if run:
        yield "signal", f"B:USR1@{int(request.job.stop_before)}", (
            "so many seconds before the limit the batch shell is told, so that the run saves")
        yield "requeue", "", "after a node died, Slurm starts the job again, and it goes on from the last checkpoint"
    else:
        yield "no-requeue", "", "a command that has begun is not started over unasked"
    if chained:
        yield "dependency", "singleton", "a job of the chain waits until the one before it has ended"


def _directives(script: Script) -> Iterator[str]:
    for option, value, why in directives(script):
        if why:
            yield f"# {why}:"
        yield f"#SBATCH --{option}" + (f"={quote(value)}" if value else "")
    if script.request.job.slurm.extra:
        yield "# yours (slurm.extra):"
        for text in script.request.job.slurm.extra:
            yield f"#SBATCH {text}"


def slurm_time(seconds: float) -> str:
    """`1-12:00:00`."""
    whole = max(int(seconds), 60)
    days, rest = divmod(whole, 86400)
    clock = f"{rest // 3600:02d}:{rest % 3600 // 60:02d}:{rest % 60:02d}"
    return f"{days}-{clock}" if days else clock


# ---- before the ranks --------------------------------------------------------------------------------------------------
def _safety() -> Iterator[str]:
    yield 'stop() { echo "officina: $1" >&2; exit 2; }'
    yield "# Core dumps of many ranks would fill the quota."
    yield "ulimit -c 0"


def _software(script: Script) -> Iterator[str]:
    request, profile = script.request, script.request.profile
    image = request.image_kind
    lines = request.job.setup
    if lines is None:
        lines = list(profile.container.setup if image == IMAGE_FILE else [] if image else profile.software.setup)
    if lines:
        yield "# " + ("The site's modules" if request.job.setup is None else "Modules, as you asked (setup)") + (
            " for running images." if image == IMAGE_FILE and request.job.setup is None else ".")
        for line in lines:
            yield f"{line} || stop {quote(f'this failed: {line}')}" if line.startswith("module ") else line
    if profile.env.unset:
        why = next((fact.note for key, fact in request.site.facts.items() if key == "env.unset" and fact.note), "")
        yield f"# {why[:1].upper()}{why[1:]}." if why else "# What modules set and would get in the way."
        yield f"unset {' '.join(profile.env.unset)}"
    if script.venv and not image:
        yield f"export PATH={quote(script.venv)}/bin:$PATH"
        yield f'[ -x {quote(script.python)} ] || stop {quote(f"{script.python} is not there, seen from the node")}'
    if image == IMAGE_FILE:
        yield f'[ -e {quote(request.image)} ] || stop {quote(f"{request.image} is not there, seen from the node")}'


def _environment(script: Script) -> Iterator[str]:
    request, profile = script.request, script.request.profile
    if request.cpus_per_task and request.what in RANKED:
        yield "# srun does not take the job's --cpus-per-task by itself (Slurm 22.05 and later): each task would get one core."
        yield "export SRUN_CPUS_PER_TASK=$SLURM_CPUS_PER_TASK"
        yield f"export OMP_NUM_THREADS={request.cores_per_rank}"
    if request.job.launcher == "mpirun" and request.what in RANKED:
        yield "# mpirun hands on what is set; its ranks believe to have a terminal, which the log is not."
        yield "export LD_LIBRARY_PATH=${LD_LIBRARY_PATH:-} TERM=dumb"
    yield "# Output at once; packages only from where they are installed, never from the folder we stand in."
    yield "export PYTHONUNBUFFERED=1 PYTHONSAFEPATH=1" + (" PYTHONNOUSERSITE=1" if script.venv or request.image_kind else "")
    online = request.online
    if online is not True:
        known = "These nodes do not reach the internet" if online is False else (
            "Whether these nodes reach the internet is not known")
        yield f"# {known}: whatever would try fails at once."
        yield "export HF_HUB_OFFLINE=1 HF_DATASETS_OFFLINE=1 TRANSFORMERS_OFFLINE=1 WANDB_MODE=offline"
    if request.gpus and profile.env.set:
        extra = request.job.env.extra
        yield f"# Of the site ({request.site.id}):"
        for name, value in profile.env.set.items():
            if name not in extra:
                note = request.site.facts.get(f"env.set.{name}")
                yield f"export {name}={quote(value)}" + (f"  # {note.note}" if note and note.note else "")
    for name, why in profile.env.forbid.items():
        yield f"# {why}:"
        yield f"unset {name}"
    if request.job.env.extra:
        yield "# Yours (env.extra):"
        for name, value in request.job.env.extra.items():
            yield f"export {name}={quote(value)}"


def _address(script: Script) -> Iterator[str]:
    """MASTER_ADDR by the site's rule. Computed here: images have no Slurm programs."""
    request = script.request
    if request.what not in RANKED:
        return
    if request.nodes == 1:
        yield "# One node: its ranks meet on it, and nothing leaves it."
        yield "export MASTER_ADDR=127.0.0.1"
        return
    rule = request.profile.rendezvous.address or "{host}"
    name = re.sub(r"\{(?:ipv4|host)\}(?=\w)", "${first}", rule).replace("{ipv4}", "$first").replace("{host}", "$first")
    yield "# Where the ranks meet: on the first node. A wrong guess would hang every rank, so a failure ends the job here."
    yield 'first=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)'
    yield '[ -n "$first" ] || stop "scontrol does not say which nodes the job has"'
    if rule == "{host}":
        yield 'getent ahostsv4 "$first" >/dev/null || stop "MASTER_ADDR: $first has no IPv4 address"'
        yield "MASTER_ADDR=$first"
    else:
        if rule != "{ipv4}":
            yield "# The name of its network interface for jobs; as IPv4, since with IPv6 too, ranks can miss each other."
        else:
            yield "# As IPv4: with IPv6 too, ranks can miss each other."
        yield f"MASTER_ADDR=$(getent ahostsv4 \"{name}\" | awk 'NR == 1 {{ print $1 }}')"
        yield f'[ -n "$MASTER_ADDR" ] || stop "MASTER_ADDR: {name} has no IPv4 address"'
        yield f'case $MASTER_ADDR in 127.*) stop "MASTER_ADDR: {name} is $MASTER_ADDR, this node itself to each node" ;; esac'
    yield "export MASTER_ADDR"


def _prologue(script: Script) -> Iterator[str]:
    if script.request.job.prologue:
        yield "# Yours (prologue):"
        yield from script.request.job.prologue


# ---- the ranks ---------------------------------------------------------------------------------------------------------
def _run(script: Script) -> Iterator[str]:
    request, job = script.request, script.request.job
    if script.run_dirs:
        yield "# The runs of the sweep, by task of the array."
        yield "runs=("
        for run_dir in script.run_dirs:
            yield f"  {quote(run_dir)}"
        yield ")"
        yield "export RUN=${runs[$SLURM_ARRAY_TASK_ID]}"
    else:
        yield f"export RUN={quote(script.folder)}"
    becomes = "torchrun" if job.launcher == "torchrun" else "a rank"
    yield f"# What each task does on its own node before it becomes {becomes}. Caches that many write at once belong on the"
    yield "# node; their folders are made here, since the batch shell runs on the first node only."
    yield "# shellcheck disable=SC2016  # expanded by the task, not here"
    yield "step='"
    yield from (f"  {line}" for line in step_lines(request))
    yield "'"
    yield "# Each attempt is one step, with a port that the supervisor chooses; it decides what follows from how a step ends."
    yield "# exec: Slurm's signal before the limit must reach the supervisor, not this shell."
    words = ["exec", "python3", '"$RUN/supervise.py"', '"$RUN"', "--max-attempts", str(job.attempts)]
    jobs = chain_length(request)
    if job.requeue:
        words += ["--requeue", "--max-jobs", str(max(jobs, 2))]
    elif jobs > 1:
        words += ["--chain"]
    attempt = step_words(request, python=quote(script.python), binds=script.binds)
    yield " \\\n  ".join([" ".join([*words, "--"]), *(" ".join(line) for line in attempt)])


def _command(script: Script) -> Iterator[str]:
    request = script.request
    words = [quote(script.python), "-m", "officina.launch.cli", *map(quote, script.command)]
    if request.image_kind == IMAGE_FILE:
        words = [*image_words(request, script.binds), *words]
    yield "# Caches on the node."
    yield from caches(request)
    yield "# exec: the job ends as the command does."
    yield f"exec {' '.join(words)}"


def bind_folders(request: Request, paths: Sequence[Path]) -> tuple[str, ...]:
    """Of the paths, those that no bind of the site covers."""
    covered = [Path(bind) for bind in request.profile.container.binds]
    found = []
    for path in dict.fromkeys(paths):
        if not any(path == root or root in path.parents for root in [*covered, *map(Path, found)]):
            found.append(str(path))
    return tuple(found)

