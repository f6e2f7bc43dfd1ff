"""What a submission will take: ranks, mesh, memory, hours, cost, jobs. Estimates say what they rest on."""

import json
from dataclasses import dataclass, fields, replace
from pathlib import Path

from officina.launch.job_cost import chain_length, cost_of_job
from officina.launch.job_request import Request
from officina.launch.memory_plan import MemoryPlan, plan_memory
from officina.launch.site_rows import GRADE_WORDS, time_words
from officina.launch.start import describe_run
from officina.trainer.config import DecoderConfig, FSDP2Config, HSDPConfig, RunConfig
from officina.trainer.errors import Problem
from officina.trainer.memory import remedies
from officina.trainer.model.flops import flops_per_token
from officina.trainer.run_dir import METRICS, read_history

RESERVED_GB = 2.0
"""What the driver's context, collective buffers and the allocator's gaps take besides: an assumption, shown as one."""
_MIN_MEASURED_STEPS = 20


@dataclass(frozen=True, slots=True)
class Speed:
    """How fast a run is expected to be."""

    tokens_per_s: float
    """Of all ranks."""
    basis: str
    """Where it comes from, in words: measured, cited or assumed."""


@dataclass(frozen=True, slots=True)
class JobPlan:
    """The plan of one submission."""

    request: Request
    run: RunConfig
    memory: MemoryPlan | None
    speed: Speed | None
    steps_done: int = 0
    position: int = 0
    """Global sample index of the next sample."""

    @property
    def hours(self) -> float | None:
        """Time of the steps that are left; None if no speed is known."""
        left = (self.run.steps - self.steps_done) * self.run.batch.global_tokens
        return left / self.speed.tokens_per_s / 3600 if self.speed else None

    @property
    def jobs_needed(self) -> int | None:
        """Jobs that those hours fill, each without the time it keeps for saving."""
        useful = self.request.time_s - self.request.job.stop_before
        return max(1, -(-int(self.hours * 3600) // int(useful))) if self.hours is not None and useful >= 1 else None


def make_plan(request: Request, run: RunConfig, *, run_dir: Path | None = None, steps_done: int = 0,
              position: int = 0) -> JobPlan:
    """Plan `run` on the requested nodes. run_dir: of a run that goes on, whose own speed then counts."""
    memory = plan_memory(run, request.world_size) if run.device != "cpu" else None
    return JobPlan(request, run, memory, _speed(request, run, run_dir), steps_done, position)


# ---- does it fit ---------------------------------------------------------------------------------------------------------
def memory_problems(plan: JobPlan) -> list[Problem]:
    """A run whose parts are more than a GPU has."""
    limit = plan.request.profile.gpu.memory_gb
    if plan.memory is None or not limit or not plan.request.gpus or plan.memory.total <= limit * 1e9:
        return []
    parts = _parts_words(plan.memory)
    return [Problem(_culprit(plan), None, f"needs about {plan.memory.total / 1e9:,.0f} GB of each GPU ({parts}), and a "
                    f"{plan.request.profile.gpu.model or 'GPU'} has {limit:g} GB", _remedy(plan))]


def _culprit(plan: JobPlan) -> str:
    memory = plan.memory
    passing = memory.activations + memory.logits
    return "batch.micro_rows" if passing > memory.total - passing else "engine"


def _remedy(plan: JobPlan) -> str:
    """The first change of a few words with which the estimate fits, else more nodes, else the list of what helps."""
    limit, run, world = plan.request.profile.gpu.memory_gb * 1e9, plan.run, plan.request.world_size
    tries: list[tuple[str, RunConfig]] = []
    rows = run.batch.micro_rows
    smaller = [replace(run, batch=replace(run.batch, micro_rows=n)) for n in _halves(rows)]
    full = replace(run, engine=replace(run.engine, recompute="full"))
    sharded = replace(run, engine=FSDP2Config(recompute=run.engine.recompute))
    sharded_full = replace(run, engine=FSDP2Config(recompute="full"))
    tries += [(f"batch.micro_rows={other.batch.micro_rows}", other) for other in smaller]
    tries += [("engine.recompute=full", full)]
    tries += [(f"engine.recompute=full batch.micro_rows={n}", replace(full, batch=replace(run.batch, micro_rows=n)))
              for n in _halves(rows)]
    tries += [("engine=fsdp2", sharded), ("engine=fsdp2 engine.recompute=full", sharded_full)]
    tries += [(f"engine=fsdp2 engine.recompute=full batch.micro_rows={n}",
               replace(sharded_full, batch=replace(run.batch, micro_rows=n))) for n in _halves(rows)]
    for words, other in tries:
        if plan_memory(other, world).total <= limit:
            return words
    smallest = tries[-1][1]
    for times in (2, 4, 8, 16, 32, 64, 128):
        if plan_memory(smallest, world * times).total <= limit:
            return f"{tries[-1][0]} nodes={plan.request.nodes * times}"
    return "; ".join(remedies(run, world, "forward and backward"))


def _halves(rows: int) -> list[int]:
    found = []
    while rows > 1:
        rows //= 2
        found.append(rows)
    return found or [1]


# ---- how long ------------------------------------------------------------------------------------------------------------
def _speed(request: Request, run: RunConfig, run_dir: Path | None) -> Speed | None:
    """Measured in this very run, else assumed by the user, else cited for this system; never guessed."""
    if run_dir is not None and (measured := _measured(run_dir, request.world_size)):
        return Speed(measured, f"measured: {measured:,.0f} tokens/s in this run's last steps, on {request.world_size} ranks")
    if not isinstance(run.model, DecoderConfig) or not request.gpus:
        return None
    cited, per_gpu = request.profile.speed, request.job.tflops
    if per_gpu:
        basis = f"assumed, as you said: {per_gpu:g} TFLOP/s a GPU"
    elif cited.tflops_per_gpu:
        per_gpu, fact = cited.tflops_per_gpu, request.site.facts["speed.tflops_per_gpu"]
        where = ", ".join(filter(None, (fact.source.title, GRADE_WORDS[fact.grade], fact.date)))
        basis = (f"cited: {per_gpu:g} TFLOP/s a GPU" + (f", as {cited.of}" if cited.of else "")
                 + f" ({where}); this run was not measured")
    else:
        return None
    # As these figures are counted: attention in full.
    flops = flops_per_token(run.model, run.batch.seq_len, causal=False, adapter=run.adapter)
    return Speed(per_gpu * 1e12 * request.world_size / flops, basis)


def _measured(run_dir: Path, world_size: int) -> float | None:
    """Mean tokens/s of the last steps, if the last start had as many ranks and made enough of them."""
    history = read_history(run_dir)
    if not history or history[-1].get("world_size") != world_size or not (run_dir / METRICS).exists():
        return None
    found = []
    for line in (run_dir / METRICS).read_text(encoding="utf-8").splitlines()[-200:]:
        try:
            row = json.loads(line)
        except ValueError:
            continue
        if isinstance(row, dict) and row.get("tokens_per_s") and row.get("step", 0) > history[-1].get("step", 0) + 2:
            found.append(row["tokens_per_s"])
    return len(found) / sum(1 / speed for speed in found) if len(found) >= _MIN_MEASURED_STEPS else None


# ---- in words ------------------------------------------------------------------------------------------------------------
def plan_lines(plan: JobPlan) -> list[tuple[str, str]]:
    """(name, text) lines, as a person wants to see them before submitting."""
    request, run, profile = plan.request, plan.run, plan.request.profile
    about = {name: text for name, text in describe_run(run, request.world_size, plan.position)
             if name in ("model", "data", "batch", "length")}
    where = ", ".join(filter(None, (f"partition {request.partition}" if request.partition else "",
                                    f"qos {request.qos}" if request.qos else "",
                                    f"account {request.account}" if request.account else "")))
    lines = [("site", f"{profile.name}: {where}" if where else profile.name), ("nodes", _nodes_words(request)),
             ("mesh", mesh_words(run, request.world_size)), *about.items()]
    if request.gpus:
        lines.append(("memory", _memory_words(plan)))
    lines.append(("hours", _hours_words(plan)))
    if cost := _cost_words(plan):
        lines.append(("cost", cost))
    elif request.time_s:
        lines.append(("time", f"at most {time_words(request.time_s)} a job"))
    lines.append(("jobs", _jobs_words(plan)))
    return lines


def _nodes_words(request: Request) -> str:
    nodes = f"{request.nodes} node{'s' * (request.nodes > 1)}"
    cores = f", {request.cpus_per_rank} CPUs each" if request.cpus_per_rank else ""
    if not request.gpus:
        cores = cores or ", one CPU each (more: cpus=4)"
        return f"{nodes} = {request.world_size} rank{'s' * (request.world_size > 1)} on CPUs{cores}"
    total = request.gpus * request.nodes
    return (f"{nodes} x {request.gpus} {request.profile.gpu.model or 'GPU'} = {total} rank{'s' * (total > 1)}, one a GPU, "
            f"started by {request.job.launcher}{cores}")


def mesh_words(run: RunConfig, world_size: int) -> str:
    """How the ranks share the model: `dp_replicate 16 x dp_shard 4 (hsdp)`."""
    engine = run.engine
    if isinstance(engine, HSDPConfig):
        return f"dp_replicate {world_size // engine.shard_size} x dp_shard {engine.shard_size} (hsdp)"
    return f"{'dp_replicate' if engine.kind in ('ddp', 'single') else 'dp_shard'} {world_size} ({run.engine_name})"


def _parts_words(memory: MemoryPlan) -> str:
    sizes = {part.name: getattr(memory, part.name) for part in fields(memory)}
    return ", ".join(f"{name} {size_words(size)}" for name, size in sizes.items() if size)


def size_words(n_bytes: int) -> str:
    """Bytes in MB or GB."""
    return f"{n_bytes / 1e9:.1f} GB" if n_bytes >= 1e8 else f"{n_bytes / 1e6:.1f} MB"


def _memory_words(plan: JobPlan) -> str:
    limit = plan.request.profile.gpu.memory_gb
    if plan.memory is None:
        why = "the ranks work on CPUs" if plan.run.device == "cpu" else "only its code knows the size of the model"
        return f"not estimated: {why}"
    total = plan.memory.total / 1e9
    text = (f"about {size_words(plan.memory.total)} a GPU" + (f" of {limit:g} GB" if limit else "")
            + f" (estimate): {_parts_words(plan.memory)}")
    if limit and total + RESERVED_GB > limit:
        text += f"; with some {RESERVED_GB:g} GB for the driver and collectives it may not fit"
    return text


def _hours_words(plan: JobPlan) -> str:
    if plan.hours is None:
        why = ("a CPU's speed is not planned" if not plan.request.gpus else
               f"no speed was measured or published for such a run on {plan.request.profile.name}; plan with one: tflops=150"
               if isinstance(plan.run.model, DecoderConfig) else "only its code knows what a user's own model computes")
        return f"not known: {why}"
    hours = f"about {plan.hours:,.1f}" if plan.hours >= 0.1 else "less than 0.1"
    return f"{hours} ({plan.speed.basis})"


def _cost_words(plan: JobPlan) -> str:
    request, billing = plan.request, plan.request.profile.billing
    whole = cost_of_job(request)
    if whole is None:
        return ""
    text = f"at most {whole:,.0f} {billing.unit}s a job ({time_words(request.time_s)})"
    jobs = chain_length(request) * request.runs
    if jobs > 1:
        text += f", {whole * jobs:,.0f} for {jobs}"
    if plan.hours is not None and request.time_s:
        needed = max(whole * plan.hours * 3600 / request.time_s, 1)
        text += f"; {'a' if request.runs > 1 else 'the'} run needs about {needed:,.0f}"
    return text + (f" ({billing.rule})" if billing.rule else "")


def _jobs_words(plan: JobPlan) -> str:
    jobs, needed, job = chain_length(plan.request), plan.jobs_needed, plan.request.job
    text = f"{jobs}" + (", each goes on where the one before it stopped" if jobs > 1 and not job.requeue else "")
    if plan.request.runs > 1:
        text = f"{plan.request.runs}, one a run of the sweep" + (f", {job.at_once} at a time" if job.at_once else "") + (
            f"; each queues itself again at its time limit and runs {max(jobs, 2)} times at most" if job.requeue else "")
    elif job.requeue:
        text = f"1, which queues itself again at its time limit and runs {max(jobs, 2)} times at most"
    if needed and needed > jobs:
        text += f"; a run needs about {needed}: jobs={needed}{' requeue=true' * (plan.request.runs > 1 and not job.requeue)}"
    return text

