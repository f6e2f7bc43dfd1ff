"""Flash attention on a GPU, compiled, in bf16 and fp16: the two-times rule on long rows, the order of sums, compiled models."""

import pytest
import torch

from officina.kernels.flash_attention import flash_attention
from officina.kernels.masks import document_spans, length_spans
from tests.kernels.attention_cases import FEW_KEYS_ULP, compare, documents, qkv

pytestmark = pytest.mark.gpu

SWITCHES = {"causal": {}, "full": dict(causal=False), "window": dict(window=300), "softcap": dict(softcap=20.0)}


@pytest.mark.parametrize("deterministic", [False, True], ids=["fused", "split"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
@pytest.mark.parametrize("head_dim", [64, 80, 96, 128, 192, 256])
@pytest.mark.parametrize("switches", SWITCHES)
def test_kernels_are_as_exact_as_plain_torch(cuda, switches, head_dim, dtype, deterministic):
    compare(qkv(B=2, H=4, G=2, T=1111, D=head_dim, dtype=dtype, device=cuda), deterministic=deterministic, **SWITCHES[switches])


@pytest.mark.parametrize("deterministic", [False, True], ids=["fused", "split"])
@pytest.mark.parametrize("T,S", [(1, 1), (1, 777), (17, 1025), (1025, 17), (512, 512)], ids=str)
@pytest.mark.parametrize("causal", [False, True])
def test_queries_and_keys_of_different_number(cuda, causal, T, S, deterministic):
    compare(qkv(H=8, G=1, T=T, S=S, D=128, dtype=torch.bfloat16, device=cuda), causal=causal, deterministic=deterministic,
            score_ulp=FEW_KEYS_ULP)


@pytest.mark.parametrize("deterministic", [False, True], ids=["fused", "split"])
@pytest.mark.parametrize("switches", SWITCHES)
@pytest.mark.parametrize("mean", [1, 30, 500, 10**6])
def test_packed_documents(cuda, mean, switches, deterministic):
    spans = document_spans(documents(2, 2000, mean, cuda))
    compare(qkv(B=2, H=4, G=2, T=2000, D=128, dtype=torch.bfloat16, device=cuda), spans=spans, deterministic=deterministic,
            score_ulp=FEW_KEYS_ULP, **SWITCHES[switches])


def test_documents_by_cumulative_lengths_with_empty_ones(cuda):
    cumulative = torch.tensor([0, 0, 400, 400, 401, 1000], device=cuda, dtype=torch.int32)
    compare(qkv(T=1000, D=64, dtype=torch.bfloat16, device=cuda), spans=length_spans(cumulative, 1000), score_ulp=FEW_KEYS_ULP)


@pytest.mark.parametrize("deterministic", [False, True], ids=["fused", "split"])
def test_fp32(cuda, deterministic):
    compare(qkv(T=300, D=64, device=cuda), deterministic=deterministic)


def test_deterministic_gradients_have_the_same_bits(cuda):
    leaves = [x.requires_grad_() for x in qkv(B=2, H=8, G=2, T=2048, D=128, dtype=torch.bfloat16, device=cuda)]
    spans = document_spans(documents(2, 2048, 300, cuda))
    out, _ = flash_attention(*leaves, spans_B2S=spans, deterministic=True)
    dout = torch.randn_like(out)
    first = torch.autograd.grad(out, leaves, dout, retain_graph=True)
    for _ in range(10):
        again = torch.autograd.grad(out, leaves, dout, retain_graph=True)
        assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))


def test_compiled_by_inductor_it_is_the_same(cuda):
    spans = document_spans(documents(1, 700, 100, cuda))

    def layer(q, k, v):
        return flash_attention(q * 2, k, v, spans_B2S=spans, deterministic=True)[0].float().sin()

    results = []
    for run in (layer, torch.compile(layer, fullgraph=True)):
        leaves = [x.requires_grad_() for x in qkv(T=700, D=64, dtype=torch.bfloat16, device=cuda)]
        out = run(*leaves)
        results.append([out, *torch.autograd.grad(out.sum(), leaves)])
    for got, want in zip(*results, strict=True):
        torch.testing.assert_close(got, want, atol=2e-2, rtol=2e-2)  # sin and cos are other functions there


def test_no_wait_for_the_device(cuda):
    """Making spans, forward and backward pass ask the device for nothing."""
    inputs = [x.requires_grad_() for x in qkv(T=256, D=64, dtype=torch.bfloat16, device=cuda)]
    numbers = documents(1, 256, 50, cuda)
    for mode in ("default", "error"):  # the first time, compiling
        torch.cuda.set_sync_debug_mode(mode)
        try:
            flash_attention(*inputs, spans_B2S=document_spans(numbers))[0].float().sum().backward()
        finally:
            torch.cuda.set_sync_debug_mode("default")


def test_rows_further_apart_than_2_to_the_31(cuda):
    """Heads 2**31 elements apart: 8 GB of bf16, of which little is touched."""
    far = torch.zeros(2**32 + 200 * 64, dtype=torch.bfloat16, device=cuda).as_strided((1, 3, 200, 64), (0, 2**31, 64, 1))
    near = qkv(H=3, G=3, T=200, D=64, dtype=torch.bfloat16, device=cuda)[0]
    far.copy_(near)
    for got, want in zip(flash_attention(far, far, far), flash_attention(near, near, near), strict=True):
        assert torch.equal(got, want)
