"""State that leaves one engine and enters another, or the same, on as many or other ranks."""

import itertools

import numpy as np
import pytest
import torch

from officina.trainer.model.build import build_model
from officina.trainer.parallel.engine import Parts, build_engine
from tests.trainer.parallel.cases import MUON, Case, Values, distance, global_batch, join, micro_batches, reference

TRAIN = "tests.trainer.parallel.cases:train"
RANKS = {"single": 1, "ddp": 3, "fsdp2": 3, "hsdp": 4, "zero1": 2, "zero2": 3, "zero3": 3}
HALF, WHOLE = 5, 10

BITWISE = [("single", 1), ("ddp", 2), ("ddp", 4), ("fsdp2", 1), ("fsdp2", 3), ("fsdp2_fast", 2), ("fsdp2_offload", 2),
           ("hsdp", 4), ("hsdp_fast", 4), ("zero1", 3), ("zero1_offload", 2), ("zero2", 3), ("zero3", 3), ("zero3_persist", 2),
           ("zero2_offload", 2), ("zero3_offload", 2)]


@pytest.mark.parametrize(("engine", "ranks"), BITWISE)
def test_resume_in_the_same_world_is_bitwise(pool, engine, ranks):
    check_bitwise(pool, ranks, engine=engine, evaluate_every=2)


@pytest.mark.parametrize(("engine", "ranks", "precision"), [
    ("single", 1, "bf16"), ("fsdp2", 2, "bf16"), ("zero1", 2, "bf16"), ("zero2", 2, "bf16"), ("zero3", 2, "bf16"),
    ("ddp", 2, "bf16_pure"), ("fsdp2", 2, "bf16_pure"), ("zero2", 2, "bf16_pure"), ("zero3", 2, "bf16_pure")])
def test_resume_in_bf16_is_bitwise(pool, engine, ranks, precision):
    check_bitwise(pool, ranks, engine=engine, precision=precision)


@pytest.mark.parametrize(("engine", "ranks"), [("single", 1), ("ddp", 3), ("fsdp2", 3), ("hsdp", 4)])
def test_resume_with_muon_is_bitwise(pool, engine, ranks):
    check_bitwise(pool, ranks, engine=engine, optim=MUON)


def check_bitwise(pool, ranks: int, **case) -> None:
    whole = join(pool.run(ranks, TRAIN, Case(steps=4, **case)))
    begun = join(pool.run(ranks, TRAIN, Case(steps=2, **case)))
    ended = join(pool.run(ranks, TRAIN, Case(steps=2, first=2, **case), begun.state, "moments"))
    assert ended.losses == whole.losses[2:] and ended.norms == whole.norms[2:]
    assert ended.optimizer_steps == 4 and ended.state.keys() == whole.state.keys()
    for key, values in whole.state.items():
        assert np.array_equal(values, ended.state[key]), f"{key}: {np.abs(values - ended.state[key]).max()}"


def evaluate_import_evaluate(ranks, engine: str, state) -> tuple[float, float]:
    """The loss on a batch after `state` was filled into an engine that had evaluated before, and into a new one."""
    case = Case(engine)
    micro = micro_batches(global_batch(0, case), range(case.rows), 1)[0]
    losses = []
    for used in (True, False):
        built = build_model(case.run)
        made = build_engine(Parts(case.run, ranks, built.module, built.loss_fn, "fp32"))
        made.import_state(built.source, optimizer_steps=None)
        if used:
            with torch.no_grad():  # as generation does: the engine does not see it
                built.loss_fn(made.module, micro.fields)
        made.import_state(Values(state), optimizer_steps=5)
        losses.append(made.evaluate(micro).item())
        made.close()
    return losses[0], losses[1]


@pytest.mark.parametrize(("engine", "ranks"), [("single", 1), ("ddp", 2), ("fsdp2", 2), ("fsdp2_fast", 2), ("zero2", 2),
                                               ("zero3", 2), ("zero3_persist", 2)])
def test_state_reaches_the_weights_that_were_in_use(pool, engine, ranks):
    state = join(pool.run(1, TRAIN, Case(steps=5))).state
    for used, new in pool.run(ranks, "tests.trainer.parallel.test_resume:evaluate_import_evaluate", engine, state):
        assert used == new


@pytest.fixture(scope="module")
def halves(pool):
    """The state of each engine half way, computed when first asked for."""
    known = {}

    def half(engine: str):
        if engine not in known:
            known[engine] = join(pool.run(RANKS[engine], TRAIN, Case(engine, steps=HALF)))
        return known[engine]

    return half


PAIRS = list(itertools.permutations(RANKS, 2))
ROUND = [("single", "zero2"), ("zero2", "fsdp2"), ("fsdp2", "zero3"), ("zero3", "ddp"), ("ddp", "zero1"), ("zero1", "hsdp"),
         ("hsdp", "single")]


@pytest.mark.parametrize(("one", "other"), [
    pytest.param(*pair, marks=[] if pair in ROUND else pytest.mark.slow) for pair in PAIRS])
def test_any_engine_goes_on_from_any_other(pool, halves, one, other):
    found = join(pool.run(RANKS[other], TRAIN, Case(other, steps=WHOLE - HALF, first=HALF), halves(one).state, "moments"))
    away = distance(reference(Case(steps=WHOLE)), found, first=HALF)
    assert away.within(), away
    assert found.optimizer_steps == WHOLE


@pytest.mark.parametrize("engines", [
    *([name] * 3 for name in ("ddp", "fsdp2", "zero1", "zero2", "zero3")),
    ["hsdp", "hsdp", "fsdp2"]], ids="-".join)  # 3 ranks make no groups of 2
def test_four_two_three_ranks(pool, engines):
    state, losses = None, []
    for engine, ranks, first, steps in zip(engines, (4, 2, 3), (0, 4, 7), (4, 3, 3), strict=True):
        found = join(pool.run(ranks, TRAIN, Case(engine, steps=steps, first=first), state, "moments"))
        state, losses = found.state, losses + found.losses
    away = distance(reference(Case(steps=10)), found, first=7)
    assert away.within(), away
    assert np.abs(np.subtract(losses, reference(Case(steps=10)).losses)).max() <= 1e-5
