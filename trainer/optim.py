"""Which parameters are updated how: decay groups, AdamW, and AdamW with Muon behind one small class.

Works on whole tensors and on FSDP2's DTensors alike; DeepSpeed takes only the groups and `new_adamw`.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

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
    """torch's AdamW over the decayed and the plain parameters: the fused kernel, one pass over memory, on CPU and GPU."""
    members = [{"params": [params[name] for name in names], "weight_decay": decay}
               for names, decay in ((groups.decayed, config.weight_decay), (groups.plain, 0.0)) if names]
    return torch.optim.AdamW(members, lr=config.lr, betas=(config.beta1, config.beta2), eps=config.eps, fused=True)


def new_adamw_state(tensor: Tensor, steps: int = 0) -> dict[str, Tensor]:
    """AdamW's state of one tensor with zero moments, as after `steps` steps. The fused kernel wants `step` on the device."""
    return {"step": torch.full((), float(steps), dtype=torch.float32, device=tensor.device),
            EXP_AVG: torch.zeros_like(tensor), EXP_AVG_SQ: torch.zeros_like(tensor)}


class Optimizer:
    """AdamW, and Muon where the configuration asks for it. State exists from the beginning, so memory does not grow later.

    fp32 parameters where Triton kernels run are updated by `adamw_step_`, all others by torch's fused AdamW.
    """

    def __init__(self, config: AdamWConfig, groups: Groups, params: Mapping[str, nn.Parameter], split: Split,
                 impl: Impl = "auto") -> None:
        self._params = {name: params[name] for name in (*groups.decayed, *groups.plain)}
        self._adamw = new_adamw(config, groups, params) if self._params else None
        self._lr, self._local = config.lr, split.local
        self._by_kernel = impl != "reference" and all(
            p.dtype == torch.float32 and p.is_contiguous() and why_not_triton(p) is None for p in self._params.values())
        self._muon = None
        if isinstance(config, MuonConfig):
            self._muon = Muon(config, {name: params[name] for name in groups.muon}, split, impl)
        self.reset(0)

    def reset(self, steps: int) -> None:
        """Zero moments, and the bias correction as after `steps` steps."""
        self._steps = steps
        for parameter in self._params.values():
            self._adamw.state[parameter] = new_adamw_state(parameter.detach(), steps)
        if self._muon:
            self._muon.reset()

    def step(self, lr_factor: float) -> None:
        """Update every parameter that has a gradient, with the learning rates of the configuration x lr_factor."""
        if self._adamw:
            for group in self._adamw.param_groups:
                group["lr"] = self._lr * lr_factor
                if self._by_kernel:
                    self._step_by_kernel(group)
            if not self._by_kernel:
                self._adamw.step()
            self._steps += 1
        if self._muon:
            self._muon.step(lr_factor)

    @torch.no_grad()
    def _step_by_kernel(self, group: Mapping[str, Any]) -> None:
        params = [p for p in group["params"] if p.grad is not None]
        if not params:
            return
        states = [self._adamw.state[p] for p in params]
        columns = params, (p.grad for p in params), (s[EXP_AVG] for s in states), (s[EXP_AVG_SQ] for s in states)
        tensors = [[self._local(tensor) for tensor in column] for column in columns]
        step = torch.full((), float(self._steps), device=tensors[0][0].device)  # a launch; a copy would wait
        adamw_step_(*tensors, step, lr=group["lr"], beta1=group["betas"][0], beta2=group["betas"][1], eps=group["eps"],
                    weight_decay=group["weight_decay"], impl="triton")

    def slots(self, name: str) -> Iterable[tuple[str, Tensor]]:
        """(slot, this rank's part) of the state of a parameter; nothing where another rank holds it or it is frozen."""
        if name in self._params:
            state = self._adamw.state[self._params[name]]
            return [(EXP_AVG, state[EXP_AVG]), (EXP_AVG_SQ, state[EXP_AVG_SQ])]
        if self._muon and name in self._muon.momentum:
            return [(MOMENTUM, self._muon.momentum[name])]
        return []
