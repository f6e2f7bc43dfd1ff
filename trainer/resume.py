"""What may change when a run goes on: the table, and how a change is told, judged and applied. Torch-free.

Everything of how and where a run is run may change, and so may what is everyday work in the middle of one: learning rate,
schedule, length, batch size, mixture. What the weights, the moments or the order of past samples rest on may not.
"""

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from typing import Literal

from officina.trainer.config import DataConfig, RunConfig, SourceConfig, TimelineStage
from officina.trainer.errors import DataError, Problem
from officina.trainer.keys import Values, as_text, flat, generic, optional, word
from officina.trainer.schema import dump_run

Ruling = Literal["free", "force", "refused"]

RULES: tuple[tuple[str, Ruling, str], ...] = (
    # where and how
    ("ranks", "free", "any number of ranks reads any checkpoint"),
    ("device", "free", "a checkpoint is fp32 and belongs to no device"),
    ("threads", "free", "sums differ in the last bit between thread counts"),
    ("time_limit", "free", "says when to stop"),
    ("stall_after", "free", "says when a step stands still"),
    ("engine.*", "free", "any engine reads any checkpoint"),
    ("site.*", "free", "a run can move"),
    ("logging.*", "free", "changes what is written"),
    ("checkpoint.*", "free", "changes what is kept"),
    ("eval.*", "free", "changes what is measured"),
    ("profile.*", "free", "changes what is recorded"),
    ("precision", "force", "the loss curve gets another rounding, and bf16_pure loses what bf16 keeps"),
    # the course of training
    ("steps", "free", "the schedule follows it"),
    ("lr_schedule.*", "free", "a pure function of the step: a WSD decay or a cut is a change here"),
    ("optim.kind", "refused", "one optimizer's moments mean nothing to another"),
    ("optim.*", "free", "takes effect at the next step"),
    ("objective.kind", "refused", "another goal is another run; it may begin from this one"),
    ("objective.beta", "force", "another goal in the middle of a run"),
    ("objective.*", "free", "takes effect at the next step"),
    ("batch.seq_len", "refused", "rows would be cut elsewhere, so that past samples could not be told from new ones"),
    ("batch.*", "free", "samples are counted in rows, whatever the batch"),
    # data
    ("data.sources.*.path", "free", "a data set may move; its fingerprint is checked"),
    ("data.sources.*.key", "free", "where the key lies, not what is read"),
    ("data.sources.*.weight", "free", "a new mixture from the next sample on"),
    ("data.temperature*", "free", "new weights from the next sample on"),
    ("data.skip", "free", "of samples that are still to come"),
    ("data.timeline", "refused", "is written by officina itself; change data.sources.NAME.weight, or plan data.stages"),
    ("data.planned_at", "refused", "is written by officina itself"),
    ("data.stages", "free", "mixtures of steps that are still to come"),
    ("data.mask_documents", "force", "attention and labels change their meaning in the middle of a run"),
    ("use.*", "free", "is judged anew at every start"),
    ("data.packing", "refused", "rows would be packed otherwise, so that past samples could not be told from new ones"),
    ("data.overlong", "refused", "rows would be packed otherwise, so that past samples could not be told from new ones"),
    ("data.split", "refused", "past samples would belong to other data"),
    ("data.validation_split", "free", "changes what is measured"),
    ("data.shuffle", "refused", "the order of past samples rests on it"),
    ("data.shuffle_block", "refused", "the order of past samples rests on it"),
    ("data.read", "free", "changes no sample"),
    ("data.prefetch_batches", "free", "changes no sample"),
    ("data.max_damaged_blocks", "free", "says when to stop"),
    ("init_from", "free", "may move, not come or go: read before the first step, and an adapter's frozen weights are checked"),
    ("seed", "refused", "the order of past samples rests on it"),
    # the adapter
    ("adapter.dropout", "free", "takes effect at the next step"),
    ("adapter.init_from", "free", "was read before the first step"),
    ("adapter.*", "refused", "the checkpoint holds the weights that this adapter trains"),
    # the model
    ("model.attention_impl", "free", "the same mathematics"),
    ("model.kernels", "free", "the same mathematics"),
    ("model.init_std", "refused", "is of the first step only"),
    ("model.rope.*", "force", "the weights were trained with other positions; meant for extending the context"),
    ("model.local_rope", "force", "the weights were trained with other positions; meant for extending the context"),
    ("model.local_rope.*", "force", "the weights were trained with other positions; meant for extending the context"),
    ("model.rope_pattern", "force", "the weights were trained with other positions"),
    ("model.window", "force", "the weights were trained to see another context"),
    ("model.window_pattern", "force", "the weights were trained to see another context"),
    ("model.attn_scale", "force", "the weights were trained with another scale"),
    ("model.attn_softcap", "force", "the weights were trained with another cap"),
    ("model.logit_softcap", "force", "the weights were trained with another cap"),
    ("model.embed_scale", "force", "the weights were trained with another scale"),
    ("model.norm_eps", "force", "the weights were trained with another value"),
    ("model.norm_cast", "force", "the weights were trained with another rounding"),
    ("model.loss", "force", "another goal in the middle of a run"),
    ("model.decoder", "force", "records would be read in another way than those before"),
    ("model.blocks", "free", "names the unit of sharding; parameters keep their names"),
    ("model.*", "refused", "the weights have the shape and the meaning of this model"),
    ("name", "refused", "is the name of the run's directory"),
)
"""Pattern of the dotted key, ruling, why. The first that matches counts."""


@dataclass(frozen=True, slots=True)
class Change:
    """One key that differs. A key that one side does not have is None there."""

    key: str
    old: object
    new: object


def ruling(key: str) -> tuple[Ruling, str]:
    """What the table says about a key, and why."""
    declared = generic(key) or key
    return next((rule, why) for pattern, rule, why in RULES if fnmatchcase(declared, pattern))


def changes(old: RunConfig, new: RunConfig) -> list[Change]:
    """All keys in which two runs differ."""
    before, after = flat(dump_run(old)), flat(dump_run(new))
    return [Change(key, before.get(key), after.get(key)) for key in {**before, **after}
            if before.get(key) != after.get(key)]


def flat_values(run: RunConfig) -> dict[str, object]:
    """Dotted key -> value of all of a run."""
    return flat(dump_run(run))


def resume_problems(old: RunConfig, new: RunConfig, *, step: int, position: int, force: bool = False,
                    branch: bool = False) -> list[Problem]:
    """What stands against going on with `new` where `old` stopped.

    Args:
        step, position: optimizer steps done and next global sample index, of the checkpoint that is gone on from.
        force: the user said --force.
        branch: a new run with a name of its own.
    """
    return list(_resume_problems(old, new, step, position, force, branch))


def _resume_problems(old: RunConfig, new: RunConfig, step: int, position: int, force: bool, branch: bool) -> Iterator[Problem]:
    yield from ruled_out(old, new, force=force, branch=branch)
    if new.steps <= step:
        yield Problem("steps", new.steps, f"the run has done {step} steps already", f"steps={step + max(1, step // 10)}")
    yield from _stage_problems(old.data, new.data, step, position)
    if old.objective.kind == "dpo" and step:
        yield from _pair_problems(old.data, new.data)
    for a, b in _skip_changes(old.data.skip, new.data.skip, position):
        yield Problem("data.skip", as_text(new.data.skip), f"changes samples {a} to {b}, and those before {position} are past",
                      word("data.skip", _skip_that_works(old.data.skip, new.data.skip, position)))
        break


def ruled_out(old: RunConfig, new: RunConfig, *, force: bool = False, branch: bool = False) -> Iterator[Problem]:
    """Keys that differ although the table says that they may not, or only by force."""
    judged: set[str] = set()
    for change in changes(old, new):
        if change.key == "data.sources" or change.key.startswith("data.sources."):
            continue  # sources come and go: the timeline keeps what past samples need
        if change.key == "name" and branch:
            continue
        rule, why = ruling(change.key)
        if change.key == "init_from" and not (change.old and change.new):
            rule = "refused"  # it may move, not come or go
        other_kind = old.model.kind != new.model.kind and change.key.startswith("model.")
        whole = "model.kind" if other_kind else change.key
        if rule == "free" or whole in judged:
            continue
        judged.add(whole)
        if rule == "refused":
            kept = flat(dump_run(old)).get(whole)
            back = "officina train name=NEW for a new run" if kept is None and not optional(whole) else word(whole, kept)
            yield Problem(whole, as_text(flat(dump_run(new)).get(whole)), f"cannot change in the middle of a run: {why}", back)
        elif not force:
            yield Problem(change.key, as_text(change.new), f"was {as_text(change.old)}; {why}", "the same command with --force")


def _planned_ahead(data: DataConfig, position: int) -> list[TimelineStage]:
    """Stages that a user planned and that begin behind sample `position`."""
    return [] if data.planned_at is None else [stage for stage in data.timeline if stage.from_sample > position]


def _stage_problems(old: DataConfig, new: DataConfig, step: int, position: int) -> Iterator[Problem]:
    if new.stages and new.stages[0].from_step < step:
        yield Problem("data.stages", as_text(new.stages[0].from_step), f"begins before step {step}, and what was read is past",
                      f"stages from step {step} on")
    ahead = _planned_ahead(old, position)
    weights = [{name: source.weight for name, source in data.sources.items()} for data in (old, new)]
    if ahead and not new.stages and weights[0] != weights[1]:
        yield Problem("data.stages", None, "must say what follows: from sample "
                      f"{ahead[0].from_sample} on another mixture is planned, which a change of the sources now would drop",
                      f"data.stages=[{{from_step: {step}, weights: {{...}}}}, ...] with all that is to follow")


def _pair_problems(old: DataConfig, new: DataConfig) -> Iterator[Problem]:
    """Pairs that the reference has not scored: see preference.py."""
    why = "has pairs that the model which the run began with has not scored, as it does before the first step"
    for name in sorted(new.sources.keys() - old.sources.keys()):
        yield Problem(f"data.sources.{name}.path", new.sources[name].path, why,
                      f"~data.sources.{name}, or a run that begins from this one: officina train init_from=RUN ...")
    if new.validation_split != old.validation_split and any(_has_split(s, new.validation_split) for s in new.sources.values()):
        yield Problem("data.validation_split", new.validation_split, why, word("data.validation_split", old.validation_split))


def _has_split(source: SourceConfig, split: str) -> bool:
    from officina.trainer.data.manifest import open_dataset

    try:
        return split in open_dataset(source.path).manifest.splits
    except DataError:  # told where the data sets are judged
        return False


def _below(ranges: list[list[int]], position: int) -> set[tuple[int, int]]:
    """The ranges' parts before `position`, joined."""
    joined: list[tuple[int, int]] = []
    for a, b in sorted((a, min(b, position)) for a, b in ranges if a < position):
        if joined and a <= joined[-1][1]:
            joined[-1] = (joined[-1][0], max(b, joined[-1][1]))
        else:
            joined.append((a, b))
    return set(joined)


def _skip_changes(old: list[list[int]], new: list[list[int]], position: int) -> list[tuple[int, int]]:
    return sorted(_below(old, position) ^ _below(new, position))


def _skip_that_works(old: list[list[int]], new: list[list[int]], position: int) -> list[list[int]]:
    past = [[a, b] for a, b in sorted(_below(old, position))]
    return past + sorted([max(a, position), b] for a, b in new if b > position)


# ---- applying ----------------------------------------------------------------------------------------------
def as_planned(data: DataConfig, position: int, timeline: Sequence[TimelineStage | Values],
               planned_at: int | None) -> DataConfig:
    """`data` without mixtures that were decided when the run had come to sample `position` or further.

    timeline, planned_at: as they stood on the way there; what they plan behind it still holds.
    """
    from officina.trainer.data.order import timeline_of

    whole = timeline_of(data)
    then = [stage if isinstance(stage, TimelineStage) else TimelineStage(**stage) for stage in timeline] or whole[:1]
    planned = [stage for stage in then if stage.from_sample > position and planned_at is not None and planned_at <= position]
    stages = [stage for stage in then if stage.from_sample <= position] + planned
    if stages == whole:
        return data
    last, used = stages[-1].weights, {name for stage in stages for name in stage.weights}
    sources = {name: replace(source, weight=last.get(name, source.weight)) for name, source in data.sources.items()
               if name in used}
    alone = len(stages) == 1 and set(sources) == used
    return replace(data, sources=sources, timeline=[] if alone else stages, planned_at=planned_at if planned else None)


def take_out(old: RunConfig, new: RunConfig, position: int) -> tuple[RunConfig, RunConfig]:
    """Both runs with a timeline that goes on from sample `position` without the sources that `new` has no more.

    They stay in `sources`, for what a timeline says was read from them. As they are where none is left, or where mixtures of
    later steps say which.
    """
    from officina.trainer.data.order import extend_timeline, timeline_of

    named = {name for stage in old.data.timeline for name in stage.weights}
    gone = {name: old.data.sources[name] for name in sorted(named - set(new.data.sources))}
    stay = {name: old.data.sources[name] for name in timeline_of(old.data)[-1].weights if name not in gone}
    if not gone or not stay or new.data.stages or _planned_ahead(old.data, position):
        return old, new
    data = extend_timeline(old.data, position, stay)
    kept = {name: source for name, source in gone.items() if name in data.sources}
    return replace(old, data=data), replace(new, data=replace(
        new.data, sources=kept | new.data.sources, timeline=data.timeline, planned_at=data.planned_at))


def carry_forward(old: RunConfig, new: RunConfig, position: int, named: Collection[str] = ()) -> RunConfig:
    """`new` with the mixture's timeline that `old` and the change from sample `position` on make together.

    named: sources that the user named; one that had left the mixture and is kept for the audit comes back by this.
    """
    from officina.trainer.data.order import (  # needs numpy, which --help should not wait for
        extend_timeline,
        timeline_of,
    )

    if new.data.stages and position:  # what is read from now on is said there, see `plan_stages`; what was read stays
        return replace(new, data=replace(new.data, sources={**old.data.sources, **new.data.sources},
                                         timeline=timeline_of(old.data)))
    if new.data.stages:
        return new
    if _planned_ahead(old.data, position):
        return at_their_steps(old, new, position)
    last = timeline_of(old.data)[-1].weights
    current = {name: source for name, source in new.data.sources.items()
               if name in last or name in named or name not in old.data.sources}
    if {name: source.weight for name, source in current.items()} == last:
        return new  # at most a path has changed
    data = extend_timeline(old.data, position, current)
    moved = {name: new.data.sources.get(name, source) for name, source in data.sources.items()}
    paths = {name: replace(source, path=moved[name].path, key=moved[name].key) for name, source in data.sources.items()}
    return replace(new, data=replace(new.data, sources=paths, timeline=data.timeline, planned_at=data.planned_at))


def at_their_steps(old: RunConfig, new: RunConfig, position: int) -> RunConfig:
    """`new` with the mixtures that `old` planned behind sample `position` where the steps begin for which they were planned:
    with another batch or other samples left out these are other samples."""
    import numpy as np  # which --help should not wait for

    from officina.trainer.data.order import Skips, timeline_of

    if (old.batch.rows, old.data.skip) == (new.batch.rows, new.data.skip) or not _planned_ahead(new.data, position):
        return new
    then, now, stages = Skips(old.data.skip), Skips(new.data.skip), {}
    for stage in timeline_of(new.data):
        first = stage.from_sample
        if first > position:
            rows = first - position - sum(b - a for a, b in then.within(position, first))
            steps = -(-rows // old.batch.rows)
            first = int(now.indices(position, np.asarray(steps * new.batch.rows)))
        stages[first] = replace(stage, from_sample=first)
    return replace(new, data=replace(new.data, timeline=list(stages.values()), planned_at=position))
