"""Muon: momentum whose matrices are orthogonalised before they are applied (https://kellerjordan.github.io/posts/muon/).

The orthogonalisation needs a whole matrix, while momentum is as sharded as the parameter: matrices are gathered, a
different one on each rank, worked on there, and sent back. No matrix is ever worked on twice within a shard group.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch
import torch.distributed as dist
from torch import Tensor, nn

from officina.kernels.dispatch import Impl
from officina.kernels.symmetric import symmetric_product
from officina.trainer.config import MuonConfig

NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)
"""Coefficients of the quintic iteration: steepest at 0, so that 5 steps bring all singular values near 1 (same source)."""


@dataclass(frozen=True, slots=True)
class Split:
    """How the parameters lie over the ranks of `group`."""

    kind: str = "whole"
    """`whole`: one rank has all. `dealt`: all ranks have all; each keeps the momentum of the matrices dealt to it.
    `rows`: each rank has some rows of each matrix (FSDP2's Shard(0)), in rank order."""
    group: dist.ProcessGroup | None = None
    owners: Mapping[str, int] = field(default_factory=dict)
    """dealt: name of a matrix -> its rank in the group."""
    local: Callable[[Tensor], Tensor] = lambda tensor: tensor
    """rows: from a sharded tensor to this rank's rows of it."""


def orthogonalize(matrix: Tensor, steps: int, dtype: torch.dtype, impl: Impl = "auto") -> Tensor:
    """Nearly the orthogonal factor of a (n, m) matrix, singular values between about 0.7 and 1.2; in `dtype`."""
    a, b, c = NEWTON_SCHULZ
    x = matrix.to(dtype)
    tall = x.shape[0] > x.shape[1]
    x = x.T if tall else x
    x = x / (x.norm() + 1e-7)
    for _ in range(steps):
        gram = symmetric_product(x, impl=impl)
        x = torch.addmm(x, symmetric_product(gram, alpha=c, beta=b, addend_NN=gram, impl=impl), x, beta=a)
    return x.T if tall else x


class Muon:
    """Momentum and update of a set of matrices; gradients are read from `.grad`."""

    def __init__(self, config: MuonConfig, params: Mapping[str, nn.Parameter], split: Split, impl: Impl = "auto") -> None:
        self._config, self._params, self._split, self._impl = config, params, split, impl
        self._dtype = {"bf16": torch.bfloat16, "fp32": torch.float32}[config.newton_schulz_dtype]
        self._rank = dist.get_rank(split.group) if split.group else 0
        self._ranks = dist.get_world_size(split.group) if split.group else 1
        self.momentum: dict[str, Tensor] = {}
        """This rank's momentum: whole matrices, the dealt ones, or its rows of all."""

    def reset(self) -> None:
        """Zero momentum."""
        self.momentum = {name: torch.zeros_like(p.detach()) for name, p in self._params.items() if self._holds(name)}

    @torch.no_grad()
    def step(self, lr_factor: float) -> None:
        """Update every matrix that has a gradient (all ranks have one for the same matrices)."""
        names = [name for name, parameter in self._params.items() if parameter.grad is not None]
        if self._split.kind == "rows":
            # Matrices of one shape beside each other, so that the ranks of a round have equal work.
            names.sort(key=lambda name: tuple(self._params[name].shape))
            for first in range(0, len(names), self._ranks):
                self._step_rows(names[first:first + self._ranks], lr_factor)
            return
        ready = {name: self._direction(self._search(name)) for name in names if self._holds(name)}
        for name in names:
            parameter = self._params[name]
            update = ready.get(name)
            if self._split.kind == "dealt":
                update = torch.empty_like(parameter, dtype=self._dtype) if update is None else update.contiguous()
                dist.broadcast(update, group=self._split.group, group_src=self._split.owners[name])
            self._apply(parameter, update, parameter.shape, lr_factor)

    def _step_rows(self, names: list[str], lr_factor: float) -> None:
        """One round: matrix j of `names` is put together on rank j, orthogonalised there, and its rows go back."""
        local = self._split.local
        shapes = [tuple(self._params[name].shape) for name in names]
        mine = [self._search(name).to(self._dtype) for name in names]
        sent = [part.numel() for part in mine] + [0] * (self._ranks - len(names))
        received = [0] * self._ranks
        if self._rank < len(names):
            n, m = shapes[self._rank]
            rows = -(-n // self._ranks)
            received = [max(0, min(rows, n - r * rows)) * m for r in range(self._ranks)]
        flat = torch.cat([part.reshape(-1) for part in mine])
        whole = flat.new_empty(sum(received))
        dist.all_to_all_single(whole, flat, received, sent, group=self._split.group)
        if self._rank < len(names):
            whole = self._direction(whole.view(shapes[self._rank])).reshape(-1)
        dist.all_to_all_single(flat, whole, sent, received, group=self._split.group)
        for name, shape, part in zip(names, shapes, flat.split(sent[:len(names)]), strict=True):
            parameter = local(self._params[name].detach())
            self._apply(parameter, part.view(parameter.shape), shape, lr_factor)

    def _search(self, name: str) -> Tensor:
        """Take the gradient into the momentum; returns the direction before it is orthogonalised."""
        local, beta = self._split.local, self._config.momentum
        momentum, gradient = local(self.momentum[name]), local(self._params[name].grad)
        momentum.lerp_(gradient, 1 - beta)
        return gradient.lerp(momentum, beta) if self._config.nesterov else momentum

    def _direction(self, matrix: Tensor) -> Tensor:
        return orthogonalize(matrix, self._config.newton_schulz_steps, self._dtype, self._impl)

    def _apply(self, parameter: Tensor, update: Tensor, shape: tuple[int, ...], lr_factor: float) -> None:
        lr = self._config.muon_lr * lr_factor
        parameter.mul_(1 - lr * self._config.weight_decay)
        # A tall matrix has fewer singular values than rows: the factor keeps the update's size per row (same source).
        parameter.add_(update, alpha=-lr * max(1.0, shape[0] / shape[1]) ** 0.5)

    def _holds(self, name: str) -> bool:
        return self._split.kind != "dealt" or self._split.owners[name] == self._rank
