"""The symmetric product X X^T, of which only the tiles on and below the diagonal are computed and the others mirrored.

    out = alpha X X^T + beta C,   C symmetric

Half the operations of a general product. With C = X = G symmetric it is also Newton-Schulz's second product b G + c G G,
which Muon takes at each of its steps.  Backward: dX = alpha (dout + dout^T) X,  dC = beta dout.
Source: the idea is of modded-nanogpt's XXT kernel; written anew. Shapes: X (N, M).
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from officina.kernels.dispatch import Impl, choose_impl, jit, tl, triton, why_not_triton
from officina.kernels.ops import define_op, wide_type
from officina.kernels.tables import INTERPRETER, SAFE, Config, arch_of, look_up


def symmetric_product(x_NM: Tensor, *, alpha: float = 1.0, beta: float = 0.0, addend_NN: Tensor | None = None,
                      impl: Impl = "auto") -> Tensor:
    """alpha X X^T + beta C, (N, N) in x's dtype, exactly symmetric where C is; sums in fp32 (fp64 for fp64).

    Args:
        addend_NN: C, symmetric (which is not checked: what lies above the diagonal is not read, and nothing of it where beta
            is 0); None: no addend.
    Raises ValueError for shapes that do not fit, and where impl=triton cannot run. `auto` leaves fp32 on a GPU to torch, whose
    product of full precision is the faster one.
    """
    if x_NM.dim() != 2:
        raise ValueError(f"symmetric_product: x {tuple(x_NM.shape)} must be a matrix")
    N = x_NM.shape[0]
    if addend_NN is not None and (addend_NN.shape != (N, N) or addend_NN.dtype != x_NM.dtype):
        raise ValueError(f"symmetric_product: addend {tuple(addend_NN.shape)} {addend_NN.dtype} must be ({N}, {N}) "
                         f"{x_NM.dtype}")
    reason = why_not_triton(x_NM, addend_NN)
    if reason is None and impl == "auto" and x_NM.is_cuda and x_NM.dtype not in (torch.bfloat16, torch.float16):
        reason = f"{x_NM.dtype} is faster with torch.matmul"
    if choose_impl("symmetric_product", impl, reason) == "reference":
        return symmetric_product_reference(x_NM, alpha=alpha, beta=beta, addend_NN=addend_NN)
    return torch.ops.officina.symmetric_product(x_NM, addend_NN, alpha, beta)


def symmetric_product_reference(x_NM: Tensor, *, alpha: float = 1.0, beta: float = 0.0,
                                addend_NN: Tensor | None = None) -> Tensor:
    """Same contract in plain torch: the oracle for tests and benchmarks."""
    if addend_NN is None:
        product = x_NM @ x_NM.T
        return product if alpha == 1 else alpha * product
    return torch.addmm(addend_NN, x_NM, x_NM.T, beta=beta, alpha=alpha)


@jit
def _place_in_triangle(p):
    """(i, j) with j <= i and p = i (i + 1) / 2 + j."""
    i = ((tl.sqrt(8.0 * p + 1.0) - 1.0) / 2.0).to(tl.int32)
    i -= (i * (i + 1) // 2 > p).to(tl.int32)  # the root in fp32 rounds up for large p,
    i += ((i + 1) * (i + 2) // 2 <= p).to(tl.int32)  # and a GPU's, which is approximate, may be just below
    return i, p - i * (i + 1) // 2


@jit
def symmetric_product_kernel(x, addend, out, x_stride_n, x_stride_m, addend_stride, N, M, alpha, beta, WIDE: tl.constexpr,
                             TILE: tl.constexpr, DEPTH: tl.constexpr):
    """A program makes one tile (i, j) with j <= i and stores it at (j, i) too."""
    i, j = _place_in_triangle(tl.program_id(0))
    row = (i * TILE + tl.arange(0, TILE)).to(tl.int64)
    column = (j * TILE + tl.arange(0, TILE)).to(tl.int64)
    depth = tl.arange(0, DEPTH).to(tl.int64)
    left = x + row[:, None] * x_stride_n + depth[None, :] * x_stride_m
    right = x + column[None, :] * x_stride_n + depth[:, None] * x_stride_m
    total = tl.zeros((TILE, TILE), WIDE)
    for start in range(0, M, DEPTH):
        inside = depth < M - start
        a = tl.load(left, mask=(row[:, None] < N) & inside[None, :], other=0)
        b = tl.load(right, mask=(column[None, :] < N) & inside[:, None], other=0)
        total = tl.dot(a, b, total, input_precision="ieee", out_dtype=WIDE)
        left += DEPTH * x_stride_m
        right += DEPTH * x_stride_m
    total *= alpha
    mask = (row[:, None] < N) & (column[None, :] < N)
    if addend is not None:
        total += beta * tl.load(addend + row[:, None] * addend_stride + column[None, :], mask=mask, other=0).to(WIDE)
    value = total.to(out.dtype.element_ty)
    mirrored = tl.trans(value)
    if i == j:
        value = tl.where(row[:, None] >= column[None, :], value, mirrored)
    else:
        tl.store(out + column[:, None] * N + row[None, :], mirrored, mask=(column[:, None] < N) & (row[None, :] < N))
    tl.store(out + row[:, None] * N + column[None, :], value, mask=mask)


@jit
def symmetric_product_by_tma_kernel(x, addend, out, N, M, alpha, beta, TILE: tl.constexpr, DEPTH: tl.constexpr):
    """The same for 16-bit numbers by Hopper's copies of tiles: x, addend and out are descriptors, zero outside the matrix."""
    i, j = _place_in_triangle(tl.program_id(0))
    total = tl.zeros((TILE, TILE), tl.float32)
    for start in range(0, M, DEPTH):
        a = x.load([i * TILE, start])
        b = x.load([j * TILE, start])
        total = tl.dot(a, b.T, total)
    total *= alpha
    if addend is not None:
        total += beta * addend.load([i * TILE, j * TILE]).to(tl.float32)
    value = total.to(out.dtype)
    mirrored = tl.trans(value)
    if i == j:
        row = tl.arange(0, TILE)
        value = tl.where(row[:, None] >= row[None, :], value, mirrored)
    else:
        out.store([j * TILE, i * TILE], mirrored)
    out.store([i * TILE, j * TILE], value)


def _configs(half: Config, fp32: Config) -> dict[torch.dtype, Config]:
    return {torch.bfloat16: half, torch.float16: half, torch.float32: fp32, torch.float64: fp32}


_SMALL = Config(64, 32, 4, 1)
TABLE = {"sm_80": _configs(Config(128, 32, 8, 3), _SMALL), "sm_90": _configs(Config(128, 64, 4, 3, {"tma": 1}), _SMALL),
         "gfx90a": _configs(Config(128, 32, 8, 1), _SMALL), "gfx942": _configs(Config(128, 32, 8, 1), _SMALL),
         SAFE: _configs(_SMALL, _SMALL), INTERPRETER: _configs(*2 * (Config(32, 16, 4, 1),))}


def config_for(dtype: torch.dtype, arch: str) -> Config:
    """block_m is the side of a tile of the product, block_n the columns of X taken at a time."""
    return look_up("symmetric_product", TABLE, arch, dtype)


def compilations(arch: str) -> Iterator[tuple[str, Any, dict[str, Any], Config]]:
    """(name, kernel, arguments, configuration) of what Muon launches; for tests and the table in the docs."""
    for name, dtype, addend in (("bf16", torch.bfloat16, None), ("bf16, with addend", torch.bfloat16, "*bf16"),
                                ("fp32", torch.float32, None)):
        config = config_for(dtype, arch)
        pointer = "*bf16" if dtype == torch.bfloat16 else "*fp32"
        arguments = {"x": pointer, "addend": addend, "out": pointer, "x_stride_n": "i32:16", "x_stride_m": 1,
                     "addend_stride": "i32:16", "N": "i32:16", "M": "i32:16", "alpha": "fp32", "beta": "fp32",
                     "WIDE": tl.float32, "TILE": config.block_m, "DEPTH": config.block_n}
        yield f"X X^T, {name}", symmetric_product_kernel, arguments, _plain(config)
        if "tma" in config.extra:
            kernel = symmetric_product_by_tma_kernel
            square = f"tensordesc<bf16[{config.block_m}, {config.block_m}]>"
            arguments |= {"x": f"tensordesc<bf16[{config.block_m}, {config.block_n}]>", "addend": addend and square,
                          "out": square}
            yield f"X X^T, {name}, by TMA", kernel, {name: arguments[name] for name in kernel.arg_names}, config


def _plain(config: Config) -> Config:
    """What takes the place of a configuration by TMA where the matrix is none that TMA can walk."""
    return Config(128, 64, 8, 4) if "tma" in config.extra else config


def _walkable(x: Tensor | None) -> bool:
    """Whether TMA can copy tiles: rows in one piece, each beginning at a multiple of 16 bytes."""
    return x is None or (x.stride(1) == 1 and x.stride(0) % 8 == 0 and x.stride(0) > 0 and x.data_ptr() % 16 == 0)


def _symmetric_product(x, addend, alpha, beta):
    N, M = x.shape
    out = x.new_empty(N, N)
    if not beta:
        addend = None  # not read, as in torch: 0 NaN is NaN
    if addend is not None and addend.stride(1) != 1:
        addend = addend.contiguous()
    if not N:
        return out
    arch = arch_of(x.device)
    config = config_for(x.dtype, arch)
    sound = not triton.__version__.startswith("3.5.")  # whose interpreter gets other numbers from this kernel
    by_tma = "tma" in config.extra and sound and M > 0 and all(map(_walkable, (x, addend, out)))
    config = config if by_tma else _plain(config)
    side, tile = triton.cdiv(N, config.block_m), [config.block_m, config.block_n]
    grid = (side * (side + 1) // 2,)
    if by_tma:
        describe, square = triton.tools.tensor_descriptor.TensorDescriptor.from_tensor, [config.block_m] * 2
        symmetric_product_by_tma_kernel[grid](
            describe(x, tile), None if addend is None else describe(addend, square), describe(out, square), N, M, alpha, beta,
            *tile, **config.options(arch))
    else:
        symmetric_product_kernel[grid](
            x, addend, out, *x.stride(), 0 if addend is None else addend.stride(0), N, M, alpha, beta, wide_type(x.dtype),
            *tile, **config.options(arch))
    return out


def _save(ctx, inputs, output):
    x, addend, ctx.alpha, ctx.beta = inputs
    ctx.has_addend = addend is not None
    ctx.save_for_backward(x)


def _grads(ctx, dout):
    dx = ctx.alpha * ((dout + dout.T) @ ctx.saved_tensors[0])
    return dx, ctx.beta * dout if ctx.has_addend else None, None, None


define_op("symmetric_product(Tensor x, Tensor? addend, float alpha, float beta) -> Tensor", _symmetric_product,
          lambda x, addend, alpha, beta: x.new_empty(x.shape[0], x.shape[0]), _grads, _save)
