"""The forward pass of flash attention for Hopper, in Gluon: what flash_attention.py says, by TMA, wgmma and specialised warps.

A program takes tile after tile, M queries of one head each: as many programs as multiprocessors, and who is done first takes
the next tile, by a counter in memory. One warp loads: a tile's queries, then block after block of k and v into STAGES buffers
each; while the last of them are worked on, it is at the next tile already. The rest compute, in warpgroups ("consumers") of
ROWS = 64 queries. They meet at barriers in shared memory:

    plan_full[slot]                 1 arrival, the loader's: which tile, and which blocks of keys
    q_full[slot, consumer]          1 arrival, the loader's, complete with the last byte of the copy
    q_empty[slot, consumer]         1 arrival, the consumer's, once its output, which takes the queries' place, is read
    k_full[stage], v_full[stage]    as q_full
    k_empty[stage], v_empty[stage]  an arrival of each consumer, once its products of the buffer are done
    turn[consumer]                  1 arrival, of the consumer before it

The c-th block that a program visits lies in stage c % STAGES and is the buffer's round c // STAGES, so that round's parity is
what to wait for: of *_full its own, of *_empty that of the round before, which at the start counts as complete. The same for
q: that of the i-th tile of a program lies in slot i % 2. Plans have three slots and none is given back: before the loader tells
of tile i + 3 it has waited until the queries of tile i were given back, so its plan was read.

A consumer begins the product of its scores for block j, and with it that of the weights of block j - 1 and v; while the second
runs, it makes the weights of block j. Of a tile's first block it begins them before the output of the tile before is written;
behind the last tile there are queries and keys once more for scores that are dropped. PING_PONG: consumers begin their products
in turn, so that one's products run during another's softmax. Blocks that need a mask come first, because then the loop over the
others is the last and longest one.
Sources: arXiv:2407.08608 (FlashAttention-3: warp specialisation, ping-pong, overlap within a warpgroup, block sizes); tutorials
05 and 08 of Gluon (order of expect, wait, fence and arrive). Shared memory is read by wgmma and written by TMA without a fence:
both are the asynchronous proxy, ordered by the barriers; out goes through the generic one to TMA, and barriers are written by
it at the start, so there a fence stands between.
Shapes and the names of lengths as in flash_attention_triton.py.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch

from officina.kernels.dispatch import triton
from officina.kernels.flash_attention_triton import _blocks, _keys_seen, _place, _tanh
from officina.kernels.hopper_descriptors import STRIDE_ELEMENTS
from officina.kernels.tables import Config

try:
    from triton.experimental import gluon
    from triton.experimental.gluon import language as gl
    from triton.experimental.gluon.language.nvidia.hopper import (
        fence_async_shared,
        mbarrier,
        tma,
        warpgroup_mma,
        warpgroup_mma_wait,
    )
except ImportError:  # no triton, or one without Gluon
    gluon = None

TRITON = ("3.6", "3.7")
"""Gluon's interface may change with each minor version of triton; these make the same of the kernels, and 3.6 has run them."""
ROWS = 64
"""Queries of a consumer: the height of wgmma."""
REGISTERS = {2: 240, 3: 160}
"""Number of consumers -> registers of a thread in each; with the loader's they fill the multiprocessor's 65,536."""
LOADER_REGISTERS = 24


def _jit(function: Any) -> Any:
    lengths = ("B", "H", "group", "T", "S", "distance", "wave", "window")
    return function if gluon is None else gluon.jit(function, do_not_specialize=lengths)


def why_not_hopper(arch: str, head_dim: int, n_keys: int, dtype: torch.dtype) -> str | None:
    """Why the Hopper kernel cannot take a case that flash_attention's others take, or None if it can."""
    if gluon is None or ".".join(triton.__version__.split(".")[:2]) not in TRITON:
        return f"it needs the Gluon of triton {' or '.join(TRITON)}, this is triton {triton and triton.__version__}"
    if arch != "sm_90":
        return f"it needs Hopper (sm_90), this is {arch}"
    if dtype not in (torch.bfloat16, torch.float16):
        return f"it computes in bf16 and fp16, not {dtype}"
    if head_dim % STRIDE_ELEMENTS:
        return f"heads are {head_dim} wide, it takes multiples of {STRIDE_ELEMENTS}"
    return None if n_keys else "there are no keys"


def with_softcap(config: Config, softcap: bool) -> Config:
    """Where there is one, two groups at most: its tanh takes registers that three do not have."""
    return replace(config, block_m=min(config.block_m, 2 * ROWS)) if softcap else config


def constants(config: Config) -> dict[str, int]:
    """The kernel's constants that a configuration stands for."""
    return {"M": config.block_m, "STAGES": config.num_stages, "PING_PONG": config.extra.get("ping_pong", 0),
            "REGISTERS": REGISTERS[config.block_m // ROWS], "LOADER_REGISTERS": LOADER_REGISTERS}


def tile_rows(config: Config) -> dict[str, int]:
    """The kernel's descriptors and the rows of their tiles."""
    return {"q_desc": ROWS, "k_desc": config.block_n, "v_desc": config.block_n, "out_desc": ROWS}


@_jit
def _flat(tile):
    """The (1, 1, rows, width) that TMA fills, as the matrix that it is."""
    return tile.reshape([tile.shape[2], tile.shape[3]])


@_jit
def _edge(j, before, begin, behind):
    """Of the blocks that need a mask, the j-th: the first `before` lie before those that need none, the others behind."""
    return gl.where(j < before, begin + j, behind + j)


@_jit
def _publish(plan, plan_full, turn, numbers):
    """Tell the consumers of the turn-th tile: first row, head, then what `_edge` takes, blocks that need a mask, blocks."""
    slot = turn % plan_full.shape[0]
    for i in gl.static_range(7):
        plan.index(slot * 7 + i).store(gl.full([1], numbers[i], gl.int32, gl.BlockedLayout([1], [32], [1], [0])))
    mbarrier.arrive(plan_full.index(slot))


@_jit
def _told(plan, i):
    return gl.sum(plan.index(i).load(gl.BlockedLayout([1], [32], [4], [0])), 0)  # of one number


@_jit
def _read_plan(plan, plan_full, turn):
    """What `_publish` told."""
    slot = turn % plan_full.shape[0]
    mbarrier.wait(plan_full.index(slot), turn // plan_full.shape[0] & 1)
    at = slot * 7
    return (_told(plan, at), _told(plan, at + 1), _told(plan, at + 2), _told(plan, at + 3), _told(plan, at + 4),
            _told(plan, at + 5), _told(plan, at + 6))


@_jit
def _load_queries(q_desc, b, h, row, turn, q, q_full, q_empty):
    """Those of the turn-th tile."""
    CONSUMERS: gl.constexpr = q.shape[0] // 2
    ROWS: gl.constexpr = q_desc.block_type.shape[2]
    for i in gl.static_range(CONSUMERS):
        own = turn % 2 * CONSUMERS + i
        mbarrier.wait(q_empty.index(own), (turn // 2 & 1) ^ 1)
        mbarrier.expect(q_full.index(own), q_desc.block_type.nbytes)
        tma.async_copy_global_to_shared(q_desc, [b, h, row + i * ROWS, 0], q_full.index(own), q.index(own))


@_jit
def _load(work, CAUSAL: gl.constexpr, M: gl.constexpr, STAGES: gl.constexpr):
    """The loader."""
    q_desc, k_desc, v_desc, spans, counter, tiles, plan, plan_full, barriers, B, H, group, T, S, wave, window = work
    q, k, v = tiles
    q_full, q_empty, k_full, k_empty, v_full, v_empty, _ = barriers
    N: gl.constexpr = k_desc.block_type.shape[2]
    n_tiles = gl.cdiv(T, M)
    number = gl.program_id(0)
    turn = 0
    past = 0
    while number < n_tiles * B * H:
        tile, head = _place(number, n_tiles, B * H, wave)
        if CAUSAL:
            tile = n_tiles - 1 - tile  # the longest first
        b = head // H
        h = head % H
        row = tile * M
        seen = spans
        if spans is not None:
            seen += gl.cast(b, gl.int64) * 2 * S
        first_key, first_end = _keys_seen(S - T + row, seen, window, S, CAUSAL)
        last_first, end_key = _keys_seen(S - T + gl.minimum(row + M, T) - 1, seen, window, S, CAUSAL)
        begin, before, full_begin, full_end, masked = _blocks(first_key, last_first, first_end, end_key, N)
        n = gl.maximum(masked + full_end - full_begin, 1)  # where nothing is seen, the first block, masked all over
        before = gl.where(masked == 0, 1, before)  # the first block visited is always masked
        masked = gl.maximum(masked, 1)
        behind = full_end - before
        _publish(plan, plan_full, turn, (row, head, before, begin, behind, masked, n))
        number = gl.num_programs(0) + gl.atomic_add(counter, 1)
        _load_queries(q_desc, b, h, row, turn, q, q_full, q_empty)
        for j in range(n):
            stage = (past + j) % STAGES
            free = ((past + j) // STAGES & 1) ^ 1
            start = gl.where(j < masked, _edge(j, before, begin, behind), begin + before + j - masked) * N
            mbarrier.wait(k_empty.index(stage), free)
            mbarrier.expect(k_full.index(stage), k_desc.block_type.nbytes)
            tma.async_copy_global_to_shared(k_desc, [b, h // group, start, 0], k_full.index(stage), k.index(stage))
            mbarrier.wait(v_empty.index(stage), free)
            mbarrier.expect(v_full.index(stage), v_desc.block_type.nbytes)
            tma.async_copy_global_to_shared(v_desc, [b, h // group, start, 0], v_full.index(stage), v.index(stage))
        past += n
        turn += 1
    _publish(plan, plan_full, turn, (-1, 0, 0, 0, 0, 0, 0))
    _load_queries(q_desc, 0, 0, 0, turn, q, q_full, q_empty)  # for scores that are dropped
    stage = past % STAGES
    mbarrier.wait(k_empty.index(stage), (past // STAGES & 1) ^ 1)
    mbarrier.expect(k_full.index(stage), k_desc.block_type.nbytes)
    tma.async_copy_global_to_shared(k_desc, [0, 0, 0, 0], k_full.index(stage), k.index(stage))


@_jit
def _my_turn(turn, j, WHO: gl.constexpr, PING_PONG: gl.constexpr):
    if PING_PONG:
        mbarrier.wait(turn.index(WHO), (j & 1) ^ (WHO == 0))  # the first is free to begin


@_jit
def _next_turn(turn, WHO: gl.constexpr, CONSUMERS: gl.constexpr, PING_PONG: gl.constexpr):
    if PING_PONG:
        mbarrier.arrive(turn.index((WHO + 1) % CONSUMERS))


@_jit
def _scores(q, k, layout: gl.constexpr):
    """Begins q k^T."""
    M: gl.constexpr = q.shape[0]
    N: gl.constexpr = k.shape[0]
    return warpgroup_mma(q, k.permute((1, 0)), gl.zeros([M, N], gl.float32, layout), use_acc=False, is_async=True)


@_jit
def _first_scores(tile, c, tiles, barriers, WHO: gl.constexpr, PING_PONG: gl.constexpr, STAGES: gl.constexpr,
                  layout: gl.constexpr):
    """Begins those of the program's tile-th tile; c: the first of its blocks."""
    queries, k, _ = tiles
    q_full, _, k_full, _, _, _, turn = barriers
    CONSUMERS: gl.constexpr = queries.shape[0] // 2
    place = tile % 2 * CONSUMERS + WHO
    stage = c % STAGES
    mbarrier.wait(q_full.index(place), tile // 2 & 1)
    mbarrier.wait(k_full.index(stage), c // STAGES & 1)
    _my_turn(turn, c, WHO, PING_PONG)
    s = _scores(_flat(queries.index(place)), _flat(k.index(stage)), layout)
    _next_turn(turn, WHO, CONSUMERS, PING_PONG)
    return s


@_jit
def _weigh(s, norm, top, start, seen, at_begin, at_end, scale, cap, MASKED: gl.constexpr, SOFTCAP: gl.constexpr,
           N: gl.constexpr, layout: gl.constexpr):
    """Weights of a block of scores, norm and top with it, and the factor on what was summed before it; log2 units.

    MASKED: rows may begin to see within the block only if it is `at_begin`, and cease to only if it is `at_end`.
    """
    first, end = seen
    if SOFTCAP:
        s = cap * _tanh(s * scale)
        scale = 1.0
    if MASKED:
        # The two bits of a column's number in which wgmma's layout tells threads apart go to the rows' side, once a row:
        # what a thread compares are then constants of its instructions.
        keys = gl.expand_dims(gl.arange(0, N, gl.SliceLayout(0, layout)), 0)
        if at_begin:
            s = gl.where((keys & ~6) >= gl.expand_dims(first - start, 1) - (keys & 6), s, float("-inf"))
        if at_end:
            s = gl.where((keys & ~6) < gl.expand_dims(end - start, 1) - (keys & 6), s, float("-inf"))
    new_top = gl.maximum(top, gl.max(s, 1) * scale)
    shift = gl.where(new_top == float("-inf"), 0.0, new_top) if MASKED else new_top  # -inf less -inf is NaN
    p = gl.exp2(s * scale - gl.expand_dims(shift, 1))
    fade = gl.exp2(top - shift)
    return p, norm * fade + gl.sum(p, 1), new_top, fade


@_jit
def _step(c, edges, state, q, tiles, barriers, seen, scale, cap, MASKED: gl.constexpr, SOFTCAP: gl.constexpr,
          WHO: gl.constexpr, PING_PONG: gl.constexpr, STAGES: gl.constexpr, layouts: gl.constexpr):
    """Block c of the program, not the first of a tile: its scores and weights; the weights of block c - 1 into the sum."""
    out, p, norm, top = state
    queries, k, v = tiles
    _, _, k_full, k_empty, v_full, v_empty, turn = barriers
    CONSUMERS: gl.constexpr = queries.shape[0] // 2
    N: gl.constexpr = k.shape[3]
    stage = c % STAGES
    last = (c - 1) % STAGES
    mbarrier.wait(k_full.index(stage), c // STAGES & 1)
    _my_turn(turn, c, WHO, PING_PONG)
    s = _scores(q, _flat(k.index(stage)), layouts[0])
    mbarrier.wait(v_full.index(last), (c - 1) // STAGES & 1)
    out = warpgroup_mma(p, _flat(v.index(last)), out, is_async=True)
    _next_turn(turn, WHO, CONSUMERS, PING_PONG)
    s = warpgroup_mma_wait(1, deps=(s,))
    mbarrier.arrive(k_empty.index(stage))
    start = _edge(c, edges[0], edges[1], edges[2]) * N
    new_p, norm, top, fade = _weigh(s, norm, top, start, seen, c < edges[0], (c >= edges[0]) | edges[3], scale, cap,
                                    MASKED, SOFTCAP, N, layouts[0])
    out, p = warpgroup_mma_wait(0, deps=(out, p))  # p: its registers are read until then
    mbarrier.arrive(v_empty.index(last))
    out *= gl.expand_dims(gl.convert_layout(fade, gl.SliceLayout(1, layouts[1]), assert_trivial=True), 1)
    return out, gl.convert_layout(new_p.to(v.dtype), layouts[2], assert_trivial=True), norm, top


@_jit
def _seen_by(told, own, spans, H, T, S, window, CAUSAL: gl.constexpr):
    """Range of keys that each of a consumer's queries sees, `own` being its places in the tile that was told of."""
    if spans is not None:
        spans += gl.cast(told[1] // H, gl.int64) * 2 * S
    return _keys_seen(S - T + gl.maximum(told[0], 0) + own, spans, window, S, CAUSAL)


@_jit
def _attend(work, WHO: gl.constexpr, CAUSAL: gl.constexpr, SOFTCAP: gl.constexpr, PING_PONG: gl.constexpr,
            STAGES: gl.constexpr):
    """A consumer: its ROWS queries of each tile against n blocks of keys, out and lse."""
    out_desc, lse, spans, tiles, plan, plan_full, barriers, H, T, S, window, scale, cap = work
    queries, k, v = tiles
    _, q_empty, _, k_empty, v_full, v_empty, _ = barriers
    CONSUMERS: gl.constexpr = queries.shape[0] // 2
    ROWS: gl.constexpr = queries.shape[3]
    D: gl.constexpr = queries.shape[4]
    N: gl.constexpr = k.shape[3]
    score_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, N, 16])
    out_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, D, 16])
    weight_layout: gl.constexpr = gl.DotOperandLayout(0, out_layout, 2)
    layouts: gl.constexpr = (score_layout, out_layout, weight_layout)
    row_layout: gl.constexpr = gl.SliceLayout(1, score_layout)

    own = WHO * ROWS + gl.arange(0, ROWS, row_layout)
    done = 0
    c = 0  # blocks visited
    told = _read_plan(plan, plan_full, done)
    seen = _seen_by(told, own, spans, H, T, S, window, CAUSAL)
    s = _first_scores(done, c, tiles, barriers, WHO, PING_PONG, STAGES, score_layout)
    s = warpgroup_mma_wait(0, deps=(s,))
    mbarrier.arrive(k_empty.index(0))
    while told[0] >= 0:
        row, head, before, begin, behind, masked, n = told
        place = queries.index(done % 2 * CONSUMERS + WHO)
        q = _flat(place)
        start = _edge(0, before, begin, behind) * N
        norm = gl.zeros([ROWS], gl.float32, row_layout)
        top = gl.full([ROWS], float("-inf"), gl.float32, row_layout)
        both = masked == n if CAUSAL else True  # without whole blocks, one may lie at both edges; True: a register less
        p, norm, top, _fade = _weigh(s, norm, top, start, seen, before > 0, (before == 0) | both, scale, cap, True, SOFTCAP,
                                     N, score_layout)
        state = (gl.zeros([ROWS, D], gl.float32, out_layout),
                 gl.convert_layout(p.to(v.dtype), weight_layout, assert_trivial=True), norm, top)
        edges = (c + before, begin - c, behind - c, both)
        for c_now in range(c + 1, c + masked):
            state = _step(c_now, edges, state, q, tiles, barriers, seen, scale, cap, True, SOFTCAP, WHO, PING_PONG, STAGES,
                          layouts)
        if done > 0:
            tma.store_wait(0)  # of the tile before
            mbarrier.arrive(q_empty.index((done - 1) % 2 * CONSUMERS + WHO))
        for c_now in range(c + masked, c + n):
            state = _step(c_now, edges, state, q, tiles, barriers, seen, scale, cap, False, SOFTCAP, WHO, PING_PONG, STAGES,
                          layouts)
        out, p, norm, top = state
        c += n
        done += 1
        last = (c - 1) % STAGES
        mbarrier.wait(v_full.index(last), (c - 1) // STAGES & 1)
        out = warpgroup_mma(p, _flat(v.index(last)), out, is_async=True)
        told = _read_plan(plan, plan_full, done)  # meanwhile
        seen = _seen_by(told, own, spans, H, T, S, window, CAUSAL)
        s = _first_scores(done, c, tiles, barriers, WHO, PING_PONG, STAGES, score_layout)
        out, p = warpgroup_mma_wait(1, deps=(out, p))
        mbarrier.arrive(v_empty.index(last))

        share = gl.where(norm > 0, 1 / norm, 0.0)
        out *= gl.expand_dims(gl.convert_layout(share, gl.SliceLayout(1, out_layout), assert_trivial=True), 1)
        q.store(out.to(queries.dtype))
        fence_async_shared()
        tma.async_copy_shared_to_global(out_desc, [head // H, head % H, row + WHO * ROWS, 0], place)
        rows = row + own
        gl.store(lse + gl.cast(head, gl.int64) * T + rows, (top + gl.log2(norm)) * 0.6931471805599453, mask=rows < T)
        s = warpgroup_mma_wait(0, deps=(s,))
        mbarrier.arrive(k_empty.index(c % STAGES))
    tma.store_wait(0)


@_jit
def forward_kernel(q_desc, k_desc, v_desc, out_desc, lse, spans, counter, B, H, group, T, S, wave, window, scale, cap,
                   CAUSAL: gl.constexpr, SOFTCAP: gl.constexpr, M: gl.constexpr, STAGES: gl.constexpr,
                   PING_PONG: gl.constexpr, REGISTERS: gl.constexpr, LOADER_REGISTERS: gl.constexpr):
    """Tiles of M queries of one head: out (B, H, T, D) and lse (B, H, T) fp32, in natural logarithms; `counter` holds 0."""
    ROWS: gl.constexpr = q_desc.block_type.shape[2]
    CONSUMERS: gl.constexpr = M // ROWS
    N: gl.constexpr = k_desc.block_type.shape[2]
    D: gl.constexpr = q_desc.block_type.shape[3]
    PLANS: gl.constexpr = 3

    q = gl.allocate_shared_memory(q_desc.dtype, [2 * CONSUMERS, 1, 1, ROWS, D], q_desc.layout)
    k = gl.allocate_shared_memory(k_desc.dtype, [STAGES, 1, 1, N, D], k_desc.layout)
    v = gl.allocate_shared_memory(v_desc.dtype, [STAGES, 1, 1, N, D], v_desc.layout)
    plan = gl.allocate_shared_memory(gl.int32, [PLANS * 7, 1], gl.SwizzledSharedLayout(1, 1, 1, [0]))
    plan_full = gl.allocate_shared_memory(gl.int64, [PLANS, 1], mbarrier.MBarrierLayout())
    q_full = gl.allocate_shared_memory(gl.int64, [2 * CONSUMERS, 1], mbarrier.MBarrierLayout())
    q_empty = gl.allocate_shared_memory(gl.int64, [2 * CONSUMERS, 1], mbarrier.MBarrierLayout())
    k_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    k_empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    v_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    v_empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    turn = gl.allocate_shared_memory(gl.int64, [CONSUMERS, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(PLANS):
        mbarrier.init(plan_full.index(i), count=1)
    for i in gl.static_range(2 * CONSUMERS):
        mbarrier.init(q_full.index(i), count=1)
        mbarrier.init(q_empty.index(i), count=1)
    for i in gl.static_range(CONSUMERS):
        mbarrier.init(turn.index(i), count=1)
    for i in gl.static_range(STAGES):
        mbarrier.init(k_full.index(i), count=1)
        mbarrier.init(v_full.index(i), count=1)
        mbarrier.init(k_empty.index(i), count=CONSUMERS)
        mbarrier.init(v_empty.index(i), count=CONSUMERS)
    fence_async_shared()

    tiles = (q, k, v)
    barriers = (q_full, q_empty, k_full, k_empty, v_full, v_empty, turn)
    work = (out_desc, lse, spans, tiles, plan, plan_full, barriers, H, T, S, window, scale, cap)
    load = (q_desc, k_desc, v_desc, spans, counter, tiles, plan, plan_full, barriers, B, H, group, T, S, wave, window)
    if CONSUMERS == 2:
        gl.warp_specialize([(_attend, (work, 0, CAUSAL, SOFTCAP, PING_PONG, STAGES)),
                            (_attend, (work, 1, CAUSAL, SOFTCAP, PING_PONG, STAGES)),
                            (_load, (load, CAUSAL, M, STAGES))], [4, 1], [REGISTERS, LOADER_REGISTERS])
    else:
        gl.warp_specialize([(_attend, (work, 0, CAUSAL, SOFTCAP, PING_PONG, STAGES)),
                            (_attend, (work, 1, CAUSAL, SOFTCAP, PING_PONG, STAGES)),
                            (_attend, (work, 2, CAUSAL, SOFTCAP, PING_PONG, STAGES)),
                            (_load, (load, CAUSAL, M, STAGES))], [4, 4, 1], [REGISTERS, REGISTERS, LOADER_REGISTERS])
