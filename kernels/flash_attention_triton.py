"""The Triton kernels of flash attention, forward and backward. What they compute stands in flash_attention.py.

Every row of a tile sees a range of the other side's rows (masks.py), so a tile visits blocks in two loops: those that all its
rows see whole, without a mask, and those at the edges of the ranges, with one; what nobody sees is not visited.
Scores live in units of log2, so that each probability costs one fused multiply-add and one exp2.
Sources: arXiv:2205.14135, arXiv:2307.08691 (forward, backward with atomics), arXiv:2407.08608 (block sizes, order of tiles).
Shapes: B rows, H query heads, G key and value heads, T queries, S keys, D head width; M and N a tile's queries and keys.
"""

from __future__ import annotations

from officina.kernels.dispatch import jit, tl


@jit
def _keys_seen(place, spans, window, S, CAUSAL: tl.constexpr):
    """Range of keys (first, end) that a query at `place` sees; scalar or block. Neither falls from a query to the next."""
    first = tl.maximum(place - window + 1, 0)
    end = tl.maximum(place + 1, 0) if CAUSAL else place * 0 + S
    if spans is not None:
        first = tl.maximum(first, tl.load(spans + place, mask=place < S, other=0))
        if not CAUSAL:
            end = tl.load(spans + S + place, mask=place < S, other=0)
    return first, end


@jit
def _places_seeing(key, spans, window, T, S, CAUSAL: tl.constexpr):
    """Range of places (first, end) of the queries that see `key`: `_keys_seen`, seen from the other side."""
    first = key if CAUSAL else key * 0 + S - T
    end = tl.minimum(key + window, S)
    if spans is not None:
        end = tl.minimum(end, tl.load(spans + S + key, mask=key < S, other=0))
        if not CAUSAL:
            first = tl.maximum(first, tl.load(spans + key, mask=key < S, other=0))
    return first, end


@jit
def _blocks(first, last_first, first_end, end, SIZE: tl.constexpr):
    """Blocks to visit, from the ranges of a tile's first row (first, first_end) and last (last_first, end).

    Returns (begin, masked_before, full_begin, full_end, masked): masked blocks are begin + i for i < masked_before, then
    full_end + i - masked_before, for i < masked.
    """
    begin = first // SIZE
    stop = tl.maximum(tl.cdiv(end, SIZE), begin)
    full_begin = tl.minimum(tl.cdiv(last_first, SIZE), stop)
    full_end = tl.maximum(first_end // SIZE, full_begin)
    return begin, full_begin - begin, full_begin, full_end, full_begin - begin + stop - full_end


@jit
def _place(number, n_tiles, n_heads, wave):
    """The number-th (tile, head): a wave of heads shares the L2 cache, and within it tile 0 of every head comes first."""
    first_head = number // (wave * n_tiles) * wave
    heads = tl.minimum(wave, n_heads - first_head)
    rest = number % (wave * n_tiles)
    return rest // heads, first_head + rest % heads


@jit
def _tile(x, start, stride, ROWS: tl.constexpr, D: tl.constexpr):
    """Pointers to rows from `start` on: int64 up to the first, which may lie past 2**31 elements, and plain within a tile."""
    return x + tl.cast(start, tl.int64) * stride + (tl.arange(0, ROWS)[:, None] * stride + tl.arange(0, D)[None, :])


@jit
def _inside(start, end, ROWS: tl.constexpr, D: tl.constexpr, HEAD_DIM: tl.constexpr):
    """Mask of a tile's rows before `end`, and of its columns where heads are padded to D, a power of two."""
    mask = start + tl.arange(0, ROWS)[:, None] < end
    if HEAD_DIM < D:
        mask = mask & (tl.arange(0, D)[None, :] < HEAD_DIM)
    return mask


@jit
def _load(x, start, stride, end, RAGGED: tl.constexpr, ROWS: tl.constexpr, D: tl.constexpr, HEAD_DIM: tl.constexpr):
    """Rows start to start + ROWS of x, zero outside; not RAGGED: all of them lie before `end`."""
    pointers = _tile(x, start, stride, ROWS, D)
    if RAGGED:
        return tl.load(pointers, mask=_inside(start, end, ROWS, D, HEAD_DIM), other=0.0)
    if HEAD_DIM < D:
        return tl.load(pointers, mask=tl.arange(0, D)[None, :] < HEAD_DIM, other=0.0)
    return tl.load(pointers)


@jit
def _tanh(x):
    """By exp2, which interpreter and all targets have."""
    e = tl.exp2(-2.8853900817779268 * tl.abs(x))
    t = (1 - e) / (1 + e)
    return tl.where(x < 0, -t, t)


@jit
def _attend(out, norm, top, q, k, v, start, first, end, stride_ks, stride_vs, S, scale, cap,
            MASKED: tl.constexpr, SOFTCAP: tl.constexpr, N: tl.constexpr, D: tl.constexpr, HEAD_DIM: tl.constexpr):
    """One block of keys into the running sums: `out` unnormalised, `norm` of the rows, `top` score of the rows."""
    k_ND = _load(k, start, stride_ks, S, MASKED, N, D, HEAD_DIM)
    s = tl.dot(q, tl.trans(k_ND), input_precision="ieee")
    if SOFTCAP:
        s = cap * _tanh(s * scale)
        scale = 1.0
    if MASKED:
        keys = start + tl.arange(0, N)[None, :]
        s = tl.where((keys >= first[:, None]) & (keys < end[:, None]), s, float("-inf"))
    new_top = tl.maximum(top, tl.max(s, 1) * scale)
    shift = tl.where(new_top == float("-inf"), 0.0, new_top) if MASKED else new_top  # -inf less -inf is NaN
    p = tl.exp2(s * scale - shift[:, None])
    fade = tl.exp2(top - shift)
    v_ND = _load(v, start, stride_vs, S, MASKED, N, D, HEAD_DIM)
    out = tl.dot(p.to(v_ND.dtype), v_ND, out * fade[:, None], input_precision="ieee")
    return out, norm * fade + tl.sum(p, 1), new_top


@jit
def forward_kernel(q, k, v, out, lse, spans,
                   stride_qb, stride_qh, stride_qt, stride_kb, stride_kh, stride_ks, stride_vb, stride_vh, stride_vs,
                   stride_ob, stride_oh, stride_ot, B, H, T, S, wave, window, scale, cap,
                   GROUP: tl.constexpr, CAUSAL: tl.constexpr, SOFTCAP: tl.constexpr,
                   M: tl.constexpr, N: tl.constexpr, D: tl.constexpr, HEAD_DIM: tl.constexpr):
    """A tile of M queries of one head: out (B, H, T, D) and lse (B, H, T) fp32, in natural logarithms."""
    n_tiles = tl.cdiv(T, M)
    tile, head = _place(tl.program_id(0), n_tiles, B * H, wave)
    if CAUSAL:
        tile = n_tiles - 1 - tile  # the longest first
    b = (head // H).to(tl.int64)
    h = (head % H).to(tl.int64)
    q += b * stride_qb + h * stride_qh
    k += b * stride_kb + h // GROUP * stride_kh
    v += b * stride_vb + h // GROUP * stride_vh
    if spans is not None:
        spans += b * 2 * S

    begin_row = tile * M
    place = S - T + begin_row
    last = S - T + tl.minimum(begin_row + M, T) - 1
    first_key, first_end = _keys_seen(place, spans, window, S, CAUSAL)
    last_first, end_key = _keys_seen(last, spans, window, S, CAUSAL)
    begin, before, full_begin, full_end, masked = _blocks(first_key, last_first, first_end, end_key, N)

    q_MD = _load(q, begin_row, stride_qt, T, True, M, D, HEAD_DIM)
    acc = tl.zeros((M, D), tl.float32)
    norm = tl.zeros((M,), tl.float32)
    top = tl.full((M,), float("-inf"), tl.float32)
    for block in tl.range(full_begin, full_end):
        acc, norm, top = _attend(acc, norm, top, q_MD, k, v, block * N, None, None, stride_ks, stride_vs, S,
                                 scale, cap, False, SOFTCAP, N, D, HEAD_DIM)
    first, end = _keys_seen(place + tl.arange(0, M), spans, window, S, CAUSAL)
    for i in tl.range(0, masked):
        block = tl.where(i < before, begin + i, full_end + i - before)
        acc, norm, top = _attend(acc, norm, top, q_MD, k, v, block * N, first, end, stride_ks, stride_vs, S,
                                 scale, cap, True, SOFTCAP, N, D, HEAD_DIM)

    acc *= tl.where(norm > 0, 1 / norm, 0.0)[:, None]
    out += b * stride_ob + h * stride_oh
    tl.store(_tile(out, begin_row, stride_ot, M, D), acc.to(out.dtype.element_ty),
             mask=_inside(begin_row, T, M, D, HEAD_DIM))
    rows = begin_row + tl.arange(0, M)
    tl.store(lse + (b * H + h) * T + rows, (top + tl.log2(norm)) * 0.6931471805599453, mask=rows < T)


@jit
def delta_kernel(out, dout, dlse, lse, delta, stride_ob, stride_oh, stride_ot, stride_db, stride_dh, stride_dt,
                 stride_lb, stride_lh, stride_lt, H, T, M: tl.constexpr, D: tl.constexpr, HEAD_DIM: tl.constexpr):
    """delta (B, H, T) fp32 = sum over D of out dout, less dlse: what the softmax takes from each gradient of a probability."""
    n_tiles = tl.cdiv(T, M)
    head = (tl.program_id(0) // n_tiles).to(tl.int64)
    b = head // H
    h = head % H
    begin_row = tl.program_id(0) % n_tiles * M
    rows = begin_row + tl.arange(0, M)
    out_MD = _load(out + b * stride_ob + h * stride_oh, begin_row, stride_ot, T, True, M, D, HEAD_DIM)
    dout_MD = _load(dout + b * stride_db + h * stride_dh, begin_row, stride_dt, T, True, M, D, HEAD_DIM)
    total = tl.sum(out_MD.to(tl.float32) * dout_MD.to(tl.float32), 1)
    if dlse is not None:
        dlse_M = tl.load(dlse + b * stride_lb + h * stride_lh + rows.to(tl.int64) * stride_lt, mask=rows < T, other=0.0)
        blind = tl.load(lse + head * T + rows, mask=rows < T, other=0.0) == float("-inf")
        total -= tl.where(blind, 0.0, dlse_M)  # merging partial results yields NaN for rows that saw nothing
    tl.store(delta + head * T + rows, total, mask=rows < T)


@jit
def _key_gradients(dk, dv, q, dout, lse, delta, dq, k_ND, v_ND, head, start, first, end, stride_qh, stride_qt, stride_dh,
                   stride_dt, T, S, scale, cap, dscale, MASKED: tl.constexpr, FUSED: tl.constexpr, SOFTCAP: tl.constexpr,
                   M: tl.constexpr, D: tl.constexpr, HEAD_DIM: tl.constexpr):
    """What a block of queries adds to dk and dv of a tile of keys; FUSED: and the tile to dq, by atomic addition."""
    head = tl.cast(head, tl.int64)
    rows = start + tl.arange(0, M)
    inside = rows < T
    q_MD = _load(q + head * stride_qh, start, stride_qt, T, MASKED, M, D, HEAD_DIM)
    s_NM = tl.dot(k_ND, tl.trans(q_MD), input_precision="ieee")
    lse += head * T
    top_M = (tl.load(lse + rows, mask=inside, other=0.0) if MASKED else tl.load(lse + rows)) * 1.4426950408889634
    if SOFTCAP:
        tanh = _tanh(s_NM * scale)
        p = tl.exp2(cap * tanh - top_M[None, :])
    else:
        p = tl.exp2(s_NM * scale - top_M[None, :])
    if MASKED:
        place = rows + (S - T)
        p = tl.where((place[None, :] >= first[:, None]) & (place[None, :] < end[:, None]), p, 0.0)
    dout_MD = _load(dout + head * stride_dh, start, stride_dt, T, MASKED, M, D, HEAD_DIM)
    dv = tl.dot(p.to(dout_MD.dtype), dout_MD, dv, input_precision="ieee")
    dp = tl.dot(v_ND, tl.trans(dout_MD), input_precision="ieee")
    delta += head * T
    delta_M = tl.load(delta + rows, mask=inside, other=0.0) if MASKED else tl.load(delta + rows)
    ds = p * (dp - delta_M[None, :])
    if SOFTCAP:
        ds *= 1 - tanh * tanh
    ds = ds.to(q_MD.dtype)
    dk = tl.dot(ds, q_MD, dk, input_precision="ieee")
    if FUSED:
        dq_MD = tl.dot(tl.trans(ds), k_ND, input_precision="ieee") * dscale
        pointers = _tile(dq + head * T * HEAD_DIM, start, HEAD_DIM, M, D)
        if MASKED or HEAD_DIM < D:
            tl.atomic_add(pointers, dq_MD, mask=_inside(start, T, M, D, HEAD_DIM), sem="relaxed")
        else:
            tl.atomic_add(pointers, dq_MD, sem="relaxed")
    return dk, dv


@jit
def backward_keys_kernel(q, k, v, dout, lse, delta, dq, dk, dv, spans,
                         stride_qb, stride_qh, stride_qt, stride_kb, stride_kh, stride_ks, stride_vb, stride_vh, stride_vs,
                         stride_db, stride_dh, stride_dt,
                         stride_dkb, stride_dkh, stride_dks, stride_dvb, stride_dvh, stride_dvs,
                         B, H, T, S, wave, window, scale, cap, dscale,
                         GROUP: tl.constexpr, CAUSAL: tl.constexpr, SOFTCAP: tl.constexpr, FUSED: tl.constexpr,
                         M: tl.constexpr, N: tl.constexpr, D: tl.constexpr, HEAD_DIM: tl.constexpr):
    """dk and dv of a tile of N keys, over all queries of all heads that share it; FUSED: and its part of dq (fp32, zeroed)."""
    tile, head = _place(tl.program_id(0), tl.cdiv(S, N), B * (H // GROUP), wave)
    b = (head // (H // GROUP)).to(tl.int64)
    g = (head % (H // GROUP)).to(tl.int64)
    if spans is not None:
        spans += b * 2 * S

    begin_key = tile * N
    keys = begin_key + tl.arange(0, N)
    last = tl.minimum(begin_key + N, S) - 1
    first_place, first_end = _places_seeing(begin_key, spans, window, T, S, CAUSAL)
    last_first, end_place = _places_seeing(last, spans, window, T, S, CAUSAL)
    whole_end = tl.where(begin_key + N <= S, first_end, S - T)  # the last tile has keys that are none: all masked
    begin, before, full_begin, full_end, masked = _blocks(
        tl.maximum(first_place - (S - T), 0), tl.maximum(last_first - (S - T), 0),
        tl.maximum(whole_end - (S - T), 0), tl.maximum(end_place - (S - T), 0), M)

    k_ND = _load(k + b * stride_kb + g * stride_kh, begin_key, stride_ks, S, True, N, D, HEAD_DIM)
    v_ND = _load(v + b * stride_vb + g * stride_vh, begin_key, stride_vs, S, True, N, D, HEAD_DIM)
    dk_ND = tl.zeros((N, D), tl.float32)
    dv_ND = tl.zeros((N, D), tl.float32)
    q += b * stride_qb + g * GROUP * stride_qh
    dout += b * stride_db + g * GROUP * stride_dh
    first_row = (b * H + g * GROUP) * T
    lse += first_row
    delta += first_row
    if FUSED:
        dq += first_row * HEAD_DIM
    # One loop over the blocks of all heads of the group, so that loads are under way across heads too. Ranges are made where
    # masks need them, and invariants stay in the loops, because registers limit the tiles: with a loop over the heads around
    # these, 64 x 64 at head_dim 128 spilled 200 bytes a thread on sm_90, with invariants before the loops up to 24, so none.
    full = full_end - full_begin
    for i in tl.range(0, GROUP * full, disable_licm=True):
        head, block = i // full, full_begin + i % full
        dk_ND, dv_ND = _key_gradients(dk_ND, dv_ND, q, dout, lse, delta, dq, k_ND, v_ND, head, block * M, None, None,
                                      stride_qh, stride_qt, stride_dh, stride_dt, T, S, scale, cap, dscale,
                                      False, FUSED, SOFTCAP, M, D, HEAD_DIM)
    first, end = _places_seeing(keys, spans, window, T, S, CAUSAL)
    end = tl.where(keys < S, end, S - T)
    for i in tl.range(0, GROUP * masked, disable_licm=True):
        head, block = i // masked, i % masked
        block = tl.where(block < before, begin + block, full_end + block - before)
        dk_ND, dv_ND = _key_gradients(dk_ND, dv_ND, q, dout, lse, delta, dq, k_ND, v_ND, head, block * M, first, end,
                                      stride_qh, stride_qt, stride_dh, stride_dt, T, S, scale, cap, dscale,
                                      True, FUSED, SOFTCAP, M, D, HEAD_DIM)

    kept = _inside(begin_key, S, N, D, HEAD_DIM)
    dk += b * stride_dkb + g * stride_dkh
    dv += b * stride_dvb + g * stride_dvh
    tl.store(_tile(dk, begin_key, stride_dks, N, D), (dk_ND * dscale).to(dk.dtype.element_ty), mask=kept)
    tl.store(_tile(dv, begin_key, stride_dvs, N, D), dv_ND.to(dv.dtype.element_ty), mask=kept)


@jit
def _query_gradient(dq, q, dout, k, v, top, delta, start, first, end, stride_ks, stride_vs, S, scale, cap,
                    MASKED: tl.constexpr, SOFTCAP: tl.constexpr, N: tl.constexpr, D: tl.constexpr, HEAD_DIM: tl.constexpr):
    """What a block of keys adds to dq of a tile of queries."""
    k_ND = _load(k, start, stride_ks, S, MASKED, N, D, HEAD_DIM)
    s = tl.dot(q, tl.trans(k_ND), input_precision="ieee")
    if SOFTCAP:
        tanh = _tanh(s * scale)
        p = tl.exp2(cap * tanh - top[:, None])
    else:
        p = tl.exp2(s * scale - top[:, None])
    if MASKED:
        keys = start + tl.arange(0, N)[None, :]
        p = tl.where((keys >= first[:, None]) & (keys < end[:, None]), p, 0.0)
    v_ND = _load(v, start, stride_vs, S, MASKED, N, D, HEAD_DIM)
    ds = p * (tl.dot(dout, tl.trans(v_ND), input_precision="ieee") - delta[:, None])
    if SOFTCAP:
        ds *= 1 - tanh * tanh
    return tl.dot(ds.to(k_ND.dtype), k_ND, dq, input_precision="ieee")


@jit
def backward_queries_kernel(q, k, v, dout, lse, delta, dq, spans,
                            stride_qb, stride_qh, stride_qt, stride_kb, stride_kh, stride_ks,
                            stride_vb, stride_vh, stride_vs, stride_db, stride_dh, stride_dt, stride_gb, stride_gh, stride_gt,
                            B, H, T, S, wave, window, scale, cap, dscale,
                            GROUP: tl.constexpr, CAUSAL: tl.constexpr, SOFTCAP: tl.constexpr,
                            M: tl.constexpr, N: tl.constexpr, D: tl.constexpr, HEAD_DIM: tl.constexpr):
    """dq of a tile of M queries of one head, in a fixed order of additions."""
    n_tiles = tl.cdiv(T, M)
    tile, head = _place(tl.program_id(0), n_tiles, B * H, wave)
    if CAUSAL:
        tile = n_tiles - 1 - tile
    b = (head // H).to(tl.int64)
    h = (head % H).to(tl.int64)
    k += b * stride_kb + h // GROUP * stride_kh
    v += b * stride_vb + h // GROUP * stride_vh
    if spans is not None:
        spans += b * 2 * S

    begin_row = tile * M
    place = S - T + begin_row
    last = S - T + tl.minimum(begin_row + M, T) - 1
    first_key, first_end = _keys_seen(place, spans, window, S, CAUSAL)
    last_first, end_key = _keys_seen(last, spans, window, S, CAUSAL)
    begin, before, full_begin, full_end, masked = _blocks(first_key, last_first, first_end, end_key, N)

    rows = begin_row + tl.arange(0, M)
    q_MD = _load(q + b * stride_qb + h * stride_qh, begin_row, stride_qt, T, True, M, D, HEAD_DIM)
    dout_MD = _load(dout + b * stride_db + h * stride_dh, begin_row, stride_dt, T, True, M, D, HEAD_DIM)
    top_M = tl.load(lse + (b * H + h) * T + rows, mask=rows < T, other=0.0) * 1.4426950408889634
    delta_M = tl.load(delta + (b * H + h) * T + rows, mask=rows < T, other=0.0)
    acc = tl.zeros((M, D), tl.float32)
    for block in tl.range(full_begin, full_end):
        acc = _query_gradient(acc, q_MD, dout_MD, k, v, top_M, delta_M, block * N, None, None, stride_ks, stride_vs, S,
                              scale, cap, False, SOFTCAP, N, D, HEAD_DIM)
    first, end = _keys_seen(place + tl.arange(0, M), spans, window, S, CAUSAL)
    for i in tl.range(0, masked):
        block = tl.where(i < before, begin + i, full_end + i - before)
        acc = _query_gradient(acc, q_MD, dout_MD, k, v, top_M, delta_M, block * N, first, end, stride_ks, stride_vs, S,
                              scale, cap, True, SOFTCAP, N, D, HEAD_DIM)
    dq += b * stride_gb + h * stride_gh
    tl.store(_tile(dq, begin_row, stride_gt, M, D), (acc * dscale).to(dq.dtype.element_ty),
             mask=_inside(begin_row, T, M, D, HEAD_DIM))
