"""The forward pass of flash attention for Hopper, in Gluon: what flash_attention.py says, by TMA, wgmma and specialised warps.

A program takes M queries of one head. One warp loads: the tiles of q once, then block after block of k and v into STAGES
buffers each. The rest compute, in warpgroups ("consumers") of ROWS = 64 queries. They meet at barriers in shared memory:

    q_full[consumer]                1 arrival, the loader's, complete with the last byte of the copy
    k_full[stage], v_full[stage]    the same
    k_empty[stage], v_empty[stage]  an arrival of each consumer, once its products of the buffer are done
    turn[consumer]                  1 arrival, of the consumer before it

The j-th block visited lies in stage j % STAGES and is the buffer's round j // STAGES, so that round's parity is what
to wait for: of *_full its own, of *_empty that of the round before, which at the start counts as complete.

A consumer begins the product of its scores for block j, and with it that of the weights of block j - 1 and v; while the second
runs, it makes the weights of block j. PING_PONG: consumers begin their products in turn, so that one's products run during
another's softmax. Blocks that need a mask come first, because then the loop over the others is the last and longest one.
Sources: arXiv:2407.08608 (FlashAttention-3: warp specialisation, ping-pong, overlap within a warpgroup, block sizes); tutorials
05 and 08 of Gluon (order of expect, wait, fence and arrive). Shared memory is read by wgmma and written by TMA without a fence:
both are the asynchronous proxy, ordered by the barriers; out goes through the generic one to TMA, and barriers are written by
it at the start, so there a fence stands between.
Shapes and the names of lengths as in flash_attention_triton.py.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from officina.kernels.dispatch import triton
from officina.kernels.flash_attention_triton import _blocks, _keys_seen, _place, _tanh
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
    from triton.experimental.gluon.nvidia.hopper import TensorDescriptor
except ImportError:  # no triton, or one without Gluon
    gluon = None

TRITON = "3.6"
"""Gluon's interface may change with each minor version of triton; this is the one that the kernel is made for."""
ROWS = 64
"""Queries of a consumer: the height of wgmma."""
REGISTERS = {2: 240, 3: 160}
"""Number of consumers -> registers of a thread in each; with the loader's they fill the multiprocessor's 65,536."""
LOADER_REGISTERS = 24
STRIDE_ELEMENTS, STRIDE_LIMIT_BYTES = 8, 2**40
"""TMA takes strides that are multiples of 16 bytes, less than this."""


def _jit(function: Any) -> Any:
    lengths = ("B", "H", "group", "T", "S", "distance", "wave", "window")
    return function if gluon is None else gluon.jit(function, do_not_specialize=lengths)


def why_not_hopper(arch: str, head_dim: int, n_keys: int, dtype: torch.dtype) -> str | None:
    """Why the Hopper kernel cannot take a case that flash_attention's others take, or None if it can."""
    if gluon is None or not triton.__version__.startswith(f"{TRITON}."):
        return f"it needs the Gluon of triton {TRITON}, this is triton {triton and triton.__version__}"
    if arch != "sm_90":
        return f"it needs Hopper (sm_90), this is {arch}"
    if dtype not in (torch.bfloat16, torch.float16):
        return f"it computes in bf16 and fp16, not {dtype}"
    if head_dim % STRIDE_ELEMENTS:
        return f"heads are {head_dim} wide, it takes multiples of {STRIDE_ELEMENTS}"
    return None if n_keys else "there are no keys"


def constants(config: Config) -> dict[str, int]:
    """The kernel's constants that a configuration stands for."""
    return {"M": config.block_m, "STAGES": config.num_stages, "PING_PONG": config.extra.get("ping_pong", 0),
            "REGISTERS": REGISTERS[config.block_m // ROWS], "LOADER_REGISTERS": LOADER_REGISTERS}


def tile_rows(config: Config) -> dict[str, int]:
    """The kernel's descriptors and the rows of their tiles."""
    return {"q_desc": ROWS, "k_desc": config.block_n, "v_desc": config.block_n, "out_desc": ROWS}


def loadable(x: Tensor) -> Tensor:
    """x itself, or a copy where TMA could not walk it."""
    steps = [stride for size, stride in zip(x.shape[:-1], x.stride()[:-1], strict=True) if size > 1]
    fits = all(0 < s < STRIDE_LIMIT_BYTES // x.element_size() and s % STRIDE_ELEMENTS == 0 for s in steps)
    return x if fits and x.stride(-1) == 1 and x.data_ptr() % 16 == 0 else x.clone(memory_format=torch.contiguous_format)


def descriptor(x_BHTD: Tensor, rows: int, width: int) -> Any:
    """For copies of tiles (rows, width) of one head. What lies outside the tensor is read as 0 and not written."""
    # The stride of an axis of one is never used, but must be a legal one.
    strides = [stride if size > 1 else x_BHTD.shape[-1] for size, stride in zip(x_BHTD.shape, x_BHTD.stride(), strict=True)]
    shape = [1, 1, rows, width]
    return TensorDescriptor(x_BHTD, list(x_BHTD.shape), [*strides[:-1], 1], shape, _layout(shape))


def descriptor_type(dtype: str, rows: int, width: int) -> str:
    """Triton's name of the type of such a descriptor, for compiling without one; `bf16` or `fp16`."""
    shape = [1, 1, rows, width]
    return f"tensordesc<{dtype}{shape},{_layout(shape)!r}>"


def _layout(shape: list[int]) -> Any:
    """Of 16-bit elements in shared memory: swizzled as TMA and wgmma both know it."""
    return gl.NVMMASharedLayout.get_default_for(shape, gl.float16)


@_jit
def _flat(tile):
    """The (1, 1, rows, width) that TMA fills, as the matrix that it is."""
    return tile.reshape([tile.shape[2], tile.shape[3]])


@_jit
def _block_of(j, span):
    """The block of keys visited as the j-th, `span` being what `_blocks` returned: masked ones first."""
    begin, before, full_begin, full_end, masked = span
    edge = gl.where(j < before, begin + j, full_end + j - before)
    return gl.where(j < masked, edge, full_begin + j - masked)


@_jit
def _load(work, STAGES: gl.constexpr):
    """The loader."""
    q_desc, k_desc, v_desc, tiles, barriers, b, h, g, row, n, span = work
    q, k, v = tiles
    q_full, k_full, k_empty, v_full, v_empty, _ = barriers
    CONSUMERS: gl.constexpr = q.shape[0]
    ROWS: gl.constexpr = q_desc.block_type.shape[2]
    N: gl.constexpr = k_desc.block_type.shape[2]
    for i in gl.static_range(CONSUMERS):
        mbarrier.expect(q_full.index(i), q_desc.block_type.nbytes)
        tma.async_copy_global_to_shared(q_desc, [b, h, row + i * ROWS, 0], q_full.index(i), q.index(i))
    for j in range(n):
        stage = j % STAGES
        before = (j // STAGES & 1) ^ 1
        start = _block_of(j, span) * N
        mbarrier.wait(k_empty.index(stage), before)
        mbarrier.expect(k_full.index(stage), k_desc.block_type.nbytes)
        tma.async_copy_global_to_shared(k_desc, [b, g, start, 0], k_full.index(stage), k.index(stage))
        mbarrier.wait(v_empty.index(stage), before)
        mbarrier.expect(v_full.index(stage), v_desc.block_type.nbytes)
        tma.async_copy_global_to_shared(v_desc, [b, g, start, 0], v_full.index(stage), v.index(stage))


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
def _weigh(s, norm, top, start, seen, scale, cap, MASKED: gl.constexpr, SOFTCAP: gl.constexpr, N: gl.constexpr,
           layout: gl.constexpr):
    """Weights of a block of scores, norm and top with it, and the factor on what was summed before it; log2 units."""
    first, end = seen
    if SOFTCAP:
        s = cap * _tanh(s * scale)
        scale = 1.0
    if MASKED:
        keys = gl.expand_dims(start + gl.arange(0, N, gl.SliceLayout(0, layout)), 0)
        s = gl.where((keys >= gl.expand_dims(first, 1)) & (keys < gl.expand_dims(end, 1)), s, float("-inf"))
    new_top = gl.maximum(top, gl.max(s, 1) * scale)
    shift = gl.where(new_top == float("-inf"), 0.0, new_top) if MASKED else new_top  # -inf less -inf is NaN
    p = gl.exp2(s * scale - gl.expand_dims(shift, 1))
    fade = gl.exp2(top - shift)
    return p, norm * fade + gl.sum(p, 1), new_top, fade


@_jit
def _step(j, state, q, tiles, barriers, span, seen, scale, cap, MASKED: gl.constexpr, SOFTCAP: gl.constexpr,
          WHO: gl.constexpr, PING_PONG: gl.constexpr, STAGES: gl.constexpr, layouts: gl.constexpr):
    """Block j >= 1: its scores and weights; the weights of block j - 1 into the sum."""
    out, p, norm, top = state
    queries, k, v = tiles
    _, k_full, k_empty, v_full, v_empty, turn = barriers
    CONSUMERS: gl.constexpr = queries.shape[0]
    N: gl.constexpr = k.shape[3]
    stage = j % STAGES
    past = (j - 1) % STAGES
    mbarrier.wait(k_full.index(stage), j // STAGES & 1)
    _my_turn(turn, j, WHO, PING_PONG)
    s = _scores(q, _flat(k.index(stage)), layouts[0])
    mbarrier.wait(v_full.index(past), (j - 1) // STAGES & 1)
    out = warpgroup_mma(p, _flat(v.index(past)), out, is_async=True)
    _next_turn(turn, WHO, CONSUMERS, PING_PONG)
    s = warpgroup_mma_wait(1, deps=(s,))
    mbarrier.arrive(k_empty.index(stage))
    start = _block_of(j, span) * N
    new_p, norm, top, fade = _weigh(s, norm, top, start, seen, scale, cap, MASKED, SOFTCAP, N, layouts[0])
    out, p = warpgroup_mma_wait(0, deps=(out, p))  # p: its registers are read until then
    mbarrier.arrive(v_empty.index(past))
    out *= gl.expand_dims(gl.convert_layout(fade, gl.SliceLayout(1, layouts[1]), assert_trivial=True), 1)
    return out, gl.convert_layout(new_p.to(v.dtype), layouts[2], assert_trivial=True), norm, top


@_jit
def _attend(work, WHO: gl.constexpr, CAUSAL: gl.constexpr, SOFTCAP: gl.constexpr, PING_PONG: gl.constexpr,
            STAGES: gl.constexpr):
    """A consumer: its ROWS queries against n blocks of keys, out and lse."""
    out_desc, lse, spans, tiles, barriers, b, h, row, n, span, T, S, window, scale, cap = work
    queries, k, v = tiles
    q_full, k_full, k_empty, v_full, _, turn = barriers
    CONSUMERS: gl.constexpr = queries.shape[0]
    ROWS: gl.constexpr = queries.shape[3]
    D: gl.constexpr = queries.shape[4]
    N: gl.constexpr = k.shape[3]
    score_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, N, 16])
    out_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, D, 16])
    weight_layout: gl.constexpr = gl.DotOperandLayout(0, out_layout, 2)
    layouts: gl.constexpr = (score_layout, out_layout, weight_layout)
    row_layout: gl.constexpr = gl.SliceLayout(1, score_layout)

    begin_row = row + WHO * ROWS
    rows = begin_row + gl.arange(0, ROWS, row_layout)
    seen = _keys_seen(S - T + rows, spans, window, S, CAUSAL)
    out = gl.zeros([ROWS, D], gl.float32, out_layout)
    norm = gl.zeros([ROWS], gl.float32, row_layout)
    top = gl.full([ROWS], float("-inf"), gl.float32, row_layout)
    q = _flat(queries.index(WHO))
    mbarrier.wait(q_full.index(WHO), 0)
    mbarrier.wait(k_full.index(0), 0)
    _my_turn(turn, 0, WHO, PING_PONG)
    s = _scores(q, _flat(k.index(0)), score_layout)
    _next_turn(turn, WHO, CONSUMERS, PING_PONG)
    s = warpgroup_mma_wait(0, deps=(s,))
    mbarrier.arrive(k_empty.index(0))
    p, norm, top, _ = _weigh(s, norm, top, _block_of(0, span) * N, seen, scale, cap, True, SOFTCAP, N, score_layout)
    state = (out, gl.convert_layout(p.to(v.dtype), weight_layout, assert_trivial=True), norm, top)
    masked = gl.maximum(span[4], 1)
    for j in range(1, masked):
        state = _step(j, state, q, tiles, barriers, span, seen, scale, cap, True, SOFTCAP, WHO, PING_PONG, STAGES, layouts)
    for j in range(masked, n):
        state = _step(j, state, q, tiles, barriers, span, seen, scale, cap, False, SOFTCAP, WHO, PING_PONG, STAGES, layouts)
    out, p, norm, top = state
    mbarrier.wait(v_full.index((n - 1) % STAGES), (n - 1) // STAGES & 1)
    out = warpgroup_mma(p, _flat(v.index((n - 1) % STAGES)), out, is_async=True)
    out, p = warpgroup_mma_wait(0, deps=(out, p))

    share = gl.where(norm > 0, 1 / norm, 0.0)
    out *= gl.expand_dims(gl.convert_layout(share, gl.SliceLayout(1, out_layout), assert_trivial=True), 1)
    q.store(out.to(q.dtype))  # its queries' place: nobody else reads them, and it is done with them
    fence_async_shared()
    tma.async_copy_shared_to_global(out_desc, [b, h, begin_row, 0], queries.index(WHO))
    gl.store(lse + rows, (top + gl.log2(norm)) * 0.6931471805599453, mask=rows < T)
    tma.store_wait(0)


@_jit
def forward_kernel(q_desc, k_desc, v_desc, out_desc, lse, spans, B, H, group, T, S, wave, window, scale, cap,
                   CAUSAL: gl.constexpr, SOFTCAP: gl.constexpr, M: gl.constexpr, STAGES: gl.constexpr,
                   PING_PONG: gl.constexpr, REGISTERS: gl.constexpr, LOADER_REGISTERS: gl.constexpr):
    """A tile of M queries of one head: out (B, H, T, D) and lse (B, H, T) fp32, in natural logarithms."""
    ROWS: gl.constexpr = q_desc.block_type.shape[2]
    CONSUMERS: gl.constexpr = M // ROWS
    N: gl.constexpr = k_desc.block_type.shape[2]
    D: gl.constexpr = q_desc.block_type.shape[3]
    n_tiles = gl.cdiv(T, M)
    tile, head = _place(n_tiles, B * H, wave)
    if CAUSAL:
        tile = n_tiles - 1 - tile  # the longest first
    b = head // H
    h = head % H
    row = tile * M
    lse += gl.cast(head, gl.int64) * T
    if spans is not None:
        spans += gl.cast(b, gl.int64) * 2 * S
    first_key, first_end = _keys_seen(S - T + row, spans, window, S, CAUSAL)
    last_first, end_key = _keys_seen(S - T + gl.minimum(row + M, T) - 1, spans, window, S, CAUSAL)
    span = _blocks(first_key, last_first, first_end, end_key, N)
    n = gl.maximum(span[4] + span[3] - span[2], 1)  # where nothing is seen, the first block, masked all over

    q = gl.allocate_shared_memory(q_desc.dtype, [CONSUMERS, 1, 1, ROWS, D], q_desc.layout)
    k = gl.allocate_shared_memory(k_desc.dtype, [STAGES, 1, 1, N, D], k_desc.layout)
    v = gl.allocate_shared_memory(v_desc.dtype, [STAGES, 1, 1, N, D], v_desc.layout)
    q_full = gl.allocate_shared_memory(gl.int64, [CONSUMERS, 1], mbarrier.MBarrierLayout())
    k_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    k_empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    v_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    v_empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    turn = gl.allocate_shared_memory(gl.int64, [CONSUMERS, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(CONSUMERS):
        mbarrier.init(q_full.index(i), count=1)
        mbarrier.init(turn.index(i), count=1)
    for i in gl.static_range(STAGES):
        mbarrier.init(k_full.index(i), count=1)
        mbarrier.init(v_full.index(i), count=1)
        mbarrier.init(k_empty.index(i), count=CONSUMERS)
        mbarrier.init(v_empty.index(i), count=CONSUMERS)
    fence_async_shared()

    tiles = (q, k, v)
    barriers = (q_full, k_full, k_empty, v_full, v_empty, turn)
    work = (out_desc, lse, spans, tiles, barriers, b, h, row, n, span, T, S, window, scale, cap)
    load = (q_desc, k_desc, v_desc, tiles, barriers, b, h, h // group, row, n, span)
    if CONSUMERS == 2:
        gl.warp_specialize([(_attend, (work, 0, CAUSAL, SOFTCAP, PING_PONG, STAGES)),
                            (_attend, (work, 1, CAUSAL, SOFTCAP, PING_PONG, STAGES)),
                            (_load, (load, STAGES))], [4, 1], [REGISTERS, LOADER_REGISTERS])
    else:
        gl.warp_specialize([(_attend, (work, 0, CAUSAL, SOFTCAP, PING_PONG, STAGES)),
                            (_attend, (work, 1, CAUSAL, SOFTCAP, PING_PONG, STAGES)),
                            (_attend, (work, 2, CAUSAL, SOFTCAP, PING_PONG, STAGES)),
                            (_load, (load, STAGES))], [4, 4, 1], [REGISTERS, REGISTERS, LOADER_REGISTERS])
