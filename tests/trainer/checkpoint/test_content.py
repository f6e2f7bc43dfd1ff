"""The content sum sees every change, whatever the sharding, and is fast."""

import random
from itertools import pairwise

import numpy as np
import pytest
import torch

from officina.benchmarks.checkpoint_faults import cut, on_ranks, save_step, state_at
from officina.trainer.checkpoint.content import ContentHasher, state_hashes, verify_changed, verify_loaded
from officina.trainer.checkpoint.read import open_checkpoint
from officina.trainer.errors import CheckpointError


def content(data, start=0):
    return ContentHasher().share(memoryview(data), start)


def test_shares_of_any_cut_add_up():
    rng = random.Random(0)
    data = np.random.default_rng(0).integers(0, 256, 700_001, dtype=np.uint8).tobytes()
    whole = content(data)
    for _ in range(20):
        cuts = sorted({0, len(data), *(rng.randrange(len(data)) for _ in range(rng.randrange(6)))})
        shares = [content(data[a:b], a) for a, b in pairwise(cuts)]
        assert sum(shares) % 2**64 == whole


def test_every_kind_of_change_is_seen():
    rng = random.Random(1)
    values = np.random.default_rng(1).standard_normal(100_000, dtype=np.float32)
    before = content(values.tobytes())
    for _ in range(200):
        changed = values.copy()
        i, j = rng.sample(range(values.size), 2)
        match rng.randrange(4):
            case 0:
                changed.view(np.uint32)[i] ^= 1 << rng.randrange(32)
            case 1:
                changed[[i, j]] = changed[[j, i]]
            case 2:  # two sign bits: a product of 64-bit words mod 2**64 would miss half of these
                changed[[i, j]] *= -1
            case 3:
                changed = np.roll(changed, rng.choice((1, 1 << 15)))
        assert content(changed.tobytes()) != before


def test_value_is_fixed():
    """The sum is part of the format: a change of it makes every older checkpoint fail its self-check."""
    mask = 2**64 - 1

    def splitmix(i):
        z = (i + 1) * 0x9E3779B97F4A7C15 & mask
        z = (z ^ z >> 30) * 0xBF58476D1CE4E5B9 & mask
        z = (z ^ z >> 27) * 0x94D049BB133111EB & mask
        return z ^ z >> 31

    data, start = bytes(range(256)) * 600, 12
    padded = bytes(start) + data + bytes(-(start + len(data)) % 8)
    total = 0
    for k in range(len(padded) // 8):
        b, j = divmod(k, 2**14)
        low, high = (int.from_bytes(padded[8 * k + i:8 * k + i + 4], "little") for i in (0, 4))
        total += (splitmix(b) | 1) * ((splitmix((1 << 40) + j) | 1) * low + (splitmix((1 << 41) + j) | 1) * high)
    assert content(data, start) == total & mask == 0x2732D5397D30E2D8


def test_loaded_state_is_compared_on_any_world(tmp_path):
    save_step(tmp_path, 1, world_size=3)

    def check(ranks, state, held=torch.float32):
        with open_checkpoint(tmp_path, ranks=ranks) as opened:
            verify_loaded(lambda: cut(state, ranks.rank, ranks.world_size), opened, ranks, held=held)

    on_ranks(2, lambda r: check(r, state_at(1)))
    wrong = state_at(1)
    wrong["w", "exp_avg"][777] += 1
    with pytest.raises(CheckpointError, match="w exp_avg: the engine holds other values than were saved"):
        on_ranks(2, lambda r: check(r, wrong))
    with pytest.raises(CheckpointError, match="w exp_avg: the engine holds 0 of 349525 elements"):
        on_ranks(2, lambda r: check(r, {k: v for k, v in state_at(1).items() if k != ("w", "exp_avg")}))
    with pytest.raises(CheckpointError, match="what was not saved: w momentum"):
        on_ranks(2, lambda r: check(r, {**state_at(1), ("w", "momentum"): torch.ones(3)}))

    rounded = {key: values.bfloat16().float() for key, values in state_at(1).items()}
    on_ranks(2, lambda r: check(r, rounded, torch.bfloat16))
    with pytest.raises(CheckpointError, match="embed param: the engine holds other values than were saved"):
        on_ranks(2, lambda r: check(r, rounded))
    rounded["embed", "param"][1000] += 2**12  # on one of the ranks
    with pytest.raises(CheckpointError, match=r"one:\n  embed param: the engine holds other values than were saved\nNot"):
        on_ranks(2, lambda r: check(r, rounded, torch.bfloat16))


def test_only_the_slots_that_were_loaded_are_compared(tmp_path):
    save_step(tmp_path, 1)
    state = {k: v if k[1] == "param" else v * 0 for k, v in state_at(1).items()}
    with open_checkpoint(tmp_path) as opened:
        verify_loaded(lambda: cut(state, 0, 1), opened, slots={"param"})


def test_first_step_must_change_parameters():
    before = state_hashes(cut(state_at(1), 0, 1), slots={"param"})
    assert set(before) == {("embed", "param"), ("w", "param"), ("norm", "param")}
    verify_changed(before, state_hashes(cut(state_at(2), 0, 1)))
    moments_only = {k: v if k[1] == "param" else v + 1 for k, v in state_at(1).items()}
    with pytest.raises(CheckpointError, match="changed none of the 3 parameter"):
        verify_changed(before, state_hashes(cut(moments_only, 0, 1)))
