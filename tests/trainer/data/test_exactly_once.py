"""Random lives of runs: stops, kills, other ranks, new weights, sources that join and leave: each row once.

A thousand as they are planned, where no file is touched, and some read by the loader from shards.
"""

import json
import os
import signal
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from itertools import count, islice
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
from data_sets import make_run, write_tokens
from hypothesis import given, settings
from hypothesis import strategies as st

from officina.trainer.batch import IGNORE
from officina.trainer.config import RunConfig, SourceConfig
from officina.trainer.data import plan
from officina.trainer.data.loader import Loader
from officina.trainer.data.loader_state import check_state, make_state
from officina.trainer.data.manifest import open_dataset
from officina.trainer.data.order import Mixture, Order, Places, Skips, SourceRows, extend_timeline, timeline_of
from officina.trainer.data.plan import plan_steps

ROWS = {"a": 1, "b": 7, "c": 7, "d": 40, "e": 40, "f": 90, "g": 300, "h": 300}
"""Of each source, in one epoch."""
SEQ_LEN = 8


# ---- lives -----------------------------------------------------------------------------------------------------------
@dataclass(frozen=True)
class Leg:
    """From one start of a run to its end."""

    ranks: int
    saved: int
    """Steps to its last checkpoint, where the next leg goes on."""
    lost: int
    """Steps after it, which a kill takes back."""
    back: int
    """How many checkpoints before the newest it begins."""
    weights: dict[str, float] | None
    """The mixture from its first step on; none = as before."""
    skip: list[int]
    """A range of samples that is left out from then on."""


@dataclass(frozen=True)
class Life:
    """All that is drawn of a run."""

    seed: int
    rows: int
    """Of a global batch."""
    block: int
    weights: dict[str, float]
    legs: list[Leg]


WEIGHTS = st.dictionaries(st.sampled_from(sorted(ROWS)), st.sampled_from([1, 2, 3, 7, 0.7, 0.2, 0.1]), min_size=1)
LEGS = st.builds(Leg, ranks=st.sampled_from([1, 2, 3, 7]), saved=st.integers(0, 6), lost=st.sampled_from([0, 0, 1, 3]),
                 back=st.sampled_from([0, 0, 0, 1, 2]), weights=st.one_of(st.none(), WEIGHTS),
                 skip=st.builds(lambda first, n: [first, first + n], st.integers(0, 120), st.integers(0, 30)))
LIVES = st.builds(
    Life, seed=st.integers(0, 9), rows=st.integers(1, 16), block=st.sampled_from([1, 1, 4, 16]), weights=WEIGHTS,
    legs=st.lists(LEGS, min_size=1, max_size=4))

Row = tuple[str, int]
"""A source and the number of its row."""


@dataclass
class Read:
    """What a leg read: the rows of each step and the position after it, and what its checkpoint keeps."""

    rows: list[list[Row]] = field(default_factory=list)
    stops: list[int] = field(default_factory=list)
    state: dict[str, Any] | None = None


ReadLeg = Callable[[RunConfig, Leg, int, dict[str, Any] | None], Read]
"""Reads a leg of a run from a position on, as all its ranks do; the state is that of the checkpoint it goes on from."""


def live(life: Life, paths: dict[str, Path], read_leg: ReadLeg) -> tuple[RunConfig, dict[int, Row]]:
    """The run at its end, and the row that was trained on for each sample: what a kill took back counts no more."""
    def mixture(weights: dict[str, float]) -> dict[str, SourceConfig]:
        return {name: SourceConfig(path=str(paths[name]), weight=weight) for name, weight in weights.items()}

    run = make_run({name: (paths[name], weight) for name, weight in life.weights.items()}, seq_len=SEQ_LEN, rows=life.rows,
                   seed=life.seed, shuffle_block=life.block, mask_documents=False)
    left_out: set[int] = set()
    checkpoints, trained = [(0, None)], {}
    for leg in life.legs:
        del checkpoints[max(1, len(checkpoints) - leg.back):]
        position, state = checkpoints[-1]
        trained = {k: row for k, row in trained.items() if k < position}
        left_out |= set(range(*leg.skip))
        run = replace(run, data=replace(run.data, skip=[*run.data.skip, leg.skip]))
        if leg.weights is not None:
            run = replace(run, data=extend_timeline(run.data, position, mixture(leg.weights)))
        read = read_leg(run, leg, position, state)
        assert len(read.rows) == leg.saved + leg.lost
        for rows, stop in islice(zip(read.rows, read.stops, strict=True), leg.saved):
            samples = list(islice((k for k in count(position) if k not in left_out), life.rows))
            assert stop == samples[-1] + 1
            trained |= dict(zip(samples, rows, strict=True))
            position = stop
        if leg.saved:
            checkpoints.append((position, json.loads(json.dumps(read.state))))
    assert set(range(checkpoints[-1][0])) - left_out <= trained.keys() <= set(range(checkpoints[-1][0]))  # none is missed
    return run, trained


def assert_exactly_once(run: RunConfig, trained: dict[int, Row], fingerprints: dict[str, str]) -> None:
    """Each source gives its rows once in each epoch, over all stops and changes; samples left out keep the rows they had."""
    order, samples = order_of(run, fingerprints), np.arange(max(trained, default=-1) + 1)
    places = order.place(samples)
    planned = [(order.names[number], row) for number, row in zip(places.source.tolist(), places.row.tolist(), strict=True)]
    assert trained == {k: planned[k] for k in trained}  # the past stands, whatever was changed since
    for number, name in enumerate(order.names):
        here = places.source == number
        assert np.array_equal(places.cursor[here], np.arange(np.count_nonzero(here)))
        of_source = places.row[here]
        for first in range(0, len(of_source), ROWS[name]):
            epoch = np.sort(of_source[first:first + ROWS[name]])
            if len(epoch) == ROWS[name]:
                assert np.array_equal(epoch, np.arange(ROWS[name]))
            else:
                assert len(np.unique(epoch)) == len(epoch) and epoch[-1] < ROWS[name]
    stages = timeline_of(run.data)
    for stage, stop in zip(stages, [*(s.from_sample for s in stages[1:]), len(samples)], strict=True):
        of_stage, total = places.source[stage.from_sample:stop], sum(stage.weights.values())
        for number, name in enumerate(order.names):
            counts = np.cumsum(of_stage == number)
            shares = np.arange(1, len(of_stage) + 1) * stage.weights.get(name, 0) / total
            assert np.all(np.abs(counts - shares) < 1)  # at every sample, so that a single batch is within two


def order_of(run: RunConfig, fingerprints: dict[str, str]) -> Order:
    """Built apart from the reader's."""
    known = {name: SourceRows(fingerprint, ROWS[name]) for name, fingerprint in fingerprints.items()}
    return Order(Mixture(timeline_of(run.data)), known, seed=run.seed, shuffle=True, block=run.data.shuffle_block)


@pytest.fixture(scope="module", autouse=True)
def short_plans() -> Iterator[None]:
    """So that legs go over the end of one."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(plan, "_STEPS", 4)
        yield


# ---- as planned ------------------------------------------------------------------------------------------------------
FINGERPRINTS = {name: f"{ord(name):08x}" for name in ROWS}


@dataclass
class Planner:
    """What planning and state ask of a reader."""

    order: Order
    skips: Skips
    fingerprints: dict[str, str]
    packing: dict[str, str]
    seq_len: int

    def place(self, samples: np.ndarray) -> Places:
        return self.order.place(samples)


def plan_leg(run: RunConfig, leg: Leg, position: int, state: dict[str, Any] | None) -> Read:
    order, read = order_of(run, FINGERPRINTS), Read()
    needed = {name: FINGERPRINTS[name] for name in order.mixture.sources_from(position)}
    planner = Planner(order, Skips(run.data.skip), needed, {}, SEQ_LEN)
    earlier = check_state(run, planner, position, state) if state else {}
    planned: list[list[plan.PlannedStep]] = []
    for rank in range(leg.ranks):
        own, steps, first = run.batch.rows_of_rank(rank, leg.ranks), [], position
        while len(steps) < leg.saved + leg.lost:
            steps += plan_steps(planner, first, run.batch.rows, own)
            first = steps[-1].stop
        planned.append(steps[:leg.saved + leg.lost])
    for of_ranks in zip(*planned, strict=True):
        samples, rows = of_ranks[0].samples, []
        assert np.array_equal(np.concatenate([each.own for each in of_ranks]), samples)
        for each in of_ranks:
            rows += [(order.names[number], row) for number, row in zip(
                each.places.source.tolist(), each.places.row.tolist(), strict=True)]
        for each in of_ranks:
            assert each.first == (read.stops or [position])[-1] and np.array_equal(each.samples, samples)
            assert each.source_rows == Counter(name for name, _ in rows)
        read.rows.append(rows)
        read.stops.append(of_ranks[0].stop)
        if len(read.stops) == leg.saved:
            read.state = make_state(run, planner, read.stops[-1], earlier)
            all_open = replace(planner, fingerprints=FINGERPRINTS)
            assert read.state == make_state(run, all_open, read.stops[-1], {})  # sources that left are not forgotten
    return read


@given(LIVES)
@settings(max_examples=1000, deadline=None)
def test_each_row_once_in_a_thousand_lives_as_planned(life: Life) -> None:
    run, trained = live(life, {name: Path(name) for name in ROWS}, plan_leg)
    assert_exactly_once(run, trained, FINGERPRINTS)


# ---- as read ---------------------------------------------------------------------------------------------------------
@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Data sets whose tokens tell source and row."""
    folders = {name: tmp_path_factory.mktemp("lives") / name for name in ROWS}
    for number, (name, folder) in enumerate(folders.items()):
        write_tokens(folder, {"train": [5, SEQ_LEN * ROWS[name] - 4]}, base=10**6 * number, shard_bytes=500)
    return folders


def load_leg(run: RunConfig, leg: Leg, position: int, state: dict[str, Any] | None) -> Read:
    read, names = Read(), list(ROWS)
    with ExitStack() as stack:
        loaders = [stack.enter_context(Loader(run, rank=rank, world_size=leg.ranks, position=position))
                   for rank in range(leg.ranks)]
        for loader in loaders if state else ():
            loader.check_state(state)
        for _ in range(leg.saved + leg.lost):
            found = [loader.next_step() for loader in loaders]
            fields = [micro.fields for step in found for micro in step.micros]
            firsts = [first for each in fields for first in each["tokens"][(each["labels"] != IGNORE).any(1), 0].tolist()]
            read.rows.append([(names[first // 10**6], first % 10**6 // SEQ_LEN) for first in firsts])
            assert all(step.source_rows == Counter(name for name, _ in read.rows[-1]) for step in found)
            [stop] = {step.stop_sample for step in found}
            read.stops.append(stop)
            if len(read.stops) == leg.saved:
                read.state = loaders[-1].state(stop)
    return read


@given(life=LIVES)
@settings(max_examples=15, deadline=None)
def test_each_row_once_in_lives_on_shards(life: Life, shards: dict[str, Path]) -> None:
    run, trained = live(life, shards, load_leg)
    assert_exactly_once(run, trained, {name: open_dataset(path).manifest.fingerprint for name, path in shards.items()})


# ---- what is left after a kill ---------------------------------------------------------------------------------------
_READ = """
import sys
from pathlib import Path
from data_sets import make_run
from officina.trainer.data.loader import Loader
loader = Loader(make_run({"a": (Path(sys.argv[1]), 1)}, read=sys.argv[2]), rank=0, world_size=1, position=0)
while True:
    loader.next_step()
    print("read", flush=True)
"""


@pytest.mark.parametrize("read", ["mmap", "pread"])
def test_kill_9_leaves_nothing_and_nothing_is_written(tmp_path: Path, read: str) -> None:
    write_tokens(tmp_path / "a", {"train": [50] * 100})
    shared = set(os.listdir("/dev/shm")) if os.path.isdir("/dev/shm") else set()
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "a").rglob("*")}
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[2]), "TMPDIR": str(tmp_path / "tmp")}
    (tmp_path / "tmp").mkdir()
    process = subprocess.Popen([sys.executable, "-c", _READ, str(tmp_path / "a"), read], stdout=subprocess.PIPE, text=True,
                               env=environment, cwd=tmp_path / "tmp")
    for _ in range(20):
        assert process.stdout.readline() == "read\n"
    children = psutil.Process(process.pid).children(recursive=True)
    process.send_signal(signal.SIGKILL)
    process.wait()
    process.stdout.close()
    assert children == []
    mine = {name for name in set(os.listdir("/dev/shm")) - shared if str(process.pid) in name} if shared else set()
    assert not mine and not list((tmp_path / "tmp").iterdir())
    assert before == {path: path.stat().st_mtime_ns for path in (tmp_path / "a").rglob("*")}
