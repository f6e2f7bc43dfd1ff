"""What travels from the loader to the engine."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

IGNORE = -100
"""Label of a token that carries no loss."""

LossFn = Callable[[nn.Module, dict[str, Tensor]], Tensor]
"""`loss(module, fields)` -> 0-dim fp32 SUM of the losses over the loss-bearing tokens (or items) of the micro-batch; or (n,)
sums, of which the first is that one and the others, without gradient, are what the objective measures beside it. What is
minimised may be more than is shown: the gradient of the first is the objective's.

`module` is the engine's wrapped module and must be called (`module(...)`), never reached around: sharding hooks run there.
"""


@dataclass(frozen=True, slots=True)
class Batch:
    """One micro-batch on one rank. B rows, T tokens a row."""

    fields: dict[str, Tensor]
    """Decoder: `tokens` (B, T) int64; `labels` (B, T) int64, IGNORE where no loss; and with data.mask_documents `documents`
    (B, T) int32, a number per document that rises within the row, and `positions` (B, T) int64, counted from the document's
    first token in the row; and of preference pairs `reference` (B, P, 2) fp32, the reference's log-probabilities of the chosen
    and the rejected answers, which are documents 0 and 1, 2 and 3, and so on. Custom models: what the decoder gave, stacked,
    plus `valid` (B,) bool, false for a missing row."""
    loss_tokens: int
    """Loss-bearing tokens (records for custom models, pairs for DPO) in this micro-batch; 0 is legal."""
    filled_tokens: int = 0
    """Tokens that are no padding, trained on or only read; 0 for custom models."""

    def to(self, device: torch.device) -> "Batch":
        """The same batch on `device`, copied without waiting where the memory is pinned."""
        return Batch({k: v.to(device, non_blocking=True) for k, v in self.fields.items()}, self.loss_tokens,
                     self.filled_tokens)


def loss_of(sums: Tensor) -> Tensor:
    """The loss among what a `LossFn` gave, 0-dim, to be differentiated.

    One that is not finite has no finite gradient: the norm, which every rank learns, then tells of it, and the step is left
    out. (Cross-entropy of a label whose logit is minus infinity, for one, is infinite with the finite gradient of a softmax.)
    """
    loss = sums if sums.ndim == 0 else sums[0]
    return loss * torch.where(loss.detach().isfinite(), 1.0, torch.nan)
