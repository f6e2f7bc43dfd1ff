"""The one form in which parameters and moments leave and enter an engine: flat ranges of named tensors.

A tensor of any shape is seen as its elements in row-major order, 0 to numel. A rank holds some ranges [start, stop) of
some tensors, whatever the sharding; so any engine on any number of ranks reads what any other wrote. Initial weights
are a `Source` like a checkpoint is: both fill an engine by the same calls.
"""

from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

PARAM = "param"
"""Slot of a parameter; also that of a persistent buffer."""
EXP_AVG, EXP_AVG_SQ, MOMENTUM = "exp_avg", "exp_avg_sq", "momentum"
"""Slots of AdamW's first and second moment and of Muon's momentum."""


@dataclass(frozen=True, slots=True)
class Piece:
    """The range [start, stop) of slot `slot` of tensor `name`, as held by this rank."""

    name: str
    """Name in the unwrapped module, e.g. `blocks.0.attn.q.weight`; a tied parameter has its first name only."""
    slot: str
    shape: tuple[int, ...]
    """Shape of the whole tensor."""
    start: int
    stop: int
    values: Tensor
    """(stop - start,) on any device; fp32 for parameters and moments, their own dtype for buffers. May be a view: copy it
    before the next step."""


class Source(Protocol):
    """Where an engine's state comes from: initial weights, a checkpoint, another model's files."""

    def read(self, name: str, slot: str, start: int, stop: int) -> Tensor:
        """Elements [start, stop) in row-major order: (stop - start,) CPU tensor, fp32 (buffers: their own dtype)."""
        ...
