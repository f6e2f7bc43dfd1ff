"""Programs that take turns: one runs at a time, their blocks are what was timed, and what fails is told."""

import math
import time
from functools import partial
from itertools import pairwise

import pytest

from officina.benchmarks.turns import Block, Entrant, blocks_in, compare, median_interval, race


def sleeper(turns, env, *, step_s, log=None):
    for i in range(10**6):
        turns.at_step()
        began = time.time()
        time.sleep(step_s)
        if log:
            with open(log, "a") as file:
                file.write(f"{step_s} {env.rank} {i} {began} {time.time()}\n")
        turns.facts["steps"] = turns.facts.get("steps", 0) + 1


def breaks(turns, env, *, at):
    for i in range(10**6):
        turns.at_step()
        if i == at and env.rank == env.world_size - 1:
            raise ArithmeticError(f"broken at step {i}")


def stuck(turns, env):
    turns.at_step()
    time.sleep(1000)


@pytest.mark.parametrize("alternate", [True, False])
def test_blocks_are_timed_and_turns_do_not_overlap(tmp_path, alternate):
    log = tmp_path / "log"
    found = race({"slow": Entrant(partial(sleeper, step_s=0.02, log=log), ranks=2),
                  "fast": Entrant(partial(sleeper, step_s=0.01, log=log))},
                 blocks=3, steps=4, lead=2, warmup=1, alternate=alternate)
    assert [len(blocks) for blocks in found.values()] == [3, 3]
    for block in (block for blocks in found.values() for block in blocks):
        assert block.facts.pop("cpu_s") < block.seconds / 2  # who sleeps computes little
        assert block.facts == {"steps": 4}  # the lead is not in it
    steps = sorted((float(began), float(ended), who, rank) for who, rank, _, began, ended in map(str.split, log.open()))
    assert len(steps) == 4 * 6 * 3  # rounds x steps x processes
    for (_, end, who, _), (begin, _, next_one, _) in pairwise(steps):
        assert who == next_one or begin >= end - 1e-3
    of_rank_0 = [step for step in steps if step[3] == "0"]
    for name, step_s in (("slow", "0.02"), ("fast", "0.01")):  # a block lies between the end of its lead and the next turn
        own = [step for step in of_rank_0 if step[2] == step_s]
        for block, first in zip(found[name], range(8, 24, 6), strict=True):
            began, ended = own[first][0], own[first + 3][1]
            after = min((step[0] for step in of_rank_0 if step[0] >= ended), default=math.inf)
            assert ended - began - 1e-3 <= block.seconds <= after - own[first - 1][1] + 1e-3
    if alternate:
        order = [a for a, b in zip([None, *(s[2] for s in steps)], (s[2] for s in steps), strict=False) if a != b]
        assert order[1:] == ["0.02", "0.01", "0.02", "0.01"]  # there and back: neighbours of one kind run together


@pytest.mark.parametrize("at", [0, 7])
def test_a_failure_comes_back_with_its_traceback(at):
    with pytest.raises(RuntimeError, match=rf"(?s)rank 1 of bad failed.*ArithmeticError: broken at step {at}"):
        race({"good": Entrant(partial(sleeper, step_s=0.001)), "bad": Entrant(partial(breaks, at=at), ranks=2)},
             blocks=5, steps=2)


def test_who_does_not_come_back_is_named():
    with pytest.raises(TimeoutError, match="idle did not finish"):
        race({"idle": Entrant(stuck)}, blocks=1, steps=1, timeout_s=8)


def test_a_slow_machine_takes_fewer_turns_and_all_entrants_as_many():
    found = race({who: Entrant(partial(sleeper, step_s=0.1)) for who in ("a", "b")}, blocks=10_000, steps=1, timeout_s=20)
    assert 5 <= len(found["a"]) == len(found["b"]) < 200
    speeds = {who: {"values": blocks} for who, blocks in found.items()}
    assert blocks_in({"fp32": {"tokens_per_s": speeds}}) == len(found["a"])


def test_the_ratio_is_that_of_neighbouring_blocks():
    found = {"a": [Block(1.0, {}), Block(10.0, {})], "b": [Block(2.0, {}), Block(20.0, {})]}
    assert compare(found, "a", "b") == {"median": 2.0, "low": 2.0, "high": 2.0, "values": [2.0, 2.0]}


@pytest.mark.parametrize("n, inside", [(2, (0, 1)), (4, (0, 3)), (5, (0, 4)), (8, (1, 6)), (20, (5, 14))])
def test_interval_of_the_median(n, inside):
    """From tables of the sign test: 90 % two-sided."""
    values = [float((7 * i) % n) for i in range(n)] if n % 7 else [float(i) for i in range(n)]
    assert median_interval(values) == (float(inside[0]), float(inside[1]))
