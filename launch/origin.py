"""What a resume or a branch goes on from: a run directory and one of its checkpoints. Torch-free."""

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

from officina.trainer.checkpoint.keep import old_dir
from officina.trainer.checkpoint.layout import COMMIT, Unreadable, read_commit, step_dir
from officina.trainer.checkpoint.verify import list_checkpoints
from officina.trainer.config import RunConfig
from officina.trainer.data.manifest import open_dataset
from officina.trainer.errors import CheckpointError, ConfigError, Problem
from officina.trainer.keys import as_text, optional, word
from officina.trainer.resume import Change, as_planned, at_their_steps, flat_values
from officina.trainer.run_dir import CONFIG, load_config, read_history
from officina.trainer.schedule import lr_factor


@dataclass(frozen=True, slots=True)
class Origin:
    """Where a run goes on from: a directory and one of its checkpoints. Step 0 is the very beginning."""

    run_dir: Path
    run: RunConfig
    step: int
    position: int
    """Global sample index of the next sample."""
    fingerprints: Mapping[str, str] = field(default_factory=dict)
    """Of the data sets that were read until then, by source."""
    later: tuple[Change, ...] = ()
    """What was decided after `step` and stands in `run`: `old` is what held at the step."""


def read_origin(text: str, exact: bool = False) -> Origin:
    """RUN or RUN@STEP. exact: the text is a path, whatever it holds."""
    folder, _, step = (text, "", "") if exact or Path(text, CONFIG).is_file() else text.rpartition("@")
    run_dir = Path(folder or step)
    step = step if folder else ""
    run = load_config(run_dir / CONFIG)
    if step and not re.fullmatch("[0-9]+", step):
        raise ConfigError([Problem("from", text, "STEP must be a number", f"from={run_dir}@{(_steps(run_dir) or [100])[-1]}")])
    if (history := read_history(run_dir)) and history[0].get("action") == "import":
        raise ConfigError([Problem("from", text, "holds the weights of a model that was imported, and no run",
                                   f"officina train init_from={run_dir} model=from_init")])
    there = _steps(run_dir)
    if step and int(step) not in there:
        known = ", ".join(map(str, there)) or "none"
        raise CheckpointError(f"{run_dir} has no whole checkpoint of step {int(step)}; there are: {known}. "
                              + (f"Try: from={run_dir}@{there[-1]}" if there else f"Try: officina resume {run_dir}"))
    if not there:
        return Origin(run_dir, run, 0, 0)
    chosen = int(step) if step else there[-1]
    try:
        state = read_commit(checkpoint_of(run_dir, chosen)).train_state
    except (OSError, Unreadable) as error:
        raise CheckpointError(f"{checkpoint_of(run_dir, chosen)}: {error}. Try an earlier one of {run_dir}: "
                              f"{', '.join(map(str, there[:-1])) or 'there is none'}") from error
    return Origin(run_dir, run, chosen, state.position, state.data_fingerprints)


def as_of_step(origin: Origin) -> Origin:
    """The origin of a branch: with settings of today, which are told, but of mixtures only what was planned at its step."""
    history = [start for start in read_history(origin.run_dir) if isinstance(start.get("step"), int)]
    reached = max((i for i, start in enumerate(history) if start["step"] < origin.step), default=0)
    later = [change for start in reversed(history[reached + 1:]) for change in start.get("changes") or ()]
    then = {change["key"]: change["old"] for change in later}  # the earliest one lies over those after it
    data = origin.run.data
    run = replace(origin.run, data=as_planned(
        data, origin.position, then.get("data.timeline", data.timeline), then.get("data.planned_at", data.planned_at)))
    batch = replace(run.batch, global_tokens=then.get("batch.global_tokens", run.batch.global_tokens))
    before = replace(run, batch=batch, data=replace(run.data, skip=then.get("data.skip", data.skip)))
    run = at_their_steps(before, run, origin.position)
    now = flat_values(run)
    mixture = ("data.sources.", "data.timeline", "data.planned_at")
    told = tuple(Change(key, old, now[key]) for key, old in then.items()
                 if key in now and now[key] != old and not key.startswith(mixture) and (old is not None or optional(key)))
    if run.data != data:
        told += (Change("data.timeline", flat_values(run)["data.timeline"], None),)
    return replace(origin, run=run, later=told)


def told_later(origin: Origin, run: RunConfig) -> list[str]:
    """Settings that a branch `run` takes over although its origin got them after the step it goes on from."""
    now, when = flat_values(run), f"{origin.run_dir} got after step {origin.step:,}"
    return [f"mixtures that {when} are left out" if change.key == "data.timeline" else
            f"{change.key}: {as_text(change.new)}, which {when}; then it was {word(change.key, change.old)}"
            for change in origin.later if now.get(change.key) == change.new or change.key == "data.timeline"]


def told_rise(origin: Origin, run: RunConfig) -> list[str]:
    """That the schedule of `run` begins above where the origin's had come down to, as one does that a longer run spreads."""
    step = origin.step
    if step <= origin.run.lr_schedule.warmup_steps:
        return []
    before, after = (each.optim.lr * lr_factor(each.lr_schedule, at, each.steps)
                     for each, at in ((origin.run, step - 1), (run, step)))
    return [f"the learning rate goes up from {before:.2e} to {after:.2e} at step {step:,}, where {origin.run_dir} had lowered "
            "it; a branch from a step before that, from=RUN@STEP, goes on without"] if after > 1.01 * before else []


def other_data(origin: Origin, run: RunConfig) -> Iterator[Problem]:
    """Sources whose data set is not the one that was read: found by the ranks, it would stand in config.yaml already."""
    from officina.trainer.data.ledger import heeded  # needs numpy, as above
    from officina.trainer.data.order import Mixture, sources_in_use, timeline_of

    read = Mixture(timeline_of(origin.run.data)).rows_given(origin.position) if origin.fingerprints else {}
    lists = heeded(origin.run_dir)
    for name in sorted(read.keys() & set(sources_in_use(run.data, origin.position))):
        path, then = run.data.sources[name].path, origin.fingerprints.get(name)
        manifest = open_dataset(path).manifest
        now = manifest.fingerprint
        if now == then and len(manifest.removals) < lists.get(name, 0):
            yield Problem(f"data.sources.{name}.path", path, f"names {len(manifest.removals)} lists of removed documents, and "
                          f"the run has heeded {lists[name]}: what was removed would be read again",
                          f"data.sources.{name}.path=DIR with all of them, or the same officina data remove on this copy")
        if then in (None, now):
            continue
        before = origin.run.data.sources[name].path
        kept = before if before != path else "DIR"
        yield Problem(f"data.sources.{name}.path", path, f"has fingerprint {now[:12]}, and the run has read {then[:12]} under "
                      "this name; new data may join under a name of its own",
                      f"data.sources.{name}.path={kept}{' with the old data' if kept == 'DIR' else ''}, "
                      f"and beside it data.sources.NEW.path={path}")


def checkpoint_of(run_dir: Path, step: int) -> Path:
    """The directory of a step that is whole: `step-N.old` if a kill came while step N was being written anew."""
    own = step_dir(run_dir, step)
    return own if (own / COMMIT).exists() else old_dir(own)


def _steps(run_dir: Path) -> list[int]:
    return sorted({info.step for info in list_checkpoints(run_dir) if info.status == "complete"})
