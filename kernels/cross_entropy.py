"""Output projection and cross-entropy in one, without ever holding all logits.

    loss = sum over tokens with a label of  lse(z) - z[label] + z_loss lse(z)^2,   z = softcap(W x)

The forward pass goes over chunks of tokens and makes the gradient of each chunk's logits at once, while they
exist: three matrix products in all (6 N V D floating-point operations), where recomputing the logits in the
backward pass needs four.
Source of the chunked form: Liger, arXiv:2410.10989; z-loss: PaLM, arXiv:2204.02311.
Shapes: N tokens, V rows of the vocabulary, D model width.
"""

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

IGNORE = -100
"""Label of a token without loss."""

CHUNK_LOGITS_GPU, CHUNK_LOGITS_CPU = 2**28, 2**23
"""Logits held at a time by default: 1 GiB in fp32 on a GPU (large products), 32 MiB on a CPU (its cache)."""


def linear_cross_entropy(x_ND: Tensor, weight_VD: Tensor, labels_N: Tensor, *, z_loss: float = 0.0,
                         softcap: float = 0.0, chunk_tokens: int = 0) -> Tensor:
    """Sum of the token losses, 0-dim fp32 (fp64 for fp64 inputs); differentiable once in x and weight.

    Args:
        labels_N: int64, IGNORE where a token has no loss. Without any label sum and gradients are zeros.
        z_loss: weight of the squared log-partition function.
        softcap: tanh cap on the logits; 0 = none.
        chunk_tokens: tokens whose logits exist at a time; 0 = a good value for the device.
    Raises ValueError where the shapes do not fit.
    """
    N, D = x_ND.shape
    if weight_VD.dim() != 2 or weight_VD.shape[1] != D or labels_N.shape != (N,):
        raise ValueError(f"linear_cross_entropy: x {tuple(x_ND.shape)}, weight {tuple(weight_VD.shape)}, "
                         f"labels {tuple(labels_N.shape)} do not fit; need (N, D), (V, D), (N,)")
    if not chunk_tokens:
        chunk_tokens = max(1, (CHUNK_LOGITS_GPU if x_ND.is_cuda else CHUNK_LOGITS_CPU) // weight_VD.shape[0])
    if torch.is_grad_enabled() and (x_ND.requires_grad or weight_VD.requires_grad):
        return _LinearCrossEntropy.apply(x_ND, weight_VD, labels_N, z_loss, softcap, chunk_tokens)
    return _forward(x_ND, weight_VD, labels_N, z_loss, softcap, chunk_tokens, False, False)[0]


def linear_cross_entropy_reference(x_ND: Tensor, weight_VD: Tensor, labels_N: Tensor, *, z_loss: float = 0.0,
                                   softcap: float = 0.0) -> Tensor:
    """Same contract in plain torch, all logits at once; the oracle for tests and benchmarks."""
    logits_NV = x_ND @ weight_VD.T
    logits_NV = logits_NV.to(torch.promote_types(logits_NV.dtype, torch.float32))
    if softcap:
        logits_NV = softcap * torch.tanh(logits_NV / softcap)
    lse_N = logits_NV.logsumexp(-1)
    has_label_N = labels_N != IGNORE
    target_N = logits_NV.gather(1, labels_N.clamp(min=0)[:, None]).squeeze(1)
    return torch.where(has_label_N, lse_N - target_N + z_loss * lse_N.square(), 0.0).sum()


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, labels, z_loss, softcap, chunk_tokens):
        want = ctx.needs_input_grad[:2]
        loss, dx, dweight = _forward(x, weight, labels, z_loss, softcap, chunk_tokens, *want)
        ctx.save_for_backward(dx, dweight)
        ctx.dtypes = x.dtype, weight.dtype
        return loss

    @staticmethod
    @once_differentiable
    def backward(ctx, dloss):
        # Scaled in dloss' fp32: rounded to bf16, 1 / step_tokens would put every gradient off by up to 0.4 %.
        dx, dweight = (None if d is None else (d.to(dloss.dtype) * dloss).to(dtype)
                       for d, dtype in zip(ctx.saved_tensors, ctx.dtypes, strict=True))
        return dx, dweight, None, None, None, None


def _forward(x: Tensor, weight: Tensor, labels: Tensor, z_loss: float, softcap: float, chunk_tokens: int,
             want_dx: bool, want_dweight: bool) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Loss, its gradient in x (x's dtype) and in weight (at least fp32)."""
    wide = torch.promote_types(x.dtype, torch.float32)
    loss = torch.zeros((), dtype=wide, device=x.device)
    dx = torch.empty_like(x) if want_dx else None
    # Chunks are added up in fp32: in bf16 each addition would round the sum once more.
    dweight = torch.zeros(weight.shape, dtype=wide, device=weight.device) if want_dweight else None
    for start in range(0, x.shape[0], chunk_tokens):
        rows = slice(start, start + chunk_tokens)
        x_c, labels_c = x[rows], labels[rows]
        logits = (x_c @ weight.T).to(wide)
        if softcap:
            logits = logits.div_(softcap).tanh_().mul_(softcap)
        # One exponential serves loss and gradient: the largest probability is 1 / sum(exp(z - max z)), never below 1 / V.
        p = logits.softmax(-1)
        lse = logits.amax(-1) - p.amax(-1).log()
        has_label, index = labels_c != IGNORE, labels_c.clamp(min=0)[:, None]
        target = logits.gather(1, index).squeeze(1)
        loss += torch.where(has_label, lse - target + z_loss * lse.square(), 0.0).sum()
        if not (want_dx or want_dweight):
            continue
        slope = 1 - (logits / softcap).square() if softcap else None
        dlogits = p
        if z_loss:
            dlogits *= (1 + 2 * z_loss * lse)[:, None]
        dlogits.scatter_add_(1, index, dlogits.new_full((1, 1), -1.0).expand_as(index))
        dlogits *= has_label[:, None]
        if slope is not None:
            dlogits *= slope
        dlogits = dlogits.to(x.dtype)
        if dx is not None:
            torch.mm(dlogits, weight, out=dx[rows])
        if dweight is not None:
            if dweight.dtype == x.dtype:
                torch.addmm(dweight, dlogits.T, x_c, out=dweight)  # addmm_, in a form that flop counters know
            else:
                dweight += dlogits.T @ x_c
    return loss, dx, dweight
