"""Which parameters are updated how: decay groups, AdamW, and AdamW with Muon behind one small class.

Works on whole tensors and on FSDP2's DTensors alike; DeepSpeed takes only the groups and `new_adamw`.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from officina.kernels.adamw import adamw_step_
from officina.kernels.dispatch import Impl, why_not_triton
from officina.trainer.config import AdamWConfig, MuonConfig
from officina.trainer.muon import Muon, Split
from officina.trainer.state import EXP_AVG, EXP_AVG_SQ, MOMENTUM

_NORMS = nn.LayerNorm | nn.RMSNorm | nn.GroupNorm | nn.modules.batchnorm._BatchNorm


@dataclass(frozen=True, slots=True)
class Groups:
    """Names of all trainable parameters, by the way they are updated. A tied parameter is there once, by its first name."""

    decayed: tuple[str, ...]
    """AdamW with weight decay."""
    plain: tuple[str, ...]
    """AdamW without."""
    muon: tuple[str, ...]
    """Muon with weight decay: the matrices of the blocks."""


def group_parameters(module: nn.Module, blocks: nn.Module, config: AdamWConfig) -> Groups:
    """Sort the trainable parameters of the unwrapped module.

    Decayed are matrices (2 dimensions or more) inside the blocks, and outside them those called `weight` (a linear map or
    a convolution, the output head); never a norm, a bias, another 1-dimensional parameter or an embedding, tied or not.
    """
    never = {id(parameter) for name, child in module.named_modules() if _is_norm_or_embedding(name, child)
             for parameter in child.parameters(recurse=False)}
    inside = {id(parameter) for parameter in blocks.parameters()}
    decayed, plain, muon = [], [], []
    for name, parameter in module.named_parameters():
        if not parameter.requires_grad:
            continue
        leaf = name.rpartition(".")[2]
        is_matrix = parameter.ndim >= 2 and leaf != "bias" and id(parameter) not in never
        if isinstance(config, MuonConfig) and is_matrix and id(parameter) in inside and parameter.ndim == 2:
            muon.append(name)
        elif is_matrix and (id(parameter) in inside or leaf == "weight"):
            decayed.append(name)
        else:
            plain.append(name)
    return Groups(tuple(decayed), tuple(plain), tuple(muon))


def _is_norm_or_embedding(name: str, child: nn.Module) -> bool:
    return isinstance(child, _NORMS | nn.Embedding) or name.rpartition(".")[2].startswith("embed")


def new_adamw(config: AdamWConfig, groups: Groups, params: Mapping[str, nn.Parameter]) -> torch.optim.AdamW:
    """torch's AdamW over the decayed and the plain parameters, for DeepSpeed: fused, one pass over memory, on CPU and GPU."""
    members = [{"params": [params[name] for name in names], "weight_decay": decay}
               for names, decay in ((groups.decayed, config.weight_decay), (groups.plain, 0.0)) if names]
    return torch.optim.AdamW(members, lr=config.lr, betas=(config.beta1, config.beta2), eps=config.eps, fused=True)


def new_adamw_state(tensor: Tensor, steps: int = 0) -> dict[str, Tensor]:
    """AdamW's state of one tensor with zero moments, as after `steps` steps. The fused kernel wants `step` on the device."""
    return {"step": torch.full((), float(steps), dtype=torch.float32, device=tensor.device),
            EXP_AVG: torch.zeros_like(tensor), EXP_AVG_SQ: torch.zeros_like(tensor)}


class Optimizer:
    """AdamW, and Muon where the configuration asks for it. State exists from the beginning, so memory does not grow later.

    fp32 parameters where Triton kernels run are updated by `adamw_step_`, all others by the fused operator of torch's AdamW,
    which is called here without `torch.optim`: that would import torch.compile's machinery at its first step, a second and
    800 modules in every rank.
    """

    def __init__(self, config: AdamWConfig, groups: Groups, params: Mapping[str, nn.Parameter], split: Split,
                 impl: Impl = "auto") -> None:
        self._config, self._local = config, split.local
        self._params = {name: params[name] for name in (*groups.decayed, *groups.plain)}
        self._lists: dict[tuple[float, torch.dtype], list[str]] = {}
        """Names by weight decay and dtype: what one call may update."""
        for names, decay in ((groups.decayed, config.weight_decay), (groups.plain, 0.0)):
            for name in names:
                self._lists.setdefault((decay, params[name].dtype), []).append(name)
        self._by_kernel = impl != "reference" and all(
            p.dtype == torch.float32 and p.is_contiguous() and why_not_triton(p) is None for p in self._params.values())
        self._muon = None
        if isinstance(config, MuonConfig):
            self._muon = Muon(config, {name: params[name] for name in groups.muon}, split, impl)
        self.reset(0)

    def reset(self, steps: int) -> None:
        """Zero moments, and the bias correction as after `steps` steps."""
        self._steps = steps
        self._moments = {name: {slot: torch.zeros_like(parameter.detach()) for slot in (EXP_AVG, EXP_AVG_SQ)}
                         for name, parameter in self._params.items()}
        if self._muon:
            self._muon.reset()

    def step(self, lr_factor: float) -> None:
        """Update every parameter that has a gradient, with the learning rates of the configuration x lr_factor."""
        for (decay, _), names in self._lists.items():
            self._step_adamw([name for name in names if self._params[name].grad is not None], decay, lr_factor)
        self._steps += 1
        if self._muon:
            self._muon.step(lr_factor)

    @torch.no_grad()
    def _step_adamw(self, names: Sequence[str], weight_decay: float, lr_factor: float) -> None:
        if not names:
            return
        params, moments = [self._params[name] for name in names], [self._moments[name] for name in names]
        columns = params, (p.grad for p in params), (m[EXP_AVG] for m in moments), (m[EXP_AVG_SQ] for m in moments)
        tensors = [[self._local(tensor) for tensor in column] for column in columns]
        config, device = self._config, tensors[0][0].device
        numbers = dict(lr=config.lr * lr_factor, beta1=config.beta1, beta2=config.beta2, eps=config.eps,
                       weight_decay=weight_decay)
        if self._by_kernel:
            step = torch.full((), float(self._steps), device=device)  # a launch; a copy would wait
            adamw_step_(*tensors, step, **numbers, impl="triton")
        else:
            step = torch.full((), float(self._steps + 1), device=device)
            torch._fused_adamw_(*tensors, [], [step] * len(names), **numbers, amsgrad=False, maximize=False)

    def moments(self) -> list[Tensor]:
        """All of the state that this rank holds."""
        return [tensor for state in self._moments.values() for tensor in state.values()] + (
            list(self._muon.momentum.values()) if self._muon else [])

    def slots(self, name: str) -> Iterable[tuple[str, Tensor]]:
        """(slot, this rank's part) of the state of a parameter; nothing where another rank holds it or it is frozen."""
        if name in self._moments:
            return self._moments[name].items()
        if self._muon and name in self._muon.momentum:
            return [(MOMENTUM, self._muon.momentum[name])]
        return []
