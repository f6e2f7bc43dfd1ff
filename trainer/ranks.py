"""Which rank this process is, and the ranks as one group: the only reader of RANK, SLURM_* and OMPI_* variables."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch


@dataclass(frozen=True, slots=True)
class RankEnv:
    """This process among the others, as the launcher's environment tells."""

    rank: int
    local_rank: int
    world_size: int
    local_world_size: int
    launcher: str
    """`officina` (started by the parent here), `torchrun`, `srun`, `mpirun`, or `none` for a lone process."""


@dataclass(frozen=True, slots=True)
class Ranks:
    """The started process group. With one rank there is none, and every method is its own identity."""

    env: RankEnv
    device: torch.device

    @property
    def rank(self) -> int:
        return self.env.rank

    @property
    def world_size(self) -> int:
        return self.env.world_size

    def sum(self, numbers: Sequence[float]) -> list[float]:
        """Sums over all ranks of a few float64 numbers: one collective on the CPU group, no device sync."""
        if self.world_size == 1:
            return list(numbers)
        packed = torch.tensor(numbers, dtype=torch.float64)
        torch.distributed.all_reduce(packed)
        return packed.tolist()

    def barrier(self) -> None:
        """Return when every rank is here (on the CPU group)."""
        self.sum([0.0])
