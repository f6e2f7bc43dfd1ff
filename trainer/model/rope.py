"""Rotary position embedding: frequencies as plain numbers, and the tables of angles. The rotation is `kernels.rope`.

Sources: Su et al., arXiv:2104.09864; yarn arXiv:2309.00071; llama3 scaling arXiv:2407.21783 section 3.4.3.
The frequencies agree with those of transformers, whose conventions the published models were trained with.
"""

import functools
import math

import torch
from torch import Tensor

from officina.trainer.config import RopeConfig


@functools.cache
def rope_frequencies(rope: RopeConfig, head_dim: int) -> tuple[tuple[float, ...], float]:
    """Angular frequency (radians per token) of each of the head_dim / 2 pairs, and the factor on cos and sin.

    Plain floats need no device and survive meta construction; computed in fp64, once per configuration.
    """
    plain = [rope.theta ** (-2 * pair / head_dim) for pair in range(head_dim // 2)]
    if rope.scaling == "linear":
        return tuple(f / rope.factor for f in plain), 1.0
    if rope.scaling == "llama3":
        return tuple(_llama3(f, rope) for f in plain), 1.0
    if rope.scaling == "yarn":
        return _yarn(plain, rope, head_dim)
    return tuple(plain), 1.0


def rope_tables(frequencies: Tensor, factor: float, positions_BT: Tensor) -> tuple[Tensor, Tensor]:
    """cos and sin of every pair's angle at every position: (B, 1, T, head_dim / 2) each, fp32."""
    angles = positions_BT[:, None, :, None].float() * frequencies
    return angles.cos() * factor, angles.sin() * factor


def at_least_fp32(x: Tensor) -> Tensor:
    """x in fp32, or as it is if fp64 (used as a finer reference in tests)."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def _llama3(frequency: float, rope: RopeConfig) -> float:
    """Keep short wavelengths, divide the frequency of long ones by `factor`, and blend in between."""
    turns = rope.original_seq_len * frequency / (2 * math.pi)  # in the length first trained for
    if turns < rope.low_freq_factor:
        return frequency / rope.factor
    if turns > rope.high_freq_factor:
        return frequency
    kept = (turns - rope.low_freq_factor) / (rope.high_freq_factor - rope.low_freq_factor)
    return (1 - kept) * frequency / rope.factor + kept * frequency


def _yarn(plain: list[float], rope: RopeConfig, head_dim: int) -> tuple[tuple[float, ...], float]:
    """Between the pairs that make beta_fast and beta_slow turns, go from kept to divided frequencies."""
    def pair_with(turns: float) -> float:
        return head_dim * math.log(rope.original_seq_len / (turns * 2 * math.pi)) / (2 * math.log(rope.theta))

    low = max(math.floor(pair_with(rope.beta_fast)), 0)
    high = min(math.ceil(pair_with(rope.beta_slow)), head_dim - 1)
    width = high - low or 0.001  # transformers' guard against a division by zero, kept for equality
    divided = [min(max((pair - low) / width, 0.0), 1.0) for pair in range(len(plain))]
    factor = rope.attention_factor
    if factor is None:
        factor = 0.1 * math.log(rope.factor) + 1.0 if rope.factor > 1 else 1.0
    return tuple(f / rope.factor * d + f * (1 - d) for f, d in zip(plain, divided, strict=True)), factor
