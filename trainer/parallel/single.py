"""One process, nothing sharded; and the torch engine on which DDP and FSDP2 put their collectives."""

import math
from collections.abc import Collection, Iterator

import torch
from torch import Tensor, nn

from officina.trainer.batch import Batch, LossFn, loss_of
from officina.trainer.muon import Split
from officina.trainer.optim import Groups, Optimizer, group_parameters
from officina.trainer.parallel.blocks import find_blocks, prepare_blocks
from officina.trainer.parallel.engine import Parts, StepOutcome
from officina.trainer.parallel.precision import frozen_dtype, set_precision, storage_dtype
from officina.trainer.parallel.tensors import (
    Held,
    KeptBuffers,
    buffer_pieces,
    evaluating,
    fill_buffers,
    materialize,
    persistent_buffers,
    refuse_unreached,
)
from officina.trainer.state import PARAM, Piece, Source


def build(parts: Parts) -> "TorchEngine":
    """The engine of one process. Raises ValueError if there are more."""
    if parts.ranks.world_size != 1:
        raise ValueError(f"engine=single has one process, but there are {parts.ranks.world_size} ranks")
    return TorchEngine(parts, prepare_whole(parts), Split())


def prepare_whole(parts: Parts) -> Groups:
    """Make the whole module real on this rank's device, blocks prepared; returns the groups of its parameters."""
    blocks = find_blocks(parts.module, parts.run)
    groups = group_parameters(parts.module, blocks, parts.run.optim)
    materialize(parts.module, parts.ranks.device, dtype=storage_dtype(parts.precision),
                frozen_dtype=frozen_dtype(parts.module, parts.precision))
    prepare_blocks(blocks, parts.run)
    return groups


class TorchEngine:
    """Engine whose gradients are in `.grad` and whose optimizer is ours. As it stands: whole tensors, one process."""

    def __init__(self, parts: Parts, groups: Groups, split: Split) -> None:
        self.module = parts.module
        self.optimizer_steps = 0
        self._ranks, self._loss_fn = parts.ranks, parts.loss_fn
        self._clip_norm = parts.run.optim.clip_norm
        # In bf16, FSDP2's own policy casts; one process and DDP hand over fp32 weights, which the forward casts.
        self._autocast = set_precision(parts.module, find_blocks(parts.module, parts.run), parts.precision,
                                       parts.ranks.device, bf16_weights=parts.precision == "bf16_pure")
        self._params = dict(parts.module.named_parameters())
        self._kept = KeptBuffers(parts.module)
        kernels = getattr(parts.run.model, "kernels", "auto")  # a user's own model has no such key
        self._optimizer = Optimizer(parts.run.optim, groups, self._params, split, kernels)

    def forward_backward(self, batch: Batch, *, step_tokens: int, last: bool) -> Tensor:
        self._kept.keep()
        with self._autocast():
            loss = self._loss_fn(self.module, batch.fields)
        (loss_of(loss) / step_tokens).backward()
        return loss.detach().float()

    def step(self, lr_factor: float, *, max_norm: float = math.inf) -> StepOutcome:
        refuse_unreached(name for name, p in self._params.items() if p.requires_grad and p.grad is None)
        gradients = [self._local(p.grad) for p in self._params.values() if p.grad is not None]
        norm = self._global_norm([gradient for gradient in gradients if gradient.numel()])
        applied = math.isfinite(norm) and norm <= max_norm
        if applied:
            if 0 < self._clip_norm < norm:
                torch._foreach_mul_(gradients, self._clip_norm / (norm + 1e-6))
            self._optimizer.step(lr_factor)
            self.optimizer_steps += 1
        for parameter in self._params.values():
            parameter.grad = None
        self._kept.settle(applied)
        return StepOutcome(norm, applied)

    def evaluate(self, batch: Batch) -> Tensor:
        return self.infer(self._loss_fn, batch)

    @torch.no_grad()
    def infer(self, compute: LossFn, batch: Batch) -> Tensor:
        with evaluating(self.module), self._autocast():
            return compute(self.module, batch.fields).float()

    @torch.no_grad()
    def import_state(self, source: Source, *, optimizer_steps: int | None) -> None:
        self._optimizer.reset(optimizer_steps or 0)
        self.optimizer_steps = optimizer_steps or 0
        for name, parameter in self._params.items():
            held = self._held(name, parameter)
            held.fill(self._local(parameter), source, PARAM)
            if optimizer_steps is not None:
                for slot, state in self._optimizer.slots(name):
                    held.fill(self._local(state), source, slot)
        fill_buffers(persistent_buffers(self.module), source)

    def export_state(self, without: Collection[str] = ()) -> Iterator[Piece]:
        for name, parameter in self._params.items():
            if name in without:
                continue
            held = self._held(name, parameter)
            if held.stop > held.start and self._exports(name):
                yield held.piece(PARAM, self._local(parameter).float())
                for slot, state in self._optimizer.slots(name):
                    yield held.piece(slot, self._local(state).float())
        if self._ranks.rank == 0:
            yield from buffer_pieces(persistent_buffers(self.module))

    def close(self) -> None:
        # Parameters hold their gradients, hooks and modules in cycles; what is dropped here is freed at once.
        self._params, self._kept, self._optimizer, self._loss_fn = {}, None, None, None
        self.module = None

    def _global_norm(self, gradients: list[Tensor]) -> float:
        """L2 norm over all parameters and ranks: the one place of a step where the host waits for the device."""
        return self._squares(gradients).sqrt().item()

    def _squares(self, gradients: list[Tensor]) -> Tensor:
        """Sum of the squares of this rank's gradients, 0-dim fp32, whatever their dtype."""
        if not gradients:
            return torch.zeros(())
        norms = torch._foreach_norm(gradients, 2, dtype=torch.float32)
        return torch.stack(norms).square().sum()

    def _held(self, name: str, parameter: nn.Parameter) -> Held:
        return Held(name, tuple(parameter.shape), 0, parameter.numel())

    def _local(self, tensor: Tensor) -> Tensor:
        """This rank's part of a tensor."""
        return tensor

    def _exports(self, name: str) -> bool:
        """Does this rank, of those that hold the same part, hand it out?"""
        return True
