"""The order is a permutation, the mixture keeps its shares, and a change of it loses and repeats nothing."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from officina.trainer.config import DataConfig, SourceConfig, TimelineStage
from officina.trainer.data.order import (
    SMALL,
    Mixture,
    Order,
    Skips,
    SourceRows,
    extend_timeline,
    permute,
    permute_blocks,
    round_keys,
    sources_in_use,
    timeline_of,
)
from officina.trainer.errors import DataError

WEIGHTS = st.dictionaries(st.sampled_from("abcdefgh"), st.one_of(
    st.integers(1, 9).map(float), st.floats(1e-4, 100), st.sampled_from([0.7, 0.2, 0.1])), min_size=1)


def sources(weights: dict[str, float]) -> dict[str, SourceConfig]:
    return {name: SourceConfig(path=name, weight=weight) for name, weight in weights.items()}


@given(st.integers(1, 3 * SMALL), st.integers(0, 2**40), st.integers(0, 9))
@settings(max_examples=60, deadline=None)
def test_permutation_is_a_bijection(size: int, seed: int, epoch: int) -> None:
    out = permute(np.arange(size), size, round_keys(seed, "data", epoch))
    assert np.array_equal(np.sort(out), np.arange(size))


@pytest.mark.parametrize("size", [1, 2, 3, SMALL, SMALL + 1, 10**6, 10**6 + 3])
def test_permutation_of_awkward_sizes(size: int) -> None:
    out = permute(np.arange(size), size, round_keys(7, "data", 0))
    assert np.array_equal(np.sort(out), np.arange(size))


def test_permutation_of_a_huge_source_is_answered_for_single_indices() -> None:
    size = 3_700_000_000_000
    picked = np.asarray([0, 1, size // 2, size - 1])
    out = permute(picked, size, round_keys(0, "data", 0))
    assert len(set(out.tolist())) == 4 and out.min() >= 0 and out.max() < size
    assert np.array_equal(out[1:3], permute(picked[1:3], size, round_keys(0, "data", 0)))


def test_permutation_is_as_even_as_chance() -> None:
    """Neighbours and positions: chi-square of 64 x 64 cells of (place, image) near its mean, and another per epoch."""
    size = 64 * 64 * 64
    first = permute(np.arange(size), size, round_keys(0, "data", 0))
    cells = np.bincount((np.arange(size) * 64 // size) * 64 + first * 64 // size, minlength=4096)
    chi2 = ((cells - 64) ** 2 / 64).sum()
    assert abs(chi2 - 63 * 63) < 5 * (2 * 63 * 63) ** 0.5
    assert np.count_nonzero(np.abs(np.diff(first)) == 1) < 20  # two neighbours stay neighbours about twice by chance
    for keys in (round_keys(0, "data", 1), round_keys(1, "data", 0), round_keys(0, "datb", 0)):
        assert np.count_nonzero(first == permute(np.arange(size), size, keys)) < 20


@given(WEIGHTS, st.integers(1, 512), st.integers(0, 200_000))
@settings(max_examples=40, deadline=None)
def test_every_prefix_and_batch_has_its_shares(weights: dict[str, float], rows: int, first: int) -> None:
    mixture = Mixture([TimelineStage(weights=weights)])
    shares = np.asarray([weights[n] for n in mixture.names]) / sum(weights.values())
    counts = np.bincount(mixture.place(np.arange(first, first + rows))[0], minlength=len(shares))
    tiny = shares * 65536 < 1  # shares below 1/65536 are rounded up to it
    slack = 2 + rows * (1 + tiny.sum()) / 65536
    assert np.all(np.abs(counts - rows * shares) < slack)
    if first < 65536:  # rounding to 1/65536 of awkward weights grows slowly with the prefix
        prefix = mixture.cursors(first)
        assert prefix.sum() == first
        assert np.all(np.abs(prefix - first * shares) < 1 + (1 + len(shares)) * first / 65536)


def test_shares_with_a_common_denominator_are_met_exactly() -> None:
    mixture = Mixture([TimelineStage(weights={"a": 0.7, "b": 0.2, "c": 0.1})])
    for start in range(0, 1000, 10):
        assert np.bincount(mixture.place(np.arange(start, start + 10))[0]).tolist() == [7, 2, 1]


@given(st.lists(st.tuples(st.integers(1, 300), WEIGHTS), min_size=1, max_size=5), st.integers(0, 100))
@settings(max_examples=20, deadline=None)
def test_cursors_go_on_over_all_changes_of_the_mixture(stages: list[tuple[int, dict[str, float]]], more: int) -> None:
    """However the weights change: each source's cursors are 0, 1, 2, ... without gap or repetition."""
    data, position = DataConfig(sources=sources(stages[0][1])), 0
    for length, weights in stages:
        data = extend_timeline(data, position, sources(weights))
        position += length
    mixture = Mixture(timeline_of(data))
    source, cursor = mixture.place(np.arange(position + more))
    for number in range(len(mixture.names)):
        assert np.array_equal(cursor[source == number], np.arange(np.count_nonzero(source == number)))
    assert np.array_equal(mixture.cursors(position), np.bincount(source[:position], minlength=len(mixture.names)))


def test_timeline_grows_only_by_changes() -> None:
    plain = DataConfig(sources=sources({"a": 1, "b": 1}))
    assert extend_timeline(plain, 640, sources({"a": 2, "b": 2})).timeline == []
    changed = extend_timeline(plain, 640, sources({"a": 3, "c": 1}))
    assert [(s.from_sample, s.weights) for s in changed.timeline] == [
        (0, {"a": 1, "b": 1}), (640, {"a": 3, "c": 1})]
    assert sorted(changed.sources) == ["a", "b", "c"]  # b stays for the audit
    earlier = extend_timeline(changed, 320, sources({"c": 1}))  # resumed from an earlier checkpoint
    assert [s.from_sample for s in earlier.timeline] == [0, 320]
    assert extend_timeline(changed, 0, sources({"c": 5})).timeline == []


def test_past_samples_do_not_move_when_a_source_joins() -> None:
    before = DataConfig(sources=sources({"m": 0.6, "z": 0.4}))
    after = extend_timeline(before, 100, sources({"a": 0.5, "m": 0.3, "z": 0.2}))
    old, new = Mixture(timeline_of(before)), Mixture(timeline_of(after))
    old_source, old_cursor = old.place(np.arange(100))
    new_source, new_cursor = new.place(np.arange(100))
    assert [old.names[s] for s in old_source] == [new.names[s] for s in new_source]
    assert np.array_equal(old_cursor, new_cursor)


def test_sources_from() -> None:
    mixture = Mixture([TimelineStage(weights={"a": 1, "b": 1}),
                       TimelineStage(from_sample=50, weights={"b": 1, "c": 1})])
    assert mixture.sources_from(49) == {"a", "b", "c"} and mixture.sources_from(50) == {"b", "c"}


@given(st.lists(st.tuples(st.integers(1, 60), st.sets(st.sampled_from("abcd"), min_size=1)), min_size=1, max_size=4),
       st.integers(1, 250))
def test_sources_in_use_are_all_that_are_still_to_be_read(stages: list[tuple[int, set[str]]], position: int) -> None:
    """Also before the last decision on the mixture, where a run goes on from an older checkpoint."""
    firsts = np.cumsum([0, *(length for length, _ in stages[:-1])]).tolist()
    timeline = [TimelineStage(from_sample=first, weights=dict.fromkeys(names, 1.0))
                for first, (_, names) in zip(firsts, stages, strict=True)]
    data = DataConfig(sources=sources(dict.fromkeys("abcd", 1)), timeline=timeline)
    read = Mixture(timeline).sources_from(position)
    found, never = set(sources_in_use(data, position)), set("abcd") - {name for stage in timeline for name in stage.weights}
    assert found == read | never, "a source that no stage names is one that is about to join"
    assert set(sources_in_use(data)) == set(timeline[-1].weights) | never


@pytest.mark.parametrize(("stages", "told"), [
    ([], "start at 0"), ([5], "start at 0"), ([0, 7, 7], "rise"), ([0, 9, 3], "rise")])
def test_timelines_that_make_no_sense(stages: list[int], told: str) -> None:
    with pytest.raises(DataError, match=told):
        Mixture([TimelineStage(from_sample=first, weights={"a": 1}) for first in stages])


def test_a_stage_or_a_run_without_sources() -> None:
    with pytest.raises(DataError, match=r"has no source"):
        Mixture([TimelineStage(weights={})])
    with pytest.raises(DataError, match=r"data\.sources is empty.*officina data build"):
        timeline_of(DataConfig())


@given(st.dictionaries(st.sampled_from("abc"), st.integers(1, 40), min_size=1), st.booleans(), st.integers(0, 5),
       st.integers(1, 50))
@settings(max_examples=100, deadline=None)
def test_each_epoch_has_each_row_once(rows: dict[str, int], shuffle: bool, seed: int, block: int) -> None:
    mixture = Mixture([TimelineStage(weights={name: i + 1.0 for i, name in enumerate(rows)})])
    order = Order(mixture, {n: SourceRows(n * 9, r) for n, r in rows.items()}, seed=seed, shuffle=shuffle,
                  block=block)
    places = order.place(np.arange(500))
    for number, name in enumerate(order.names):
        here = places.source == number
        assert np.array_equal(places.epoch[here], places.cursor[here] // rows[name])
        for epoch in range(int(places.epoch[here].max(initial=-1))):  # the whole ones
            of_epoch = places.row[here & (places.epoch == epoch)]
            assert np.array_equal(np.sort(of_epoch), np.arange(rows[name]))
            if not shuffle:
                assert np.array_equal(of_epoch, np.arange(rows[name]))


@given(st.integers(1, 3000), st.integers(2, 400), st.integers(0, 9))
@settings(max_examples=150, deadline=None)
def test_blocks_stay_together_and_move(size: int, block: int, epoch: int) -> None:
    keys = round_keys(1, "set", epoch)
    rows = permute_blocks(np.arange(size), size, block, keys)
    assert np.array_equal(np.sort(rows), np.arange(size))
    assert np.array_equal(permute_blocks(np.arange(size)[::-1], size, block, keys), rows[::-1])  # one by one, it is the same
    for first in range(0, size, block):
        here = np.sort(rows[first:first + block])
        gaps = np.diff(here, append=here[0] + size)  # on a ring, since blocks begin anywhere
        assert np.count_nonzero(gaps != 1) <= 1
    if size > 100 and block > 20:
        assert not np.array_equal(rows, permute_blocks(np.arange(size), size, block, round_keys(1, "set", epoch + 10)))
        assert np.abs(np.diff(rows[:block])).max() > 1  # shuffled inside


def test_blocks_of_a_huge_source_spread_evenly() -> None:
    size, block = 3_700_000_000, 256
    firsts = permute_blocks(np.arange(0, 4096 * block, block), size, block, round_keys(0, "huge", 0))
    tenths = np.bincount(firsts * 10 // size, minlength=10)
    chi2 = ((tenths - 409.6) ** 2 / 409.6).sum()
    assert chi2 < 27.9  # 99.9 % of chance, 9 degrees of freedom


@given(st.lists(st.tuples(st.integers(0, 300), st.integers(0, 60)), max_size=6), st.integers(0, 200), st.integers(1, 80))
@settings(deadline=None)
def test_skips(ranges: list[tuple[int, int]], first: int, n: int) -> None:
    ranges = [[a, a + length] for a, length in ranges]
    skips = Skips(ranges)
    kept = [k for k in range(first, 1000) if not any(a <= k < b for a, b in ranges)][:n]
    found = skips.indices(first, np.arange(n))
    assert found.tolist() == kept
    stop = kept[-1] + 1
    left_out = {k for a, b in skips.within(first, stop) for k in range(a, b)}
    assert left_out == set(range(first, stop)) - set(kept)
