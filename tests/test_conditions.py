"""Conditions of use over the life of a run: they end while it trains, and maxima are counted at its saves."""

import json
import shutil
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from data_sets import write_tokens

from officina.launch import start
from officina.launch.start import plan_resume, plan_train, write_start
from officina.trainer.config import CheckpointConfig, DDPConfig, ObjectiveConfig, RunConfig, SingleConfig, SourceConfig
from officina.trainer.convert import export_run
from officina.trainer.data import carried
from officina.trainer.data.describe import change
from officina.trainer.data.ledger import audit
from officina.trainer.data.policy import Policy
from officina.trainer.data.register import Going, enter, read_entries
from officina.trainer.data.summary import summarise
from officina.trainer.errors import EXIT_DONE, DataError
from officina.trainer.metrics import read_metrics
from officina.trainer.run_dir import Start, append_history, committed_steps, read_run_id
from tests.distributed import RankFailure
from tests.lives import begin, changed, plain_run


def make_run(folder: Path, policy: Policy, **changes: object) -> RunConfig:
    write_tokens(folder, {"train": [300, 500, 400], "validation": [90]}, dtype="u16", licence="MIT")
    change(folder, policy=policy)
    run = plain_run(folder, **changes)
    return replace(run, data=replace(run.data, sources={"text": SourceConfig(path=str(folder))}),
                   model=replace(run.model, vocab_size=2048))


def test_conditions_end_during_the_run(pool, tmp_path: Path) -> None:
    """One rank's clock passes the end: both stop after the same step, with a checkpoint, and say why and what to do."""
    run = make_run(tmp_path / "set", Policy(not_after="2999-12-31"), engine=DDPConfig())
    run_dir = tmp_path / "run"
    begin(run_dir, run)
    with pytest.raises(RankFailure) as failure:
        pool.run(2, "tests.lives:live", str(run_dir), fault="conditions end")
    told = str(failure.value)
    assert "stopped in good order after step 4, with a checkpoint: data.sources.text may be used until 3000-01-01" in told
    assert f"officina data describe {tmp_path / 'set'} --policy FILE" in told
    assert "'~data.sources.text'" in told
    assert committed_steps(run_dir) == [3, 4]
    stop = read_metrics(run_dir).generations[-1].stop
    assert (stop.reason, stop.exit_status) == ("conditions of use", 2)
    assert audit(run_dir).ok and summarise(run_dir).total == 4 * 7 * 32
    change(tmp_path / "set", policy=Policy(not_after="2999-12-30"))
    assert pool.run(2, "tests.lives:live", str(run_dir)) == [EXIT_DONE] * 2 and committed_steps(run_dir)[-1] == 8


def test_conditions_that_ended_before_the_first_step(pool, tmp_path: Path) -> None:
    """A rank that a launcher starts without asking the gate reads nothing for a step either."""
    run = make_run(tmp_path / "set", Policy(not_after="2020-01-01"), engine=SingleConfig())
    begin(tmp_path / "run", run)
    with pytest.raises(RankFailure, match="after step 0, with a checkpoint"):
        pool.run(1, "tests.lives:live", str(tmp_path / "run"))
    assert not (tmp_path / "run" / "ledger.jsonl").read_text()


def test_uses_are_counted_at_each_save(pool, tmp_path: Path) -> None:
    run = make_run(tmp_path / "set", Policy(max_tokens=8 * 7 * 32, max_days=9), engine=SingleConfig())
    run_dir = tmp_path / "run"
    begin(run_dir, run)
    enter(run, Going(read_run_id(run_dir)))
    pool.run(1, "tests.lives:live", str(run_dir), stop_after=5)
    [entry] = read_entries(tmp_path / "set" / "use")
    assert (entry.rows, entry.planned_rows, entry.row_tokens, entry.done) == (5 * 7, 8 * 7, 32, False)
    changed(run_dir)
    assert pool.run(1, "tests.lives:live", str(run_dir)) == [EXIT_DONE]
    [entry] = read_entries(tmp_path / "set" / "use")
    assert (entry.rows, entry.done) == (8 * 7, True) and entry.rows * entry.row_tokens == summarise(run_dir).total


def test_a_start_on_the_command_line_enters_the_register(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path))
    make_run(tmp_path / "set", Policy(max_runs=1, purpose=("research",)))
    words = ["steps=20", "model.vocab_size=2048", f"data.sources.text.path={tmp_path / 'set'}", "use=research",
             "lr_schedule.warmup_steps=1"]
    first = plan_train([*words, "name=one"], tmp_path / "runs", world_size=1).checked()
    write_start(first, 1)
    [entry] = read_entries(tmp_path / "set" / "use")
    assert entry.run == f"{read_run_id(tmp_path / 'runs' / 'one')}.one" and entry.purpose == "research"
    second = plan_train([*words, "name=two"], tmp_path / "runs", world_size=1)
    assert "may be used by 1 runs, and this would be number 2" in str(second.problems[0])
    assert plan_resume(tmp_path / "runs" / "one", [], world_size=1).problems == []
    product = plan_train([*words, "use=product"], tmp_path / "runs", world_size=1)
    assert "the purpose must be research" in str(product.problems[0])
    old = datetime.now(UTC) - timedelta(days=2)
    path = tmp_path / "set" / "use" / f"{entry.run}.json"
    path.write_text(path.read_text().replace(entry.last, old.strftime("%Y-%m-%dT%H:%M:%S.%fZ")))
    assert plan_train([*words, "name=two"], tmp_path / "runs", world_size=1).problems == []


def test_a_run_that_is_killed_before_its_first_save_is_counted(pool, tmp_path: Path) -> None:
    run = make_run(tmp_path / "set", Policy(max_runs=1), engine=SingleConfig(), checkpoint=CheckpointConfig(every_steps=0),
                   objective=ObjectiveConfig(max_nonfinite_steps=2))
    begin(tmp_path / "run", run)
    enter(run, Going(read_run_id(tmp_path / "run")))
    with pytest.raises(RankFailure, match="not finite in 2 steps in a row"):
        pool.run(1, "tests.lives:live", str(tmp_path / "run"), fault="nan")
    assert committed_steps(tmp_path / "run") == []
    [entry] = read_entries(tmp_path / "set" / "use")
    assert entry.rows == 7, "its first step, written down when it was done"


# ---- sources that come back ------------------------------------------------------------------------------------------
def two_sources(tmp_path: Path) -> list[str]:
    """The words of a run on `text`, and on `late`, whose conditions will have ended."""
    make_run(tmp_path / "text", Policy())
    make_run(tmp_path / "late", Policy())
    return ["steps=8", "ranks=2", "precision=fp32", "device=cpu", "threads=1", "engine=ddp", "model.vocab_size=2048",
            "model.n_layers=1", "model.d_model=32", "model.n_heads=2", "model.n_kv_heads=1", "model.d_ff=64",
            "batch.global_tokens=224", "batch.seq_len=32", "batch.micro_rows=2", "lr_schedule.warmup_steps=1",
            "checkpoint.every_steps=3", "eval.every_steps=0", "name=run",
            f"data.sources.text.path={tmp_path / 'text'}", f"data.sources.late.path={tmp_path / 'late'}"]


def standing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[start.Plan, dict[str, start.Origin]]:
    """A run of two sources that was planned, and where it stands: "at" may be set to any step, which nobody has trained."""
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path))
    plan = plan_train(two_sources(tmp_path), tmp_path / "runs", world_size=2).checked()
    write_start(plan, 2)
    stands = {"at": start.Origin(plan.run_dir, plan.run, 1, 7)}
    monkeypatch.setattr(start, "read_origin", lambda *_, **__: stands["at"])
    return plan, stands


def test_a_source_that_comes_back_is_judged(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plan, stands = standing(tmp_path, monkeypatch)
    left = plan_resume(plan.run_dir, ["~data.sources.late"], world_size=2).checked()
    assert [sorted(stage.weights) for stage in left.run.data.timeline] == [["late", "text"], ["text"]]
    change(tmp_path / "late", policy=Policy(not_after="2020-01-01"))
    stands["at"] = start.Origin(plan.run_dir, left.run, 2, 14)
    assert not plan_resume(plan.run_dir, [], world_size=2).problems, "what left the mixture is not asked for"
    [problem] = plan_resume(plan.run_dir, ["data.sources.late.weight=0.5"], world_size=2).problems
    assert problem.key == "data.sources.late.path" and "may be used until 2020-01-01" in problem.rule
    change(tmp_path / "late", policy=Policy(not_after="2999-01-01"))
    back = plan_resume(plan.run_dir, ["data.sources.late.weight=0.5"], world_size=2).checked()
    assert len(back.run.data.timeline) == 3


def test_a_source_can_be_taken_out_whatever_was_read_of_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As the gate says where its conditions ended, also when it left before; then its folder may go."""
    plan, stands = standing(tmp_path, monkeypatch)
    for step, words in enumerate([["data.sources.late.weight=0.5"], ["~data.sources.late"], ["data.sources.late.weight=2"]], 1):
        stands["at"] = start.Origin(plan.run_dir, stands["at"].run, step, 7 * step)
        stands["at"] = replace(stands["at"], run=plan_resume(plan.run_dir, words, world_size=2).checked().run)
    change(tmp_path / "late", policy=Policy(not_after="2020-01-01"))
    at = replace(stands["at"], step=4, position=28)
    for words in ([["~data.sources.late"], ["~data.sources.late", "data.sources.text.weight=3", "optim.lr=1e-4"]]):
        stands["at"] = at
        left = plan_resume(plan.run_dir, words, world_size=2).checked().run
        assert [sorted(stage.weights) for stage in left.data.timeline] == [
            ["late", "text"], ["late", "text"], ["text"], ["late", "text"], ["text"]]
        assert sorted(left.data.sources) == ["late", "text"] and left.data.timeline[-1].from_sample == 28
        stands["at"] = start.Origin(plan.run_dir, left, 5, 35)
        assert plan_resume(plan.run_dir, ["~data.sources.late"], world_size=2).checked().run.data == left.data
    shutil.rmtree(tmp_path / "late")
    assert plan_resume(plan.run_dir, ["steps=9"], world_size=2).checked().run.data == left.data
    [problem] = plan_resume(plan.run_dir, ["~data.sources.text"], world_size=2).problems
    assert (problem.key, problem.rule[:10]) == ("data.sources.text.path", "is missing")


def test_what_an_older_checkpoint_reads_again_is_judged(pool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A run goes on without a source whose conditions ended, from its newest checkpoint. That is damaged, and before it the
    source is still read: all ranks refuse, and go on where its conditions allow it."""
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path))
    plan = plan_train(two_sources(tmp_path), tmp_path / "runs", world_size=2).checked()
    run_dir = plan.run_dir
    write_start(plan, 2)
    pool.run(2, "tests.lives:live", str(run_dir), stop_after=5)
    assert committed_steps(run_dir) == [3, 5]
    change(tmp_path / "late", policy=Policy(not_after="2020-01-01"))
    write_start(plan_resume(run_dir, ["~data.sources.late"], world_size=2).checked(), 2)
    file = run_dir / "checkpoints" / "step-00000005" / "rank-00000.bin"
    raw = bytearray(file.read_bytes())
    raw[len(raw) // 2] ^= 1
    file.write_bytes(raw)
    with pytest.raises(RankFailure) as failure:
        pool.run(2, "tests.lives:live", str(run_dir))
    told = str(failure.value)
    assert "may be used until 2020-01-01" in told and "planned from step 5" in told and "step-00000005 is damaged" in told
    assert f"go on from the older one: officina resume {run_dir}" in told and committed_steps(run_dir) == [3, 5]
    assert told.count("DataError: the run goes on from step 3") >= 2, "every rank says so, and none waits for another"
    change(tmp_path / "late", policy=Policy())
    assert pool.run(2, "tests.lives:live", str(run_dir)) == [EXIT_DONE] * 2
    assert audit(run_dir).ok and committed_steps(run_dir)[-1] == 8


# ---- weights carry the conditions of what they were trained on ---------------------------------------------------------
def test_weights_carry_the_conditions_of_their_data(pool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A run that begins with another's weights, a branch, a resume without the source: none may release what was not to be,
    also where the data and the run that read them are gone."""
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path))
    words = two_sources(tmp_path)
    only_text = [word for word in words if "late" not in word]
    change(tmp_path / "late", policy=Policy(export="no", attribution="ACME Lab", licence=("CC-BY-NC-4.0",)))
    declared = ["use.release=false", "use.commercial=false"]
    plan = plan_train([*words, *declared], tmp_path / "runs", world_size=2).checked()
    write_start(plan, 2)
    pool.run(2, "tests.lives:live", str(plan.run_dir), stop_after=5)

    def problems(plan: start.Plan) -> dict[str, str]:
        return {problem.key: f"{problem.rule}; {problem.remedy}" for problem in plan.problems}

    def begun(*more: str) -> start.Plan:
        return plan_train([*only_text, f"init_from={plan.run_dir}", "name=second", *more], tmp_path / "runs", world_size=2)

    undeclared = ["~data.sources.late", "use.release=true", "use.commercial=null"]
    branch = plan_train([f"from={plan.run_dir}@5", "name=branch", *undeclared], tmp_path / "runs", world_size=2)
    resumed = plan_resume(plan.run_dir, undeclared, world_size=2)
    for found, label in ((problems(begun()), "late of run"), (problems(branch), "late of run@5"), (problems(resumed), "late")):
        assert set(found) == {"use.release", "use.commercial"}, found
        assert f"{label}: weights trained on it must not be released" in found["use.release"]
        assert f"{label}: licence MIT and CC-BY-NC-4.0: CC-BY-NC-4.0 is for non-commercial use" in found["use.commercial"]
        assert "begin with weights that were not trained on it" in found["use.release"] and "leave the source" not in str(found)
    assert set(problems(begun("use.weights_derive=false"))) == {"use.release"}, "a licence of data says nothing of weights then"
    shutil.rmtree(tmp_path / "late")
    assert "late of run: " in problems(begun("use.commercial=false"))["use.release"]
    export_run(str(plan.run_dir), tmp_path / "first")
    must_not = "MIT AND CC-BY-NC-4.0; weights trained on it must not be released; attribution: ACME Lab\n"
    assert f"- late: {must_not}" in (tmp_path / "first" / "README.md").read_text()
    of_folder = plan_train([word for word in only_text if "model." not in word] + [
        "model=from_init", f"init_from={tmp_path / 'first'}", "name=third"], tmp_path / "runs", world_size=2)
    assert "late of run@5: weights trained on it must not be released" in problems(of_folder)["use.release"]
    for broken in ("{", "[]", '{"a": 1}', '{"a": {"fingerprint": "", "policy": {"export": "maybe"}}}'):
        (tmp_path / "broken").mkdir(exist_ok=True)
        (tmp_path / "broken" / carried.FILE).write_text(broken)
        with pytest.raises(DataError, match=carried.FILE):
            carried.read_file(tmp_path / "broken")
    second = begun(*declared).checked()
    write_start(second, 2)
    pool.run(2, "tests.lives:live", str(second.run_dir), stop_after=3)
    shutil.rmtree(plan.run_dir)
    assert "late of run@5: weights" in problems(plan_resume(second.run_dir, ["use.release=true"], world_size=2))["use.release"]
    export_run(str(second.run_dir), tmp_path / "out")
    told = (tmp_path / "out" / "README.md").read_text()
    assert f"- late of run@5: {must_not}" in told
    assert "- text of run@5: MIT\n" in told and "- text: MIT\n" in told and "look them up" not in told


def test_weights_carry_nothing_of_what_they_were_not_trained_on(pool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A source that joins later is not in the weights of an earlier step; new conditions of the provider hold at once."""
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path))
    words = two_sources(tmp_path)
    only_text = [word for word in words if "late" not in word]
    plan = plan_train(only_text, tmp_path / "runs", world_size=2).checked()
    write_start(plan, 2)
    pool.run(2, "tests.lives:live", str(plan.run_dir), stop_after=3)
    change(tmp_path / "late", policy=Policy(export="no"))
    joins = plan_resume(plan.run_dir, [words[-1], "use.release=false"], world_size=2).checked()
    write_start(joins, 2)
    assert {label: known.policy for label, known in carried.of_run(plan.run_dir).items()} == {
        "text": Policy(licence=("MIT",))}, "planned, and not read yet"
    pool.run(2, "tests.lives:live", str(plan.run_dir), stop_after=5)
    assert set(carried.of_run(plan.run_dir)) == {"text", "late"} and set(carried.of_run(plan.run_dir, 3)) == {"text"}
    for step, refused in ((3, False), (5, True)):
        begun = plan_train([*only_text, f"init_from={plan.run_dir}@{step}", "name=second"], tmp_path / "runs", world_size=2)
        assert bool(begun.problems) is refused
    change(tmp_path / "late", policy=Policy())
    plan_train([*only_text, f"init_from={plan.run_dir}@5", "name=second"], tmp_path / "runs", world_size=2).checked()


def test_what_weights_carry_whatever_became_of_the_records(pool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A ledger that was not copied, a history of an older version, a false start in the folder, other weights before step 1."""
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path))
    words, runs = two_sources(tmp_path), tmp_path / "runs"
    only_text = [word for word in words if "late" not in word]
    change(tmp_path / "late", policy=Policy(export="no"))

    def train(words: list[str], stop_after: int = 0) -> Path:
        plan = plan_train(words, runs, world_size=2).checked()
        write_start(plan, 2)
        pool.run(2, "tests.lives:live", str(plan.run_dir), stop_after=stop_after)
        return plan.run_dir

    def refused(init_from: Path) -> bool:
        plan = plan_train([*only_text, f"init_from={init_from}", "name=next"], runs, world_size=2)
        return [problem.key for problem in plan.problems] == ["use.release"]

    base = train([*words, "use.release=false"], stop_after=5)
    write_start(plan_train([*words, "use.release=false", "name=clean"], runs, world_size=2).checked(), 2)  # no rank ever trains
    clean = train([*only_text, "name=clean"])
    assert refused(base) and not refused(clean)

    shutil.copytree(base, runs / "no-ledger")
    (runs / "no-ledger" / "ledger.jsonl").unlink()
    assert refused(runs / "no-ledger")

    old = runs / "old"
    shutil.copytree(base, old)
    starts = [json.loads(line) for line in (old / "history.jsonl").read_text().splitlines()]
    (old / "history.jsonl").write_text("".join(json.dumps(
        {key: value for key, value in start.items() if key not in ("conditions", "carried")}) + "\n" for start in starts))
    assert refused(old)
    write_start(plan_resume(old, ["~data.sources.late"], world_size=2).checked(), 2)
    assert refused(old) and plan_resume(old, ["use.release=true"], world_size=2).problems

    first = plan_train([*only_text, f"init_from={clean}", "name=swapped"], runs, world_size=2).checked()
    write_start(first, 2)
    [problem] = plan_resume(first.run_dir, [f"init_from={base}"], world_size=2).problems
    assert problem.key == "use.release" and "late of run: " in problem.rule
    write_start(plan_resume(first.run_dir, [f"init_from={base}", "use.release=false"], world_size=2).checked(), 2)
    assert set(carried.of_run(first.run_dir)) == {"text of run@5", "late of run@5"}


def test_a_later_start_takes_back_what_lies_behind_its_step(tmp_path: Path) -> None:
    """Of starts in one folder: a false one before the run was begun, and one that goes on from the same step again."""
    for name, action, step in (("false", "start", 0), ("branch", "branch", 5), ("late", "resume", 9), ("again", "resume", 9)):
        append_history(tmp_path, Start(run_id="x", action=action, words=[name], step=step, world_size=1, engine="single",
                                       commit=None))
    begun, standing = carried._starts(tmp_path)
    assert [start["words"] for start in begun] == [["branch"], ["late"], ["again"]]
    assert [start["words"] for start in standing] == [["branch"], ["again"]]
