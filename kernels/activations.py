"""Activations between the matrix products of an MLP: SwiGLU, GeGLU and xIELU.

    swiglu(g, u) = silu(g) u            silu(g) = g sigmoid(g)
    geglu(g, u)  = gelu(g) u            gelu(g) = g sigmoid(2 t),   t = sqrt(2 / pi) (g + 0.044715 g^3)      (the tanh form)
    xielu(x)     = x / 2 + softplus(alpha_p) x^2                                 for x > 0
                   x / 2 + (1 / 2 + softplus(alpha_n)) (exp(min(x, -1e-6)) - 1 - x)   else

Nothing but the inputs is kept for the backward pass, which computes the activation anew while it is there.
Sources: Shazeer, arXiv:2002.05202; Hendrycks & Gimpel, arXiv:1606.08415; xIELU arXiv:2411.13010.
Shapes: N rows, F features; rows may be strided, as the halves of one product of gate and up are.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from officina.kernels.dispatch import Impl, choose_impl, jit, tl, triton, why_not_triton
from officina.kernels.ops import define_op, multiprocessors, rows_of, wide_dtype, wide_type
from officina.kernels.tables import SAFE, Config, arch_of, look_up

XIELU_BETA, XIELU_EPS = 0.5, -1e-6
"""Constants of xIELU (section 3 of the source)."""

_PROGRAMS_PER_MULTIPROCESSOR = 8
"""Of xIELU's backward pass, whose programs add up the gradients of the two alphas on their way."""


def swiglu(gate: Tensor, up: Tensor, *, impl: Impl = "auto") -> Tensor:
    """silu(gate) up, in their shape and dtype; fp32 inside. ValueError for inputs that differ, or where triton cannot run."""
    return _gated("swiglu", gate, up, impl)


def geglu(gate: Tensor, up: Tensor, *, impl: Impl = "auto") -> Tensor:
    """gelu(gate) up with the tanh form of gelu; else as `swiglu`."""
    return _gated("geglu", gate, up, impl)


def xielu(x: Tensor, alpha_p: Tensor, alpha_n: Tensor, *, impl: Impl = "auto") -> Tensor:
    """xIELU with two learned numbers, tensors of one element each, rounded to x's dtype; x's shape and dtype, fp32 inside."""
    if x.dim() < 1:
        raise ValueError(f"xielu: x {tuple(x.shape)} has no axis; need (..., F), such as x[None]")
    if alpha_p.numel() != 1 or alpha_n.numel() != 1:
        raise ValueError(f"xielu: alpha_p {tuple(alpha_p.shape)} and alpha_n {tuple(alpha_n.shape)} must have one element each")
    if choose_impl("xielu", impl, why_not_triton(x, alpha_p, alpha_n)) == "reference":
        return xielu_reference(x, alpha_p, alpha_n)
    return torch.ops.officina.xielu(rows_of(x), alpha_p, alpha_n).view(x.shape)


def swiglu_reference(gate: Tensor, up: Tensor) -> Tensor:
    """Same contract in plain torch: the oracle for tests and benchmarks."""
    return F.silu(gate) * up


def geglu_reference(gate: Tensor, up: Tensor) -> Tensor:
    """Same contract in plain torch."""
    return F.gelu(gate, approximate="tanh") * up


def xielu_reference(x: Tensor, alpha_p: Tensor, alpha_n: Tensor) -> Tensor:
    """Same contract in plain torch. In bf16, exp(x) - 1 - x would lose all its digits near 0."""
    wide = wide_dtype(x.dtype)
    value, alpha_p, alpha_n = x.to(wide), alpha_p.to(x.dtype).to(wide), alpha_n.to(x.dtype).to(wide)
    rising = F.softplus(alpha_p) * value.square()
    falling = (XIELU_BETA + F.softplus(alpha_n)) * (torch.expm1(value.clamp(max=XIELU_EPS)) - value)
    return (torch.where(value > 0, rising, falling) + XIELU_BETA * value).to(x.dtype)


def _gated(op: str, gate: Tensor, up: Tensor, impl: Impl) -> Tensor:
    if gate.shape != up.shape or gate.dtype != up.dtype or gate.dim() < 1:
        raise ValueError(f"{op}: gate {tuple(gate.shape)} {gate.dtype} and up {tuple(up.shape)} {up.dtype} must be alike, "
                         "(..., F)")
    if choose_impl(op, impl, why_not_triton(gate, up)) == "reference":
        return (swiglu_reference if op == "swiglu" else geglu_reference)(gate, up)
    return torch.ops.officina.gated(rows_of(gate), rows_of(up), op == "geglu").view(gate.shape)


@jit
def _activation(gate, GELU: tl.constexpr):
    """The activation of the gate and its slope."""
    if GELU:
        twice = 1.5957691216057308 * gate * (1 + 0.044715 * gate * gate)  # 2 t
        share = tl.sigmoid(twice)
        bend = 1.5957691216057308 * gate * (1 + 3 * 0.044715 * gate * gate)  # g times the derivative of 2 t
    else:
        share = tl.sigmoid(gate)
        bend = gate
    return gate * share, share + bend * share * (1 - share)


@jit
def _blocks(F, BLOCK: tl.constexpr):
    """Blocks of a row; unlike tl.cdiv without overflow for F just below 2^31."""
    return (F - 1) // BLOCK + 1


@jit
def _block(task, F, BLOCK: tl.constexpr):
    """Row and features of a task, where each row is cut into blocks."""
    blocks = _blocks(F, BLOCK)
    row, block = (task // blocks).to(tl.int64), (task % blocks).to(tl.int64)
    return row, block * BLOCK + tl.arange(0, BLOCK)


@jit
def gated_forward_kernel(gate, up, out, gate_stride, up_stride, F, GELU: tl.constexpr, WIDE: tl.constexpr, BLOCK: tl.constexpr):
    row, column = _block(tl.program_id(0), F, BLOCK)
    mask = column < F
    value, _ = _activation(tl.load(gate + row * gate_stride + column, mask=mask).to(WIDE), GELU)
    value *= tl.load(up + row * up_stride + column, mask=mask).to(WIDE)
    tl.store(out + row * F + column, value.to(out.dtype.element_ty), mask=mask)


@jit
def gated_backward_kernel(dout, gate, up, dgate, dup, dout_stride, gate_stride, up_stride, F, GELU: tl.constexpr,
                          WIDE: tl.constexpr, BLOCK: tl.constexpr):
    row, column = _block(tl.program_id(0), F, BLOCK)
    mask = column < F
    value, slope = _activation(tl.load(gate + row * gate_stride + column, mask=mask).to(WIDE), GELU)
    upper = tl.load(dout + row * dout_stride + column, mask=mask).to(WIDE)
    other = tl.load(up + row * up_stride + column, mask=mask).to(WIDE)
    tl.store(dgate + row * F + column, (upper * other * slope).to(dgate.dtype.element_ty), mask=mask)
    tl.store(dup + row * F + column, (upper * value).to(dup.dtype.element_ty), mask=mask)


@jit
def _softplus(alpha):
    """log(1 + exp(alpha)), which large alpha must not overflow."""
    return tl.maximum(alpha, 0) + tl.log(1 + tl.exp(-tl.abs(alpha)))


@jit
def _expm1(x):
    """exp(x) - 1 for x <= 0, by its series where the subtraction would cancel: at most 1.2e-8 of it is left out."""
    series = 1 + x / 6 * (1 + x / 7 * (1 + x / 8))
    series = x * (1 + x / 2 * (1 + x / 3 * (1 + x / 4 * (1 + x / 5 * series))))
    return tl.where(x > -0.5, series, tl.exp(x) - 1)


@jit
def xielu_forward_kernel(x, alpha_p, alpha_n, out, x_stride, F, BETA: tl.constexpr, EPS: tl.constexpr, WIDE: tl.constexpr,
                         BLOCK: tl.constexpr):
    row, column = _block(tl.program_id(0), F, BLOCK)
    mask = column < F
    dtype = x.dtype.element_ty
    p = _softplus(tl.load(alpha_p).to(dtype).to(WIDE))
    n = BETA + _softplus(tl.load(alpha_n).to(dtype).to(WIDE))
    value = tl.load(x + row * x_stride + column, mask=mask).to(WIDE)
    bent = tl.where(value > 0, p * value * value, n * (_expm1(tl.minimum(value, EPS)) - value))
    tl.store(out + row * F + column, (bent + BETA * value).to(dtype), mask=mask)


@jit
def xielu_backward_kernel(dout, x, alpha_p, alpha_n, dx, dalphas, dout_stride, x_stride, N, F, BETA: tl.constexpr,
                          EPS: tl.constexpr, WIDE: tl.constexpr, BLOCK: tl.constexpr):
    """Program p takes blocks p, p + programs, ... of all rows; its part of the alphas' gradients goes to row p of `dalphas`."""
    program = tl.program_id(0)
    dtype = x.dtype.element_ty
    raw_p = tl.load(alpha_p).to(dtype).to(WIDE)
    raw_n = tl.load(alpha_n).to(dtype).to(WIDE)
    p, n = _softplus(raw_p), BETA + _softplus(raw_n)
    total_p, total_n = tl.zeros((BLOCK,), WIDE), tl.zeros((BLOCK,), WIDE)
    for task in range(program, N * _blocks(F, BLOCK), tl.num_programs(0)):
        row, column = _block(task, F, BLOCK)
        mask = column < F
        value = tl.load(x + row * x_stride + column, mask=mask, other=0).to(WIDE)
        upper = tl.load(dout + row * dout_stride + column, mask=mask, other=0).to(WIDE)
        falls = value <= 0  # no comparison holds of NaN, which is to reach all three gradients
        grown = _expm1(tl.minimum(value, EPS))
        # Below EPS the slope is n expm1(x); between EPS and 0 the clamp holds exp, and only -n x is left of it.
        slope = tl.where(falls, n * tl.where(value <= EPS, grown, -1), 2 * p * value)
        tl.store(dx + row * F + column, (upper * (slope + BETA)).to(dtype), mask=mask)
        total_p += tl.where(falls, 0, upper * value * value)
        total_n += tl.where(value > 0, 0, upper * (grown - value))
    tl.store(dalphas + 2 * program, tl.sum(total_p) * tl.sigmoid(raw_p))
    tl.store(dalphas + 2 * program + 1, tl.sum(total_n) * tl.sigmoid(raw_n))


TABLE = {arch: {"any": Config(1, 1024, warps, 1)} for arch, warps in
         (("sm_80", 4), ("sm_90", 4), ("gfx90a", 2), ("gfx942", 2), (SAFE, 2))}
"""8 numbers a thread: one load of 16 bytes in bf16."""


def config_for(arch: str) -> Config:
    """One row by block_n features."""
    return look_up("activations", TABLE, arch, "any")


def compilations(arch: str) -> Iterator[tuple[str, Any, dict[str, Any], Config]]:
    """(name, kernel, arguments, configuration) of what a bf16 model launches; for tests and the table in the docs."""
    config = config_for(arch)
    block = {"WIDE": tl.float32, "BLOCK": config.block_n}
    for name, gelu in (("SwiGLU", False), ("GeGLU", True)):
        there = block | {"gate": "*bf16", "up": "*bf16", "out": "*bf16", "gate_stride": "i32:16", "up_stride": "i32:16",
                         "F": "i32:16", "GELU": gelu}
        back = {key: value for key, value in there.items() if key != "out"} | {
            "dout": "*bf16", "dgate": "*bf16", "dup": "*bf16", "dout_stride": "i32:16"}
        yield f"{name}, forward", gated_forward_kernel, there, config
        yield f"{name}, backward", gated_backward_kernel, back, config
    alone = block | {"x": "*bf16", "alpha_p": "*bf16", "alpha_n": "*bf16", "x_stride": "i32:16", "F": "i32:16",
                     "BETA": XIELU_BETA, "EPS": XIELU_EPS}
    yield "xIELU, forward", xielu_forward_kernel, alone | {"out": "*bf16"}, config
    yield "xIELU, backward", xielu_backward_kernel, alone | {
        "dout": "*bf16", "dx": "*bf16", "dalphas": "*fp32", "dout_stride": "i32:16", "N": "i32"}, config


def _rows(*tensors: Tensor) -> list[Tensor]:
    """With features beside each other; as one long row where all tensors have no gaps, so that no block is cut short."""
    tensors = [t if t.stride(1) == 1 else t.contiguous() for t in tensors]
    return [t.view(1, -1) for t in tensors] if all(t.is_contiguous() for t in tensors) else tensors


def _launch(kernel: Any, inputs: list[Tensor], others: tuple[Tensor, ...], constants: tuple[Any, ...]) -> None:
    """A program for each block of each row of `inputs`, which come with their strides."""
    N, width = inputs[0].shape
    if inputs[0].numel():
        arch = arch_of(inputs[0].device)
        config = config_for(arch)
        kernel[(N * triton.cdiv(width, config.block_n),)](
            *inputs, *others, *(t.stride(0) for t in inputs), width, *constants, wide_type(inputs[0].dtype), config.block_n,
            **config.options(arch))


def _gated_forward(gate, up, gelu):
    out = gate.new_empty(gate.shape)
    _launch(gated_forward_kernel, _rows(gate, up), (out,), (gelu,))
    return out


def _gated_backward(dout, gate, up, gelu):
    dgate, dup = gate.new_empty(gate.shape), up.new_empty(up.shape)
    _launch(gated_backward_kernel, _rows(dout, gate, up), (dgate, dup), (gelu,))
    return dgate, dup


def _gated_save(ctx, inputs, output):
    *kept, ctx.gelu = inputs
    ctx.save_for_backward(*kept)


def _gated_grads(ctx, dout):
    return *torch.ops.officina.gated_backward(dout, *ctx.saved_tensors, ctx.gelu), None


def _xielu_forward(x, alpha_p, alpha_n):
    out = x.new_empty(x.shape)
    _launch(xielu_forward_kernel, _rows(x), (alpha_p, alpha_n, out), (XIELU_BETA, XIELU_EPS))
    return out


def _xielu_backward(dout, x, alpha_p, alpha_n):
    dx = x.new_empty(x.shape)
    dout, x = _rows(dout, x)
    N, width = x.shape
    arch = arch_of(x.device)
    config = config_for(arch)
    programs = min(N * triton.cdiv(width, config.block_n), _PROGRAMS_PER_MULTIPROCESSOR * multiprocessors(x.device))
    dalphas = x.new_empty(programs, 2, dtype=wide_dtype(x.dtype))
    if programs:
        xielu_backward_kernel[(programs,)](
            dout, x, alpha_p, alpha_n, dx, dalphas, dout.stride(0), x.stride(0), N, width, XIELU_BETA, XIELU_EPS,
            wide_type(x.dtype), config.block_n, **config.options(arch))
    dalpha_p, dalpha_n = dalphas.sum(0).unbind()
    return dx, dalpha_p.to(alpha_p.dtype).view(alpha_p.shape), dalpha_n.to(alpha_n.dtype).view(alpha_n.shape)


define_op("gated(Tensor gate, Tensor up, bool gelu) -> Tensor", _gated_forward,
          lambda gate, up, gelu: gate.new_empty(gate.shape), _gated_grads, _gated_save)
define_op("gated_backward(Tensor dout, Tensor gate, Tensor up, bool gelu) -> (Tensor, Tensor)", _gated_backward,
          lambda dout, gate, up, gelu: (gate.new_empty(gate.shape), up.new_empty(up.shape)))
define_op("xielu(Tensor x, Tensor alpha_p, Tensor alpha_n) -> Tensor", _xielu_forward,
          lambda x, alpha_p, alpha_n: x.new_empty(x.shape),
          lambda ctx, dout: torch.ops.officina.xielu_backward(dout, *ctx.saved_tensors),
          lambda ctx, inputs, output: ctx.save_for_backward(*inputs))
define_op("xielu_backward(Tensor dout, Tensor x, Tensor alpha_p, Tensor alpha_n) -> (Tensor, Tensor, Tensor)", _xielu_backward,
          lambda dout, x, p, n: (x.new_empty(x.shape), p.new_empty(p.shape), n.new_empty(n.shape)))
