"""Random runs, as they are planned: stops, other ranks, new weights, joining sources, blocks and skips, each sample once.

That what is planned is what is read, tests/trainer/data/test_loader.py shows on real shards.
"""

import os
import signal
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import psutil
import pytest
from data_sets import write_tokens

from officina.trainer.config import DataConfig, SourceConfig
from officina.trainer.data import plan
from officina.trainer.data.order import Mixture, Order, Places, Skips, SourceRows, extend_timeline, timeline_of
from officina.trainer.data.plan import plan_steps

CASES = pytest.mark.parametrize("cases", [50, pytest.param(1000, marks=pytest.mark.slow)])


@dataclass
class Planner:
    """What `plan_steps` asks of a reader."""

    order: Order
    skips: Skips

    def place(self, samples: np.ndarray) -> Places:
        return self.order.place(samples)


def a_run(rng: np.random.Generator) -> tuple[DataConfig, list[tuple[int, int, int]], dict[str, SourceRows]]:
    """(data, [(ranks, steps, position)], sources): weights change, and sources join and leave, at random steps."""
    names = [f"s{i}" for i in range(rng.integers(1, 9))]
    known = {name: SourceRows(name * 8, int(rng.choice([1, 7, 40, 300]))) for name in names}

    def mixture() -> dict[str, SourceConfig]:
        some = [name for name in names if rng.random() < 0.7] or names[:1]
        return {name: SourceConfig(path=name, weight=int(rng.integers(1, 4))) for name in some}

    rows = int(rng.integers(1, 25))
    first = int(rng.integers(0, 100))
    skips = Skips([[first, first + int(rng.integers(0, 30))]])
    data = DataConfig(sources=mixture(), skip=skips.ranges, shuffle_block=int(rng.choice([1, 1, 4, 16])))
    position, parts = 0, []
    for ranks in rng.permutation([1, 2, 3, 7])[:rng.integers(1, 5)]:
        steps = int(rng.integers(1, 9))
        parts.append((int(ranks), steps, position))
        position = int(skips.indices(position, np.asarray([steps * rows - 1]))[0]) + 1
        if rng.random() < 0.5:
            data = extend_timeline(data, position, mixture())
    return data, [(rows, 0, 0), *parts], known


def planner_of(data: DataConfig, known: dict[str, SourceRows], seed: int) -> Planner:
    order = Order(Mixture(timeline_of(data)), known, seed=seed, shuffle=True, block=data.shuffle_block)
    return Planner(order, Skips(data.skip))


@CASES
def test_each_sample_once_whatever_the_ranks_stops_and_changes(cases: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plan, "_STEPS", 8)  # no part is longer
    rng = np.random.default_rng(cases)
    for case in range(cases):
        data, [(rows, _, _), *parts], known = a_run(rng)
        planner = planner_of(data, known, case)
        found: list[int] = []
        for ranks, steps, position in parts:
            shares = [range(rank * rows // ranks, (rank + 1) * rows // ranks) for rank in range(ranks)]
            planned = [plan_steps(planner, position, rows, own)[:steps] for own in shares]  # anew for each: as after a resume
            for step in range(steps):
                of_ranks = [of_rank[step] for of_rank in planned]
                assert len({each.first for each in of_ranks}) == 1 and len({str(each.source_rows) for each in of_ranks}) == 1
                batch = np.concatenate([each.own for each in of_ranks])
                assert np.array_equal(batch, of_ranks[0].samples)
                places = planner.place(batch)
                for field in ("source", "cursor", "epoch", "row"):
                    dealt = np.concatenate([getattr(each.places, field) for each in of_ranks])
                    assert np.array_equal(dealt, getattr(places, field))
                found += batch.tolist()
        samples = np.asarray(found)
        left_out = [k for a, b in data.skip for k in range(a, b)]
        assert np.array_equal(samples, np.setdiff1d(np.arange(samples[-1] + 1), left_out))  # none missed, none repeated
        whole = planner.place(np.arange(samples[-1] + 1))
        for number, name in enumerate(planner.order.names):
            here = whole.source == number
            assert np.array_equal(whole.cursor[here], np.arange(np.count_nonzero(here)))  # over every change of the mixture
            for epoch in range(np.count_nonzero(here) // known[name].rows):
                assert np.array_equal(np.sort(whole.row[here & (whole.epoch == epoch)]), np.arange(known[name].rows))


@CASES
def test_weights_are_met_to_one_row_in_each_batch_and_after_each_change(cases: int) -> None:
    rng = np.random.default_rng(cases)
    for _ in range(cases):
        data, [(rows, _, _), *_], _known = a_run(rng)
        mixture, stages = Mixture(timeline_of(data)), timeline_of(data)
        for i, stage in enumerate(stages):
            stop = stages[i + 1].from_sample if i + 1 < len(stages) else stage.from_sample + 5 * rows
            total = sum(stage.weights.values())
            for first in range(stage.from_sample, stop, rows):
                n = min(rows, stop - first)
                counts = mixture.cursors(first + n) - mixture.cursors(first)
                for name, count in zip(mixture.names, counts.tolist(), strict=True):
                    assert abs(count - n * stage.weights.get(name, 0) / total) < 2  # each prefix is met to less than one


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
