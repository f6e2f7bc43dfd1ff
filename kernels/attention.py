"""Softmax attention over causal, windowed and packed rows, with grouped key and value heads.

    out = softmax(softcap(scale q k^T) + mask) v,   softcap(s) = c tanh(s / c), the identity for c = 0

Query t of T stands at place S - T + t of the S keys, so that with a cache the last query sees the last key.
Sources: Vaswani et al., arXiv:1706.03762; grouped heads arXiv:2305.13245; windows arXiv:2004.05150.
Shapes: B rows, H query heads, G key and value heads (H a multiple of G), T queries, S keys, D head width.
"""

import functools
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.flex_attention import create_block_mask, flex_attention

from officina.kernels.dispatch import log_once
from officina.kernels.flash_attention import (
    check_shapes,
    check_switches,
    flash_attention,
    flash_attention_reference,
    why_not_flash,
)
from officina.kernels.masks import dense_mask, document_spans

Impl = Literal["auto", "triton", "reference", "sdpa", "flex"]
Chosen = Literal["triton", "reference", "sdpa", "flex"]

@dataclass(frozen=True, slots=True)
class AttentionPlan:
    """What a call needs besides q, k and v: built once per forward, shared by layers with the same window."""

    impl: Chosen
    is_causal: bool
    """The mask is the plain causal triangle over T = S, which kernels know without a mask tensor."""
    mask: Tensor | None
    """(T, S) or (B, 1, T, S) bool, true where a query sees a key; None: see is_causal, else all."""
    block_mask: Any = None
    """flex: the same as a BlockMask."""
    score_mod: Any = None
    """flex: the softcap as a function of a score."""
    spans_B2S: Tensor | None = None
    """triton: the documents (masks.document_spans); window and triangle the kernels know from the call."""


def attention(q_BHTD: Tensor, k_BGSD: Tensor, v_BGSD: Tensor, *, causal: bool = True, scale: float | None = None,
              window: int = 0, softcap: float = 0.0, documents_BS: Tensor | None = None, impl: Impl = "auto",
              plan: AttentionPlan | None = None) -> Tensor:
    """Attention of each query to the keys it may see; (B, H, T, D) in q's dtype.

    Args:
        scale: factor on q k^T; None = D ** -0.5.
        window: a query sees this many keys, its own included; 0 = all. Needs causal.
        softcap: tanh cap on the scaled scores; 0 = none. `triton`'s is off by some softcap * 6e-8.
        documents_BS: a number per document, each a run of neighbouring tokens; queries see keys of their own document only.
            (1, S): the same for all rows.
        impl: `auto` takes the fastest that can do the case and logs which once; a named one never falls back.
        plan: what `plan_attention` gave for the same arguments; saves building it again.
    Raises ValueError for shapes or switches that do not fit, and where a named impl cannot do the case.
    """
    check_shapes("attention", q_BHTD, k_BGSD, v_BGSD)
    B, _, T, D = q_BHTD.shape
    S = k_BGSD.shape[2]
    if documents_BS is not None and (documents_BS.dim() != 2 or documents_BS.shape[0] not in (1, B)):
        raise ValueError(f"attention: documents {tuple(documents_BS.shape)} do not fit {B} rows; need ({B}, {S}), or (1, {S}) "
                         "for all rows")
    if plan is None:
        plan = plan_attention(T, S, causal=causal, window=window, softcap=softcap,
                              documents_BS=documents_BS, impl=impl, device=q_BHTD.device, head_dim=D, dtype=q_BHTD.dtype)
    if plan.impl == "triton":
        spans_B2S = None if plan.spans_B2S is None else plan.spans_B2S.expand(B, -1, -1)
        return flash_attention(q_BHTD, k_BGSD, v_BGSD, causal=causal, scale=scale, window=window if window < S else 0,
                               softcap=softcap, spans_B2S=spans_B2S, impl="triton",
                               deterministic=torch.are_deterministic_algorithms_enabled())[0]
    scale = D**-0.5 if scale is None else scale
    if plan.impl == "flex":
        return _flex(q_BHTD, k_BGSD, v_BGSD, plan, scale)
    if plan.impl == "sdpa":
        return _sdpa(q_BHTD, k_BGSD, v_BGSD, plan, scale)
    return attention_reference(q_BHTD, k_BGSD, v_BGSD, mask=_full_mask(plan, T, q_BHTD.device), scale=scale, softcap=softcap)


def attention_reference(q_BHTD: Tensor, k_BGSD: Tensor, v_BGSD: Tensor, *, mask: Tensor | None, scale: float,
                        softcap: float = 0.0) -> Tensor:
    """Same contract in plain torch, fp32 inside (fp64 for fp64): the oracle for tests and benchmarks."""
    return flash_attention_reference(q_BHTD, k_BGSD, v_BGSD, mask=mask, scale=scale, softcap=softcap)[0]


def plan_attention(n_queries: int, n_keys: int, *, causal: bool = True, window: int = 0, softcap: float = 0.0,
                   documents_BS: Tensor | None = None, impl: Impl = "auto", device: torch.device, head_dim: int,
                   dtype: torch.dtype = torch.float32) -> AttentionPlan:
    """Choose the implementation and build its mask, on the device and without waiting for it.

    Raises ValueError where a named impl cannot do the case.
    """
    check_switches("attention", causal, window, softcap)
    if n_keys < n_queries:
        raise ValueError(f"attention: {n_queries} queries but only {n_keys} keys; the last keys are the queries' own")
    if documents_BS is not None and documents_BS.shape[1] != n_keys:
        raise ValueError(f"attention: documents have {documents_BS.shape[1]} places, but there are {n_keys} keys")
    window = window if causal and window < n_keys else 0
    masked = documents_BS is not None or bool(window)
    chosen = _choose(impl, masked=masked, softcap=softcap, n_queries=n_queries, n_keys=n_keys, device=device,
                     head_dim=head_dim, dtype=dtype)
    spans_B2S = None if documents_BS is None else document_spans(documents_BS)
    if chosen == "triton":
        return AttentionPlan("triton", False, None, spans_B2S=spans_B2S)
    if chosen == "flex":
        block_mask = _block_mask(n_queries, n_keys, causal, window, spans_B2S, device)
        return AttentionPlan("flex", False, None, block_mask, _softcap_mod(softcap) if softcap else None)
    if not masked and (not causal or n_queries == 1):
        return AttentionPlan(chosen, False, None)
    if not masked and n_queries == n_keys:
        return AttentionPlan(chosen, True, None)
    return AttentionPlan(chosen, False, dense_mask(n_queries, n_keys, causal, window, spans_B2S, device))


def flex_missing(device: torch.device, head_dim: int) -> str | None:
    """Why flex attention cannot run here, or None if it can."""
    if device.type != "cuda":
        return f"flex attention has no backward on the {device.type}"
    if head_dim < 16:
        return f"flex attention needs head_dim of at least 16, not {head_dim}"
    return None if find_spec("triton") else "flex attention needs triton (pip install 'officina[kernels]')"


def _choose(impl: Impl, *, masked: bool, softcap: float, n_queries: int, n_keys: int, device: torch.device, head_dim: int,
            dtype: torch.dtype) -> Chosen:
    if impl == "reference":
        return "reference"
    no_triton = why_not_flash(head_dim, dtype, device)
    if impl == "triton":
        if no_triton:
            raise ValueError(f"attention: impl=triton cannot run: {no_triton}. Use impl=auto")
        return "triton"
    square, no_flex = n_queries == n_keys, flex_missing(device, head_dim)
    if impl == "flex":
        if no_flex:
            raise ValueError(f"attention: impl=flex cannot run: {no_flex}. Use impl=auto")
        return "flex" if square else "reference" if softcap else "sdpa"  # decoding has nothing to fuse
    if impl == "sdpa":
        if softcap:
            raise ValueError(f"attention: impl=sdpa has no softcap (softcap={softcap}). Use impl=auto")
        return "sdpa"
    # In fp32 the kernels have no tensor cores to use, and for one query no rows to share the keys.
    if device.type == "cuda" and not no_triton and dtype != torch.float32 and n_queries > 1:
        return "triton"
    if softcap:
        if square and not no_flex:
            return "flex"
        log_once(f"attention: auto takes the reference: sdpa has no softcap, {no_flex or 'decoding'}")
        return "reference"
    if masked and square and device.type == "cuda":
        if not no_flex:
            return "flex"
        log_once(f"attention: auto takes sdpa with a dense mask: {no_flex}")
    return "sdpa"


def _sdpa(q: Tensor, k: Tensor, v: Tensor, plan: AttentionPlan, scale: float) -> Tensor:
    grouped = q.shape[1] != k.shape[1]
    # On a GPU only the flash kernel knows grouped heads, and it takes neither masks nor fp32: without
    # repeating the heads SDPA would fall back, silently, to a path that holds all scores.
    if grouped and q.is_cuda and (plan.mask is not None or q.dtype not in (torch.bfloat16, torch.float16)):
        k, v = (x.repeat_interleave(q.shape[1] // k.shape[1], dim=1) for x in (k, v))
        grouped = False
    return F.scaled_dot_product_attention(q, k, v, attn_mask=plan.mask, is_causal=plan.is_causal, scale=scale,
                                          enable_gqa=grouped)


def _flex(q: Tensor, k: Tensor, v: Tensor, plan: AttentionPlan, scale: float) -> Tensor:
    # Inside a compiled block the function is compiled with it.
    run = _compiled_flex() if q.is_cuda and not torch.compiler.is_compiling() else flex_attention
    return run(q, k, v, score_mod=plan.score_mod, block_mask=plan.block_mask, scale=scale, enable_gqa=q.shape[1] != k.shape[1])


def _full_mask(plan: AttentionPlan, n_queries: int, device: torch.device) -> Tensor | None:
    return dense_mask(n_queries, n_queries, True, 0, None, device) if plan.is_causal else plan.mask


def _block_mask(n_queries: int, n_keys: int, causal: bool, window: int, spans_B2S: Tensor | None,
                device: torch.device) -> Any:
    offset = n_keys - n_queries
    starts_BS = None if spans_B2S is None else spans_B2S[:, 0].contiguous()

    def sees(b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        seen = j <= i + offset if causal else j >= 0
        if window:
            seen = seen & (i + offset - j < window)
        if starts_BS is not None:
            row = b if rows > 1 else b * 0  # torch 2.9 takes no plain number here
            seen = seen & (starts_BS[row, i + offset] == starts_BS[row, j])
        return seen

    rows = None if starts_BS is None else starts_BS.shape[0]
    # Compiled, the mask is reduced to blocks on the fly; else all B x T x S entries exist for a moment.
    create = _compiled_block_mask() if device.type == "cuda" else create_block_mask
    return create(sees, rows, None, n_queries, n_keys, device=device)


@functools.cache
def _compiled_flex() -> Any:
    return torch.compile(flex_attention)


@functools.cache
def _compiled_block_mask() -> Any:
    return torch.compile(create_block_mask)


@functools.cache
def _softcap_mod(softcap: float) -> Any:
    """Cached: torch.compile recognises a score function by its identity."""
    return lambda score, b, h, i, j: softcap * torch.tanh(score / softcap)
