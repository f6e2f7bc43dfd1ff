"""The backward pass of flash attention for Hopper, in Gluon: two kernels without atomics, so the same bits every time.

    keys kernel       a program keeps N keys and values, queries and gradients of out pass by     -> dk, dv
    queries kernel    a program keeps M queries and gradients of out, keys and values pass by     -> dq

Both make the scores and what follows from them anew, seven products in place of the five that dq by atomic additions would
take; but what the later products take of the earlier ones stays in registers, and nothing but the gradients is written.
The parts are those of flash_attention_hopper.py: a warp that loads, two consumers of 64 rows of what is kept, and barriers:

    kept_full[consumer]    1 arrival, the loader's, complete with the last byte of both tiles
    a_full, b_full[stage]  the same, for what passes by: q with lse, and dout with delta; or k, and v
    empty[stage]           an arrival of each consumer, once its products of both are done

Rounds and parities as there. The keys kernel has its scores with keys as rows, so that in both the last products take p and ds
as the ones before leave them. A consumer makes p while the product for dp runs, ds while that of p does, and begins the next
block's scores behind its last product. So there are two buffers at least; and the last block's scores are made twice, because
ptxas waits after each product where one is begun under a condition, as it does where one that takes registers is under
way at a loop's end. delta goes into dp's product, as what that adds to. `disable_licm`: what does not change in a loop, such as
the columns' numbers, is made in it, because registers are short.
Sources: arXiv:2407.08608 (FlashAttention-3: backward pass, block sizes); arXiv:2307.08691 (formulas).
Shapes and the names of lengths as in flash_attention_triton.py.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from officina.kernels import flash_attention_hopper as hopper
from officina.kernels.dispatch import tl
from officina.kernels.flash_attention_hopper import _flat, _jit, _scores
from officina.kernels.flash_attention_triton import _blocks, _keys_seen, _place, _places_seeing, _tanh
from officina.kernels.tables import Config

if hopper.gluon is not None:
    from triton.experimental.gluon.language.nvidia.hopper import warpgroup_mma_init

    from officina.kernels.flash_attention_hopper import (
        fence_async_shared,
        gl,
        mbarrier,
        tma,
        warpgroup_mma,
        warpgroup_mma_wait,
    )

ALIGNED = 4
"""fp32 numbers in 16 bytes."""
MAX_HEAD_DIM = 128
"""dk and dv of wider heads do not fit into a consumer's registers."""


def why_not_hopper(arch: str, head_dim: int, n_keys: int, dtype: torch.dtype) -> str | None:
    """Why these kernels cannot take a case that flash_attention's others take, or None if they can."""
    if head_dim > MAX_HEAD_DIM:
        return f"heads are {head_dim} wide, its backward pass takes {MAX_HEAD_DIM} at most"
    return hopper.why_not_hopper(arch, head_dim, n_keys, dtype)


def constants(config: Config) -> dict[str, int]:
    """The kernels' constants that a configuration stands for."""
    if config.num_stages < 2:
        raise ValueError(f"flash_attention_hopper_backward: num_stages={config.num_stages} must be 2 or more, since a block's "
                         "buffer is filled before that of the block before it is free")
    return {"STAGES": config.num_stages, "REGISTERS": hopper.REGISTERS[2], "LOADER_REGISTERS": hopper.LOADER_REGISTERS}


def keys_tiles(config: Config) -> dict[str, int]:
    """The keys kernel's descriptors and the rows of their tiles."""
    kept, passing = config.block_n // 2, config.block_m
    return {"k_desc": kept, "v_desc": kept, "q_desc": passing, "dout_desc": passing, "lse_desc": passing, "delta_desc": passing,
            "dk_desc": kept, "dv_desc": kept}


def queries_tiles(config: Config) -> dict[str, int]:
    """The same of the queries kernel."""
    kept, passing = config.block_m // 2, config.block_n
    return {"q_desc": kept, "dout_desc": kept, "k_desc": passing, "v_desc": passing, "dq_desc": kept}


def spaced(x_BHT: Tensor) -> Tensor:
    """x with rows that each begin at a multiple of 16 bytes: a copy by TMA that begins elsewhere is an illegal instruction."""
    return F.pad(x_BHT, (0, -x_BHT.shape[-1] % ALIGNED)) if x_BHT.shape[-1] % ALIGNED else x_BHT


# ---- what the two kernels share ------------------------------------------------------------------------------------
@_jit
def _visited(j, span, heads):
    """(head, block) visited as the j-th, `span` being what `_blocks` returned: masked blocks of all heads, then the others."""
    begin, before, full_begin, full_end, masked = span
    edges = heads * masked
    i = gl.where(j < edges, j, j - edges)
    size = gl.maximum(gl.where(j < edges, masked, full_end - full_begin), 1)
    at = i % size
    edge = gl.where(at < before, begin + at, full_end + at - before)
    return i // size, gl.where(j < edges, edge, full_begin + at)


@_jit
def _load(work, NUMBERS: gl.constexpr, STAGES: gl.constexpr):
    """The loader. NUMBERS: lse and delta of the rows pass by too, `distance` from head to head."""
    descs, tiles, barriers, place, passing_place, heads, distance, n, span = work
    kept_a_desc, kept_b_desc, a_desc, b_desc, lse_desc, delta_desc = descs
    kept_a, kept_b, a, b, lse, delta = tiles
    kept_full, a_full, b_full, empty = barriers
    batch, head, row = place
    passing_head, first_number = passing_place
    CONSUMERS: gl.constexpr = kept_a.shape[0]
    ROWS: gl.constexpr = kept_a_desc.block_type.shape[2]
    SIZE: gl.constexpr = a_desc.block_type.shape[2]
    a_bytes: gl.constexpr = a_desc.block_type.nbytes + (4 * SIZE if NUMBERS else 0)
    b_bytes: gl.constexpr = b_desc.block_type.nbytes + (4 * SIZE if NUMBERS else 0)
    for i in gl.static_range(CONSUMERS):
        mbarrier.expect(kept_full.index(i), kept_a_desc.block_type.nbytes + kept_b_desc.block_type.nbytes)
        tma.async_copy_global_to_shared(kept_a_desc, [batch, head, row + i * ROWS, 0], kept_full.index(i), kept_a.index(i))
        tma.async_copy_global_to_shared(kept_b_desc, [batch, head, row + i * ROWS, 0], kept_full.index(i), kept_b.index(i))
    for j in range(n):
        stage = j % STAGES
        before = (j // STAGES & 1) ^ 1
        other, block = _visited(j, span, heads)
        start = block * SIZE
        mbarrier.wait(empty.index(stage), before)
        mbarrier.expect(a_full.index(stage), a_bytes)
        tma.async_copy_global_to_shared(a_desc, [batch, passing_head + other, start, 0], a_full.index(stage), a.index(stage))
        if NUMBERS:
            number = first_number + other * distance + start
            tma.async_copy_global_to_shared(lse_desc, [number], a_full.index(stage), lse.index(stage))
        mbarrier.expect(b_full.index(stage), b_bytes)
        tma.async_copy_global_to_shared(b_desc, [batch, passing_head + other, start, 0], b_full.index(stage), b.index(stage))
        if NUMBERS:
            tma.async_copy_global_to_shared(delta_desc, [number], b_full.index(stage), delta.index(stage))


@_jit
def _weigh(s, top, scale, cap, SOFTCAP: gl.constexpr):
    """Probabilities of scores, from lse in log2 units, and the factor that the softcap puts on their gradients."""
    if SOFTCAP:
        tanh = _tanh(s * scale)
        s = cap * tanh
        scale = 1.0
        slope = 1 - tanh * tanh
    else:
        slope = 1.0
    return gl.exp2(s * scale - top), slope


@_jit
def _operand(x, dtype: gl.constexpr, layout: gl.constexpr):
    """x as the product after it takes it from registers."""
    return gl.convert_layout(x.to(dtype), layout, assert_trivial=True)


@_jit
def _allocate(kept_a_desc, kept_b_desc, a_desc, b_desc, CONSUMERS: gl.constexpr, STAGES: gl.constexpr):
    """Tiles and barriers, ready for use."""
    ROWS: gl.constexpr = kept_a_desc.block_type.shape[2]
    SIZE: gl.constexpr = a_desc.block_type.shape[2]
    D: gl.constexpr = a_desc.block_type.shape[3]
    kept_a = gl.allocate_shared_memory(kept_a_desc.dtype, [CONSUMERS, 1, 1, ROWS, D], kept_a_desc.layout)
    kept_b = gl.allocate_shared_memory(kept_b_desc.dtype, [CONSUMERS, 1, 1, ROWS, D], kept_b_desc.layout)
    a = gl.allocate_shared_memory(a_desc.dtype, [STAGES, 1, 1, SIZE, D], a_desc.layout)
    b = gl.allocate_shared_memory(b_desc.dtype, [STAGES, 1, 1, SIZE, D], b_desc.layout)
    kept_full = gl.allocate_shared_memory(gl.int64, [CONSUMERS, 1], mbarrier.MBarrierLayout())
    a_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    b_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(CONSUMERS):
        mbarrier.init(kept_full.index(i), count=1)
    for i in gl.static_range(STAGES):
        mbarrier.init(a_full.index(i), count=1)
        mbarrier.init(b_full.index(i), count=1)
        mbarrier.init(empty.index(i), count=CONSUMERS)
    fence_async_shared()
    return (kept_a, kept_b, a, b), (kept_full, a_full, b_full, empty)


# ---- dk and dv -----------------------------------------------------------------------------------------------------
@_jit
def _keys_step(j, state, keys, values, tiles, barriers, span, n, heads, seen, T, S, scale, cap, MASKED: gl.constexpr,
               SOFTCAP: gl.constexpr, STAGES: gl.constexpr, layouts: gl.constexpr):
    """What the j-th block of queries adds to dk and dv; its scores are under way, and those of the next one are begun."""
    s, dk, dv = state
    _, _, q, dout, lse, delta = tiles
    _, a_full, b_full, empty = barriers
    ROWS: gl.constexpr = keys.shape[0]
    M: gl.constexpr = q.shape[3]
    column_layout: gl.constexpr = gl.SliceLayout(0, layouts[0])
    stage = j % STAGES
    after = gl.minimum(j + 1, n - 1)  # the last one's are made twice
    mbarrier.wait(b_full.index(stage), j // STAGES & 1)
    less = delta.index(stage).load(column_layout)
    if MASKED:
        _, block = _visited(j, span, heads)
        rows = block * M + gl.arange(0, M, column_layout)
        less = gl.where(rows < T, less, 0.0)  # beyond T stands another head's
    dp = gl.zeros([ROWS, M], gl.float32, layouts[0]) - gl.expand_dims(less, 0)
    s = warpgroup_mma_wait(0, deps=(s,))
    dp = warpgroup_mma(values, _flat(dout.index(stage)).permute((1, 0)), dp, is_async=True)
    top = lse.index(stage).load(column_layout) * 1.4426950408889634
    p, slope = _weigh(s, gl.expand_dims(top, 0), scale, cap, SOFTCAP)
    if MASKED:
        first, end = seen
        place = gl.expand_dims(S - T + rows, 0)
        p = gl.where((place >= gl.expand_dims(first, 1)) & (place < gl.expand_dims(end, 1)), p, 0.0)
    weights = _operand(p, q.dtype, layouts[2])
    dv = warpgroup_mma(weights, _flat(dout.index(stage)), dv, is_async=True)
    p = p * slope
    dp = warpgroup_mma_wait(1, deps=(dp,))
    ds = _operand(p * dp, q.dtype, layouts[2])
    dk = warpgroup_mma(ds, _flat(q.index(stage)), dk, is_async=True)
    mbarrier.wait(a_full.index(after % STAGES), after // STAGES & 1)
    s = _scores(keys, _flat(q.index(after % STAGES)), layouts[0])
    dv, weights, dk, ds = warpgroup_mma_wait(1, deps=(dv, weights, dk, ds))
    mbarrier.arrive(empty.index(stage))
    return s, dk, dv


@_jit
def _keys_gradients(work, WHO: gl.constexpr, CAUSAL: gl.constexpr, SOFTCAP: gl.constexpr, STAGES: gl.constexpr):
    """A consumer of the keys kernel: dk and dv of its ROWS keys."""
    dk_desc, dv_desc, spans, tiles, barriers, b, g, group, key, n, span, T, S, window, scale, cap, dscale = work
    kept_k, kept_v, q, _, _, _ = tiles
    ROWS: gl.constexpr = kept_k.shape[3]
    D: gl.constexpr = kept_k.shape[4]
    M: gl.constexpr = q.shape[3]
    score_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, M, 16])
    out_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, D, 16])
    operand_layout: gl.constexpr = gl.DotOperandLayout(0, out_layout, 2)
    layouts: gl.constexpr = (score_layout, out_layout, operand_layout)

    begin_key = key + WHO * ROWS
    keys = begin_key + gl.arange(0, ROWS, gl.SliceLayout(1, score_layout))
    seen = _places_seeing(keys, spans, window, T, S, CAUSAL)
    k = _flat(kept_k.index(WHO))
    v = _flat(kept_v.index(WHO))
    dk = gl.zeros([ROWS, D], gl.float32, out_layout)
    dv = gl.zeros([ROWS, D], gl.float32, out_layout)
    mbarrier.wait(barriers[0].index(WHO), 0)
    mbarrier.wait(barriers[1].index(0), 0)
    s = warpgroup_mma_wait(0, deps=(_scores(k, _flat(q.index(0)), score_layout),))
    state = (warpgroup_mma_init(s), dk, dv)
    masked = gl.where(span[3] > span[2], group * span[4], n)
    for j in tl.range(0, masked, disable_licm=True):
        state = _keys_step(j, state, k, v, tiles, barriers, span, n, group, seen, T, S, scale, cap, True, SOFTCAP, STAGES,
                           layouts)
    for j in tl.range(masked, n, disable_licm=True):
        state = _keys_step(j, state, k, v, tiles, barriers, span, n, group, seen, T, S, scale, cap, False, SOFTCAP, STAGES,
                           layouts)
    s, dk, dv = state
    s = warpgroup_mma_wait(0, deps=(s,))

    k.store((dk * dscale).to(q.dtype))  # its keys' place, and its values': nobody else reads them, and it is done with them
    v.store(dv.to(q.dtype))
    fence_async_shared()
    tma.async_copy_shared_to_global(dk_desc, [b, g, begin_key, 0], kept_k.index(WHO))
    tma.async_copy_shared_to_global(dv_desc, [b, g, begin_key, 0], kept_v.index(WHO))
    tma.store_wait(0)


@_jit
def keys_kernel(k_desc, v_desc, q_desc, dout_desc, lse_desc, delta_desc, dk_desc, dv_desc, spans, B, H, group, T, S, distance,
                wave, window, scale, cap, dscale, CAUSAL: gl.constexpr, SOFTCAP: gl.constexpr, STAGES: gl.constexpr,
                REGISTERS: gl.constexpr, LOADER_REGISTERS: gl.constexpr):
    """dk and dv of a tile of keys, over all queries of all heads that share it; what stands beyond S is not written.

    distance: from the lse and delta of one head to those of the next, a multiple of ALIGNED.
    """
    CONSUMERS: gl.constexpr = 2
    M: gl.constexpr = q_desc.block_type.shape[2]
    N: gl.constexpr = CONSUMERS * k_desc.block_type.shape[2]
    groups = H // group
    tile, head = _place(gl.program_id(0), gl.cdiv(S, N), B * groups, wave)  # causal: the longest come first
    b = head // groups
    g = head % groups
    key = tile * N
    if spans is not None:
        spans += gl.cast(b, gl.int64) * 2 * S
    first_place, first_end = _places_seeing(key, spans, window, T, S, CAUSAL)
    last_first, end_place = _places_seeing(gl.minimum(key + N, S) - 1, spans, window, T, S, CAUSAL)
    span = _blocks(gl.maximum(first_place - (S - T), 0), gl.maximum(last_first - (S - T), 0),
                   gl.maximum(first_end - (S - T), 0), gl.maximum(end_place - (S - T), 0), M)
    n = gl.maximum(group * (span[4] + span[3] - span[2]), 1)  # where nobody sees them, one block, masked all over

    tiles, barriers = _allocate(k_desc, v_desc, q_desc, dout_desc, CONSUMERS, STAGES)
    kept_k, kept_v, q, dout = tiles
    lse = gl.allocate_shared_memory(gl.float32, [STAGES, M], lse_desc.layout)
    delta = gl.allocate_shared_memory(gl.float32, [STAGES, M], delta_desc.layout)
    tiles = (kept_k, kept_v, q, dout, lse, delta)
    first_head = g * group
    work = (dk_desc, dv_desc, spans, tiles, barriers, b, g, group, key, n, span, T, S, window, scale, cap, dscale)
    load = ((k_desc, v_desc, q_desc, dout_desc, lse_desc, delta_desc), tiles, barriers, (b, g, key),
            (first_head, (b * H + first_head) * distance), group, distance, n, span)
    gl.warp_specialize([(_keys_gradients, (work, 0, CAUSAL, SOFTCAP, STAGES)),
                        (_keys_gradients, (work, 1, CAUSAL, SOFTCAP, STAGES)),
                        (_load, (load, True, STAGES))], [4, 1], [REGISTERS, LOADER_REGISTERS])


# ---- dq ------------------------------------------------------------------------------------------------------------
@_jit
def _queries_step(j, state, queries, douts, tiles, barriers, span, n, seen, top, less, scale, cap, MASKED: gl.constexpr,
                  SOFTCAP: gl.constexpr, STAGES: gl.constexpr, layouts: gl.constexpr):
    """What the j-th block of keys adds to dq; its scores are under way, and those of the next one are begun."""
    s, dq = state
    _, _, k, v = tiles
    _, a_full, b_full, empty = barriers
    N: gl.constexpr = k.shape[3]
    stage = j % STAGES
    after = gl.minimum(j + 1, n - 1)  # the last one's are made twice
    mbarrier.wait(b_full.index(stage), j // STAGES & 1)
    s = warpgroup_mma_wait(0, deps=(s,))
    dp = _scores(douts, _flat(v.index(stage)), layouts[0])
    p, slope = _weigh(s, gl.expand_dims(top, 1), scale, cap, SOFTCAP)
    if MASKED:
        _, block = _visited(j, span, 1)
        first, end = seen
        keys = gl.expand_dims(block * N + gl.arange(0, N, gl.SliceLayout(0, layouts[0])), 0)
        p = gl.where((keys >= gl.expand_dims(first, 1)) & (keys < gl.expand_dims(end, 1)), p, 0.0)
    p = p * slope
    dp = warpgroup_mma_wait(0, deps=(dp,))
    ds = _operand(p * (dp - gl.expand_dims(less, 1)), k.dtype, layouts[2])
    dq = warpgroup_mma(ds, _flat(k.index(stage)), dq, is_async=True)
    mbarrier.wait(a_full.index(after % STAGES), after // STAGES & 1)
    s = _scores(queries, _flat(k.index(after % STAGES)), layouts[0])
    dq, ds = warpgroup_mma_wait(1, deps=(dq, ds))
    mbarrier.arrive(empty.index(stage))
    return s, dq


@_jit
def _queries_gradient(work, WHO: gl.constexpr, CAUSAL: gl.constexpr, SOFTCAP: gl.constexpr, STAGES: gl.constexpr):
    """A consumer of the queries kernel: dq of its ROWS queries."""
    dq_desc, lse, delta, spans, tiles, barriers, b, h, row, n, span, T, S, window, scale, cap, dscale = work
    kept_q, kept_dout, k, _ = tiles
    ROWS: gl.constexpr = kept_q.shape[3]
    D: gl.constexpr = kept_q.shape[4]
    N: gl.constexpr = k.shape[3]
    score_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, N, 16])
    out_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, D, 16])
    operand_layout: gl.constexpr = gl.DotOperandLayout(0, out_layout, 2)
    layouts: gl.constexpr = (score_layout, out_layout, operand_layout)

    begin_row = row + WHO * ROWS
    rows = begin_row + gl.arange(0, ROWS, gl.SliceLayout(1, score_layout))
    seen = _keys_seen(S - T + rows, spans, window, S, CAUSAL)
    top = gl.load(lse + rows, mask=rows < T, other=0.0) * 1.4426950408889634
    less = gl.load(delta + rows, mask=rows < T, other=0.0)
    q = _flat(kept_q.index(WHO))
    dout = _flat(kept_dout.index(WHO))
    mbarrier.wait(barriers[0].index(WHO), 0)
    mbarrier.wait(barriers[1].index(0), 0)
    s = warpgroup_mma_wait(0, deps=(_scores(q, _flat(k.index(0)), score_layout),))
    state = (warpgroup_mma_init(s), gl.zeros([ROWS, D], gl.float32, out_layout))
    masked = gl.where(span[3] > span[2], span[4], n)
    for j in tl.range(0, masked, disable_licm=True):
        state = _queries_step(j, state, q, dout, tiles, barriers, span, n, seen, top, less, scale, cap, True, SOFTCAP, STAGES,
                              layouts)
    for j in tl.range(masked, n, disable_licm=True):
        state = _queries_step(j, state, q, dout, tiles, barriers, span, n, seen, top, less, scale, cap, False, SOFTCAP, STAGES,
                              layouts)
    s, dq = state
    s = warpgroup_mma_wait(0, deps=(s,))

    q.store((dq * dscale).to(k.dtype))  # its queries' place: nobody else reads them, and it is done with them
    fence_async_shared()
    tma.async_copy_shared_to_global(dq_desc, [b, h, begin_row, 0], kept_q.index(WHO))
    tma.store_wait(0)


@_jit
def queries_kernel(q_desc, dout_desc, k_desc, v_desc, dq_desc, lse, delta, spans, B, H, group, T, S, wave, window, scale, cap,
                   dscale, CAUSAL: gl.constexpr, SOFTCAP: gl.constexpr, STAGES: gl.constexpr, REGISTERS: gl.constexpr,
                   LOADER_REGISTERS: gl.constexpr):
    """dq of a tile of queries of one head."""
    CONSUMERS: gl.constexpr = 2
    M: gl.constexpr = CONSUMERS * q_desc.block_type.shape[2]
    N: gl.constexpr = k_desc.block_type.shape[2]
    n_tiles = gl.cdiv(T, M)
    tile, head = _place(gl.program_id(0), n_tiles, B * H, wave)
    if CAUSAL:
        tile = n_tiles - 1 - tile  # the longest first
    b = head // H
    h = head % H
    row = tile * M
    lse += gl.cast(head, gl.int64) * T
    delta += gl.cast(head, gl.int64) * T
    if spans is not None:
        spans += gl.cast(b, gl.int64) * 2 * S
    first_key, first_end = _keys_seen(S - T + row, spans, window, S, CAUSAL)
    last_first, end_key = _keys_seen(S - T + gl.minimum(row + M, T) - 1, spans, window, S, CAUSAL)
    span = _blocks(first_key, last_first, first_end, end_key, N)
    n = gl.maximum(span[4] + span[3] - span[2], 1)  # where nothing is seen, one block, masked all over

    tiles, barriers = _allocate(q_desc, dout_desc, k_desc, v_desc, CONSUMERS, STAGES)
    kept_q, kept_dout, k, v = tiles
    work = (dq_desc, lse, delta, spans, tiles, barriers, b, h, row, n, span, T, S, window, scale, cap, dscale)
    load = ((q_desc, dout_desc, k_desc, v_desc, None, None), (kept_q, kept_dout, k, v, None, None), barriers, (b, h, row),
            (h // group, 0), 1, T, n, span)
    gl.warp_specialize([(_queries_gradient, (work, 0, CAUSAL, SOFTCAP, STAGES)),
                        (_queries_gradient, (work, 1, CAUSAL, SOFTCAP, STAGES)),
                        (_load, (load, False, STAGES))], [4, 1], [REGISTERS, LOADER_REGISTERS])
