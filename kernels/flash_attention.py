"""Flash attention: softmax attention that holds no scores in memory, forward and backward.

    s = softcap(scale q k^T),   softcap(s) = c tanh(s / c), the identity for c = 0
    lse[t] = log sum over seen keys of exp s[t],   out[t] = sum over seen keys of exp(s[t] - lse[t]) v

Query t of T stands at place S - T + t of the S keys (causal masks are aligned at the bottom right). It sees: causal, the keys
up to its place; of these the last `window`; within a document its own. What sees nothing gets out = 0 and lse = -inf.
Sources: arXiv:2205.14135, arXiv:2307.08691; grouped heads arXiv:2305.13245; softcap: Gemma 2, arXiv:2408.00118.
Shapes: B rows, H query heads, G key and value heads (H a multiple of G), T queries, S keys, D head width.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from officina.kernels.dispatch import INTERPRETED, Impl, choose_impl, why_no_tangents, why_not_triton, why_not_triton_on
from officina.kernels.masks import dense_mask
from officina.kernels.ops import define_op

MAX_HEAD_DIM = 256
"""Widest heads the kernels take; narrower ones are padded to a power of two on the chip."""


def flash_attention(q_BHTD: Tensor, k_BGSD: Tensor, v_BGSD: Tensor, *, causal: bool = True, scale: float | None = None,
                    window: int = 0, softcap: float = 0.0, spans_B2S: Tensor | None = None, deterministic: bool = False,
                    impl: Impl = "auto") -> tuple[Tensor, Tensor]:
    """Attention (B, H, T, D) in q's dtype, and the natural logarithm of its normaliser (B, H, T) fp32; both differentiable.

    Gradients of lse are accepted, so that results over parts of the keys can be merged:
    lse = logaddexp(lse1, lse2), out = exp(lse1 - lse) out1 + exp(lse2 - lse) out2.

    Args:
        scale: factor on q k^T, not 0; None = D ** -0.5.
        window: a query sees this many keys, its own included; 0 = all. Needs causal.
        softcap: tanh cap on the scaled scores; 0 = none. The kernels' tanh is off by some 6e-8, so the scores by
            softcap * 6e-8: 3e-6 at 50, but 6e-3 at 1e5, where impl=reference is more exact.
        spans_B2S: documents, from masks.document_spans or masks.length_spans; None: each row is one.
        deterministic: bitwise the same gradients each time: dq in a pass of its own, seven matrix products instead of five.
            False adds it up by atomic additions, in an order that varies.
        impl: `triton` takes bf16, fp16 and fp32 on a GPU (in Triton's interpreter fp16 and fp32 on the CPU).
    Raises ValueError for shapes or switches that do not fit, and where impl=triton cannot do the case.
    """
    _check(q_BHTD, k_BGSD, v_BGSD, spans_B2S)
    check_switches("flash_attention", causal, window, softcap)
    if scale is None:  # not looked at: torch.compile may know the head width by a symbol only
        scale = q_BHTD.shape[-1] ** -0.5
    elif not scale or not math.isfinite(scale):
        raise ValueError(f"flash_attention: scale={scale} must be a finite number other than 0; None is head_dim ** -0.5")
    elif scale < 0:  # the kernels take the largest score before they scale
        q_BHTD, scale = -q_BHTD, -scale
    why = why_not_flash(q_BHTD.shape[-1], q_BHTD.dtype, q_BHTD.device) or why_no_tangents(q_BHTD, k_BGSD, v_BGSD)
    if choose_impl("flash_attention", impl, why) == "reference":
        T, S = q_BHTD.shape[2], k_BGSD.shape[2]
        mask = dense_mask(T, S, causal, window, spans_B2S, q_BHTD.device)
        return flash_attention_reference(q_BHTD, k_BGSD, v_BGSD, mask=mask, scale=scale, softcap=softcap)
    return torch.ops.officina.flash_attention(q_BHTD, k_BGSD, v_BGSD, spans_B2S, causal, scale, window, softcap, deterministic)


def flash_attention_reference(q_BHTD: Tensor, k_BGSD: Tensor, v_BGSD: Tensor, *, mask: Tensor | None, scale: float,
                              softcap: float = 0.0, compute_dtype: torch.dtype | None = None) -> tuple[Tensor, Tensor]:
    """Same contract in plain torch, all scores at once: the oracle for tests and benchmarks.

    Args:
        mask: bool, broadcasts to (B, H, T, S), true where a query sees a key; None: all.
        compute_dtype: of the scores and products; None = fp32, or fp64 for fp64.
    """
    wide = compute_dtype or torch.promote_types(q_BHTD.dtype, torch.float32)
    repeats = q_BHTD.shape[1] // k_BGSD.shape[1]
    k_BHSD = k_BGSD.to(wide).repeat_interleave(repeats, dim=1)
    v_BHSD = v_BGSD.to(wide).repeat_interleave(repeats, dim=1)
    scores = q_BHTD.to(wide) @ k_BHSD.transpose(-1, -2) * scale
    if softcap:
        scores = softcap * torch.tanh(scores / softcap)
    if mask is not None:
        scores = scores.masked_fill(~mask, float("-inf"))
    lse = scores.logsumexp(-1, keepdim=True)
    weights = (scores - lse.masked_fill(lse == float("-inf"), 0.0)).exp()  # -inf less -inf is NaN
    lse_BHT = lse.squeeze(-1).to(torch.promote_types(wide, torch.float32))
    return (weights @ v_BHSD).to(q_BHTD.dtype), lse_BHT


def why_not_flash(head_dim: int, dtype: torch.dtype, device: torch.device) -> str | None:
    """Why the kernels cannot take such tensors, or None if they can."""
    if head_dim > MAX_HEAD_DIM:
        return f"heads are {head_dim} wide, the kernels take {MAX_HEAD_DIM} at most"
    if dtype not in (torch.bfloat16, torch.float16, torch.float32):
        return f"the kernels compute in bf16, fp16 and fp32, not {dtype}"
    return why_not_triton(torch.empty(0, dtype=dtype)) if INTERPRETED else why_not_triton_on(device)


def check_shapes(op: str, q: Tensor, k: Tensor, v: Tensor) -> None:
    """ValueError where these are no queries, keys and values."""
    if (q.dim() != 4 or k.dim() != 4 or k.shape != v.shape or k.shape[0] != q.shape[0] or k.shape[3] != q.shape[3]
            or not k.shape[1] or q.shape[1] % k.shape[1] or not q.shape[3]):
        raise ValueError(f"{op}: q {tuple(q.shape)}, k {tuple(k.shape)}, v {tuple(v.shape)} do not fit; need q (B, H, T, D) "
                         "and k, v (B, G, S, D) with H a multiple of G and D at least 1")


def check_switches(op: str, causal: bool, window: int, softcap: float) -> None:
    """ValueError for a window or softcap that no implementation takes."""
    if window < 0 or (window and not causal):
        raise ValueError(f"{op}: window={window} needs causal=True and at least one key; 0 = no window")
    if not 0 <= softcap < math.inf:
        raise ValueError(f"{op}: softcap={softcap} must not be negative, and finite; 0 = none")


def _check(q: Tensor, k: Tensor, v: Tensor, spans: Tensor | None) -> None:
    check_shapes("flash_attention", q, k, v)
    if not q.dtype == k.dtype == v.dtype or not q.device == k.device == v.device:
        raise ValueError(f"flash_attention: q, k, v are {q.dtype}, {k.dtype}, {v.dtype} on {q.device}, {k.device}, {v.device}; "
                         "they must have one dtype and one device")
    if spans is None:
        return
    B, T, S = q.shape[0], q.shape[2], k.shape[2]
    if spans.shape != (B, 2, S) or spans.dtype != torch.int32 or spans.device != q.device or T > S:
        raise ValueError(f"flash_attention: spans {tuple(spans.shape)} {spans.dtype} on {spans.device} do not fit {T} queries "
                         f"and {S} keys in {B} rows; need ({B}, 2, {S}) int32 on {q.device} and no more queries than keys: "
                         "masks.document_spans makes them")


def _forward(q, k, v, spans, causal, scale, window, softcap, deterministic):
    from officina.kernels import flash_attention_launch as launch  # the kernels' files: a rank on a CPU needs none of them

    out, lse = _forward_fake(q, k, v, spans, causal, scale, window, softcap, deterministic)
    launch.forward(q, k, v, out, lse, spans, causal, scale, window, softcap)
    return out, lse


def _forward_fake(q, k, v, spans, causal, scale, window, softcap, deterministic):
    B, H, T, D = q.shape
    # Heads last but one in memory: joining them for the output projection then copies nothing.
    return q.new_empty(B, T, H, D).transpose(1, 2), q.new_empty(B, H, T, dtype=torch.float32)


def _backward(dout, dlse, out, lse, q, k, v, spans, causal, scale, window, softcap, deterministic):
    from officina.kernels import flash_attention_launch as launch

    dout = torch.zeros_like(out) if dout is None else dout
    dq, dk, dv = _backward_fake(dout, dlse, out, lse, q, k, v, spans, causal, scale, window, softcap, deterministic)
    launch.backward(dout, dlse, out, lse, q, k, v, dq, dk, dv, spans, causal, scale, window, softcap, deterministic)
    return dq, dk, dv


def _backward_fake(dout, dlse, out, lse, q, k, v, spans, causal, scale, window, softcap, deterministic):
    return tuple(map(_like, (q, k, v)))


def _like(x: Tensor) -> Tensor:
    """Uninitialised, laid out as x, if the kernels can write it so."""
    made = torch.empty_like(x)
    return made if made.stride(-1) == 1 else made.contiguous()


def _save(ctx, inputs, output):
    ctx.set_materialize_grads(False)
    q, k, v, spans, *ctx.switches = inputs
    ctx.save_for_backward(*output, q, k, v, spans)


def _differentiate(ctx, dout, dlse):
    gradients = torch.ops.officina.flash_attention_backward(dout, dlse, *ctx.saved_tensors, *ctx.switches)
    return *gradients, None, None, None, None, None, None


_ARGUMENTS = ("Tensor q, Tensor k, Tensor v, Tensor? spans, bool causal, float scale, int window, float softcap, "
              "bool deterministic")
define_op(f"flash_attention({_ARGUMENTS}) -> (Tensor, Tensor)", _forward, _forward_fake, _differentiate, _save)
define_op(f"flash_attention_backward(Tensor? dout, Tensor? dlse, Tensor out, Tensor lse, {_ARGUMENTS}) "
          "-> (Tensor, Tensor, Tensor)", _backward, _backward_fake)
OPERATOR = torch.ops.officina.flash_attention.default
"""What stands in graphs and is seen by torch's dispatch modes."""
