"""One AdamW step of many tensors in one launch.

    t = step + 1,   g = grad_scale grad,   m = b1 m + (1 - b1) g,   v = b2 v + (1 - b2) g^2
    p = (1 - lr decay) p - lr m / (1 - b1^t) / (sqrt(v / (1 - b2^t)) + eps),   copy = p in the copy's dtype

The kernel finds its tensors through a table of addresses on the device, reads the clipping scale, the step and the flag that
says whether to skip on the device too, and so never waits for it: 28 bytes a parameter with bf16 gradients and copies.
Source: Loshchilov & Hutter, arXiv:1711.05101. A program takes a block of one tensor.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from officina.kernels.dispatch import Impl, choose_impl, jit, tl, why_not_triton
from officina.kernels.ops import define_op
from officina.kernels.tables import SAFE, Config, arch_of, look_up


def adamw_step_(params: Sequence[Tensor], grads: Sequence[Tensor], exp_avgs: Sequence[Tensor], exp_avg_sqs: Sequence[Tensor],
                step: Tensor, *, lr: float, beta1: float, beta2: float, eps: float, weight_decay: float,
                copies: Sequence[Tensor] = (), grad_scale: Tensor | None = None, skip: Tensor | None = None,
                impl: Impl = "auto") -> None:
    """Update params (the fp32 masters), both moments, step and copies in place.

    Args:
        grads: of one dtype; not written to.
        step: 0-dim fp32, steps done before this one; incremented, unless the step is skipped.
        copies: empty, or for each parameter a tensor of its shape in another dtype, into which it is rounded.
        grad_scale: 0-dim fp32, factor on all gradients (for clipping).
        skip: 0-dim bool; true leaves everything as it is.
    Raises ValueError for lists that do not fit each other, and where impl=triton cannot run.
    """
    if not params:
        return
    _check(params, grads, exp_avgs, exp_avg_sqs, copies, {"step": step, "grad_scale": grad_scale, "skip": skip})
    reason = why_not_triton(params[0], grads[0], *copies[:1])
    if params[0].dtype != torch.float32:
        reason = f"params are {params[0].dtype}, the kernel updates torch.float32"
    for name, tensors in (("grads", grads), ("copies", copies)):
        if reason is None and tensors and tensors[0].dtype not in _TYPES:
            reason = f"{name} are {tensors[0].dtype}, the kernel takes {', '.join(map(str, _TYPES))}"
    arguments = (grad_scale, skip, lr, beta1, beta2, eps, weight_decay)
    if choose_impl("adamw_step_", impl, reason) == "triton":
        torch.ops.officina.adamw_(params, grads, exp_avgs, exp_avg_sqs, copies, step, *arguments)
    else:
        adamw_step_reference_(params, grads, exp_avgs, exp_avg_sqs, copies, step, *arguments)


@torch.no_grad()
def adamw_step_reference_(params: Sequence[Tensor], grads: Sequence[Tensor], exp_avgs: Sequence[Tensor],
                          exp_avg_sqs: Sequence[Tensor], copies: Sequence[Tensor], step: Tensor, grad_scale: Tensor | None,
                          skip: Tensor | None, lr: float, beta1: float, beta2: float, eps: float, weight_decay: float) -> None:
    """Same contract in plain torch, tensor by tensor: the oracle for tests and benchmarks."""
    skip = torch.zeros((), dtype=torch.bool, device=step.device) if skip is None else skip
    t = step.double() + 1
    correction1, correction2 = 1 - beta1**t, 1 - beta2**t
    for place, (p, grad, m, v) in enumerate(zip(params, grads, exp_avgs, exp_avg_sqs, strict=True)):
        g = grad.to(p.dtype) if grad_scale is None else grad.to(p.dtype) * grad_scale
        new_m = m.lerp(g, 1 - beta1)
        new_v = (v * beta2).addcmul(g, g, value=1 - beta2)
        denominator = (new_v / correction2.to(p.dtype)).sqrt() + eps
        new_p = p * (1 - lr * weight_decay) - lr / correction1.to(p.dtype) * new_m / denominator
        for old, new in ((p, new_p), (m, new_m), (v, new_v)):
            old.copy_(torch.where(skip, old, new))
        if copies:
            copies[place].copy_(torch.where(skip, copies[place], p.to(copies[place].dtype)))
    step.add_((~skip).to(step.dtype))


def _check(params, grads, exp_avgs, exp_avg_sqs, copies, scalars: dict[str, Tensor | None]) -> None:
    lists = {"grads": grads, "exp_avgs": exp_avgs, "exp_avg_sqs": exp_avg_sqs, **({"copies": copies} if copies else {})}
    for name, tensors in lists.items():
        if len(tensors) != len(params):
            raise ValueError(f"adamw_step_: {len(tensors)} {name} for {len(params)} params; need one for each")
    device = params[0].device
    for name, tensors in {"params": params, **lists}.items():
        dtype = params[0].dtype if name.startswith("exp_avg") else tensors[0].dtype
        for place, (tensor, param) in enumerate(zip(tensors, params, strict=True)):
            if (tensor.shape != param.shape or tensor.dtype != dtype or tensor.device != device
                    or not tensor.is_contiguous()):
                raise ValueError(f"adamw_step_: {name}[{place}] is {tuple(tensor.shape)} {tensor.dtype} on {tensor.device}, "
                                 f"contiguous: {tensor.is_contiguous()}; need {tuple(param.shape)} {dtype} on {device}, "
                                 "contiguous")
    for name, tensor in scalars.items():
        if tensor is not None and (tensor.numel() != 1 or tensor.device != device):
            raise ValueError(f"adamw_step_: {name} is {tuple(tensor.shape)} on {tensor.device}; need one element on {device}")


@jit
def _update(p, grad, m, v, copy, place, mask, scale, lr, correction1, correction2, BETA1: tl.constexpr, BETA2: tl.constexpr,
            EPS: tl.constexpr, DECAY: tl.constexpr):
    g = tl.load(grad + place, mask=mask).to(tl.float32) * scale
    value, first, second = tl.load(p + place, mask=mask), tl.load(m + place, mask=mask), tl.load(v + place, mask=mask)
    first = first + (1 - BETA1) * (g - first)
    second = BETA2 * second + (1 - BETA2) * g * g
    value = value * (1 - lr * DECAY) - lr / correction1 * first / (tl.sqrt(second / correction2) + EPS)
    tl.store(p + place, value, mask=mask)
    tl.store(m + place, first, mask=mask)
    tl.store(v + place, second, mask=mask)
    if copy is not None:
        tl.store(copy + place, value.to(copy.dtype.element_ty), mask=mask)


@jit
def _pointer(address, DTYPE: tl.constexpr, ALIGNED: tl.constexpr):
    pointer = tl.load(address).to(tl.pointer_type(DTYPE))
    return tl.multiple_of(pointer, 16) if ALIGNED else pointer


@jit
def adamw_kernel(table, blocks, step, grad_scale, skip, lr, BETA1: tl.constexpr, BETA2: tl.constexpr, LOG_BETA1: tl.constexpr,
                 LOG_BETA2: tl.constexpr, EPS: tl.constexpr, DECAY: tl.constexpr, GRAD: tl.constexpr, COPY: tl.constexpr,
                 ALIGNED: tl.constexpr, BLOCK: tl.constexpr):
    """`table`: per tensor its elements and the addresses of p, grad, m, v, copy. `blocks`: per program its tensor and block."""
    program = tl.program_id(0).to(tl.int64)
    row = table + 6 * tl.load(blocks + 2 * program).to(tl.int64)
    p, grad = _pointer(row + 1, tl.float32, ALIGNED), _pointer(row + 2, GRAD, ALIGNED)
    m, v = _pointer(row + 3, tl.float32, ALIGNED), _pointer(row + 4, tl.float32, ALIGNED)
    copy = None if COPY is None else _pointer(row + 5, COPY, ALIGNED)
    t = tl.load(step).to(tl.float64) + 1  # in fp32, 1 - 0.999^t would keep four digits at the first steps
    correction1 = (1 - tl.exp(t * LOG_BETA1)).to(tl.float32)
    correction2 = (1 - tl.exp(t * LOG_BETA2)).to(tl.float32)
    scale = 1.0 if grad_scale is None else tl.load(grad_scale)
    n = tl.load(row)
    if skip is not None:
        n = tl.where(tl.load(skip) != 0, 0, n)
    start = tl.load(blocks + 2 * program + 1).to(tl.int64) * BLOCK
    place = start + tl.arange(0, BLOCK)
    if start + BLOCK <= n:  # without a mask, loads and stores are 16 bytes wide
        _update(p, grad, m, v, copy, place, None, scale, lr, correction1, correction2, BETA1, BETA2, EPS, DECAY)
    else:
        _update(p, grad, m, v, copy, place, place < n, scale, lr, correction1, correction2, BETA1, BETA2, EPS, DECAY)


TABLE = {arch: {"any": Config(1, 2048, warps, 1)} for arch, warps in
         (("sm_80", 8), ("sm_90", 8), ("gfx90a", 4), ("gfx942", 4), (SAFE, 4))}


def config_for(arch: str) -> Config:
    """block_n elements of a tensor to a program."""
    return look_up("adamw", TABLE, arch, "any")


def _constants(beta1: float, beta2: float, eps: float, weight_decay: float, config: Config) -> dict[str, Any]:
    log1, log2 = (math.log(beta) if beta else -math.inf for beta in (beta1, beta2))
    return {"BETA1": beta1, "BETA2": beta2, "LOG_BETA1": log1, "LOG_BETA2": log2, "EPS": eps, "DECAY": weight_decay,
            "BLOCK": config.block_n}


def compilations(arch: str) -> Iterator[tuple[str, Any, dict[str, Any], Config]]:
    """(name, kernel, arguments, configuration) of what a trainer launches; for tests and the table in the docs."""
    config = config_for(arch)
    types = {"table": "*i64", "blocks": "*i32", "step": "*fp32", "lr": "fp32", "ALIGNED": True} | _constants(
        0.9, 0.95, 1e-8, 0.1, config)
    lean = {"grad_scale": None, "skip": None, "GRAD": tl.float32, "COPY": None}
    full = {"grad_scale": "*fp32", "skip": "*u8", "GRAD": tl.bfloat16, "COPY": tl.bfloat16}
    yield "AdamW, fp32 gradients", adamw_kernel, types | lean, config
    yield "AdamW, bf16 gradients and copies, scale and skip flag", adamw_kernel, types | full, config


def _adamw(params, grads, exp_avgs, exp_avg_sqs, copies, step, grad_scale, skip, lr, beta1, beta2, eps, weight_decay):
    device = params[0].device
    arch = arch_of(device)
    config = config_for(arch)
    addresses = [tuple(t.data_ptr() for t in tensors) for tensors in (params, grads, exp_avgs, exp_avg_sqs, copies or params)]
    numels = tuple(p.numel() for p in params)
    blocks = _blocks(numels, config.block_n, device)
    skip = None if skip is None else skip.view(torch.uint8)
    if len(blocks):
        adamw_kernel[(len(blocks),)](
            _table((numels, *addresses), device), blocks, step, grad_scale, skip, lr, GRAD=_TYPES[grads[0].dtype],
            COPY=_TYPES[copies[0].dtype] if copies else None,
            ALIGNED=all(address % 16 == 0 for column in addresses for address in column),
            **_constants(beta1, beta2, eps, weight_decay, config), **config.options(arch))
    step.add_(1 if skip is None else (skip == 0).to(step.dtype))


@functools.lru_cache(maxsize=16)
def _blocks(numels: tuple[int, ...], block: int, device: torch.device) -> Tensor:
    """(blocks, 2) int32: tensor and block of each program. Kept, since it is the same at every step."""
    counts = torch.tensor([-(-n // block) for n in numels])
    tensor = torch.repeat_interleave(torch.arange(len(numels)), counts)
    within = torch.arange(len(tensor)) - (counts.cumsum(0) - counts)[tensor]
    return torch.stack((tensor, within), dim=1).int().to(device)


@functools.lru_cache(maxsize=16)
def _table(columns: tuple[tuple[int, ...], ...], device: torch.device) -> Tensor:
    """(tensors, 6) int64. Kept, since gradients often come back to the addresses they had."""
    table = torch.tensor(columns, dtype=torch.int64).T.contiguous()
    return table.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else table


_TYPES = {torch.float32: tl.float32, torch.float16: tl.float16, torch.bfloat16: tl.bfloat16} if tl else {}
"""Of gradients and copies, and what triton calls them."""


define_op("adamw_(Tensor(a!)[] params, Tensor[] grads, Tensor(b!)[] exp_avgs, Tensor(c!)[] exp_avg_sqs, Tensor(d!)[] copies,"
          " Tensor(e!) step, Tensor? grad_scale, Tensor? skip, float lr, float beta1, float beta2, float eps,"
          " float weight_decay) -> ()", _adamw, lambda *_: None)
