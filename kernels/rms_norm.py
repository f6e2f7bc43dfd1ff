"""RMSNorm, alone or with the addition to the residual stream before it.

    s = x + residual,   n = s / sqrt(mean(s^2) + eps),   y = n W,   W = w or 1 + w

Backward, with g = dy W:  ds = (g - n mean(g n)) / sqrt(mean(s^2) + eps) + the gradient that reaches s from elsewhere;
dw = sum over rows of dy n, each program adding up rows of its own and their partial sums added at last: no atomics, so the
same bits every time.
Source: Zhang & Sennrich, arXiv:1910.07467; derived anew. The kernels read x (and residual) once and write each output once.
Shapes: N rows, D features.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from officina.kernels.dispatch import Impl, choose_impl, jit, tl, triton, why_not_triton
from officina.kernels.ops import define_op, multiprocessors, rows_of, wide_dtype, wide_type
from officina.kernels.tables import SAFE, Config, Table, arch_of, look_up

MAX_WIDTH = 16_384
"""Features of a row at most: a row lies in the registers of one program."""

RELOAD_WIDTH = 8_192
"""Up to here the backward pass holds a row of dy and of s at once; beyond, the registers do not suffice."""

_TILE = 4_096
"""Elements a program holds at a time; narrow rows come several together."""

_PROGRAMS_PER_MULTIPROCESSOR = 4
"""Of the backward pass: enough to hide the latency of memory, few enough that the partial sums of dw are small."""


def rms_norm(x: Tensor, weight_D: Tensor, *, eps: float = 1e-6, zero_centred: bool = False, cast_first: bool = False,
             impl: Impl = "auto") -> Tensor:
    """x over its root mean square along the last axis, times w or 1 + w; x's shape and dtype, fp32 inside (fp64 for fp64).

    Args:
        weight_D: of any floating dtype, rounded to x's dtype before use; its gradient comes in its own dtype.
        zero_centred: scale by 1 + w instead of w.
        cast_first: round the normalised value to x's dtype before it meets the weight (Llama), not after (Gemma).
    Raises ValueError for shapes that do not fit, and where impl=triton cannot run.
    """
    _check("rms_norm", x, None, weight_D)
    if choose_impl("rms_norm", impl, _why_not(x, weight_D)) == "reference":
        return rms_norm_reference(x, weight_D, eps=eps, zero_centred=zero_centred, cast_first=cast_first)
    return torch.ops.officina.rms_norm(rows_of(x), weight_D, eps, zero_centred, cast_first)[0].view(x.shape)


def add_rms_norm(x: Tensor, residual: Tensor, weight_D: Tensor, *, eps: float = 1e-6, zero_centred: bool = False,
                 cast_first: bool = False, impl: Impl = "auto") -> tuple[Tensor, Tensor]:
    """`rms_norm` of x + residual, and x + residual itself (rounded to x's dtype, as the norm sees it)."""
    _check("add_rms_norm", x, residual, weight_D)
    if choose_impl("add_rms_norm", impl, _why_not(x, weight_D, residual)) == "reference":
        return add_rms_norm_reference(x, residual, weight_D, eps=eps, zero_centred=zero_centred, cast_first=cast_first)
    # In their own shapes: views would hide from autograd that both get one gradient, and leaves would share its memory.
    return torch.ops.officina.add_rms_norm(x, residual, weight_D, eps, zero_centred, cast_first)[:2]


def rms_norm_reference(x: Tensor, weight_D: Tensor, *, eps: float = 1e-6, zero_centred: bool = False,
                       cast_first: bool = False) -> Tensor:
    """Same contract in plain torch: the oracle for tests and benchmarks."""
    wide = wide_dtype(x.dtype)
    normed = F.rms_norm(x.to(wide), x.shape[-1:], None, eps)
    weight = weight_D.to(x.dtype)
    if cast_first:
        return normed.to(x.dtype) * (1 + weight if zero_centred else weight)
    weight = weight.to(wide)
    return (normed * (1 + weight if zero_centred else weight)).to(x.dtype)


def add_rms_norm_reference(x: Tensor, residual: Tensor, weight_D: Tensor, *, eps: float = 1e-6, zero_centred: bool = False,
                           cast_first: bool = False) -> tuple[Tensor, Tensor]:
    """Same contract in plain torch."""
    s = x + residual
    return rms_norm_reference(s, weight_D, eps=eps, zero_centred=zero_centred, cast_first=cast_first), s


def _check(op: str, x: Tensor, residual: Tensor | None, weight: Tensor) -> None:
    if weight.dim() != 1 or x.dim() < 1 or x.shape[-1] != weight.shape[0]:
        raise ValueError(f"{op}: x {tuple(x.shape)} and weight {tuple(weight.shape)} do not fit; need (..., D) and (D,)")
    if residual is not None and (residual.shape != x.shape or residual.dtype != x.dtype):
        raise ValueError(f"{op}: residual {tuple(residual.shape)} {residual.dtype} is not like x {tuple(x.shape)} {x.dtype}")


def _why_not(x: Tensor, weight: Tensor, residual: Tensor | None = None) -> str | None:
    if x.shape[-1] > MAX_WIDTH:
        return f"rows of {x.shape[-1]} features, the kernel holds {MAX_WIDTH} at most"
    return why_not_triton(x, weight, residual)


@jit
def rms_norm_forward_kernel(x, residual, weight, y, s, rstd, x_stride, residual_stride, N, D, eps, ZERO_CENTRED: tl.constexpr,
                            CAST_FIRST: tl.constexpr, WIDE: tl.constexpr, ROWS: tl.constexpr, WIDTH: tl.constexpr):
    """Program p makes rows p ROWS to (p + 1) ROWS."""
    row = (tl.program_id(0) * ROWS + tl.arange(0, ROWS)[:, None]).to(tl.int64)
    column = tl.arange(0, WIDTH)[None, :]
    mask = (row < N) & (column < D)
    dtype = x.dtype.element_ty
    value = tl.load(x + row * x_stride + column, mask=mask, other=0)
    if residual is not None:
        value = (value.to(WIDE) + tl.load(residual + row * residual_stride + column, mask=mask, other=0).to(WIDE)).to(dtype)
        tl.store(s + row * D + column, value, mask=mask)
    value = value.to(WIDE)
    scale = 1 / tl.sqrt(tl.sum(value * value, 1, keep_dims=True) / D + eps)
    tl.store(rstd + row, scale, mask=row < N)
    w = tl.load(weight + column, mask=column < D, other=0).to(WIDE)
    normed = value * scale
    if ZERO_CENTRED:
        w = w + 1
    if CAST_FIRST:  # then also 1 + w is rounded, as it is in x's dtype
        w, normed = w.to(dtype).to(WIDE), normed.to(dtype).to(WIDE)
    tl.store(y + row * D + column, (normed * w).to(dtype), mask=mask)


@jit
def rms_norm_backward_kernel(dy, ds, s, weight, rstd, dx, dweight, s_stride, N, D, ZERO_CENTRED: tl.constexpr,
                             CAST_FIRST: tl.constexpr, RELOAD: tl.constexpr, WIDE: tl.constexpr, ROWS: tl.constexpr,
                             WIDTH: tl.constexpr, STAGES: tl.constexpr):
    """Program p takes tiles p, p + programs, ...; `dweight` has a row for each program."""
    program = tl.program_id(0)
    column = tl.arange(0, WIDTH)[None, :]
    dtype = s.dtype.element_ty
    FIRST: tl.constexpr = "evict_last" if RELOAD else ""
    total = tl.zeros((ROWS, WIDTH), WIDE)
    for tile in tl.range(program, tl.cdiv(N, ROWS), tl.num_programs(0), num_stages=STAGES):
        row = (tile * ROWS + tl.arange(0, ROWS)[:, None]).to(tl.int64)
        mask = (row < N) & (column < D)
        scale = tl.load(rstd + row, mask=row < N, other=0)
        w = tl.load(weight + column, mask=column < D, other=0).to(WIDE)
        if ZERO_CENTRED:
            w = w + 1
        upper = tl.load(dy + row * D + column, mask=mask, other=0, eviction_policy=FIRST).to(WIDE)
        normed = tl.load(s + row * s_stride + column, mask=mask, other=0, eviction_policy=FIRST).to(WIDE) * scale
        mean = tl.sum(upper * w * normed, 1, keep_dims=True) / D
        if RELOAD:  # from the cache, rather than to hold both over the sum
            upper = tl.load(dy + row * D + column, mask=mask, other=0, eviction_policy="evict_first").to(WIDE)
            normed = tl.load(s + row * s_stride + column, mask=mask, other=0, eviction_policy="evict_first").to(WIDE) * scale
        if CAST_FIRST:
            total += upper * normed.to(dtype).to(WIDE)
        else:
            total += upper * normed
        grad = (upper * w - normed * mean) * scale
        if ds is not None:
            grad += tl.load(ds + row * D + column, mask=mask, other=0).to(WIDE)
        tl.store(dx + row * D + column, grad.to(dtype), mask=mask)
    total = tl.sum(total, 0, keep_dims=True)
    tl.store(dweight + program.to(tl.int64) * D + column, total, mask=column < D)


@jit
def add_up_kernel(parts, out, P, D, WIDE: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """out (D,) = the sum of parts (P, D) over its rows, in an order that P alone decides."""
    column = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)[None, :]
    total = tl.zeros((ROWS, COLUMNS), WIDE)
    for start in range(0, P, ROWS):
        row = (start + tl.arange(0, ROWS)[:, None]).to(tl.int64)
        total += tl.load(parts + row * D + column, mask=(row < P) & (column < D), other=0)
    tl.store(out + column, tl.sum(total, 0, keep_dims=True).to(out.dtype.element_ty), mask=column < D)


def add_up(parts_PD: Tensor, dtype: torch.dtype) -> Tensor:
    """(D,) in dtype: programs' parts of a weight's gradient, by one launch in place of torch's two."""
    P, D = parts_PD.shape
    out = parts_PD.new_empty(D, dtype=dtype)
    add_up_kernel[(triton.cdiv(D, ADD_UP.block_n),)](parts_PD, out, P, D, wide_type(parts_PD.dtype), ADD_UP.block_m,
                                                     ADD_UP.block_n, num_warps=ADD_UP.num_warps)
    return out


def _configs(lanes: int, most_threads: int) -> dict[int, Config]:
    """By width: a tile of _TILE elements, or one row if that is wider, 16 elements to a thread."""
    rows = {1 << power: max(1, _TILE >> power) for power in range(4, MAX_WIDTH.bit_length())}
    return {width: Config(n, width, min(most_threads, n * width // 16) // lanes, 1) for width, n in rows.items()}


ADD_UP = Config(64, 32, 4, 1)
"""One for all: it reads a few megabytes from the cache."""
LANES = {"sm_80": 32, "sm_90": 32, "gfx90a": 64, "gfx942": 64, SAFE: 64}
FORWARD = {arch: _configs(lanes, 1024) for arch, lanes in LANES.items()}
BACKWARD = {arch: _configs(lanes, 512) for arch, lanes in LANES.items()}  # holds more than 64 numbers a thread
BACKWARD["sm_90"] |= {2048: Config(1, 2048, 4, 4, {"programs": 4}), 4096: Config(1, 4096, 8, 3, {"programs": 2}),
                      8192: Config(1, 8192, 8, 3, {"programs": 1})}  # measured


def config_for(table: Table, D: int, arch: str) -> Config:
    """Configuration for rows of D features: block_m rows by block_n >= D columns."""
    return look_up("rms_norm", table, arch, max(16, triton.next_power_of_2(D)))


def compilations(arch: str, widths: Iterable[int] = (128, 4096, 16_384)) -> Iterator[tuple[str, Any, dict[str, Any], Config]]:
    """(name, kernel, arguments, configuration) of what a bf16 model launches; for tests and the table in the docs."""
    for D in widths:
        forward, backward = config_for(FORWARD, D, arch), config_for(BACKWARD, D, arch)
        tile = {"N": "i32", "D": "i32:16", "ZERO_CENTRED": False, "CAST_FIRST": True, "WIDE": tl.float32,
                "ROWS": forward.block_m, "WIDTH": forward.block_n}
        for residual in (None, "*bf16"):
            name = f"{'add + ' if residual else ''}norm, {D} wide"
            yield f"{name}, forward", rms_norm_forward_kernel, tile | {
                "x": "*bf16", "residual": residual, "weight": "*bf16", "y": "*bf16", "s": "*bf16", "rstd": "*fp32",
                "eps": "fp32", "x_stride": "i32:16", "residual_stride": "i32:16"}, forward
            yield f"{name}, backward", rms_norm_backward_kernel, tile | {
                "dy": "*bf16", "ds": residual, "s": "*bf16", "weight": "*bf16", "rstd": "*fp32", "dx": "*bf16",
                "dweight": "*fp32", "s_stride": "i32:16", "RELOAD": D > RELOAD_WIDTH, "STAGES": backward.num_stages}, backward
    yield "sum of the weight's gradient", add_up_kernel, {"parts": "*fp32", "out": "*bf16", "P": "i32", "D": "i32:16",
                                                          "WIDE": tl.float32, "ROWS": ADD_UP.block_m,
                                                          "COLUMNS": ADD_UP.block_n}, ADD_UP


def _walkable(x: Tensor) -> Tensor:
    return x if x.stride(1) == 1 else x.contiguous()


def _forward(x: Tensor, residual: Tensor | None, weight: Tensor, eps: float, zero_centred: bool,
             cast_first: bool) -> tuple[Tensor, Tensor, Tensor]:
    y, s, rstd = _add_fake(x, residual, weight, eps, zero_centred, cast_first)
    x, residual = (None if t is None else _walkable(rows_of(t)) for t in (x, residual))
    N, D = x.shape
    if x.numel():
        arch = arch_of(x.device)
        config = config_for(FORWARD, D, arch)
        rms_norm_forward_kernel[(triton.cdiv(N, config.block_m),)](
            x, residual, weight.to(x.dtype).contiguous(), y, s, rstd, x.stride(0),
            0 if residual is None else residual.stride(0), N, D, eps, zero_centred, cast_first, wide_type(x.dtype),
            config.block_m, config.block_n, **config.options(arch))
    return y, s, rstd


def _backward(dy: Tensor | None, ds: Tensor | None, s: Tensor, weight: Tensor, rstd: Tensor, zero_centred: bool,
              cast_first: bool) -> tuple[Tensor, Tensor]:
    dx = s.new_empty(s.shape)
    dy = torch.zeros_like(dx) if dy is None else dy.contiguous()
    ds = None if ds is None else ds.contiguous()
    s = _walkable(rows_of(s))
    N, D = s.shape
    arch = arch_of(s.device)
    config = config_for(BACKWARD, D, arch)
    programs = min(triton.cdiv(N, config.block_m),
                   config.extra.get("programs", _PROGRAMS_PER_MULTIPROCESSOR) * multiprocessors(s.device))
    dweight = s.new_empty(programs, D, dtype=rstd.dtype)
    if s.numel():
        rms_norm_backward_kernel[(programs,)](
            dy, ds, s, weight.to(s.dtype).contiguous(), rstd, dx, dweight, s.stride(0), N, D, zero_centred, cast_first,
            D > RELOAD_WIDTH, wide_type(s.dtype), config.block_m, config.block_n, config.num_stages, **config.options(arch))
    return dx, add_up(dweight, weight.dtype)


def _plain(x, weight, eps, zero_centred, cast_first):
    y, _, rstd = _forward(x, None, weight, eps, zero_centred, cast_first)
    return y, rstd


def _plain_fake(x, weight, eps, zero_centred, cast_first):
    return x.new_empty(x.shape), x.new_empty(x.shape[:-1], dtype=wide_dtype(x.dtype))


def _add_fake(x, residual, weight, eps, zero_centred, cast_first):
    y, rstd = _plain_fake(x, weight, eps, zero_centred, cast_first)
    return y, x.new_empty(0 if residual is None else x.shape), rstd


def _save(ctx, inputs, output):
    *_, weight, _, ctx.zero_centred, ctx.cast_first = inputs
    s = inputs[0] if len(output) == 2 else output[1]
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(s, weight, output[-1])


def _plain_grads(ctx, dy, _):
    grads = torch.ops.officina.rms_norm_backward(dy, None, *ctx.saved_tensors, ctx.zero_centred, ctx.cast_first)
    return *grads, None, None, None


def _add_grads(ctx, dy, ds, _):
    dx, dweight = torch.ops.officina.rms_norm_backward(dy, ds, *ctx.saved_tensors, ctx.zero_centred, ctx.cast_first)
    return dx, dx, dweight, None, None, None


define_op("rms_norm(Tensor x, Tensor weight, float eps, bool zero_centred, bool cast_first) -> (Tensor, Tensor)",
          _plain, _plain_fake, _plain_grads, _save)
define_op("add_rms_norm(Tensor x, Tensor residual, Tensor weight, float eps, bool zero_centred, bool cast_first)"
          " -> (Tensor, Tensor, Tensor)", _forward, _add_fake, _add_grads, _save)
define_op("rms_norm_backward(Tensor? dy, Tensor? ds, Tensor s, Tensor weight, Tensor rstd, bool zero_centred, bool cast_first)"
          " -> (Tensor, Tensor)", _backward,
          lambda dy, ds, s, weight, *_: (s.new_empty(s.shape), weight.new_empty(weight.shape)))
