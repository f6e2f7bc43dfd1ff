"""Random queries, keys, values and documents, and the two-times rule on flash attention: for the interpreter and for GPUs."""

import torch

from officina.kernels.flash_attention import flash_attention, flash_attention_reference
from officina.kernels.masks import dense_mask
from tests.kernels.rules import assert_twice_as_good

INF = float("inf")
FEW_KEYS_ULP = 24.0
"""Allowance for dq and dk where a query may see one key only: plain torch's weight is then exactly 1 and the gradient of its
score exactly 0, where the kernels take exp(s - lse) and the difference of two sums of D products."""


def qkv(B=1, H=2, G=1, T=50, S=None, D=16, dtype=torch.float32, device="cpu"):
    generator = torch.Generator().manual_seed(B + 10 * T + D)
    shapes = ((B, H, T, D), (B, G, T if S is None else S, D), (B, G, T if S is None else S, D))
    return [torch.randn(shape, generator=generator).to(device, dtype) for shape in shapes]


def documents(B, S, mean, device="cpu"):
    """Numbers of documents of `mean` tokens or so, other ones in each row."""
    return (torch.rand(B, S, generator=torch.Generator().manual_seed(S)) < 1 / mean).int().cumsum(1).to(device)


def compare(inputs, *, causal=True, window=0, softcap=0.0, scale=None, spans=None, deterministic=False, score_ulp=4.0):
    """Two-times rule for out, lse and all gradients; rows that see nothing are 0 and -inf to the letter. score_ulp: allowance
    for dq and dk."""
    q, k = inputs[:2]
    mask = dense_mask(q.shape[2], k.shape[2], causal, window, spans, q.device)
    switches = dict(causal=causal, window=window, softcap=softcap, scale=scale, spans_B2S=spans, deterministic=deterministic)

    def kernel(q, k, v):
        out, lse = flash_attention(q, k, v, impl="triton", **switches)
        blind = ~mask.any(-1).expand(lse.shape)
        assert torch.equal(lse == -INF, blind) and not out[blind].any()
        return out, lse.masked_fill(blind, 0)

    def plain(q, k, v):
        out, lse = flash_attention_reference(q, k, v, mask=mask, scale=q.shape[-1] ** -0.5 if scale is None else scale,
                                             softcap=softcap, compute_dtype=q.dtype)
        return out, lse.masked_fill(lse == -INF, 0)

    assert_twice_as_good(kernel, plain, inputs, loose={2: score_ulp, 3: score_ulp})
