"""What may change when a run goes on."""

import os
from dataclasses import replace
from pathlib import Path

import pytest
from data_sets import write_tokens

from officina.configs.compose import compose, recompose
from officina.trainer.config import PlannedStage, SourceConfig, TimelineStage
from officina.trainer.data.order import plan_stages, sources_in_use, timeline_of
from officina.trainer.keys import leaves
from officina.trainer.resume import RULES, as_planned, carry_forward, changes, resume_problems, ruling
from officina.trainer.validate import problems


@pytest.fixture(scope="module")
def old():
    return compose(["experiment=demo", "steps=300", "optim.lr=3e-3", "data.sources.python.path=x"])


def judge(old, words, *, step=100, position=3200, **how):
    composed = recompose(old, words)
    assert composed.problems == [], composed.problems
    return {p.key: p for p in resume_problems(old, composed.run, step=step, position=position, **how)}


def test_each_key_has_a_ruling_of_its_own():
    for key in leaves():
        rule, why = ruling(key)
        assert rule in ("free", "force", "refused") and why
    used = {next(pattern for pattern, *_ in RULES if _matches(key, pattern)) for key in leaves()}
    used.add("model.local_rope")  # stands for the whole part where one side has none
    assert used == {pattern for pattern, *_ in RULES}, "a rule that no key meets"


def _matches(key, pattern):
    from fnmatch import fnmatchcase

    return fnmatchcase(key, pattern)


@pytest.mark.parametrize("words", [
    ["engine=zero2", "ranks=3", "time_limit=none"], ["engine=hsdp", "engine.shard_size=4", "ranks=8"],
    ["lr_schedule=wsd", "lr_schedule.decay_steps=50", "steps=150"], ["optim.lr=1e-4", "optim.clip_norm=0.5"],
    ["steps=1000"], ["data.sources.new.path=y", "data.sources.new.weight=0.3"], ["data.sources.python.path=/moved"],
    ["~data.sources.python", "data.sources.new.path=y"], ["batch.global_tokens=16384", "batch.micro_rows=1"],
    ["site.account=other", "site.grace=5m"], ["logging=files", "checkpoint.every_steps=7", "eval.every_steps=3"],
    ["data.skip=[[3200,3264]]"], ["objective.spike_sigma=6", "objective.on_spike=skip"], ["threads=2", "device=cpu"],
    ["profile.steps=[101,103]"], ["model.attention_impl=reference"], []])
def test_everyday_changes_are_free(old, words):
    assert judge(old, words) == {}


@pytest.mark.parametrize("word", [
    "precision=fp32", "model.rope.theta=1e6", "model.rope.scaling=linear", "model.window=128", "model.norm_eps=1e-6",
    "data.mask_documents=false", "model.logit_softcap=30", "model.local_rope.theta=1e3"])
def test_changes_of_meaning_need_force(old, word):
    found = judge(old, [word])
    assert found and all("--force" in p.remedy for p in found.values())
    assert judge(old, [word], force=True) == {}


@pytest.mark.parametrize("word", [
    "model.n_layers=5", "model.d_model=384", "model.vocab_size=8192", "model.tie_embeddings=false", "model.qk_norm=head",
    "seed=4", "batch.seq_len=128", "data.shuffle=false", "data.shuffle_block=8",
    "data.split=other", "name=other", "model.init_std=0.01",
    "data.timeline=[{from_sample:0,weights:{python:2}}]"])
def test_what_the_past_rests_on_is_refused_even_with_force(old, word):
    key = word.split("=")[0]
    found = judge(old, [word], force=True)
    assert list(found) == [key] and "cannot change" in found[key].rule
    if "=" in found[key].remedy:  # the remedy is the old value, and it works
        assert judge(old, [word, found[key].remedy.strip("'")]) == {}


@pytest.mark.parametrize(("before", "after"), [("", "nonsense"), ("there", "")])
def test_what_a_run_began_from_may_move_but_not_come_or_go(old, before, after):
    old = replace(old, init_from=before)
    found = judge(old, [f"init_from={after}"], force=True)
    assert "may move, not come or go" in found["init_from"].rule
    assert judge(old, [found["init_from"].remedy]) == {}
    assert judge(replace(old, init_from="there"), ["init_from=elsewhere"]) == {}


def test_no_source_at_all_is_not_judged_by_the_table(old):
    assert judge(old, ["~data.sources"]) == {}
    assert [p.key for p in problems(recompose(old, ["~data.sources"]).run, read_data=False)] == ["data.sources"]


def test_the_remedy_of_officinas_own_key_is_its_value(old):
    assert judge(old, ["data.planned_at=3"])["data.planned_at"].remedy == "data.planned_at=null"


def test_another_model_or_optimizer_is_one_problem(old):
    words = ["model=custom", "model.factory=a:b", "model.loss=a:b", "model.decoder=a:b"]
    assert list(judge(old, words)) == ["model.kind"]
    assert list(judge(old, ["optim=muon"])) == ["optim.kind"]


def test_a_branch_may_have_another_name(old):
    assert judge(old, ["name=decay"], branch=True) == {}


def test_a_run_that_is_done_needs_more_steps(old):
    found = judge(old, [], step=300)
    assert found["steps"].remedy == "steps=330"
    assert judge(old, ["steps=330"], step=300) == {}


@pytest.mark.parametrize(("before", "after", "position", "refused"), [
    ("[]", "[[10,20]]", 5, False), ("[]", "[[10,20]]", 15, True), ("[[0,8]]", "[]", 9, True),
    ("[[0,8]]", "[[0,8],[20,30]]", 9, False), ("[[0,8]]", "[[0,4],[4,8]]", 9, False), ("[[10,20]]", "[]", 10, False),
    ("[[10,20]]", "[[10,15]]", 12, False), ("[[10,20]]", "[[10,15]]", 16, True)])
def test_past_samples_cannot_be_left_out_or_put_back(old, before, after, position, refused):
    old = recompose(old, [f"data.skip={before}"]).run
    found = judge(old, [f"data.skip={after}"], position=position)
    assert bool(found) is refused
    if refused:
        assert judge(old, [found["data.skip"].remedy], position=position) == {}


def test_pairs_that_the_reference_has_not_scored_are_refused_before_the_ranks_meet_them(tmp_path):
    write_tokens(tmp_path / "pairs", {split: [6] * 4 for split in ("train", "validation", "dev")}, samples="pairs")
    old = compose(["objective=dpo", f"data.sources.pairs.path={tmp_path / 'pairs'}"])
    more = f"data.sources.more.path={tmp_path / 'pairs'}"
    for word, key in ((more, "data.sources.more.path"), ("data.validation_split=dev", "data.validation_split")):
        found = judge(old, [word])
        assert list(found) == [key] and "has not scored" in found[key].rule
        assert judge(old, [word], step=0, position=0) == {}
    assert judge(old, ["data.validation_split=none", "data.sources.pairs.path=/moved"]) == {}
    assert judge(compose(["data.sources.pairs.path=x"]), [more, "data.validation_split=dev"]) == {}


def test_changes_are_told_key_by_key(old):
    new = recompose(old, ["optim.lr=1e-4", "engine=single", "data.sources.b.path=y"]).run
    told = {c.key: (c.old, c.new) for c in changes(old, new)}
    assert told["optim.lr"] == (3e-3, 1e-4) and told["engine.kind"] == ("fsdp2", "single")
    assert told["data.sources.b.path"] == (None, "y") and "steps" not in told


def test_the_page_has_the_table():
    """To renew it after a change that is wanted: OFFICINA_WRITE_GOLDEN=1."""
    page = Path(__file__).parents[2] / "docs/life_of_a_run.md"
    lines = ["| key | | why |", "|---|---|---|", *(f"| `{key}` | {rule} | {why} |" for key, rule, why in RULES)]
    head, rest = page.read_text().split("<!-- what may change -->\n")
    table, tail = rest.split("<!-- end -->")
    if os.environ.get("OFFICINA_WRITE_GOLDEN"):
        table = "".join(f"{line}\n" for line in lines)
        page.write_text(f"{head}<!-- what may change -->\n{table}<!-- end -->{tail}")
    assert table.splitlines() == lines


# ---- the mixture's timeline --------------------------------------------------------------------------------------
def mix(old, words, position):
    composed = recompose(old, words)
    named = {w.split(".")[2].split("=")[0] for w in words if w.startswith("data.sources.")}
    return carry_forward(old, composed.run, position, named)


def weights(run):
    return [(stage.from_sample, stage.weights) for stage in run.data.timeline]


def test_a_new_source_begins_at_the_next_sample(old):
    run = mix(old, ["data.sources.new.path=y", "data.sources.new.weight=0.5"], 3200)
    assert weights(run) == [(0, {"python": 1.0}), (3200, {"python": 1.0, "new": 0.5})]
    assert problems(run, read_data=False) == []
    again = mix(run, [], 6400)
    assert again == run


@pytest.mark.parametrize(("now", "then", "planned_at", "kept"), [
    (["0 a", "40 ab", "80 b"], [], None, ["0 a"]), (["0 a", "20 ab", "80 b"], ["0 a", "20 ab"], None, ["0 a", "20 ab"]),
    (["0 a", "40 b"], ["0 a", "40 b"], 0, ["0 a", "40 b"]), (["0 a", "40 b"], ["0 a", "40 b"], 35, ["0 a"]),
    (["0 a", "35 c", "90 b"], ["0 a", "40 b", "60 a"], 10, ["0 a", "40 b", "60 a"]), (["0 a", "30 b"], [], None, ["0 a"])])
def test_a_branch_gets_the_mixtures_that_were_planned_at_its_sample(old, now, then, planned_at, kept):
    """Stages as `from_sample sources`; `now` by the newest configuration, `then` by the one of sample 30."""
    def stages(texts):
        return [TimelineStage(from_sample=int(at), weights=dict.fromkeys(names, 1.0)) for at, names in map(str.split, texts)]

    data = replace(old.data, timeline=stages(now), planned_at=planned_at, sources={n: SourceConfig(path=n) for n in "abc"})
    found = as_planned(data, 30, stages(then), planned_at)
    assert timeline_of(found) == stages(kept) and set(found.sources) >= {name for s in stages(kept) for name in s.weights}
    if kept == ["0 a"]:
        assert found.timeline == [] and set(found.sources) == {"a"} and found.planned_at is None


def test_a_source_that_leaves_stays_known_for_the_audit_and_can_come_back(old):
    run = mix(old, ["~data.sources.python", "data.sources.new.path=y"], 3200)
    assert weights(run)[-1] == (3200, {"new": 1.0}) and set(run.data.sources) == {"python", "new"}
    same = mix(run, ["data.sources.new.path=z"], 6400)
    assert weights(same) == weights(run) and same.data.sources["new"].path == "z"
    back = mix(run, ["data.sources.python.weight=1"], 6400)
    assert weights(back)[-1] == (6400, {"new": 1.0, "python": 1.0})


def test_a_moved_data_set_changes_no_order(old):
    two = mix(old, ["data.sources.new.path=y"], 3200)
    moved = mix(two, ["data.sources.python.path=/elsewhere"], 1600)  # gone on from an older checkpoint
    assert weights(moved) == weights(two) and moved.data.sources["python"].path == "/elsewhere"


def test_a_change_replaces_what_was_planned_from_there_on(old):
    two = mix(old, ["data.sources.new.path=y"], 3200)
    redone = mix(two, ["data.sources.new.weight=3"], 1600)
    assert weights(redone) == [(0, {"python": 1.0}), (1600, {"python": 1.0, "new": 3.0})]


def test_before_the_first_sample_a_change_is_no_stage(old):
    run = mix(old, ["data.sources.new.path=y"], 0)
    assert weights(run) == [] and run.data.sources == {"python": SourceConfig(path="x"), "new": SourceConfig(path="y")}


def planned(run, step, position, *stages):
    """With the stages (step, weights)."""
    stages = [PlannedStage(from_step=first, weights=weights) for first, weights in stages]
    return plan_stages(replace(run, data=replace(run.data, stages=stages)), step, position)


def test_stages_are_planned_and_read_from_their_step_on(old):
    rows = old.batch.rows
    two = replace(old, data=replace(old.data, sources={"python": SourceConfig(path="x"), "math": SourceConfig(path="y")}))
    run = planned(two, 0, 0, (100, {"python": 1, "math": 3}), (200, {"math": 1}))
    assert weights(run) == [(0, {"python": 1, "math": 1}), (100 * rows, {"python": 1, "math": 3}), (200 * rows, {"math": 1})]
    assert run.data.stages == [] and sources_in_use(run.data) == ["math", "python"] and problems(run, read_data=False) == []
    held = planned(two, 0, 0, (0, {"python": 1}), (100, {"math": 1}))
    assert weights(held) == [(0, {"python": 1}), (100 * rows, {"math": 1})] and sources_in_use(held.data) == ["math", "python"]
    skipping = replace(two, data=replace(two.data, skip=[[10, 14]]))
    assert weights(planned(skipping, 0, 0, (100, {"math": 1})))[1][0] == 100 * rows + 4


def test_a_plan_holds_where_the_run_goes_on_and_can_be_made_anew(old):
    rows = old.batch.rows
    run = planned(replace(old, data=replace(old.data, sources={name: SourceConfig(path=name) for name in ("python", "math")})),
                  0, 0, (0, {"python": 1}), (200, {"math": 1}))
    assert mix(run, ["steps=400"], 100 * rows).data == run.data
    moved = mix(run, ["data.sources.math.path=/elsewhere"], 100 * rows)
    assert weights(moved) == weights(run) and moved.data.planned_at == 0
    early = mix(run, ["data.sources.python.path=/elsewhere"], 100 * rows)  # which the last stage does not name
    assert weights(early) == weights(run) and early.data.sources["python"].path == "/elsewhere"
    for words in (["data.sources.math.weight=2"], ["data.sources.new.path=y"], ["~data.sources.math"]):
        assert "data.stages" in judge(run, words, step=100, position=100 * rows)
    assert judge(run, ["data.sources.new.path=y", "data.stages=[{from_step:100,weights:{new:1}}]"], step=100,
                 position=100 * rows) == {}
    assert "data.stages" in judge(run, ["data.stages=[{from_step:99,weights:{math:1}}]"], step=100, position=100 * rows)
    anew = planned(run, 100, 100 * rows, (100, {"python": 1, "math": 1}), (150, {"python": 1}))
    assert weights(anew) == [(0, {"python": 1}), (100 * rows, {"python": 1, "math": 1}), (150 * rows, {"python": 1})]
    assert sources_in_use(anew.data) == ["math", "python"]
    assert list(planned(run, 100, 100 * rows, (150, {"python": 2})).data.sources) == ["python"]  # math is never read
    late = mix(anew, [], 200 * rows)
    assert late == anew and sources_in_use(replace(anew.data, planned_at=200 * rows)) == ["python"]
    after = mix(anew, ["data.sources.math.weight=5"], 200 * rows)
    assert weights(after)[-1] == (200 * rows, {"python": 1, "math": 5}) and sources_in_use(after.data) == ["math", "python"]


def test_a_planned_mixture_begins_at_its_step_whatever_the_batch_and_what_is_left_out(old):
    rows = old.batch.rows
    two = replace(old, data=replace(old.data, sources={name: SourceConfig(path=name) for name in ("python", "math")}))
    run = planned(two, 0, 0, (0, {"python": 1}), (200, {"math": 1}), (300, {"python": 1}))
    double = mix(run, [f"batch.global_tokens={2 * old.batch.global_tokens}"], 100 * rows)
    assert weights(double) == [(0, {"python": 1}), (300 * rows, {"math": 1}), (500 * rows, {"python": 1})]
    assert double.data.planned_at == 100 * rows
    skip = f"data.skip=[[{150 * rows},{151 * rows}],[{290 * rows},{290 * rows + 5}]]"
    assert [first for first, _ in weights(mix(run, [skip], 100 * rows))] == [0, 201 * rows, 301 * rows + 5]
    back = mix(mix(double, [f"batch.global_tokens={old.batch.global_tokens}", skip], 100 * rows), ["data.skip=[]"], 100 * rows)
    assert weights(back) == weights(run)
    late = mix(run, [f"batch.global_tokens={2 * old.batch.global_tokens}"], 250 * rows)
    assert [first for first, _ in weights(late)] == [0, 200 * rows, (250 + 2 * 50) * rows]


@pytest.mark.parametrize("words", [
    ["data.sources.new.path=y"], ["data.sources.new.path=y", "data.sources.python.weight=2"],
    ["data.sources.new.path=y", "~data.sources.python"]])
def test_stages_that_are_planned_on_the_way_leave_what_was_read_as_it_was(old, words):
    rows = old.batch.rows
    for step in (100, 150):
        run = mix(old, [*words, f"data.stages=[{{from_step: {step}, weights: {{new: 1}}}}]"], 100 * rows)
        run = plan_stages(run, 100, 100 * rows)
        assert weights(run) == [(0, {"python": 1.0}), (step * rows, {"new": 1.0})]
        assert set(run.data.sources) == {"python", "new"} and problems(run, read_data=False) == []


def test_the_timeline_survives_config_yaml(old, tmp_path):
    from officina.trainer.run_dir import load_config, save_config

    run = mix(old, ["data.sources.new.path=y"], 3200)
    save_config(run, tmp_path)
    assert load_config(tmp_path) == run and isinstance(load_config(tmp_path).data.timeline[0], TimelineStage)
