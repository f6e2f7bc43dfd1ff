"""The register of use: what is counted over runs, and that a maximum holds whoever starts when."""

import contextlib
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path

import numpy as np
import pytest
from data_sets import make_run, write_tokens
from hypothesis import given, settings
from hypothesis import strategies as st

from officina.trainer.config import CustomModelConfig, RunConfig, TimelineStage, UseConfig
from officina.trainer.data import register
from officina.trainer.data.describe import change as change_policy
from officina.trainer.data.gate import deadline, explained, judge_run, use_problems
from officina.trainer.data.order import Mixture
from officina.trainer.data.policy import Policy, write_policy
from officina.trainer.data.reader import RowReader
from officina.trainer.data.register import Entry, Going, Uses, enter, read_entries
from officina.trainer.data.shard_writer import write_records
from officina.trainer.errors import DataError


def make_set(folder: Path, policy: Policy | None = None, **about: object) -> Path:
    folder.mkdir()
    if policy:
        about["policy_sha256"] = write_policy(folder, policy)
    write_tokens(folder, {"train": [50, 31, 80], "validation": [20]}, **about)  # 20 rows of 8 tokens
    return folder


def limited_run(folder: Path, name: str = "one", steps: int = 5, **use: object) -> RunConfig:
    return replace(make_run({"s": (folder, 1)}, rows=2), name=name, steps=steps, use=UseConfig(**use))


def test_runs_are_counted_over_runs(tmp_path: Path) -> None:
    folder = make_set(tmp_path / "s", Policy(max_runs=1))
    first, second = limited_run(folder), limited_run(folder, "two")
    assert not use_problems(first)
    enter(first, Going("aa"))
    assert not use_problems(first, Going("aa", 2, 4)), "its own entry does not count against it"
    assert "may be used by 1 runs, and this would be number 2" in str(use_problems(second)[0])
    assert "number 2" in str(use_problems(first, Going("", 2, 4, True))[0]), "a branch is another use"
    with pytest.raises(DataError, match=r"number 2; another run was entered at the same moment"):
        enter(second, Going("bb"))
    assert [e.run for e in read_entries(folder / "use")] == ["aa.one"], "a start that was refused leaves nothing"
    (tmp_path / "t").mkdir()
    write_tokens(tmp_path / "t", {"train": [60]}, policy_sha256=write_policy(tmp_path / "t", Policy(max_runs=9)))
    with pytest.raises(DataError, match="number 2"):
        enter(replace(make_run({"a": (tmp_path / "t", 1), "s": (folder, 1)}, rows=2), name="two", steps=5), Going("bb"))
    assert read_entries(tmp_path / "t" / "use") == [], "nor beside the data that it might have used"


def test_a_start_that_read_nothing_counts_for_a_day(tmp_path: Path) -> None:
    folder = make_set(tmp_path / "s", Policy(max_runs=1))
    enter(limited_run(folder), Going("aa"))
    tomorrow = datetime.now(UTC) + timedelta(days=1, minutes=1)
    assert not use_problems(limited_run(folder, "two"), now=tomorrow)
    Uses(limited_run(folder), "aa").record(2)
    assert use_problems(limited_run(folder, "two"), now=tomorrow + timedelta(days=9)), "it has read, so it counts for good"


@pytest.mark.parametrize(("limit", "told"), [({"max_tokens": 200}, "may give 200 tokens to all runs together"),
                                             ({"max_epochs": 1.25}, "may be read 1.25 times by all runs together")])
def test_tokens_and_passes_are_counted_over_runs(tmp_path: Path, limit: dict, told: str) -> None:
    folder = make_set(tmp_path / "s", Policy(**limit))  # 25 rows of 8 tokens, of 20 there are
    assert told in str(use_problems(limited_run(folder, steps=13))[0]) and not use_problems(limited_run(folder, steps=12))
    first = limited_run(folder, steps=10)
    enter(first, Going("aa"))
    second = limited_run(folder, "two", steps=5)
    assert told in str(use_problems(second)[0]), "what is planned counts while the run is alive"
    assert "5 rows are left for this run, and it plans 10" in str(use_problems(second)[0])
    uses = Uses(first, "aa")
    uses.record(8)
    uses.record(6)
    assert read_entries(folder / "use")[0].rows == 8, "a resume from an earlier checkpoint takes nothing back"
    uses.record(8, done=True)
    assert not use_problems(second)
    enter(second, Going("bb"))
    assert [(e.run, e.rows, e.planned_rows, e.done) for e in read_entries(folder / "use")] == [
        ("aa.one", 8, 20, True), ("bb.two", 0, 10, False)]
    assert use_problems(replace(second, steps=9), Going("bb", 5, 10)) and not use_problems(replace(second, steps=8),
                                                                                          Going("bb", 5, 10))


def test_days_begin_with_the_first_use(tmp_path: Path) -> None:
    folder = make_set(tmp_path / "s", Policy(max_days=30))
    run = limited_run(folder)
    assert deadline(run) is None and "this is the first use" in explained(judge_run(run))[0]
    enter(run, Going("aa"))
    ends = deadline(run)[0]
    assert timedelta(days=29) < ends - datetime.now(UTC) <= timedelta(days=30)
    assert not use_problems(limited_run(folder, "two"), now=ends - timedelta(seconds=1))
    assert "for 30 days from the first use, which was on" in str(use_problems(limited_run(folder, "two"), now=ends)[0])


def test_the_register_may_lie_elsewhere_and_is_shared_by_copies(tmp_path: Path) -> None:
    one, other = make_set(tmp_path / "s", Policy(max_runs=1)), make_set(tmp_path / "t", Policy(max_runs=1))
    register = str(tmp_path / "register")
    enter(limited_run(one, register=register), Going("aa"))
    assert not (one / "use").exists()
    assert use_problems(limited_run(other, "two", register=register)), "the same content, wherever it lies"


def test_a_register_that_cannot_be_written_or_read(tmp_path: Path) -> None:
    folder = make_set(tmp_path / "s", Policy(max_runs=3))
    (tmp_path / "file").write_text("")
    with pytest.raises(DataError, match=r"data\.sources\.s has a maximum of use.*use\.register=DIR"):
        enter(limited_run(folder, register=str(tmp_path / "file")), Going("aa"))
    (folder / "use").mkdir()
    (folder / "use" / "x.json").write_text("{")
    assert "no entry of a register of use" in str(use_problems(limited_run(folder))[0])


def test_unlimited_data_is_not_written_to(tmp_path: Path) -> None:
    folder = make_set(tmp_path / "s", Policy(purpose=("research",)))
    enter(limited_run(folder), Going("aa"))
    Uses(limited_run(folder), "aa").record(4)
    assert not (folder / "use").exists()


@pytest.mark.parametrize("first", [0, 1])
def test_starts_at_the_same_moment_keep_the_maximum(first: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The other start happens between this one's writing and looking, from its beginning to its end."""
    folder = make_set(tmp_path / "s", Policy(max_runs=1))
    runs = [limited_run(folder, "one"), limited_run(folder, "two")]
    mine, other = runs[first], runs[1 - first]
    entered, look = [], register.tally

    def start(run: RunConfig) -> None:
        with contextlib.suppress(DataError):
            enter(run, Going("x"))
            entered.append(run.name)

    def looks_late(run: RunConfig, *rest: object) -> register.Tally:
        if run is mine and not entered:
            monkeypatch.setattr(register, "tally", look)
            start(other)
        return look(run, *rest)

    monkeypatch.setattr(register, "tally", looks_late)
    start(mine)
    assert len(entered) <= 1 and [e.run for e in read_entries(folder / "use")] == [f"x.{name}" for name in entered]


ROWS_OF = st.fixed_dictionaries({name: st.integers(1, 5).map(float) for name in "asz"})


@given(first=ROWS_OF, later=st.one_of(st.none(), ROWS_OF), change=st.integers(1, 40), rows=st.integers(1, 5),
       steps=st.integers(1, 9), done=st.integers(0, 4), branch=st.booleans(),
       skip=st.lists(st.builds(lambda a, n: [a, a + n], st.integers(0, 40), st.integers(1, 9)), max_size=2))
@settings(deadline=None, max_examples=60)
def test_what_is_planned_and_read_of_a_mixture_is_counted_to_the_row(first, later, change, rows, steps, done, branch, skip,
                                                                     tmp_path_factory) -> None:
    """Against a walk over the samples: other sources, new weights, samples left out, and a branch, which counts from its own
    beginning."""
    folder = tmp_path_factory.mktemp("mixture")
    timeline = [TimelineStage(weights=first)] + ([TimelineStage(from_sample=change, weights=later)] if later else [])
    sets = {name: (make_set(folder / name, base=ord(name)), first[name]) for name in "asz"}  # of three contents
    run = make_run(sets, rows=rows, skip=skip, timeline=timeline)
    run = replace(run, name="one", steps=done + steps)
    kept = [k for k in range(200) if not any(a <= k < b for a, b in skip)]
    position = kept[done * rows - 1] + 1 if done else 0
    begun, stop = position if branch else 0, kept[kept.index(next(k for k in kept if k >= position)) + steps * rows - 1] + 1
    mixture = Mixture(timeline)
    names = [mixture.names[number] for number in mixture.place(np.arange(stop))[0]]
    going = Going("aa", done, position, branch)
    count, read = names[begun:].count("s"), names[begun:position].count("s")
    for limit, allowed in ((count, True), (count - 1, False)):
        change_policy(folder / "s", policy=Policy(max_tokens=max(limit, 0) * 8))
        assert (not use_problems(run, going)) is (allowed or count == 0)
    change_policy(folder / "s", policy=Policy(max_tokens=count * 8))
    enter(run, going)
    [entry] = read_entries(folder / "s" / "use")
    assert (entry.first_sample, entry.planned_rows, entry.rows, entry.row_tokens) == (begun, count, 0, 8)
    uses = Uses(run, "aa")
    for at, wanted in ((position, read), (stop, count)):
        uses.record(at)
        assert read_entries(folder / "s" / "use")[0].rows == wanted


def test_a_row_counts_a_record_or_all_that_a_packed_row_may_hold(tmp_path: Path) -> None:
    write_records(tmp_path / "r", [b"x"] * 9, name="r")
    change_policy(tmp_path / "r", policy=Policy(max_tokens=10, max_epochs=1))
    records = replace(make_run({"s": (tmp_path / "r", 1)}, seq_len=1, rows=3), name="one",
                      model=CustomModelConfig(factory="a:b", loss="a:b", decoder="a:b"))
    assert not use_problems(replace(records, steps=3))
    assert "may give 10 tokens to all runs together, and this would make 12" in str(use_problems(replace(records, steps=4))[0])
    folder = make_set(tmp_path / "s", Policy(max_tokens=9 * 6))  # documents of 50, 31 and 80 tokens, rows of 9
    packed = replace(make_run({"s": (folder, 1)}, rows=2, packing="best_fit"), name="one", steps=3)
    assert not use_problems(packed) and "this would make 72" in str(use_problems(replace(packed, steps=4))[0])
    enter(packed, Going("aa"))
    [entry] = read_entries(folder / "use")
    assert (entry.row_tokens, entry.split_rows) == (9, RowReader(packed).rows["s"])


def test_the_earliest_end_of_all_sources_stops_the_run(tmp_path: Path) -> None:
    policies = {"a": Policy(not_after="2931-05-01"), "b": Policy(not_after="2930-01-31"), "c": Policy(),
                "d": Policy(max_days=9)}
    run = make_run({name: (make_set(tmp_path / name, policy), 1) for name, policy in policies.items()})
    assert deadline(run) == (datetime(2930, 2, 1, tzinfo=UTC), "b")
    enter(run, Going("aa"))
    ended, source = deadline(run)
    assert source == "d" and timedelta(days=8) < ended - datetime.now(UTC) <= timedelta(days=9)


def test_an_entry_in_words() -> None:
    moment = datetime.now(UTC)
    entry = Entry(run="a.b", first=moment.isoformat(), last=moment.isoformat(), rows=3, planned_rows=9)
    assert (entry.counts(moment), entry.counts(moment + timedelta(days=2))) == (9, 3)
    assert replace(entry, done=True).counts(moment) == 3


@pytest.mark.parametrize("copies", [False, True])
def test_one_data_set_under_two_names_is_counted_as_one(copies: bool, tmp_path: Path) -> None:
    """Two names of one folder, or copies with one register: the maximum is of the content."""
    one = make_set(tmp_path / "s", Policy(max_epochs=1))  # 20 rows
    other = make_set(tmp_path / "t", Policy(max_epochs=1)) if copies else Path(f"{tmp_path}/t/../s")
    (tmp_path / "t").mkdir(exist_ok=True)
    use = UseConfig(register=str(tmp_path / "register") if copies else "")

    def run_of(name: str, steps: int, **data: object) -> RunConfig:
        return replace(make_run({"a": (one, 1), "b": (other, 3)}, rows=2, **data), name=name, steps=steps, use=use)

    first = run_of("one", 6)
    assert not use_problems(run_of("one", 10))
    for problem in use_problems(run_of("one", 11)):
        assert "may be read 1 times by all runs together, and this would make 1.100" in problem.rule
    assert {problem.key for problem in use_problems(run_of("one", 11))} == {"data.sources.a.path", "data.sources.b.path"}
    enter(first, Going("aa"))
    folder = next((tmp_path / "register").iterdir()) if copies else one / "use"
    [entry] = read_entries(folder)
    assert (entry.planned_rows, entry.rows) == (12, 0)
    Uses(first, "aa").record(12, done=True)
    assert read_entries(folder)[0].rows == 12
    assert not use_problems(run_of("two", 4)) and use_problems(run_of("two", 5))
    longer = replace(first, steps=10)
    enter(longer, Going("aa", 6, 12))
    moved = run_of("one", 10, timeline=[TimelineStage(weights={"a": 1.0}), TimelineStage(from_sample=12, weights={"b": 1.0})])
    enter(moved, Going("aa", 6, 12))
    Uses(moved, "aa").record(20)
    assert read_entries(folder)[0].rows == 20, "what the other name gave before it left counts too"
    assert use_problems(replace(moved, steps=11), Going("aa", 6, 12))


def test_a_name_that_left_may_be_gone_from_the_disk(tmp_path: Path) -> None:
    folder = make_set(tmp_path / "s", Policy(max_epochs=1))
    run = make_run({"a": (tmp_path / "gone", 1), "b": (folder, 1)}, rows=2, timeline=[
        TimelineStage(weights={"a": 1.0}), TimelineStage(from_sample=10, weights={"b": 1.0})])
    enter(replace(run, name="one", steps=15), Going("aa", 5, 10))
    assert [entry.planned_rows for entry in read_entries(folder / "use")] == [20]


def test_a_run_is_counted_from_its_first_step_and_while_it_trains(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever kills it, and however rarely it saves."""
    folder = make_set(tmp_path / "s", Policy(max_runs=1))
    enter(limited_run(folder), Going("aa"))
    uses, later = Uses(limited_run(folder), "aa"), datetime.now(UTC) + timedelta(days=2)
    assert not use_problems(limited_run(folder, "two"), now=later)
    uses.step(2)
    assert use_problems(limited_run(folder, "two"), now=later), "one step is a use, for good"
    uses.step(4)
    assert read_entries(folder / "use")[0].rows == 2, "not every step is written down"
    monkeypatch.setattr(register, "EVERY_S", 0)
    uses.step(6)
    assert read_entries(folder / "use")[0].rows == 6
    free = make_set(tmp_path / "free")
    monkeypatch.setattr(register, "Mixture", None)
    Uses(limited_run(free), "aa").step(2)


@pytest.mark.parametrize("mark", ["staged.json", "remote.json"])
def test_a_staged_copy_is_counted_where_all_copies_are(mark: str, tmp_path: Path) -> None:
    """A copy does not have the register of what it is a copy of: beside it, each would count from zero."""
    folder = make_set(tmp_path / "s", Policy(max_runs=1))
    (folder / mark).write_text('{"origin": "/data/s"}' if mark == "staged.json" else '{"url": "s3://b/s", "budget_bytes": 1}')
    [problem] = use_problems(limited_run(folder))
    assert f"data.sources.s: {folder} is a copy ({mark})" in problem.rule and problem.remedy.endswith("use.register=DIR")
    with pytest.raises(DataError, match=r"use\.register=DIR"):
        enter(limited_run(folder), Going("aa"))
    assert not (folder / "use").exists()
    shared = limited_run(folder, register=str(tmp_path / "register"))
    assert not use_problems(shared)
    enter(shared, Going("aa"))
    assert use_problems(limited_run(folder, "two", register=str(tmp_path / "register")))
    change_policy(folder, policy=Policy(purpose=("research",)))
    assert not use_problems(limited_run(folder, purpose="research")), "without a maximum there is nothing to count"
