"""One optimizer step on one rank."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from officina.trainer.batch import Batch
from officina.trainer.parallel.engine import Engine


@dataclass(frozen=True, slots=True)
class StepResult:
    """What one step did, as this rank saw it."""

    loss_sum_nats: float
    """Sum of this rank's token losses."""
    grad_norm: float
    """Global L2 norm before clipping."""
    applied: bool
    """False: the step was left out, parameters and moments are unchanged."""
    measured: list[float]
    """Sums of what the objective measures beside the loss, over this rank's micro-batches."""


def train_step(engine: Engine, micros: Sequence[Batch], *, device: torch.device, step_tokens: int, lr_factor: float,
               max_norm: float = float("inf"), is_spike: Callable[[float], bool] | None = None) -> StepResult:
    """Forward and backward of every micro-batch, then the update.

    Args:
        step_tokens: loss-bearing tokens of the step over all ranks; the gradient is that of the mean loss over them.
        max_norm: a larger gradient norm leaves the step out.
        is_spike: asked with this rank's sum of losses before the update; true, on all ranks alike, leaves the step out too.
    """
    sums = torch.zeros((), device=device)
    for micro in micros:
        sums = sums + engine.forward_backward(micro.to(device), step_tokens=step_tokens, last=micro is micros[-1])
    if is_spike and is_spike(sums.reshape(-1)[0].item()):
        max_norm = -1.0  # no norm is below it
    outcome = engine.step(lr_factor, max_norm=max_norm)
    loss_sum, *measured = sums.reshape(-1).tolist()
    return StepResult(loss_sum, outcome.grad_norm, outcome.applied, measured)
