"""What happens before the ranks: words become a run, the run is judged, and its directory is made ready. Torch-free."""

import contextlib
import os
import re
import shutil
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from officina.configs.compose import Composed, compose_all, recompose
from officina.launch.origin import Origin, as_of_step, checkpoint_of, other_data, read_origin, told_later, told_rise
from officina.trainer.checkpoint.layout import checkpoints_dir, step_dir
from officina.trainer.config import RunConfig
from officina.trainer.data import carried
from officina.trainer.data.gate import use_problems
from officina.trainer.data.manifest import MANIFEST, sync_folder
from officina.trainer.data.register import Going
from officina.trainer.data.register import enter as enter_registers
from officina.trainer.environment import code_diff, describe
from officina.trainer.errors import ConfigError, LaunchError, Problem
from officina.trainer.hf.base import BASE_DIR
from officina.trainer.init_from import adapter_init_problems, init_problems, pinned_run
from officina.trainer.resume import Change, carry_forward, changes, resume_problems, take_out
from officina.trainer.run_dir import (
    CHECKPOINTS,
    CLAIM,
    CODE,
    CONFIG,
    HISTORY,
    LEDGER,
    METRICS,
    REFERENCE_DIR,
    Start,
    append_history,
    config_text,
    keep_diff,
    new_run_id,
    read_history,
    read_run_id,
    save_config,
    unwritable,
)
from officina.trainer.validate import problems

_WAIT_FOR_RANK_0_S = 120.0
_LONGEST_NAME = 100
_BEFORE_HISTORY = {CLAIM, CODE}
"""All that a start which was killed at once leaves; other ranks may see it too."""
_OF_A_BRANCH = _BEFORE_HISTORY | {CHECKPOINTS, BASE_DIR, REFERENCE_DIR}
"""The same of a branch, checkpoints first."""


@dataclass(frozen=True, slots=True)
class Plan:
    """A run that is composed and judged, but of which nothing is written yet."""

    run: RunConfig
    run_dir: Path
    action: str
    """`start`, `resume` or `branch`."""
    words: tuple[str, ...]
    defaults: list[tuple[str, str]]
    """Words from a person's or centre's defaults, with their files."""
    problems: list[Problem]
    changes: list[Change]
    origin: Origin | None = None
    forced: bool = False

    @property
    def nothing_to_do(self) -> bool:
        """Is this the resume of a run that is done, as a chain of jobs asks for it?"""
        return (self.action == "resume" and not self.words and self.origin is not None
                and self.origin.step >= self.run.steps)

    def going(self) -> Going:
        """Where the run stands, as registers of use see it: what a branch reads counts besides its origin's."""
        return _going(self.origin, self.action == "branch") if self.origin else Going()

    def notes(self) -> list[str]:
        """What one should know of what it goes on from: settings of later steps, a learning rate that goes up again."""
        if not self.origin:
            return []
        return [*(told_later(self.origin, self.run) if self.action == "branch" else []), *told_rise(self.origin, self.run)]

    def checked(self) -> "Plan":
        """Itself, or ConfigError with all problems."""
        if self.problems:
            raise ConfigError(self.problems)
        return self


# ---- planning ----------------------------------------------------------------------------------------------
def plan_train(words: Sequence[str], runs_dir: Path, *, world_size: int | None, devices: int | None = None,
               force: bool = False) -> Plan:
    """A new run from the words; `from=RUN@STEP` among them makes it a branch of RUN."""
    origins = [word.removeprefix("from=") for word in words if word.startswith("from=")]
    words = tuple(words)
    if not origins:
        composed = _weighed(compose_all(words), words)
        found = _all_problems(composed, world_size, devices, Going())
        for key, given, empty in (("data.timeline", composed.run.data.timeline, "[]"),
                                  ("data.planned_at", composed.run.data.planned_at is not None, "null")):
            if given:
                found.append(Problem(key, None, "is written by officina; mixtures of later steps are planned in data.stages",
                                     f"{key}={empty}"))
        if composed.run.data.stages and not found:
            composed = replace(composed, run=_staged(composed.run, 0, 0))
            found = _all_problems(composed, world_size, devices, Going())
        if not composed.problems:
            found += [*init_problems(composed.run, force=force), *adapter_init_problems(composed.run)]
        found += _too_long(composed.run.name)
        run = composed.run if found else pinned_run(composed.run)
        return Plan(run, runs_dir / composed.run.name, "start", words, composed.defaults, found, [], forced=force)
    if len(origins) > 1:
        raise ConfigError([Problem("from", " ".join(origins), "names more than one run", f"from={origins[0]}")])
    origin = as_of_step(read_origin(origins[0]))
    own_words = [word for word in words if not word.startswith("from=")]
    plan = _go_on(origin, own_words, world_size=world_size, devices=devices, force=force, branch=True)
    if not any(word.lstrip("+").startswith("name=") for word in own_words):
        plan = replace(plan, run=replace(plan.run, name=f"{origin.run.name}-from-{origin.step}"))
    return replace(plan, run_dir=runs_dir / plan.run.name, words=words, problems=plan.problems + _too_long(plan.run.name))


def _too_long(name: str) -> list[Problem]:
    """Of new runs alone: a folder, jobs and branches are named after it, with more behind it."""
    if len(name) <= _LONGEST_NAME:
        return []
    return [Problem("name", name, f"has {len(name)} characters, and a name has at most {_LONGEST_NAME}", f"name={name[:40]}")]


def plan_resume(run_dir: Path, words: Sequence[str], *, world_size: int | None, devices: int | None = None,
                force: bool = False) -> Plan:
    """The run in `run_dir`, gone on with from its newest checkpoint, with the words applied."""
    if origins := [given.removeprefix("from=") for given in words if given.startswith("from=")]:
        raise ConfigError([Problem("from", origins[0], "begins a branch, and a resume goes on with the run itself",
                                   f"officina train from={origins[0]}{'' if '@' in origins[0] else '@STEP'}")])
    return _go_on(read_origin(str(run_dir), exact=True), words, world_size=world_size, devices=devices, force=force,
                  branch=False)


def _go_on(origin: Origin, words: Sequence[str], *, world_size: int | None, devices: int | None, force: bool,
           branch: bool) -> Plan:
    composed = _weighed(recompose(origin.run, words), words, origin.run)
    old, new = take_out(origin.run, composed.run, origin.position)
    found = _all_problems(replace(composed, run=new), world_size, devices, _going(origin, branch))
    moved = composed.run.init_from != origin.run.init_from and "" not in (composed.run.init_from, origin.run.init_from)
    if (composed.run.adapter.kind != "none" or moved) and not composed.problems:  # frozen weights are read at every start
        found += init_problems(composed.run, force=True)
    against = resume_problems(origin.run, composed.run, step=origin.step, position=origin.position, force=force, branch=branch)
    reported = {problem.key for problem in found}
    found += [problem for problem in against if problem.key not in reported]
    named = {match[1] for word in words if (match := re.match(r"\+*data\.sources\.([^.=]+)", word))}
    run = new
    if not found:
        found = list(other_data(origin, new))
    if not found:
        run = _staged(carry_forward(old, new, origin.position, named), origin.step, origin.position)
        if run is not new:  # a source that comes back was in no mixture until here
            found = use_problems(run, _going(origin, branch))
        if not origin.step:  # no weights of its own yet
            run = pinned_run(run)
    return Plan(run, origin.run_dir, "branch" if branch else "resume", tuple(words), composed.defaults, found,
                changes(origin.run, run), origin, force)


def _staged(run: RunConfig, step: int, position: int) -> RunConfig:
    from officina.trainer.data.order import plan_stages  # needs numpy, which --help should not wait for

    return plan_stages(run, step, position)


def _weighed(composed: Composed, words: Sequence[str], before: RunConfig | None = None) -> Composed:
    """With the weights that `data.temperature` stands for; before: the run that is gone on with."""
    if composed.run.data.temperature is None:
        return composed
    from officina.trainer.data.order import sources_in_use
    from officina.trainer.data.temperature import by_temperature

    named = {match[1] for word in words if (match := re.match(r"\+*data\.sources\.([^.=]+)", word))}
    weighted = {match[1] for word in words if (match := re.match(r"\+*data\.sources\.([^.=]+)\.weight=", word))}
    sources = composed.run.data.sources
    if before is None:
        names, weighted = set(sources), weighted | {name for name, source in sources.items() if source.weight != 1}
    else:
        names = {name for name in sources if name in named or name not in before.data.sources} | (
            set(sources_in_use(before.data)) & set(sources))
    run, found = by_temperature(composed.run, names, weighted)
    return replace(composed, run=run, problems=composed.problems + found)


def _going(origin: Origin, branch: bool) -> Going:
    return Going("" if branch else read_run_id(origin.run_dir), origin.step, origin.position, branch, origin.run_dir)


def _all_problems(composed: Composed, world_size: int | None, devices: int | None, going: Going) -> list[Problem]:
    """Faults of typing first; then of rules between keys, unless a key in them was already found wrong."""
    reported = {problem.key for problem in composed.problems}
    if "experiment" in reported:  # what would be judged is not the run that is meant
        return composed.problems
    ruled = problems(composed.run, world_size, devices=devices, going=going)
    return composed.problems + [p for p in ruled
                                if not any(p.key == key or p.key.startswith(f"{key}.") for key in reported)]


# ---- the run directory -------------------------------------------------------------------------------------
def refuse_existing(plan: Plan) -> None:
    """A new run must not be written over another. A directory without a checkpoint holds nothing worth keeping."""
    refuse_foreign(plan)
    if plan.action == "resume" or not any(checkpoints_dir(plan.run_dir).glob("step-*")) or _cut_short(plan.run_dir):
        return
    raise ConfigError([Problem("name", plan.run.name, f"{plan.run_dir} is a run with checkpoints",
                               f"name={free_name(plan)}, or go on with it: officina resume {plan.run_dir}")])


def _cut_short(run_dir: Path) -> bool:
    """Was a branch killed while it started? Then its one checkpoint is lent, and without a config.yaml no rank ever trained."""
    history = read_history(run_dir)
    begun = (run_dir / CONFIG).exists() or (run_dir / METRICS).exists()
    return not begun and bool(history) and history[-1].get("action") == "branch"


def free_name(plan: Plan) -> str:
    return next(name for i in range(2, 10_000) if not (plan.run_dir.parent / (name := f"{plan.run.name}-{i}")).exists())


def refuse_foreign(plan: Plan) -> None:
    """A new run must not be written among files of something else: metrics.jsonl or base/ may be somebody's own."""
    there = set()
    with contextlib.suppress(OSError):  # no folder yet, or none that can be written: said when the run directory is made
        there = {path.name for path in plan.run_dir.iterdir()}
    begun = there <= (_OF_A_BRANCH if CHECKPOINTS in there else _BEFORE_HISTORY)
    started = bool(read_run_id(plan.run_dir)) if HISTORY in there else begun
    if plan.action == "resume" or (started and MANIFEST not in there):
        return
    what = "is a data set" if MANIFEST in there else f"holds files of no run, such as {min(there - _OF_A_BRANCH or there)}"
    raise ConfigError([Problem("name", plan.run.name, f"{plan.run_dir} {what}", f"name={free_name(plan)}")])


def write_start(plan: Plan, world_size: int | None) -> None:
    """Make the run directory ready: a line of history, then for a branch the checkpoint, last config.yaml."""
    try:
        plan.run_dir.mkdir(parents=True, exist_ok=True)
        if plan.action != "resume" and _cut_short(plan.run_dir):  # this branch may be of another step, or none
            for name in (CHECKPOINTS, BASE_DIR, REFERENCE_DIR):
                shutil.rmtree(plan.run_dir / name, ignore_errors=True)
            (plan.run_dir / HISTORY).unlink()
        if plan.action == "start":  # what a start left that never came to a checkpoint counts no more
            for name in (METRICS, LEDGER):
                (plan.run_dir / name).unlink(missing_ok=True)
        modules = [plan.run.model.factory, plan.run.model.loss] if plan.run.model.kind == "custom" else []
        about = describe(modules=modules)
        append_history(plan.run_dir, Start(
            run_id=read_run_id(plan.origin.run_dir if plan.origin else plan.run_dir) or new_run_id(),
            action=plan.action, words=plan.words, step=plan.origin.step if plan.origin else 0,
            world_size=world_size, engine=plan.run.engine_name, commit=about["code"]["officina"]["commit"],
            diff=keep_diff(plan.run_dir, code_diff(modules)),
            versions={"officina": about["officina"], "python": about["python"], **about["packages"]},
            changes=[{"key": c.key, "old": c.old, "new": c.new} for c in plan.changes], forced=plan.forced,
            origin=_origin_record(plan) if plan.action == "branch" else None,
            conditions=carried.at_start(plan.run, plan.going().position), carried=_carried(plan)))
        if plan.action == "branch":
            _lend_checkpoint(plan.origin, plan.run_dir)
        save_config(plan.run, plan.run_dir / CONFIG)
    except OSError as error:
        raise unwritable(plan.run_dir, error) from error
    for folder in (plan.run_dir, plan.run_dir.parent):  # so that a power cut loses no run whose checkpoints are durable
        with contextlib.suppress(OSError):  # who writes into a folder need not be allowed to open it
            sync_folder(folder)
    enter_registers(plan.run, replace(plan.going(), run_id=read_run_id(plan.run_dir)))


def _origin_record(plan: Plan) -> dict[str, object]:
    return {"name": plan.origin.run.name, "run_id": read_run_id(plan.origin.run_dir),
            "step": plan.origin.step, "starts": len(read_history(plan.origin.run_dir))}


def _carried(plan: Plan) -> dict[str, dict[str, object]] | None:
    if plan.action == "branch":
        return carried.record(carried.of_branch(plan.origin.run_dir, plan.origin.step))
    # A resume before the first checkpoint begins anew, and with other weights if it says so.
    return None if plan.origin and plan.origin.step else carried.record(carried.of_begin(plan.run))


def _lend_checkpoint(origin: Origin, run_dir: Path) -> None:
    """Give the branch the checkpoint it starts from, by hard links where the file system can, and what is kept of the weights
    that its origin began with.

    So a branch stands on its own: its origin may be moved or removed. Files of a checkpoint are never written again.
    """
    if not origin.step:
        return
    source, target = checkpoint_of(origin.run_dir, origin.step), step_dir(run_dir, origin.step)
    partial = target.with_name(f".{target.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    shutil.copytree(source, partial, copy_function=_link_or_copy)
    os.replace(partial, target)
    for name in (BASE_DIR, REFERENCE_DIR):
        shutil.rmtree(run_dir / name, ignore_errors=True)
        if (origin.run_dir / name).is_dir():
            shutil.copytree(origin.run_dir / name, run_dir / name)


def _link_or_copy(source: str, target: str) -> None:
    try:
        os.link(source, target)
    except OSError:
        shutil.copy2(source, target)


def wait_for_start(plan: Plan, wait_s: float = _WAIT_FOR_RANK_0_S) -> None:
    """Return when rank 0 has written the very configuration that this rank came to."""
    path, wanted = plan.run_dir / CONFIG, config_text(plan.run)
    for _ in _until(time.monotonic() + wait_s):
        if path.is_file() and path.read_text(encoding="utf-8") == wanted:
            return
    found = "holds another run than this rank composed" if path.is_file() else "has not appeared"
    raise LaunchError(f"{path} {found} after {wait_s:.0f} s. All ranks must see the same directory, "
                      f"words and files of ~/.config/officina; check that {plan.run_dir.parent} is on a shared file system")


def _until(deadline: float, every_s: float = 0.1) -> Iterator[None]:
    yield
    while time.monotonic() < deadline:
        time.sleep(every_s)
        yield


def describe_run(run: RunConfig, world_size: int, position: int = 0) -> list[tuple[str, str]]:
    """A run in a few lines: what a person wants to see before it starts. position: as for `still_to_come`."""
    batch, rows = run.batch, run.batch.rows
    micros, unit = batch.micro_steps(world_size), run.batch_unit
    shape = f"{rows:,} rows x {batch.seq_len:,}, in " if unit == "tokens" else ""
    lines = [("run", f"{run.name}, seed {run.seed}"),
             ("ranks", f"{world_size}, engine {run.engine_name}, precision {run.precision}"),
             ("model", _model_line(run)),
             ("data", _data_line(run, position)),
             ("batch", f"{batch.global_tokens:,} {unit} a step = {shape}{micros} micro-batch{'es' * (micros > 1)} of up to "
                       f"{batch.micro_rows} row{'s' * (batch.micro_rows > 1)} a rank"),
             ("length", f"{run.steps:,} steps = {run.steps * batch.global_tokens:,} {unit}"),
             ("rate", f"{run.optim.kind}, lr {run.optim.lr:g}, {run.lr_schedule.kind} schedule with "
                      f"{run.lr_schedule.warmup_steps} steps of warm-up")]
    return lines


def _data_line(run: RunConfig, position: int) -> str:
    """Sources with their shares of the rows from now on, stage by stage."""
    from officina.trainer.data.order import still_to_come

    if not run.data.sources:  # a plan needs none
        return ""

    def mixture(weights: Mapping[str, float]) -> str:
        total = sum(weights.values())
        return ", ".join(f"{name} ({run.data.sources[name].path})" + (f" {weight / total:.2%}" if len(weights) > 1 else "")
                         for name, weight in weights.items())

    first, *later = still_to_come(run.data, position)
    return "; ".join([mixture(first.weights), *(f"from sample {s.from_sample:,} {mixture(s.weights)}" for s in later)])


def _model_line(run: RunConfig) -> str:
    if run.model.kind == "custom":
        return f"{run.model.factory}"
    from officina.trainer.model.flops import parameter_count

    counts = parameter_count(run.model)
    shape = f"{run.model.n_layers} layers x {run.model.d_model}"
    line = f"{_human(counts.total)} parameters ({counts.total:,}), {shape}"
    if run.adapter.kind == "none":
        return line
    from officina.trainer.model.targets import trained_count

    beside = " beside a base in 4 bits" if run.adapter.base == "nf4" else ""
    return f"{line}; LoRA of rank {run.adapter.rank} trains {_human(trained_count(run.model, run.adapter)[0])}{beside}"


def _human(number: float) -> str:
    for unit, size in (("B", 1e9), ("M", 1e6), ("k", 1e3)):
        if number >= 0.9995 * size:
            return f"{number / size:.3g} {unit}"
    return str(number)

