"""What is minimised: loss functions as the engines call them, `loss(module, fields) -> 0-dim fp32 sum`."""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from officina.trainer.batch import LossFn
from officina.trainer.errors import OfficinaError


def next_token_loss(z_loss: float = 0.0) -> LossFn:
    """Cross-entropy plus z_loss times the squared log-partition function, summed over the labels.

    Without gradient (evaluation) the z-loss is left out: a held-out loss is in nats whatever the objective.
    """
    def loss(module: nn.Module, fields: dict[str, Tensor]) -> Tensor:
        return module(fields["tokens"], labels_BT=fields["labels"], documents_BT=fields.get("documents"),
                      positions_BT=fields.get("positions"), z_loss=z_loss if torch.is_grad_enabled() else 0.0)

    return loss


def token_scores(module: nn.Module, fields: dict[str, Tensor]) -> Tensor:
    """(2, B, T) fp32: loss of each label in nats, and 1 where it is the most likely token; 0 where there is no label."""
    return module(fields["tokens"], labels_BT=fields["labels"], documents_BT=fields.get("documents"),
                  positions_BT=fields.get("positions"), scores=True)


def record_loss(losses_of: Callable[[nn.Module, dict[str, Tensor]], Tensor], path: str) -> LossFn:
    """The user's losses per record (B,), summed over the records that are there.

    A missing row (`valid` false) is computed, so that all ranks run the same hooks, but counts nothing.
    path: the user's dotted path, named in the OfficinaError where the result is not (B,) floating point.
    """
    def loss(module: nn.Module, fields: dict[str, Tensor]) -> Tensor:
        valid_B = fields["valid"]
        losses_B = losses_of(module, {name: value for name, value in fields.items() if name != "valid"})
        is_tensor = isinstance(losses_B, Tensor)
        if not is_tensor or losses_B.shape != valid_B.shape or not losses_B.is_floating_point():
            found = f"{losses_B.dtype} {tuple(losses_B.shape)}" if is_tensor else type(losses_B).__name__
            raise OfficinaError(
                f"model.loss={path} returned {found}, but the rule is one floating-point loss per record, "
                f"shape ({valid_B.shape[0]},). Return for example losses.flatten(1).sum(1)")
        return torch.where(valid_B, losses_B.float(), 0.0).sum()

    return loss
