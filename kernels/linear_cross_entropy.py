"""Output projection and cross-entropy in one, without ever holding all logits.

    loss = sum over tokens with a label of the cross-entropy of softcap(W x); its terms stand in cross_entropy.py

The forward pass goes over chunks of tokens and makes the gradient of each chunk's logits at once, while they
exist: three matrix products in all (6 N V D floating-point operations), where recomputing the logits in the
backward pass needs four.
Source of the chunked form: Liger, arXiv:2410.10989.
Shapes: N tokens, V rows of the vocabulary (of this rank), D model width.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor

from officina.kernels.cross_entropy import (
    Terms,
    VocabShard,
    choose,
    cross_entropy_reference,
    loss_and_gradient,
    losses_of,
    row_sums,
)
from officina.kernels.dispatch import Impl, why_no_tangents
from officina.kernels.ops import define_op, differentiable_once, wide_dtype

CHUNK_LOGITS_GPU, CHUNK_LOGITS_CPU = 2**28, 2**20
"""Logits held at a time by default: 0.5 GiB in bf16 on a GPU (large products), 4 MiB in fp32 on a CPU (its cache; of 16 MiB,
malloc gives so much back to the system between chunks that new pages took a quarter of the loss's time)."""

NARROW_CHUNKS = 2
"""Chunks at most whose bf16 products are added up in bf16: one rounding more of W's gradient, half of fp32's memory.
On a GPU 2^30 logits, 1 GiB at a time, are cut into no more. Further chunks would each round the sum: fp32."""

CHUNK_TOKENS_CPU = 256
"""Tokens at least, however large the vocabulary: each chunk reads all weights and adds to all their gradients."""

_ALIGN = 64
"""Rows of the chunk's logits begin at multiples of this many numbers: any vocabulary is read 16 bytes at a time."""


def linear_cross_entropy(x_ND: Tensor, weight_VD: Tensor, labels_N: Tensor, *, z_loss: float = 0.0,
                         label_smoothing: float = 0.0, softcap: float = 0.0, shard: VocabShard | None = None,
                         chunk_tokens: int = 0, split: bool = False, impl: Impl = "auto") -> Tensor:
    """Sum of the token losses, 0-dim fp32 (fp64 for fp64 inputs); differentiable once in x and weight. Under torch.autocast
    both are taken in its dtype.

    Args:
        labels_N: int64, IGNORE where a token has no loss. Without any label sum and gradients are zeros. Any other that is no
            row makes the sum NaN; its part of the gradients is finite, that of the loss without its z[label].
        z_loss, label_smoothing, softcap: as in `cross_entropy`; 0 = none.
        shard: where weight is a part of the vocabulary's rows. The loss is then that of the whole; the gradient in x is this
            rank's part, which the caller sums over the ranks. Not inside torch.compile(fullgraph=True).
        chunk_tokens: tokens whose logits exist at a time; 0 = a good value for the device.
        split: the result is (2,): the sum, and the z-loss in it, which has no gradient.
        impl: of the cross-entropy; the matrix products are torch's in either case.
    Raises ValueError where shapes, dtypes, terms or a named impl do not fit, and for tensors with tangents of forward-mode
    differentiation.
    """
    x_ND, weight_VD = _checked("linear_cross_entropy", x_ND, weight_VD, labels_N)
    if why := why_no_tangents(x_ND, weight_VD):
        raise ValueError(f"linear_cross_entropy: {why}. Use linear_cross_entropy_reference")
    V = weight_VD.shape[0]
    if shard and not 0 <= shard.first <= shard.size - V:
        raise ValueError(f"linear_cross_entropy: the shard's rows {shard.first} to {shard.first + V} are not among the "
                         f"vocabulary's {shard.size}")
    Terms(z_loss, label_smoothing, softcap)  # raises; numbers are handed on, since torch 2.9 would compile its checks
    chunk_tokens = chunk_tokens or _chunk_tokens(x_ND, V)
    sums_2 = _LinearCrossEntropy.apply(x_ND, weight_VD, labels_N, z_loss, label_smoothing, softcap, shard, chunk_tokens,
                                       choose(x_ND, labels_N, impl), torch.is_grad_enabled())[0]
    return sums_2 if split else sums_2[0]


@torch.no_grad()
def linear_token_scores(x_ND: Tensor, weight_VD: Tensor, labels_N: Tensor, *, softcap: float = 0.0, chunk_tokens: int = 0,
                        impl: Impl = "auto") -> Tensor:
    """Of each label its loss, and 1 where it has the largest logit, else 0: (2, N) at least fp32, for evaluation.

    Arguments as in `linear_cross_entropy`; both are 0 where the label is IGNORE.
    """
    x_ND, weight_VD = _checked("linear_token_scores", x_ND, weight_VD, labels_N)
    N, V = x_ND.shape[0], weight_VD.shape[0]
    chunk_tokens = chunk_tokens or _chunk_tokens(x_ND, V)
    impl, terms = choose(x_ND, labels_N, impl), Terms(0.0, 0.0, softcap)
    scores = x_ND.new_empty((2, N), dtype=wide_dtype(x_ND.dtype))
    for start in range(0, N, chunk_tokens):
        rows = slice(start, start + chunk_tokens)
        logits = x_ND[rows] @ weight_VD.T
        scores[0, rows] = _losses(logits, labels_N[rows], terms, None, impl)[0]
        scores[1, rows] = logits.argmax(-1) == labels_N[rows]
    return scores


def linear_cross_entropy_reference(x_ND: Tensor, weight_VD: Tensor, labels_N: Tensor, *, z_loss: float = 0.0,
                                   label_smoothing: float = 0.0, softcap: float = 0.0) -> Tensor:
    """Same contract in plain torch on a whole vocabulary, all logits at once; the oracle for tests and benchmarks."""
    return cross_entropy_reference(x_ND @ weight_VD.T, labels_N, z_loss=z_loss, label_smoothing=label_smoothing,
                                   softcap=softcap).sum()


def _checked(op: str, x_ND: Tensor, weight_VD: Tensor, labels_N: Tensor) -> tuple[Tensor, Tensor]:
    """x and weight in the dtype of the products, which is autocast's where that is on; ValueError where they do not fit."""
    if (x_ND.dim() != 2 or weight_VD.dim() != 2 or weight_VD.shape[1] != x_ND.shape[1] or not weight_VD.shape[0]
            or labels_N.shape != x_ND.shape[:1]):
        raise ValueError(f"{op}: x {tuple(x_ND.shape)}, weight {tuple(weight_VD.shape)}, labels {tuple(labels_N.shape)} do not "
                         "fit; need (N, D), (V, D) with V at least 1, (N,)")
    kind = x_ND.device.type
    # Products that write to given memory know nothing of autocast.
    if kind in ("cpu", "cuda") and torch.is_autocast_enabled(kind):
        narrow = torch.get_autocast_dtype(kind)
        x_ND, weight_VD = (t if t.dtype == torch.float64 else t.to(narrow) for t in (x_ND, weight_VD))
    if x_ND.dtype != weight_VD.dtype:
        raise ValueError(f"{op}: x is {x_ND.dtype} and weight {weight_VD.dtype}; they must have one dtype, such as "
                         "weight.to(x.dtype)")
    return x_ND, weight_VD


def _chunk_tokens(x_ND: Tensor, V: int) -> int:
    if not x_ND.is_cuda:
        return max(CHUNK_TOKENS_CPU, CHUNK_LOGITS_CPU // V)
    N = x_ND.shape[0]
    few = CHUNK_LOGITS_GPU < N * V <= 2 * NARROW_CHUNKS * CHUNK_LOGITS_GPU and x_ND.dtype == torch.bfloat16
    return -(-N // NARROW_CHUNKS) if few else max(1, CHUNK_LOGITS_GPU // V)


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, labels: Tensor, z_loss: float, label_smoothing: float, softcap: float,
                shard: VocabShard | None, chunk_tokens: int, impl: str, grad_enabled: bool) -> tuple[Tensor, Tensor]:
        want_dx, want_dweight = (need and grad_enabled for need in ctx.needs_input_grad[:2])
        if torch.compiler.is_compiling() and shard is None:  # one node of the graph, however many chunks
            sums, dx, dweight = torch.ops.officina.linear_cross_entropy(
                x, weight, labels, z_loss, label_smoothing, softcap, chunk_tokens, impl, want_dx, want_dweight)
        else:  # plain, so that counters of operations and memory see what there is
            terms = Terms(z_loss, label_smoothing, softcap)
            sums, dx, dweight = _forward(x, weight, labels, terms, shard, chunk_tokens, impl, want_dx, want_dweight)
        place = sums.new_empty(0)  # an output for `differentiable_once`: the sums may be changed in place
        ctx.save_for_backward(place, dx, dweight)
        ctx.wanted, ctx.dtypes = (want_dx, want_dweight), (x.dtype, weight.dtype)
        return sums, place

    @staticmethod
    def backward(ctx: Any, dsums: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        place, *gradients = ctx.saved_tensors
        # The z-loss is in the loss. A GPU rounds a factor without an axis to the other's dtype; a CPU is slow with an axis.
        dloss = dsums.detach()[:1] if dsums.is_cuda else dsums.detach()[0]
        # Scaled in dloss' fp32: rounded to bf16, 1 / step_tokens would put every gradient off by up to 0.4 %. Written in one
        # pass: a product in fp32 first would be as large as the sum of the chunks once more.
        dx, dweight = (torch.mul(d, dloss, out=torch.empty_like(d, dtype=dtype)) if wanted else None
                       for d, dtype, wanted in zip(gradients, ctx.dtypes, ctx.wanted, strict=True))
        return *differentiable_once("the gradient of linear_cross_entropy", "linear_cross_entropy_reference", (place, dsums),
                                    dx, dweight), *[None] * 8


def _implementation(x: Tensor, weight: Tensor, labels: Tensor, z_loss: float, label_smoothing: float, softcap: float,
                    chunk_tokens: int, impl: str, want_dx: bool, want_dweight: bool) -> tuple[Tensor, Tensor, Tensor]:
    return _forward(x, weight, labels, Terms(z_loss, label_smoothing, softcap), None, chunk_tokens, impl, want_dx, want_dweight)


def _results(x: Tensor, weight: Tensor, chunk_tokens: int, want_dx: bool, want_dweight: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Loss with the z-loss in it (2,), its gradient in x (x's dtype) and in weight (bf16, or at least fp32); empty where it is
    not wanted."""
    wide = wide_dtype(x.dtype)
    narrow = x.dtype == weight.dtype == torch.bfloat16 and x.shape[0] <= NARROW_CHUNKS * chunk_tokens
    return (x.new_zeros(2, dtype=wide), x.new_empty(x.shape if want_dx else 0),
            weight.new_zeros(weight.shape if want_dweight else 0, dtype=x.dtype if narrow else wide))


def _forward(x: Tensor, weight: Tensor, labels: Tensor, terms: Terms, shard: VocabShard | None, chunk_tokens: int, impl: str,
             want_dx: bool, want_dweight: bool) -> tuple[Tensor, Tensor, Tensor]:
    sums, dx, dweight = _results(x, weight, chunk_tokens, want_dx, want_dweight)
    V, N = weight.shape[0], x.shape[0]
    width = -(-V // _ALIGN) * _ALIGN if impl == "triton" else V
    held = x.new_empty(min(chunk_tokens, N), width)
    for start in range(0, N, chunk_tokens):
        rows = slice(start, start + chunk_tokens)
        x_c, labels_c = x[rows], labels[rows]
        logits = torch.mm(x_c, weight.T, out=held[:x_c.shape[0], :V])
        if not (want_dx or want_dweight):
            sums += _losses(logits, labels_c, terms, shard, impl).sum(1)
            continue
        losses, dlogits = loss_and_gradient(logits, labels_c, terms, shard, impl)
        sums += losses.sum(1)
        dlogits = dlogits.to(x.dtype)
        if want_dx:
            torch.mm(dlogits, weight, out=dx[rows])
        if want_dweight:
            _add_product(dweight, dlogits.T, x_c)
    return sums, dx, dweight


def _losses(logits: Tensor, labels: Tensor, terms: Terms, shard: VocabShard | None, impl: str) -> Tensor:
    sums = row_sums(logits, labels, first=shard.first if shard else 0, softcap=terms.softcap, impl=impl)
    sums = shard.combine(sums) if shard else sums
    return losses_of(sums, labels, shard.size if shard else logits.shape[1], terms)


def _add_product(total: Tensor, a: Tensor, b: Tensor) -> None:
    """total += a b, where total may be wider than a and b."""
    if total.dtype == a.dtype:
        torch.addmm(total, a, b, out=total)  # addmm_, in a form that flop counters know
    elif _adds_wide(total.device, total.dtype, a.dtype):
        torch.addmm(total, a, b, out_dtype=total.dtype, out=total)
    else:
        total += a @ b


@functools.cache
def _adds_wide(device: torch.device, wide: torch.dtype, narrow: torch.dtype) -> bool:
    """Whether torch can add a product of narrow matrices to a wide one as it is made: saves writing it, rounded, and reading
    it. cuBLAS does; torch has it on CUDA, in versions that differ, so it is tried on the smallest matrices."""
    if device.type != "cuda":
        return False
    a, total = torch.ones(16, 16, device=device, dtype=narrow), torch.ones(16, 16, device=device, dtype=wide)
    try:
        torch.addmm(total, a, a, out_dtype=wide, out=total)
    except (RuntimeError, NotImplementedError, TypeError):
        return False
    return True


define_op("linear_cross_entropy(Tensor x, Tensor weight, Tensor labels, float z_loss, float label_smoothing, float softcap, "
          "SymInt chunk_tokens, str impl, bool want_dx, bool want_dweight) -> (Tensor, Tensor, Tensor)", _implementation,
          lambda x, weight, *rest: _results(x, weight, rest[-4], *rest[-2:]))
