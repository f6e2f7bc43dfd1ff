"""What is minimised: loss functions as the engines call them, `loss(module, fields) -> fp32 sums`."""

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from officina.trainer.batch import IGNORE, LossFn
from officina.trainer.config import ObjectiveConfig
from officina.trainer.errors import OfficinaError

REWARDS = ("reward_accuracy", "reward_margin", "reward_chosen", "reward_rejected")
"""What `dpo_loss` measures, sums over pairs."""


def next_token_loss(z_loss: float = 0.0) -> LossFn:
    """Cross-entropy, summed over the labels; and with z_loss the sum of z_loss times their squared log-partition function.

    The gradient is that of both, the first number the cross-entropy alone: a loss is in nats and can be compared whatever
    z_loss is. Without gradient (evaluation) the z-loss is left out.
    """
    def loss(module: nn.Module, fields: dict[str, Tensor]) -> Tensor:
        weight = z_loss if torch.is_grad_enabled() else 0.0
        found = module(fields["tokens"], labels_BT=fields["labels"], documents_BT=fields.get("documents"),
                       positions_BT=fields.get("positions"), z_loss=weight)
        if not weight:
            return found
        z = found[1].detach()
        return torch.stack((found[0] - z, z))  # less a number, which leaves the gradient as it is

    return loss


def dpo_loss(beta: float) -> LossFn:
    """-log sigmoid(beta (log-ratio of the chosen answer - log-ratio of the rejected one)), summed over pairs, and `REWARDS`.

    A log-ratio is log pi(answer) - log pi_ref(answer), a reward beta times that. Rafailov et al., arXiv:2305.18290.
    """
    def loss(module: nn.Module, fields: dict[str, Tensor]) -> Tensor:
        reference_BP2, documents_BT = fields["reference"], fields["documents"]
        n = 2 * reference_BP2.shape[1]
        logp_BP2 = document_logp(module, fields, n).unflatten(1, (-1, 2))
        there_BP = (_by_document(fields["labels"] != IGNORE, documents_BT, n) > 0).unflatten(1, (-1, 2)).all(-1)
        chosen, rejected = (torch.where(there_BP, each, 0.0) for each in (beta * (logp_BP2 - reference_BP2)).unbind(-1))
        margin = chosen - rejected
        losses = torch.where(there_BP, -F.logsigmoid(margin), 0.0)
        beside = [(margin > 0).to(losses.dtype), margin, chosen, rejected]  # a margin of 0, of no pair, is no success
        return torch.stack((losses.sum(), *(each.detach().sum() for each in beside)))

    return loss


def document_logp(module: nn.Module, fields: dict[str, Tensor], n: int = 0) -> Tensor:
    """(B, n) fp32 log-probability of the labels of documents 0 to n - 1 of each row; n = 0: of all."""
    documents_BT = fields["documents"]
    return -_by_document(token_scores(module, fields)[0], documents_BT, n or int(documents_BT.max()) + 1)


def token_scores(module: nn.Module, fields: dict[str, Tensor]) -> Tensor:
    """(2, B, T) fp32: loss of each label in nats, and 1 where it is the most likely token; 0 where there is no label."""
    return module(fields["tokens"], labels_BT=fields["labels"], documents_BT=fields.get("documents"),
                  positions_BT=fields.get("positions"), scores=True)


def _by_document(values_BT: Tensor, documents_BT: Tensor, n: int) -> Tensor:
    """(B, n) sums over the documents 0 to n - 1 of each row; what lies in others (padding) is left out."""
    values_BT = values_BT if values_BT.is_floating_point() else values_BT.float()
    sums = values_BT.new_zeros(len(values_BT), n + 1)
    return sums.scatter_add(1, documents_BT.clamp(max=n).long(), values_BT)[:, :n]


def beside(objective: ObjectiveConfig) -> tuple[str, ...]:
    """Names of what the objective's loss function gives beside the loss while it trains, in its order."""
    return REWARDS if objective.kind == "dpo" else ("z_loss",) if objective.z_loss else ()


def measured(names: Sequence[str], sums: Sequence[float], items: float) -> dict[str, float]:
    """The means of such sums over tokens or pairs, by name."""
    return {name: value / max(items, 1) for name, value in zip(names, sums, strict=True)}


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
