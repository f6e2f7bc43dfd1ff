"""Initial weights: the same whatever the range asked for, and of the stated distribution."""

import math
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

sys.path.insert(0, str(Path(__file__).parent))
from helpers import random_config, small

from officina.trainer.model.build import build_transformer
from officina.trainer.model.init import BLOCK, InitSource, ValuesSource
from officina.trainer.state import EXP_AVG, PARAM

BIG = small(vocab_size=30_000)  # 720,000 elements: three blocks and a cut one


def source(config, seed=0):
    return InitSource(build_transformer(config), config, seed)


WHOLE = source(BIG).read("embed.weight", PARAM, 0, 720_000)


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 720_000), st.integers(0, 720_000))
def test_any_range_gives_the_same_values(a, b):
    start, stop = sorted((a, b))
    assert torch.equal(source(BIG).read("embed.weight", PARAM, start, stop), WHOLE[start:stop])


@pytest.mark.parametrize("ranks", [2, 3, 7])
def test_any_split_over_ranks_gives_the_same_values(ranks):
    parts = [source(BIG).read("embed.weight", PARAM, r * 720_000 // ranks, (r + 1) * 720_000 // ranks)
             for r in range(ranks)]
    assert torch.equal(torch.cat(parts), WHOLE)


def test_values_do_not_depend_on_threads_or_machine():
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        assert torch.equal(source(BIG).read("embed.weight", PARAM, 0, 720_000), WHOLE)
    finally:
        torch.set_num_threads(before)
    # Pinned: a change of these numbers is a change of every run's first weights.
    pinned = torch.tensor(PINNED)
    assert torch.equal(WHOLE[[0, 1, BLOCK - 1, BLOCK, 719_999]], pinned)


PINNED = [float.fromhex(x) for x in (
    "0x1.98768e0000000p-7", "-0x1.0364c80000000p-8", "0x1.01352c0000000p-7", "-0x1.8e74fc0000000p-8", "0x1.b03f140000000p-6")]


def test_seeds_names_and_blocks_differ():
    a, b = source(BIG), source(BIG, seed=1)
    assert not torch.equal(a.read("embed.weight", PARAM, 0, 99), b.read("embed.weight", PARAM, 0, 99))
    assert not torch.equal(WHOLE[:99], a.read("head.weight", PARAM, 0, 99))
    assert not torch.equal(WHOLE[:99], WHOLE[BLOCK:BLOCK + 99])


def test_standard_deviations_are_as_documented():
    config = small(d_model=256, d_ff=768, n_layers=2, init_std=0.03)
    init = source(config)
    for name, std in {"embed.weight": 0.03, "head.weight": 0.03, "blocks.0.attn.q.weight": 0.03,
                      "blocks.1.mlp.up.weight": 0.03, "blocks.1.attn.o.weight": 0.03 / 2,
                      "blocks.0.mlp.down.weight": 0.03 / 2}.items():
        values = init.read(name, PARAM, 0, init.fills[name].numel)
        error = 1 / math.sqrt(2 * len(values))
        assert values.std().item() == pytest.approx(std, rel=5 * error), name
        assert abs(values.mean().item()) < 5 * std / math.sqrt(len(values))


@pytest.mark.parametrize("zero_centred", [False, True])
def test_norms_biases_and_alphas(zero_centred):
    config = small(norm_weight="zero_centred" if zero_centred else "plain", qkv_bias=True, mlp_bias=True, o_bias=True,
                   qk_norm="head", mlp="xielu", norm_placement="sandwich")
    init = source(config)
    for name, fill in init.fills.items():
        values = init.read(name, PARAM, 0, fill.numel)
        if name.endswith("bias"):
            assert not values.any()
        elif "norm" in name:
            assert (values == (0 if zero_centred else 1)).all(), name
    alphas = {kind: init.read(f"blocks.0.mlp.alpha_{kind}", PARAM, 0, 1) for kind in "pn"}
    assert F.softplus(alphas["p"]).item() == pytest.approx(0.8)
    assert 0.5 + F.softplus(alphas["n"]).item() == pytest.approx(0.8)


@pytest.mark.parametrize("seed", range(20))
def test_every_parameter_of_every_combination_has_a_rule(seed):
    import random
    config = random_config(random.Random(seed))
    init = source(config)
    assert all(torch.isfinite(init.read(n, PARAM, 0, f.numel)).all() for n, f in init.fills.items())


def test_errors():
    init = source(small())
    with pytest.raises(KeyError, match="no slot 'exp_avg'"):
        init.read("embed.weight", EXP_AVG, 0, 1)
    with pytest.raises(IndexError, match="has 1464 elements"):
        init.read("embed.weight", PARAM, 0, 1465)
    with pytest.raises(KeyError, match="no slot 'exp_avg'"):
        ValuesSource({"a": torch.ones(3)}).read("a", EXP_AVG, 0, 1)
    from officina.trainer.model.init import fill_of
    with pytest.raises(KeyError, match="no initial value is defined for parameter blocks.0.mlp.strange.weight"):
        fill_of("blocks.0.mlp.strange.weight", 3, small())
