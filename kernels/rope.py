"""Rotary position embedding of queries and keys in one launch, optionally after an RMSNorm of each head.

    (a, b) -> (a cos - b sin, b cos + a sin)      for each pair of features and its angle at the token's position

Pairs are (x[p], x[p + P]) in the half layout, (x[2 p], x[2 p + 1]) in the interleaved one; features beyond 2 P are passed
through. The rotation is orthogonal, so its backward pass is the rotation by the opposite angles. The norm's is that of
`rms_norm`, with the gradients of its weights added up without atomics.
Sources: Su et al., arXiv:2104.09864; norm of queries and keys: Dehghani et al., arXiv:2302.05442.
Shapes: B rows, H query heads, G key heads, T tokens, K head width, P = rotated pairs.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from officina.kernels.dispatch import Impl, choose_impl, jit, tl, triton, why_not_triton
from officina.kernels.ops import define_op, wide_dtype, wide_type
from officina.kernels.rms_norm import add_up, rms_norm_reference
from officina.kernels.tables import SAFE, Config, arch_of, look_up

MAX_PAIRS = 256
"""Rotated pairs at most, and features passed through at most."""

_TILE = 2_048
"""Pairs a program holds at a time."""

_TILES_WITH_NORM = 8
"""Tiles a program of the norm's backward pass takes, so that the partial sums of its weights' gradients are few."""


def rope(q_BHTK: Tensor, k_BGTK: Tensor, cos_B1TP: Tensor, sin_B1TP: Tensor, *, interleaved: bool = False,
         q_weight_K: Tensor | None = None, k_weight_K: Tensor | None = None, eps: float = 1e-6, zero_centred: bool = False,
         cast_first: bool = False, impl: Impl = "auto") -> tuple[Tensor, Tensor]:
    """Queries and keys turned by the angles of their tokens, in their shapes and dtype, fp32 inside (fp64 for fp64).

    Args:
        cos_B1TP, sin_B1TP: per token (or with a first dimension of 1, for all rows), at least fp32; they get no gradient.
        q_weight_K, k_weight_K: given together: each head is first normalised as by `rms_norm`, whose arguments the rest are.
    Returns tensors whose memory is (B, T, H, K), as attention's neighbours want it.
    Raises ValueError for shapes that do not fit, and where impl=triton cannot run.
    """
    _check(q_BHTK, k_BGTK, cos_B1TP, sin_B1TP, q_weight_K, k_weight_K)
    if choose_impl("rope", impl, _why_not(q_BHTK, k_BGTK, cos_B1TP, sin_B1TP, q_weight_K, k_weight_K)) == "reference":
        return rope_reference(q_BHTK, k_BGTK, cos_B1TP, sin_B1TP, interleaved=interleaved, q_weight_K=q_weight_K,
                              k_weight_K=k_weight_K, eps=eps, zero_centred=zero_centred, cast_first=cast_first)
    if q_weight_K is None:
        return torch.ops.officina.rope(q_BHTK, k_BGTK, cos_B1TP, sin_B1TP, interleaved, False)
    return torch.ops.officina.rope_norm(q_BHTK, k_BGTK, cos_B1TP, sin_B1TP, q_weight_K, k_weight_K, eps, interleaved,
                                        zero_centred, cast_first)[:2]


def rope_reference(q_BHTK: Tensor, k_BGTK: Tensor, cos_B1TP: Tensor, sin_B1TP: Tensor, *, interleaved: bool = False,
                   q_weight_K: Tensor | None = None, k_weight_K: Tensor | None = None, eps: float = 1e-6,
                   zero_centred: bool = False, cast_first: bool = False) -> tuple[Tensor, Tensor]:
    """Same contract in plain torch (any memory layout): the oracle for tests and benchmarks."""
    if q_weight_K is not None:  # tokens before heads, as they mostly lie: torch's norm copies what lies otherwise
        q_BHTK, k_BGTK = (rms_norm_reference(x.transpose(1, 2), weight, eps=eps, zero_centred=zero_centred,
                                             cast_first=cast_first).transpose(1, 2)
                          for x, weight in ((q_BHTK, q_weight_K), (k_BGTK, k_weight_K)))
    return tuple(_rotate(x, cos_B1TP, sin_B1TP, interleaved) for x in (q_BHTK, k_BGTK))


def _rotate(x_BHTK: Tensor, cos: Tensor, sin: Tensor, interleaved: bool) -> Tensor:
    P = cos.shape[-1]
    turned, rest = x_BHTK.to(wide_dtype(x_BHTK.dtype)).split((2 * P, x_BHTK.shape[-1] - 2 * P), dim=-1)
    # Each feature times cos plus its partner times a signed sin: on a CPU half the time of turning two halves and joining them.
    if interleaved:
        partners = turned.unflatten(-1, (P, 2)).flip(-1).flatten(-2)
        cos, sin = (torch.stack(two, dim=-1).flatten(-2) for two in ((cos, cos), (-sin, sin)))
    else:
        partners = turned.roll(P, -1)
        cos, sin = (torch.cat(two, dim=-1) for two in ((cos, cos), (-sin, sin)))
    turned = torch.addcmul(turned * cos, partners, sin)
    return (torch.cat((turned, rest), dim=-1) if rest.shape[-1] else turned).to(x_BHTK.dtype)


def _check(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, q_weight: Tensor | None, k_weight: Tensor | None) -> None:
    if q.dim() != 4 or k.dim() != 4 or q.shape[0] != k.shape[0] or q.shape[2:] != k.shape[2:] or q.dtype != k.dtype:
        raise ValueError(f"rope: q {tuple(q.shape)} {q.dtype} and k {tuple(k.shape)} {k.dtype} do not fit; need (B, H, T, K) "
                         "and (B, G, T, K) of one dtype")
    B, _, T, K = q.shape
    if cos.dim() != 4 or cos.shape != sin.shape or cos.shape[:3] not in ((B, 1, T), (1, 1, T)) or not 0 < 2 * cos.shape[3] <= K:
        raise ValueError(f"rope: cos {tuple(cos.shape)} and sin {tuple(sin.shape)} do not fit q {tuple(q.shape)}; need "
                         f"({B} or 1, 1, {T}, P) with 2 P at most {K}")
    if (q_weight is None) != (k_weight is None) or (q_weight is not None and not q_weight.shape == k_weight.shape == (K,)):
        shapes = [None if w is None else tuple(w.shape) for w in (q_weight, k_weight)]
        raise ValueError(f"rope: norm weights {shapes[0]} and {shapes[1]} must both be ({K},), or both be None")


def _why_not(q: Tensor, k: Tensor, cos: Tensor, *others: Tensor | None) -> str | None:
    pairs, rest = cos.shape[3], q.shape[3] - 2 * cos.shape[3]
    if max(pairs, rest) > MAX_PAIRS:
        return f"{pairs} pairs and {rest} features beside them, the kernel holds {MAX_PAIRS} of each at most"
    return why_not_triton(q, k, cos, *others)


@jit
def _load_pairs(base, mask, P: tl.constexpr, PAIRS: tl.constexpr, INTERLEAVED: tl.constexpr, WIDE: tl.constexpr):
    """Both members of each pair: two (rows, PAIRS) tiles; `base` is (rows, 1) or (1, 1)."""
    if INTERLEAVED:
        column = tl.arange(0, 2 * PAIRS)[None, :]
        both = tl.load(base + column, mask=mask & (column < 2 * P), other=0).to(WIDE)
        first, second = tl.split(tl.reshape(both, (both.shape[0], PAIRS, 2)))
    else:
        column = tl.arange(0, PAIRS)[None, :]
        first = tl.load(base + column, mask=mask & (column < P), other=0).to(WIDE)
        second = tl.load(base + P + column, mask=mask & (column < P), other=0).to(WIDE)
    return first, second


@jit
def _store_pairs(base, mask, first, second, P: tl.constexpr, PAIRS: tl.constexpr, INTERLEAVED: tl.constexpr):
    dtype = base.dtype.element_ty
    if INTERLEAVED:
        column = tl.arange(0, 2 * PAIRS)[None, :]
        tl.store(base + column, tl.interleave(first, second).to(dtype), mask=mask & (column < 2 * P))
    else:
        column = tl.arange(0, PAIRS)[None, :]
        tl.store(base + column, first.to(dtype), mask=mask & (column < P))
        tl.store(base + P + column, second.to(dtype), mask=mask & (column < P))


@jit
def _places(tile, stride_b, stride_h, stride_t, table_stride, T, HEADS, TOKENS, ROWS: tl.constexpr):
    """Of a tile's rows, which go head by head through the tokens: number, whether it exists, offset, line of the tables."""
    row = tile * ROWS + tl.arange(0, ROWS)[:, None]
    token = row // HEADS
    b, h, t = (token // T).to(tl.int64), (row % HEADS).to(tl.int64), (token % T).to(tl.int64)
    return row.to(tl.int64), token < TOKENS, b * stride_b + h * stride_h + t * stride_t, b * table_stride + t


@jit
def _turn(tile, x, out, weight, rstd, cos, sin, stride_b, stride_h, stride_t, table_stride, T, HEADS, TOKENS, eps,
          K: tl.constexpr, P: tl.constexpr, INTERLEAVED: tl.constexpr, INVERSE: tl.constexpr, ZERO_CENTRED: tl.constexpr,
          CAST_FIRST: tl.constexpr, WIDE: tl.constexpr, ROWS: tl.constexpr, PAIRS: tl.constexpr, REST: tl.constexpr):
    row, mask, place, line = _places(tile, stride_b, stride_h, stride_t, table_stride, T, HEADS, TOKENS, ROWS)
    first, second = _load_pairs(x + place, mask, P, PAIRS, INTERLEAVED, WIDE)
    pair = tl.arange(0, PAIRS)[None, :]
    c = tl.load(cos + line * P + pair, mask=mask & (pair < P), other=0).to(WIDE)
    s = tl.load(sin + line * P + pair, mask=mask & (pair < P), other=0).to(WIDE)
    beside = tl.arange(0, REST)[None, :]
    inside = mask & (beside < K - 2 * P)
    if K > 2 * P:
        rest = tl.load(x + place + 2 * P + beside, mask=inside, other=0).to(WIDE)
    if weight is not None:
        squares = tl.sum(first * first, 1, keep_dims=True) + tl.sum(second * second, 1, keep_dims=True)
        if K > 2 * P:
            squares += tl.sum(rest * rest, 1, keep_dims=True)
        scale = 1 / tl.sqrt(squares / K + eps)
        tl.store(rstd + row, scale, mask=mask)
        w_first, w_second = _load_pairs(weight + tl.zeros((1, 1), tl.int32), True, P, PAIRS, INTERLEAVED, WIDE)
        first = _weigh(first * scale, w_first, x.dtype.element_ty, ZERO_CENTRED, CAST_FIRST)
        second = _weigh(second * scale, w_second, x.dtype.element_ty, ZERO_CENTRED, CAST_FIRST)
        if K > 2 * P:
            w_rest = tl.load(weight + 2 * P + beside, mask=beside < K - 2 * P, other=0).to(WIDE)
            rest = _weigh(rest * scale, w_rest, x.dtype.element_ty, ZERO_CENTRED, CAST_FIRST)
    if INVERSE:
        s = -s
    _store_pairs(out + row * K, mask, first * c - second * s, second * c + first * s, P, PAIRS, INTERLEAVED)
    if K > 2 * P:
        tl.store(out + row * K + 2 * P + beside, rest.to(out.dtype.element_ty), mask=inside)


@jit
def _weigh(normed, w, dtype: tl.constexpr, ZERO_CENTRED: tl.constexpr, CAST_FIRST: tl.constexpr):
    if ZERO_CENTRED:
        w = w + 1
    if CAST_FIRST:
        w, normed = w.to(dtype).to(w.dtype), normed.to(dtype).to(w.dtype)
    return normed * w


@jit
def rope_kernel(q, k, q_out, k_out, q_weight, k_weight, q_rstd, k_rstd, cos, sin, q_b, q_h, q_t, k_b, k_h, k_t, table_stride, T,
                H, G, TOKENS, q_tiles, eps, K: tl.constexpr, P: tl.constexpr, INTERLEAVED: tl.constexpr, INVERSE: tl.constexpr,
                ZERO_CENTRED: tl.constexpr, CAST_FIRST: tl.constexpr, WIDE: tl.constexpr, ROWS: tl.constexpr,
                PAIRS: tl.constexpr, REST: tl.constexpr):
    """The first `q_tiles` programs turn queries, the others keys."""
    tile = tl.program_id(0)
    if tile < q_tiles:
        _turn(tile, q, q_out, q_weight, q_rstd, cos, sin, q_b, q_h, q_t, table_stride, T, H, TOKENS, eps, K, P, INTERLEAVED,
              INVERSE, ZERO_CENTRED, CAST_FIRST, WIDE, ROWS, PAIRS, REST)
    else:
        _turn(tile - q_tiles, k, k_out, k_weight, k_rstd, cos, sin, k_b, k_h, k_t, table_stride, T, G, TOKENS, eps, K, P,
              INTERLEAVED, INVERSE, ZERO_CENTRED, CAST_FIRST, WIDE, ROWS, PAIRS, REST)


@jit
def _turn_back(program, dy, x, dx, weight, dweight, rstd, cos, sin, dy_b, dy_h, dy_t, x_b, x_h, x_t, table_stride, T, HEADS,
               TOKENS, K: tl.constexpr, P: tl.constexpr, INTERLEAVED: tl.constexpr, ZERO_CENTRED: tl.constexpr,
               CAST_FIRST: tl.constexpr, WIDE: tl.constexpr, TILES: tl.constexpr, ROWS: tl.constexpr, PAIRS: tl.constexpr,
               REST: tl.constexpr):
    dtype = x.dtype.element_ty
    pair, beside = tl.arange(0, PAIRS)[None, :], tl.arange(0, REST)[None, :]
    w_first, w_second = _load_pairs(weight + tl.zeros((1, 1), tl.int32), True, P, PAIRS, INTERLEAVED, WIDE)
    w_rest = tl.load(weight + 2 * P + beside, mask=beside < K - 2 * P, other=0).to(WIDE)
    if ZERO_CENTRED:
        w_first, w_second, w_rest = w_first + 1, w_second + 1, w_rest + 1
    total_first, total_second = tl.zeros((ROWS, PAIRS), WIDE), tl.zeros((ROWS, PAIRS), WIDE)
    total_rest = tl.zeros((ROWS, REST), WIDE)
    for tile in range(program * TILES, (program + 1) * TILES):
        row, mask, place, line = _places(tile, x_b, x_h, x_t, table_stride, T, HEADS, TOKENS, ROWS)
        _, _, upper, _ = _places(tile, dy_b, dy_h, dy_t, table_stride, T, HEADS, TOKENS, ROWS)
        scale = tl.load(rstd + row, mask=mask, other=0)
        c = tl.load(cos + line * P + pair, mask=mask & (pair < P), other=0).to(WIDE)
        s = tl.load(sin + line * P + pair, mask=mask & (pair < P), other=0).to(WIDE)
        a, b = _load_pairs(dy + upper, mask, P, PAIRS, INTERLEAVED, WIDE)
        a, b = a * c + b * s, b * c - a * s
        first, second = _load_pairs(x + place, mask, P, PAIRS, INTERLEAVED, WIDE)
        first, second = first * scale, second * scale
        mean = tl.sum(a * w_first * first, 1, keep_dims=True) + tl.sum(b * w_second * second, 1, keep_dims=True)
        if K > 2 * P:
            inside = mask & (beside < K - 2 * P)
            r = tl.load(dy + upper + 2 * P + beside, mask=inside, other=0).to(WIDE)
            rest = tl.load(x + place + 2 * P + beside, mask=inside, other=0).to(WIDE) * scale
            mean = (mean + tl.sum(r * w_rest * rest, 1, keep_dims=True)) / K
            total_rest += r * (rest.to(dtype).to(WIDE) if CAST_FIRST else rest)
            tl.store(dx + row * K + 2 * P + beside, ((r * w_rest - rest * mean) * scale).to(dtype), mask=inside)
        else:
            mean = mean / K
        total_first += a * (first.to(dtype).to(WIDE) if CAST_FIRST else first)
        total_second += b * (second.to(dtype).to(WIDE) if CAST_FIRST else second)
        _store_pairs(dx + row * K, mask, (a * w_first - first * mean) * scale, (b * w_second - second * mean) * scale, P, PAIRS,
                     INTERLEAVED)
    sums = dweight + program.to(tl.int64) * K + tl.zeros((1, 1), tl.int32)
    _store_pairs(sums, True, tl.sum(total_first, 0, keep_dims=True), tl.sum(total_second, 0, keep_dims=True), P, PAIRS,
                 INTERLEAVED)
    if K > 2 * P:
        tl.store(sums + 2 * P + beside, tl.sum(total_rest, 0, keep_dims=True), mask=beside < K - 2 * P)


@jit
def rope_norm_backward_kernel(dq_out, dk_out, q, k, dq, dk, q_weight, k_weight, dq_weight, dk_weight, q_rstd, k_rstd, cos, sin,
                              dq_b, dq_h, dq_t, dk_b, dk_h, dk_t, q_b, q_h, q_t, k_b, k_h, k_t, table_stride, T, H, G, TOKENS,
                              q_programs, K: tl.constexpr, P: tl.constexpr, INTERLEAVED: tl.constexpr,
                              ZERO_CENTRED: tl.constexpr, CAST_FIRST: tl.constexpr, WIDE: tl.constexpr, TILES: tl.constexpr,
                              ROWS: tl.constexpr, PAIRS: tl.constexpr, REST: tl.constexpr):
    """Each program takes TILES tiles beside each other and leaves its part of the weight's gradient in its row."""
    program = tl.program_id(0)
    if program < q_programs:
        _turn_back(program, dq_out, q, dq, q_weight, dq_weight, q_rstd, cos, sin, dq_b, dq_h, dq_t, q_b, q_h, q_t, table_stride,
                   T, H, TOKENS, K, P, INTERLEAVED, ZERO_CENTRED, CAST_FIRST, WIDE, TILES, ROWS, PAIRS, REST)
    else:
        _turn_back(program - q_programs, dk_out, k, dk, k_weight, dk_weight, k_rstd, cos, sin, dk_b, dk_h, dk_t, k_b, k_h, k_t,
                   table_stride, T, G, TOKENS, K, P, INTERLEAVED, ZERO_CENTRED, CAST_FIRST, WIDE, TILES, ROWS, PAIRS, REST)


def _configs(warps: int) -> dict[tuple[str, int], Config]:
    """By kernel and number of pairs; the norm's backward pass holds twice as many numbers for a pair."""
    return {(kernel, 1 << power): Config(max(1, tile >> power), 1 << power, warps, 1) for power in range(MAX_PAIRS.bit_length())
            for kernel, tile in (("forward", _TILE), ("norm backward", _TILE // 2))}


TABLE = {"sm_80": _configs(4), "sm_90": _configs(4), "gfx90a": _configs(2), "gfx942": _configs(2), SAFE: _configs(4)}


def config_for(kernel: str, pairs: int, arch: str) -> Config:
    """Configuration of `forward` or `norm backward` for that many rotated pairs: block_m heads of tokens by block_n pairs."""
    return look_up("rope", TABLE, arch, (kernel, triton.next_power_of_2(pairs)))


def _constants(kernel: str, K: int, P: int, interleaved: bool, arch: str) -> tuple[Config, dict[str, Any]]:
    config = config_for(kernel, P, arch)
    return config, {"K": K, "P": P, "INTERLEAVED": interleaved, "ROWS": config.block_m, "PAIRS": config.block_n,
                    "REST": triton.next_power_of_2(max(1, K - 2 * P))}


def compilations(arch: str) -> Iterator[tuple[str, Any, dict[str, Any], Config]]:
    """(name, kernel, arguments, configuration) of what a bf16 model launches; for tests and the table in the docs."""
    def types(prefixes: tuple[str, ...], dtype: str) -> dict[str, str]:
        return {name + prefix: dtype for name in ("q", "k") for prefix in prefixes}

    for name, K, P, interleaved, norm in (("half, 64 wide", 64, 32, False, False), ("half, 128 wide", 128, 64, False, False),
                                          ("interleaved, 128 wide", 128, 64, True, False),
                                          ("64 of 128 features", 128, 32, False, False),
                                          ("QK-norm, 128 wide", 128, 64, False, True),
                                          ("QK-norm, interleaved, 128 wide", 128, 64, True, True)):
        config, constants = _constants("forward", K, P, interleaved, arch)
        both = types(("",), "*bf16") | types(("_weight",), "*bf16" if norm else None) | types(("_rstd",), "*fp32") | types(
            ("_b", "_h", "_t"), "i32:16") | {"cos": "*fp32", "sin": "*fp32", "table_stride": "i32", "T": "i32", "H": "i32",
                                             "G": "i32", "TOKENS": "i32", "ZERO_CENTRED": False, "CAST_FIRST": True,
                                             "WIDE": tl.float32}
        yield f"RoPE, {name}", rope_kernel, both | constants | types(("_out",), "*bf16") | {
            "q_tiles": "i32", "eps": "fp32", "INVERSE": False}, config
        if norm:
            config, constants = _constants("norm backward", K, P, interleaved, arch)
            upper = {f"d{key}": value for key, value in {
                **types(("_out", ""), "*bf16"), **types(("_weight",), "*fp32"), **types(("_b", "_h", "_t"), "i32:16")}.items()}
            yield f"RoPE, {name}, backward", rope_norm_backward_kernel, both | constants | upper | {
                "q_programs": "i32", "TILES": _TILES_WITH_NORM}, config


def _like(x: Tensor) -> Tensor:
    """An empty (B, H, T, K) tensor whose memory is (B, T, H, K)."""
    return x.new_empty(x.shape[0], x.shape[2], x.shape[1], x.shape[3]).transpose(1, 2)


def _rows(x: Tensor) -> Tensor:
    return x if x.stride(3) == 1 else x.contiguous()


def _launch(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, weights: tuple[Tensor | None, Tensor | None],
            rstds: tuple[Tensor | None, Tensor | None], eps: float, interleaved: bool, inverse: bool, zero_centred: bool,
            cast_first: bool) -> tuple[Tensor, Tensor]:
    q, k, cos, sin = _rows(q), _rows(k), cos.contiguous(), sin.contiguous()
    B, H, T, K = q.shape
    G, P = k.shape[1], cos.shape[3]
    outs = _like(q), _like(k)
    if B * T:
        arch = arch_of(q.device)
        config, constants = _constants("forward", K, P, interleaved, arch)
        tiles = [triton.cdiv(B * T * heads, config.block_m) for heads in (H, G)]
        weights = [None if w is None else w.to(q.dtype).contiguous() for w in weights]
        rope_kernel[(sum(tiles),)](
            q, k, *outs, *weights, *rstds, cos, sin, *q.stride()[:3], *k.stride()[:3], 0 if cos.shape[0] == 1 else T, T, H, G,
            B * T, tiles[0], eps, INVERSE=inverse, ZERO_CENTRED=zero_centred, CAST_FIRST=cast_first, WIDE=wide_type(q.dtype),
            **constants, **config.options(arch))
    return outs


def _rope(q, k, cos, sin, interleaved, inverse):
    return _launch(q, k, cos, sin, (None, None), (None, None), 0.0, interleaved, inverse, False, False)


def _save(ctx, inputs, output):
    _, _, *tables, ctx.interleaved, ctx.inverse = inputs
    ctx.save_for_backward(*tables)


def _grads(ctx, dq, dk):
    return *torch.ops.officina.rope(dq, dk, *ctx.saved_tensors, ctx.interleaved, not ctx.inverse), None, None, None, None


def _norm_fake(q, k, *_):
    rstds = (x.new_empty(x.shape[0], x.shape[2], x.shape[1], dtype=wide_dtype(x.dtype)) for x in (q, k))
    return _like(q), _like(k), *rstds


def _norm(q, k, cos, sin, q_weight, k_weight, eps, interleaved, zero_centred, cast_first):
    rstds = _norm_fake(q, k)[2:]
    return *_launch(q, k, cos, sin, (q_weight, k_weight), rstds, eps, interleaved, False, zero_centred, cast_first), *rstds


def _norm_save(ctx, inputs, output):
    *tensors, _, ctx.interleaved, ctx.zero_centred, ctx.cast_first = inputs
    ctx.save_for_backward(*tensors, *output[2:])


def _norm_grads(ctx, dq, dk, *_):
    dq, dk, *dweights = torch.ops.officina.rope_norm_backward(dq, dk, *ctx.saved_tensors, ctx.interleaved, ctx.zero_centred,
                                                              ctx.cast_first)
    return dq, dk, None, None, *dweights, None, None, None, None


def _norm_backward(dq_out, dk_out, q, k, cos, sin, q_weight, k_weight, q_rstd, k_rstd, interleaved, zero_centred, cast_first):
    dq_out, dk_out, q, k, cos, sin = *map(_rows, (dq_out, dk_out, q, k)), cos.contiguous(), sin.contiguous()
    B, H, T, K = q.shape
    G, P = k.shape[1], cos.shape[3]
    arch = arch_of(q.device)
    config, constants = _constants("norm backward", K, P, interleaved, arch)
    programs = [triton.cdiv(B * T * heads, config.block_m * _TILES_WITH_NORM) for heads in (H, G)]
    outs = _like(q), _like(k)
    dweights = [q.new_empty(n, K, dtype=q_rstd.dtype) for n in programs]
    if B * T:
        rope_norm_backward_kernel[(sum(programs),)](
            dq_out, dk_out, q, k, *outs, *(w.to(q.dtype).contiguous() for w in (q_weight, k_weight)), *dweights, q_rstd, k_rstd,
            cos, sin,
            *dq_out.stride()[:3], *dk_out.stride()[:3], *q.stride()[:3], *k.stride()[:3], 0 if cos.shape[0] == 1 else T, T, H,
            G, B * T, programs[0], ZERO_CENTRED=zero_centred, CAST_FIRST=cast_first, WIDE=wide_type(q.dtype),
            TILES=_TILES_WITH_NORM, **constants, **config.options(arch))
    return *outs, add_up(dweights[0], q_weight.dtype), add_up(dweights[1], k_weight.dtype)


define_op("rope(Tensor q, Tensor k, Tensor cos, Tensor sin, bool interleaved, bool inverse) -> (Tensor, Tensor)", _rope,
          lambda q, k, *_: (_like(q), _like(k)), _grads, _save)
define_op("rope_norm(Tensor q, Tensor k, Tensor cos, Tensor sin, Tensor q_weight, Tensor k_weight, float eps, bool interleaved,"
          " bool zero_centred, bool cast_first) -> (Tensor, Tensor, Tensor, Tensor)",
          _norm, _norm_fake, _norm_grads, _norm_save)
define_op("rope_norm_backward(Tensor dq, Tensor dk, Tensor q, Tensor k, Tensor cos, Tensor sin, Tensor q_weight, "
          "Tensor k_weight, Tensor q_rstd, Tensor k_rstd, bool interleaved, bool zero_centred, bool cast_first)"
          " -> (Tensor, Tensor, Tensor, Tensor)", _norm_backward,
          lambda dq, dk, q, k, cos, sin, qw, kw, *_: (_like(q), _like(k), qw.new_empty(qw.shape), kw.new_empty(kw.shape)))
