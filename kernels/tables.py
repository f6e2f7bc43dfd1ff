"""Launch configurations of kernels, by architecture: shipped as data, because ranks that tune for themselves at run time may
choose differently, which breaks bitwise equality between them and stalls collectives.
"""

import functools
from collections.abc import Hashable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from officina.kernels.dispatch import log_once

SAFE = "safe"
"""Key of a table's configurations for an architecture it does not know: they compile everywhere without spills."""
INTERPRETER = "interpreter"


@dataclass(frozen=True, slots=True)
class Config:
    """Tile and launch options of one kernel launch."""

    block_m: int
    """Rows (queries, tokens) of a tile."""
    block_n: int
    """Columns (keys, vocabulary, features) of a tile."""
    num_warps: int
    num_stages: int
    extra: Mapping[str, int] = field(default_factory=dict, hash=False)
    """Launch options that only AMD's compiler knows: waves_per_eu, matrix_instr_nonkdim, kpack; and for the Hopper kernel of
    flash attention its switch ping_pong, for the norm's backward pass the number of its programs on a multiprocessor, for the
    symmetric product whether Hopper's copies of tiles (tma) feed it."""

    def options(self, arch: str) -> dict[str, Any]:
        """Keyword arguments for the launch on `arch`, besides the tile."""
        return {"num_warps": self.num_warps, "num_stages": self.num_stages, **(self.extra if is_amd(arch) else {})}


Table = Mapping[str, Mapping[Hashable, Config]]
"""Architecture, or SAFE, -> key of the kernel's own making (head dim, causal, dtype, ...) -> configuration."""


def look_up(kernel: str, table: Table, arch: str, key: Hashable) -> Config:
    """The configuration of `key` on `arch`; for an architecture without a table the safe one, said once.

    Raises KeyError naming the keys there are. An architecture need not have all keys: what it lacks is taken from SAFE.
    """
    if arch not in table and arch != INTERPRETER:
        log_once(f"kernels: {kernel} has no table for {arch}: safe configurations, not tuned. "
                 f"Tables exist for {', '.join(sorted(set(table) - {SAFE})) or 'no architecture yet'}")
    config = table.get(arch, {}).get(key) or table[SAFE].get(key)
    if config is None:
        raise KeyError(f"{kernel}: no configuration for {key!r}; there are {sorted(map(repr, table[SAFE]))}")
    return config


def arch_of(device: torch.device) -> str:
    """`sm_90` and the like, `gfx90a` and the like, or `interpreter` for the CPU."""
    if device.type != "cuda":
        return INTERPRETER
    return _arch_of_index(torch.cuda.current_device() if device.index is None else device.index)


def is_amd(arch: str) -> bool:
    return arch.startswith("gfx")


@functools.cache
def _arch_of_index(index: int) -> str:
    if torch.version.hip:
        return torch.cuda.get_device_properties(index).gcnArchName.split(":")[0]
    major, minor = torch.cuda.get_device_capability(index)
    return f"sm_{major}{minor}"
