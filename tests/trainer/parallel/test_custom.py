"""Frozen and tied parameters, buffers and models that do not cast for themselves, under every engine."""

import functools

import numpy as np
import pytest

from tests.trainer.parallel import custom
from tests.trainer.parallel.cases import join

TRAIN = "tests.trainer.parallel.custom:train"
ALL = [("single", 1), ("ddp", 2), ("fsdp2", 2), ("hsdp", 4), ("zero1", 2), ("zero2", 2), ("zero3", 2), ("zero3_persist", 3)]
reference = functools.cache(custom.reference)


@pytest.mark.parametrize(("engine", "ranks"), ALL)
def test_frozen_tied_and_buffers(pool, engine, ranks):
    found, plain = join(pool.run(ranks, TRAIN, engine)), reference()
    assert np.abs(np.subtract(found.losses, plain.losses)).max() <= 1e-5
    assert np.abs(np.divide(found.norms, plain.norms) - 1).max() <= 1e-5
    assert np.abs(np.subtract(found.eval_losses, plain.eval_losses)).max() <= 1e-4
    for key, values in plain.state.items():
        assert np.abs(found.state[key] - values).max() <= 1e-5, key
    assert ("again.weight", "param") not in found.state  # tied: it has its first name only
    assert ("place", "exp_avg") not in found.state and ("head.weight", "exp_avg") in found.state
    assert ("ramp", "param") not in found.state
    # DDP's thrown-away first backward and evaluation leave no trace in a buffer that counts training forwards.
    assert found.state["seen", "param"] == found.state["replaced", "param"] == [custom.STEPS]
    assert found.state["scale", "param"].tolist() == [0.5, 2.0]


@pytest.mark.parametrize(("engine", "ranks"), ALL)
def test_resume_is_bitwise(pool, engine, ranks):
    whole = join(pool.run(ranks, TRAIN, engine))
    half = join(pool.run(ranks, TRAIN, engine, steps=3))
    rest = join(pool.run(ranks, TRAIN, engine, first=3, steps=3, begin=half.state))
    assert rest.losses == whole.losses[3:] and rest.eval_losses == whole.eval_losses
    for key, values in whole.state.items():
        assert np.array_equal(values, rest.state[key]), key


@pytest.mark.parametrize(("engine", "ranks"), [("single", 1), ("fsdp2", 2), ("zero1", 2)])
def test_evaluation_between_the_steps_changes_no_bit(pool, engine, ranks):
    plain, found = (join(pool.run(ranks, TRAIN, engine, steps=3, evaluate=between)) for between in (False, True))
    assert found.losses == plain.losses and all(np.array_equal(found.state[key], plain.state[key]) for key in plain.state)


@pytest.mark.parametrize(("engine", "ranks"), ALL)
def test_an_infinite_loss_with_a_finite_gradient_leaves_no_trace(pool, engine, ranks):
    found, plain = (join(pool.run(ranks, TRAIN, engine, steps=3, infinite=at)) for at in (2, -1))
    assert found.applied == [True, True, False] and not np.isfinite(found.norms[2]) and found.optimizer_steps == 2
    assert found.losses[:2] == plain.losses[:2] and found.losses[2] == np.inf
    before = join(pool.run(ranks, TRAIN, engine, steps=2))
    for key, values in before.state.items():  # buffers that a forward changes included
        assert np.array_equal(values, found.state[key]), key


@pytest.mark.parametrize(("engine", "ranks"), ALL)
def test_a_parameter_that_the_loss_does_not_reach_is_named(pool, engine, ranks):
    pool.run(ranks, "tests.trainer.parallel.custom:refuses", engine, "spare",
             r"spare.weight \(and 1 more\) is trainable, but the loss of this step does not depend on it")


@pytest.mark.parametrize(("engine", "ranks"), ALL)
@pytest.mark.parametrize("kind", ["repeated", "across"])
def test_blocks_that_share(pool, engine, ranks, kind):
    if kind == "across" and engine in ("fsdp2", "hsdp", "zero3", "zero3_persist"):
        pool.run(ranks, "tests.trainer.parallel.custom:refuses", engine, kind,
                 r"layers.0.up.weight is used in block 0 and in block 1, and engine=\w+ shards each block by itself")
        return
    found, plain = join(pool.run(ranks, TRAIN, engine, kind=kind)), reference(kind)
    assert np.abs(np.subtract(found.losses, plain.losses)).max() <= 1e-5
    assert np.abs(np.divide(found.norms, plain.norms) - 1).max() <= 1e-5
    for key, values in plain.state.items():
        assert np.abs(found.state[key] - values).max() <= 1e-5, key


@pytest.mark.parametrize(("engine", "ranks"), [("single", 1), ("ddp", 2), ("fsdp2", 2), ("zero1", 2), ("zero3", 2)])
@pytest.mark.parametrize("precision", ["bf16", "bf16_pure"])
def test_bf16_by_autocast(pool, engine, ranks, precision):
    found, plain = join(pool.run(ranks, TRAIN, engine, precision)), reference()
    away = np.abs(np.subtract(found.losses, plain.losses))
    assert 0 < away.max() < 0.05


def test_stage_3_starts_no_numactl(pool):
    """On a CPU DeepSpeed counts NUMA nodes by numactl, in every micro-batch; a PATH with a locked folder ended the run."""
    assert pool.run(2, "tests.trainer.parallel.custom:started", "zero3", "numactl") == [0, 0]


def test_deepspeed_prints_nothing_beside_the_progress(pool):
    assert pool.run(1, "tests.trainer.parallel.custom:printed", "zero1", "bf16") == [""]
