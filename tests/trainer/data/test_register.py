"""The register of use: what is counted over runs, and that a maximum holds whoever starts when."""

import contextlib
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from data_sets import make_run, write_tokens

from officina.trainer.config import RunConfig, UseConfig
from officina.trainer.data import register
from officina.trainer.data.gate import deadline, explained, judge_run, use_problems
from officina.trainer.data.policy import Policy, write_policy
from officina.trainer.data.register import Entry, Going, Uses, enter, read_entries
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


def test_an_entry_in_words() -> None:
    moment = datetime.now(UTC)
    entry = Entry(run="a.b", first=moment.isoformat(), last=moment.isoformat(), rows=3, planned_rows=9)
    assert (entry.counts(moment), entry.counts(moment + timedelta(days=2))) == (9, 3)
    assert replace(entry, done=True).counts(moment) == 3
