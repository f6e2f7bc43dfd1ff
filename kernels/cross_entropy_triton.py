"""The Triton kernels of cross_entropy.py, where the formulas stand.

A program goes over rows n, n + programs, ... of the logits, so that the grid, not the number of tokens, says how many rows
are between their two readings at a time. Maximum and sum are kept for each thread's own numbers and meet at the end of the row.
"""

from __future__ import annotations

from officina.kernels.dispatch import jit, tl

_LOG2E = tl.constexpr(1.4426950408889634) if tl else None
_LN2 = tl.constexpr(0.6931471805599453) if tl else None
_IGNORE = tl.constexpr(-100) if tl else None


@jit
def _tanh(x):
    # The interpreter knows no tanh. Off by 4e-8 at most: 2e-6 of a logit at a softcap of 50, where bf16 holds 8e-3 of it.
    e = tl.exp2(tl.abs(x) * (-2 * _LOG2E))  # in this order: from triton 3.7 on the interpreter makes no tensor of the other
    return tl.where(x < 0, -1.0, 1.0) * (1 - e) / (1 + e)


@jit
def _bend(z, SOFTCAP: tl.constexpr):
    """The logits with their softcap, and its derivative."""
    slope = 1.0
    if SOFTCAP > 0:
        bent = _tanh(z / SOFTCAP)
        slope = 1 - bent * bent
        z = SOFTCAP * bent
    return z, slope


@jit
def _load_tile(row, start, V, BLOCK: tl.constexpr):
    columns = start + tl.arange(0, BLOCK)
    return tl.load(row + columns, mask=columns < V, other=-float("inf"))


@jit
def _sums_of_row(row, column, V, SUM: tl.constexpr, SOFTCAP: tl.constexpr, WIDE: tl.constexpr, BLOCK: tl.constexpr):
    """lse, z[column] (0 if the column is not here) and with SUM the sum of z of one row, in one reading."""
    here = (column >= 0) & (column < V)
    target = tl.where(here, _bend(tl.load(row + tl.where(here, column, 0)).to(WIDE), SOFTCAP)[0], 0.0)
    EACH: tl.constexpr = 128 // row.dtype.element_ty.primitive_bitwidth  # numbers that a thread loads at a time
    PARTS: tl.constexpr = BLOCK // EACH
    top = tl.full([PARTS], -float("inf"), WIDE)
    mass = tl.zeros([PARTS], WIDE)
    total = tl.zeros([PARTS], WIDE)
    tile = _load_tile(row, 0, V, BLOCK)
    for start in range(0, V, BLOCK):
        ahead = _load_tile(row, start + BLOCK, V, BLOCK)  # is on its way while this tile is added up
        inside = start + tl.arange(0, BLOCK) < V
        z = _bend(tile.to(WIDE), SOFTCAP)[0]
        if SOFTCAP > 0:
            z = tl.where(inside, z, -float("inf"))
        if SUM:
            total += tl.sum(tl.reshape(tl.where(inside, z, 0.0), [PARTS, EACH]), 1)
        z = tl.reshape(z, [PARTS, EACH])
        new = tl.maximum(top, tl.max(z, 1))
        finite = tl.where(new == -float("inf"), 0.0, new)  # nothing seen yet: -inf - -inf would be NaN
        mass = mass * tl.exp2((top - finite) * _LOG2E) + tl.sum(tl.exp2(z * _LOG2E - (finite * _LOG2E)[:, None]), 1)
        top = new
        tile = ahead
    highest = tl.max(top)
    highest = tl.where(highest == -float("inf"), 0.0, highest)
    lse = highest + tl.log2(tl.sum(mass * tl.exp2((top - highest) * _LOG2E))) * _LN2
    return lse, target, tl.sum(total)


@jit
def _gradient_of_row(row, out, column, V, lse, dlse, dtarget, dtotal, SOFTCAP: tl.constexpr, WIDE: tl.constexpr,
                     BLOCK: tl.constexpr):
    """out = (dlse exp(z - lse) + dtarget [v = column] + dtotal) dz/dlogits; out may be row."""
    shift = tl.where(lse == -float("inf"), 0.0, lse) * _LOG2E
    here = (column >= 0) & (column < V)
    own, own_slope = _bend(tl.load(row + tl.where(here, column, 0)).to(WIDE), SOFTCAP)
    tl.debug_barrier()  # read before a tile is written
    last = tl.cdiv(V, BLOCK) - 1
    tile = _load_tile(row, last * BLOCK, V, BLOCK)
    for i in range(0, last + 1):  # backwards: of a row just read for its sums, the cache still holds the end
        start = (last - i) * BLOCK
        ahead = _load_tile(row, tl.where(i < last, start - BLOCK, V), V, BLOCK)
        z, slope = _bend(tile.to(WIDE), SOFTCAP)
        gradient = (dlse * tl.exp2(z * _LOG2E - shift) + dtotal) * slope
        columns = start + tl.arange(0, BLOCK)
        tl.store(out + columns, gradient.to(out.dtype.element_ty), mask=columns < V)
        tile = ahead
    tl.debug_barrier()  # the label's column last, over what its tile wrote
    own = (dlse * tl.exp2(own * _LOG2E - shift) + dtotal + dtarget) * own_slope
    tl.store(out + tl.where(here, column, 0), own.to(out.dtype.element_ty), mask=here)


@jit
def _zero_row(out, V, BLOCK: tl.constexpr):
    for start in range(0, V, BLOCK):
        columns = start + tl.arange(0, BLOCK)
        tl.store(out + columns, tl.zeros(columns.shape, out.dtype.element_ty), mask=columns < V)


@jit
def sums_kernel(logits, labels, sums, N, V, first, stride, SOFTCAP: tl.constexpr, WIDE: tl.constexpr,
                BLOCK: tl.constexpr):
    for n in range(tl.program_id(0), N, tl.num_programs(0)):
        label = tl.load(labels + n)
        lse, target, total = tl.zeros([], WIDE), tl.zeros([], WIDE), tl.zeros([], WIDE)
        if label != _IGNORE:  # a token without a loss is not read
            row = logits + tl.cast(n, tl.int64) * stride
            lse, target, total = _sums_of_row(row, label - first, V, True, SOFTCAP, WIDE, BLOCK)
        tl.store(sums + n, lse)
        tl.store(sums + N + n, target)
        tl.store(sums + 2 * N + n, total)


@jit
def gradient_kernel(logits, labels, sums, slopes, out, N, V, first, stride, out_stride, SOFTCAP: tl.constexpr,
                    WIDE: tl.constexpr, BLOCK: tl.constexpr):
    for n in range(tl.program_id(0), N, tl.num_programs(0)):
        label = tl.load(labels + n)
        row = logits + tl.cast(n, tl.int64) * stride
        row_out = out + tl.cast(n, tl.int64) * out_stride
        if label == _IGNORE:
            _zero_row(row_out, V, BLOCK)
        else:
            _gradient_of_row(row, row_out, label - first, V, tl.load(sums + n), tl.load(slopes + n), tl.load(slopes + N + n),
                             tl.load(slopes + 2 * N + n), SOFTCAP, WIDE, BLOCK)


@jit
def loss_and_gradient_kernel(logits, labels, losses, N, V, stride, Z_LOSS: tl.constexpr, SMOOTHING: tl.constexpr,
                             SOFTCAP: tl.constexpr, WIDE: tl.constexpr, BLOCK: tl.constexpr):
    for n in range(tl.program_id(0), N, tl.num_programs(0)):
        label = tl.load(labels + n)
        row = logits + tl.cast(n, tl.int64) * stride
        loss, z = tl.zeros([], WIDE), tl.zeros([], WIDE)
        if label == _IGNORE:
            _zero_row(row, V, BLOCK)
        else:
            lse, target, total = _sums_of_row(row, label, V, SMOOTHING > 0, SOFTCAP, WIDE, BLOCK)
            uniform = SMOOTHING / tl.cast(V, WIDE)
            if Z_LOSS > 0:
                z = Z_LOSS * lse * lse
            loss = lse - (1 - SMOOTHING) * target + z
            if SMOOTHING > 0:  # else 0 x -inf where a row of the vocabulary is switched off
                loss -= uniform * total
            loss = tl.where((label >= 0) & (label < V), loss, float("nan"))
            _gradient_of_row(row, row, label, V, lse, 1 + 2 * Z_LOSS * lse, SMOOTHING - 1.0, -uniform, SOFTCAP, WIDE,
                             BLOCK)
        tl.store(losses + n, loss)
        tl.store(losses + N + n, z)
