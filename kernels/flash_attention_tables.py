"""Tiles of the flash attention kernels by architecture, from published figures and from what the compiler makes of them.

Every entry for 16 bits compiles without spilling a register (tests hold that; softcaps and fp32 may spill some). Where no such
card was at hand they are no more than good starts: NVIDIA from FlashAttention-3's block sizes, AMD from AOTriton's database,
both cut down until nothing spilled.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from officina.kernels.tables import INTERPRETER, SAFE, Config, Table

WIDTHS = (16, 32, 64, 128, 256)
"""Widths that heads are padded to on the chip: dimensions of tiles are powers of two."""


def padded(head_dim: int) -> int:
    """The width of the tiles for heads of `head_dim`."""
    return next(width for width in WIDTHS if head_dim <= width)


def key_of(head_dim: int, causal: bool, bits: int) -> tuple[int, bool, int]:
    """Key of the tables: a head width of 64, 128 or 256, whether the mask is causal, and the bits of an element (16 or 32)."""
    return max(64, padded(head_dim)), causal, bits


def _both(tiles: Mapping[int, Config], bits: int = 16) -> Iterator[tuple[tuple[int, bool, int], Config]]:
    return (((width, causal, bits), config) for width, config in tiles.items() for causal in (False, True))


def _table(safe: Mapping[int, Config], fp32: Mapping[int, Config], interpreter: Config, **archs: Mapping[int, Config]) -> Table:
    """fp32 is for comparisons and runs without tensor cores; it has one set of tiles for all."""
    return {SAFE: dict([*_both(safe), *_both(fp32, 32)]), **{arch: dict(_both(tiles)) for arch, tiles in archs.items()},
            INTERPRETER: dict([*_both(dict.fromkeys((64, 128, 256), interpreter)),
                               *_both(dict.fromkeys((64, 128, 256), interpreter), 32)])}


FORWARD: Table = _table(
    sm_80={64: Config(128, 64, 4, 3), 128: Config(128, 32, 8, 3), 256: Config(64, 64, 8, 2)},
    sm_90={64: Config(128, 128, 8, 3), 128: Config(128, 128, 8, 2), 256: Config(128, 32, 8, 2)},
    gfx90a={64: Config(128, 64, 4, 1, {"waves_per_eu": 2}), 128: Config(128, 64, 4, 1), 256: Config(64, 32, 4, 1)},
    gfx942={64: Config(128, 64, 4, 1, {"waves_per_eu": 2}), 128: Config(128, 64, 4, 1), 256: Config(64, 32, 4, 1)},
    safe={64: Config(64, 64, 4, 1), 128: Config(64, 32, 4, 1), 256: Config(64, 32, 8, 1)},
    fp32={64: Config(32, 32, 4, 1), 128: Config(32, 32, 8, 1), 256: Config(16, 16, 8, 1)},
    interpreter=Config(32, 16, 4, 1))
"""A program's block_m queries against block_n keys at a time."""

FORWARD_HOPPER: Table = {"sm_90": dict(_both({
    64: Config(192, 128, 4, 2, {"ping_pong": 1}), 128: Config(128, 128, 4, 2, {"ping_pong": 1}),
    256: Config(128, 32, 4, 2, {"ping_pong": 1})}))}
"""The same by flash_attention_hopper.py: block_m queries in groups of 64 with four warps each, num_stages buffers of block_n
keys and as many of values."""

FORWARD_PATH: dict[tuple[str, int, bool], str] = {
    ("sm_90", 64, True): "hopper", ("sm_90", 64, False): "hopper",
    ("sm_90", 128, True): "hopper", ("sm_90", 128, False): "hopper",
    ("sm_90", 256, True): "portable", ("sm_90", 256, False): "portable"}
"""What ships: architecture, head width of the tables, causal -> `portable` (flash_attention_triton.py) or `hopper`
(flash_attention_hopper.py); portable where nothing stands.

`hopper` is written here once a GPU shows it right (tests/gpu) and faster (`officina bench kernels`), with a line in NOTES.md;
heads wider than 128 are not measured yet."""

BACKWARD_KEYS_HOPPER: Table = {"sm_90": dict(_both({64: Config(64, 128, 4, 3), 128: Config(64, 128, 4, 3)}))}
"""dk and dv by flash_attention_hopper_backward.py: two groups of block_n / 2 keys with four warps each, num_stages (2 or more)
buffers of block_m queries and as many of their gradients."""

BACKWARD_QUERIES_HOPPER: Table = {"sm_90": dict(_both({64: Config(128, 128, 4, 3), 128: Config(128, 128, 4, 2)}))}
"""dq by the same: two groups of block_m / 2 queries, num_stages (2 or more) buffers of block_n keys and as many of values."""

BACKWARD_PATH: dict[tuple[str, int, bool], str] = {
    ("sm_90", 64, True): "hopper", ("sm_90", 64, False): "hopper",
    ("sm_90", 128, True): "hopper", ("sm_90", 128, False): "hopper"}
"""FORWARD_PATH for the backward pass: `portable` as `deterministic` says, `hopper` the two kernels of
flash_attention_hopper_backward.py, which are deterministic, whatever it says."""

BACKWARD_FUSED: Table = _table(
    sm_80={64: Config(32, 128, 8, 2), 128: Config(64, 64, 8, 2), 256: Config(32, 32, 8, 1)},
    sm_90={64: Config(64, 128, 8, 2), 128: Config(64, 64, 8, 2), 256: Config(32, 32, 8, 1)},
    gfx942={64: Config(64, 64, 4, 1), 128: Config(32, 64, 4, 1), 256: Config(16, 32, 4, 1)},
    safe={64: Config(32, 64, 4, 1), 128: Config(32, 32, 8, 1), 256: Config(16, 32, 8, 1)},
    fp32={64: Config(16, 32, 8, 1), 128: Config(16, 32, 8, 1), 256: Config(16, 16, 8, 1)},
    interpreter=Config(16, 32, 4, 1))
"""A program's block_n keys against block_m queries at a time; dq by atomic additions.

Not on gfx90a: Triton makes a compare-and-swap loop of each addition there (gfx942 has an instruction), so it takes the two
deterministic kernels."""

BACKWARD_KEYS: Table = _table(
    sm_80={64: Config(64, 128, 8, 2), 128: Config(32, 64, 8, 2), 256: Config(64, 32, 8, 1)},
    sm_90={64: Config(64, 128, 8, 2), 128: Config(64, 64, 8, 2), 256: Config(64, 32, 8, 1)},
    gfx90a={64: Config(64, 64, 4, 1), 128: Config(32, 64, 4, 1), 256: Config(16, 32, 4, 1)},
    gfx942={64: Config(64, 64, 4, 1), 128: Config(32, 64, 4, 1), 256: Config(16, 32, 4, 1)},
    safe={64: Config(32, 64, 4, 1), 128: Config(32, 64, 8, 1), 256: Config(16, 32, 8, 1)},
    fp32={64: Config(16, 32, 8, 1), 128: Config(16, 32, 8, 1), 256: Config(16, 16, 8, 1)},
    interpreter=Config(16, 32, 4, 1))
"""The same without dq."""

BACKWARD_QUERIES: Table = _table(
    sm_80={64: Config(128, 64, 8, 2), 128: Config(64, 64, 8, 2), 256: Config(64, 32, 8, 1)},
    sm_90={64: Config(128, 128, 8, 2), 128: Config(128, 64, 8, 2), 256: Config(16, 64, 8, 1)},
    gfx90a={64: Config(64, 64, 4, 1), 128: Config(64, 64, 4, 1), 256: Config(64, 32, 4, 1)},
    gfx942={64: Config(64, 64, 4, 1), 128: Config(64, 64, 4, 1), 256: Config(64, 32, 4, 1)},
    safe={64: Config(64, 32, 4, 1), 128: Config(64, 32, 4, 1), 256: Config(16, 32, 4, 1)},
    fp32={64: Config(16, 32, 4, 1), 128: Config(16, 16, 8, 1), 256: Config(16, 16, 8, 1)},
    interpreter=Config(32, 16, 4, 1))
"""A program's block_m queries against block_n keys at a time: dq in a fixed order."""
