"""The Triton kernels of cross_entropy.py, where the formulas stand.

A program goes over rows n, n + programs, ... of the logits, so that the grid, not the number of tokens, says how many rows
are between their two readings at a time. A tile is LANES x (BLOCK / LANES) columns: each warp has a part of its own.
"""

from __future__ import annotations

from officina.kernels.dispatch import jit, tl

_LOG2E = tl.constexpr(1.4426950408889634) if tl else None
_LN2 = tl.constexpr(0.6931471805599453) if tl else None
_IGNORE = tl.constexpr(-100) if tl else None


@jit
def _tanh(x):
    # The interpreter knows no tanh. Off by 4e-8 at most: 2e-6 of a logit at a softcap of 50, where bf16 holds 8e-3 of it.
    e = tl.exp2(-2 * _LOG2E * tl.abs(x))
    return tl.where(x < 0, -1.0, 1.0) * (1 - e) / (1 + e)


@jit
def _columns(start, BLOCK: tl.constexpr, LANES: tl.constexpr):
    # A warp has a row of the tile to itself, so its maximum and sum need no other warp before the end of the logits' row.
    return start + tl.arange(0, LANES)[:, None] * (BLOCK // LANES) + tl.arange(0, BLOCK // LANES)[None, :]


@jit
def _sums_of_row(row, column, V, SOFTCAP: tl.constexpr, WIDE: tl.constexpr, BLOCK: tl.constexpr, LANES: tl.constexpr,
                 STAGES: tl.constexpr):
    """lse, z[column] (0 if the column is not here) and the sum of z of one row, in one reading."""
    here = (column >= 0) & (column < V)
    target = tl.load(row + tl.where(here, column, 0)).to(WIDE)
    if SOFTCAP > 0:
        target = SOFTCAP * _tanh(target / SOFTCAP)
    target = tl.where(here, target, 0.0)
    top = tl.full([LANES], -float("inf"), WIDE)  # maximum and exponentials in base 2
    mass = tl.zeros([LANES], WIDE)
    total = tl.zeros([LANES], WIDE)
    for start in tl.range(0, V, BLOCK, num_stages=STAGES):
        columns = _columns(start, BLOCK, LANES)
        inside = columns < V
        z = tl.load(row + columns, mask=inside, other=-float("inf")).to(WIDE)
        if SOFTCAP > 0:
            z = tl.where(inside, SOFTCAP * _tanh(z / SOFTCAP), -float("inf"))
        total += tl.sum(tl.where(inside, z, 0.0), 1)
        z *= _LOG2E
        new = tl.maximum(top, tl.max(z, 1))
        finite = tl.where(new == -float("inf"), 0.0, new)  # nothing seen yet: -inf - -inf would be NaN
        mass = mass * tl.exp2(top - finite) + tl.sum(tl.exp2(z - finite[:, None]), 1)
        top = new
    highest = tl.max(top, 0)
    highest = tl.where(highest == -float("inf"), 0.0, highest)
    lse = (highest + tl.log2(tl.sum(mass * tl.exp2(top - highest), 0))) * _LN2
    return lse, target, tl.sum(total, 0)


@jit
def _gradient_of_row(row, out, column, V, lse, dlse, dtarget, dtotal, SOFTCAP: tl.constexpr, WIDE: tl.constexpr,
                     BLOCK: tl.constexpr, LANES: tl.constexpr, STAGES: tl.constexpr):
    """out = (dlse exp(z - lse) + dtarget [v = column] + dtotal) dz/dlogits; out may be row."""
    shift = tl.where(lse == -float("inf"), 0.0, lse) * _LOG2E
    for start in tl.range(0, V, BLOCK, num_stages=STAGES):
        columns = _columns(start, BLOCK, LANES)
        inside = columns < V
        z = tl.load(row + columns, mask=inside, other=0.0).to(WIDE)
        slope = 1.0
        if SOFTCAP > 0:
            bent = _tanh(z / SOFTCAP)
            slope = 1 - bent * bent
            z = SOFTCAP * bent
        gradient = dlse * tl.exp2(z * _LOG2E - shift) + tl.where(columns == column, dtotal + dtarget, dtotal)
        tl.store(out + columns, (gradient * slope).to(out.dtype.element_ty), mask=inside)


@jit
def _zero_row(out, V, BLOCK: tl.constexpr, LANES: tl.constexpr):
    for start in range(0, V, BLOCK):
        columns = _columns(start, BLOCK, LANES)
        tl.store(out + columns, tl.zeros(columns.shape, out.dtype.element_ty), mask=columns < V)


@jit
def sums_kernel(logits, labels, sums, N, V, first, stride, SOFTCAP: tl.constexpr, WIDE: tl.constexpr,
                BLOCK: tl.constexpr, LANES: tl.constexpr, STAGES: tl.constexpr):
    for n in range(tl.program_id(0), N, tl.num_programs(0)):
        label = tl.load(labels + n)
        lse, target, total = tl.zeros([], WIDE), tl.zeros([], WIDE), tl.zeros([], WIDE)
        if label != _IGNORE:  # a token without a loss is not read
            row = logits + tl.cast(n, tl.int64) * stride
            lse, target, total = _sums_of_row(row, label - first, V, SOFTCAP, WIDE, BLOCK, LANES, STAGES)
        tl.store(sums + n, lse)
        tl.store(sums + N + n, target)
        tl.store(sums + 2 * N + n, total)


@jit
def gradient_kernel(logits, labels, sums, slopes, out, N, V, first, stride, out_stride, SOFTCAP: tl.constexpr,
                    WIDE: tl.constexpr, BLOCK: tl.constexpr, LANES: tl.constexpr, STAGES: tl.constexpr):
    for n in range(tl.program_id(0), N, tl.num_programs(0)):
        label = tl.load(labels + n)
        row = logits + tl.cast(n, tl.int64) * stride
        row_out = out + tl.cast(n, tl.int64) * out_stride
        if label == _IGNORE:
            _zero_row(row_out, V, BLOCK, LANES)
        else:
            _gradient_of_row(row, row_out, label - first, V, tl.load(sums + n), tl.load(slopes + n), tl.load(slopes + N + n),
                             tl.load(slopes + 2 * N + n), SOFTCAP, WIDE, BLOCK, LANES, STAGES)


@jit
def loss_and_gradient_kernel(logits, labels, losses, N, V, stride, Z_LOSS: tl.constexpr, SMOOTHING: tl.constexpr,
                             SOFTCAP: tl.constexpr, WIDE: tl.constexpr, BLOCK: tl.constexpr, LANES: tl.constexpr,
                             STAGES: tl.constexpr):
    for n in range(tl.program_id(0), N, tl.num_programs(0)):
        label = tl.load(labels + n)
        row = logits + tl.cast(n, tl.int64) * stride
        loss = tl.zeros([], WIDE)
        if label == _IGNORE:
            _zero_row(row, V, BLOCK, LANES)
        else:
            lse, target, total = _sums_of_row(row, label, V, SOFTCAP, WIDE, BLOCK, LANES, STAGES)
            uniform = SMOOTHING / tl.cast(V, WIDE)
            loss = lse - (1 - SMOOTHING) * target + Z_LOSS * lse * lse
            if SMOOTHING > 0:  # else 0 x -inf where a row of the vocabulary is switched off
                loss -= uniform * total
            loss = tl.where((label >= 0) & (label < V), loss, float("nan"))
            _gradient_of_row(row, row, label, V, lse, 1 + 2 * Z_LOSS * lse, SMOOTHING - 1.0, -uniform, SOFTCAP, WIDE,
                             BLOCK, LANES, STAGES)
        tl.store(losses + n, loss)
