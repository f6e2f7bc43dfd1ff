"""The one interface behind which every way of sharding stands, and the table of them."""

from collections.abc import Collection, Iterator
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor, nn

from officina.trainer.batch import Batch, LossFn
from officina.trainer.config import RunConfig
from officina.trainer.ranks import Ranks
from officina.trainer.state import Piece, Source


@dataclass(frozen=True, slots=True)
class Parts:
    """All that an engine is built from."""

    run: RunConfig
    ranks: Ranks
    module: nn.Module
    """Single-device module with parameters on the meta device; the engine makes them real and fills them in `import_state`."""
    loss_fn: LossFn
    precision: str
    """`fp32`, `bf16` or `bf16_pure`: `auto` is already decided."""


@dataclass(frozen=True, slots=True)
class StepOutcome:
    """What one optimizer step did."""

    grad_norm: float
    """Global L2 norm of the gradient before clipping; inf or nan if it was not finite."""
    applied: bool
    """False if the step was left out (non-finite norm, or norm above the bound): parameters and moments are unchanged."""


class Engine(Protocol):
    """A sharded model and its optimizer: all that the training loop knows of DDP, FSDP2 or ZeRO.

    Contract: after the last micro-batch the gradient is that of (sum of token losses over all ranks and micro-batches)
    / step_tokens, whatever the engine, the number of ranks, the split into micro-batches and the padding.
    """

    module: nn.Module
    """The wrapped module; `infer` calls it for evaluation and generation."""

    def import_state(self, source: Source, *, optimizer_steps: int | None) -> None:
        """Fill parameters and buffers from `source`; with optimizer_steps also the moments, as after that many steps."""
        ...

    def export_state(self, without: Collection[str] = ()) -> Iterator[Piece]:
        """This rank's share: over all ranks each element of each tensor and slot comes exactly once; none of `without`."""
        ...

    @property
    def optimizer_steps(self) -> int:
        """Steps the optimizer applied (skipped ones do not count): AdamW's bias correction follows it."""
        ...

    def forward_backward(self, batch: Batch, *, step_tokens: int, last: bool) -> Tensor:
        """Accumulate the gradient of one micro-batch; returns the local sums of the loss function, detached, fp32.

        step_tokens: loss-bearing tokens of the whole step over all ranks. last: no further micro-batch in this step.
        """
        ...

    def step(self, lr_factor: float, *, max_norm: float = float("inf")) -> StepOutcome:
        """Clip, update with learning rates x lr_factor, clear gradients. A norm above max_norm leaves the step out."""
        ...

    def evaluate(self, batch: Batch) -> Tensor:
        """Local sums of the loss function without gradient, fp32."""
        ...

    def infer(self, compute: LossFn, batch: Batch) -> Tensor:
        """`compute(module, fields)` without gradient, in the engine's precision: any tensor, as fp32. On all ranks alike."""
        ...

    def close(self) -> None:
        """Free the engine; nothing of it may be used afterwards."""
        ...


def build_engine(parts: Parts) -> Engine:
    """The engine that `parts.run.engine` names. Its module is imported only now: DeepSpeed may not be installed."""
    from importlib import import_module

    module = import_module(f"officina.trainer.parallel.{ENGINES[parts.run.engine.kind]}")
    return module.build(parts)


ENGINES: dict[str, str] = {"single": "single", "ddp": "ddp", "fsdp2": "fsdp2", "hsdp": "fsdp2", "zero": "zero"}
"""Engine kind -> module under `officina.trainer.parallel` with a `build(parts) -> Engine`."""


def resolve_precision(precision: str, device: torch.device) -> str:
    """`auto` becomes bf16 where the device computes it in hardware, else fp32."""
    if precision != "auto":
        return precision
    if device.type == "cuda":
        return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp32"
    fast = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    return "bf16" if fast else "fp32"
