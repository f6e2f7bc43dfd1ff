"""Learning-rate factors at the steps that matter, and in between."""

import itertools
import subprocess
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from officina.trainer.config import LrScheduleConfig
from officina.trainer.schedule import lr_factor

KINDS = ["constant", "cosine", "linear", "wsd"]


@pytest.mark.parametrize("kind", KINDS)
def test_warmup_is_linear_and_wastes_no_step(kind):
    config = LrScheduleConfig(kind=kind, warmup_steps=4, decay_steps=10)
    assert [lr_factor(config, step, 100) for step in range(5)] == [0.25, 0.5, 0.75, 1.0, 1.0]


def test_last_step_is_at_min_ratio_and_so_is_what_follows():
    for kind in ("cosine", "linear", "wsd"):
        config = LrScheduleConfig(kind=kind, warmup_steps=10, decay_steps=20, min_ratio=0.1)
        assert lr_factor(config, 99, 100) == pytest.approx(0.1)
        assert lr_factor(config, 98, 100) > 0.1
        assert lr_factor(config, 500, 100) == pytest.approx(0.1)
    assert lr_factor(LrScheduleConfig(kind="constant", warmup_steps=10), 99, 100) == 1.0


def test_shapes_half_way():
    half = {"cosine": 0.5, "linear": 0.5, "wsd": 1 - 0.5**0.5}
    for kind, factor in half.items():
        config = LrScheduleConfig(kind=kind, warmup_steps=0, decay_steps=100, min_ratio=0.0)
        assert lr_factor(config, 50, 101) == pytest.approx(factor)
    quarter = LrScheduleConfig(kind="cosine", warmup_steps=0, min_ratio=0.0)
    assert lr_factor(quarter, 25, 101) == pytest.approx(0.8535533905932737)


def test_wsd_is_stable_until_its_decay():
    config = LrScheduleConfig(kind="wsd", warmup_steps=5, decay_steps=10, min_ratio=0.0)
    factors = [lr_factor(config, step, 100) for step in range(100)]
    assert factors[5:90] == [1.0] * 85 and factors[90] < 1.0
    assert lr_factor(LrScheduleConfig(kind="wsd", warmup_steps=5, decay_steps=0), 99, 100) == 1.0


@given(kind=st.sampled_from(KINDS), warmup=st.integers(0, 50), decay=st.integers(0, 80), steps=st.integers(1, 100),
       ratio=st.floats(0, 1))
def test_never_outside_and_falling_after_the_warmup(kind, warmup, decay, steps, ratio):
    config = LrScheduleConfig(kind=kind, warmup_steps=warmup, decay_steps=decay, min_ratio=ratio)
    factors = [lr_factor(config, step, steps) for step in range(steps + 3)]
    assert all(0 <= factor <= 1 for factor in factors)
    after = factors[warmup:]
    assert all(a >= b - 1e-12 for a, b in itertools.pairwise(after))
    assert all(factor >= ratio - 1e-12 for factor in after)


def test_negative_step_is_refused():
    with pytest.raises(ValueError, match="step -1 is negative; the first step is 0"):
        lr_factor(LrScheduleConfig(), -1, 10)


def test_needs_no_torch():
    code = "import sys, officina.trainer.schedule; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
