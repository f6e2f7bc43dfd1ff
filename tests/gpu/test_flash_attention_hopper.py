"""The Hopper kernel of flash attention on a GPU, beside plain torch and the portable kernel, whichever of the two ships."""

from unittest import mock

import pytest
import torch

from officina.kernels import flash_attention_launch as launch
from officina.kernels.flash_attention import flash_attention
from officina.kernels.flash_attention_hopper import why_not_hopper
from officina.kernels.flash_attention_tables import FORWARD_PATH
from officina.kernels.masks import document_spans, length_spans
from officina.kernels.tables import arch_of
from tests.kernels.attention_cases import FEW_KEYS_ULP, compare, documents, qkv

pytestmark = pytest.mark.gpu

BF16 = torch.bfloat16
FP16 = torch.float16
SWITCHES = {"causal": {}, "full": dict(causal=False), "window": dict(window=300), "softcap": dict(softcap=20.0)}
EACH = [("window", 128, BF16), ("softcap", 64, BF16), ("softcap", 128, BF16), ("causal", 128, FP16),
        *((mask, head_dim, BF16) for mask in ("causal", "full") for head_dim in (64, 80, 96, 128, 192, 256))]
"""Each kernel of its own takes seconds to compile, and all of this has to fit into a minute."""


def path(name):
    """All forward passes by `hopper` or `portable`."""
    return mock.patch.dict(FORWARD_PATH, dict.fromkeys(FORWARD_PATH, name))


@pytest.fixture
def hopper(cuda):
    """Every forward pass by the Hopper kernel, none by another in silence."""
    if why := why_not_hopper(arch_of(cuda), 64, 1, BF16):
        pytest.skip(why)
    choose = launch.forward_path

    def chosen(*args):
        assert choose(*args) == "hopper" or "hopper" not in FORWARD_PATH.values()
        return choose(*args)

    with path("hopper"), mock.patch.object(launch, "forward_path", chosen):
        yield cuda


@pytest.mark.parametrize("switches,head_dim,dtype", EACH, ids=str)
def test_it_is_as_exact_as_plain_torch(hopper, switches, head_dim, dtype):
    """Gradients too, which the portable kernels make from its log-sum-exp."""
    compare(qkv(B=2, H=4, G=2, T=1111, D=head_dim, dtype=dtype, device=hopper), **SWITCHES[switches])


@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize("T,S", [(1, 1), (1, 777), (17, 1025), (1025, 17), (128, 128), (129, 127), (512, 512)], ids=str)
@pytest.mark.parametrize("causal", [False, True])
def test_queries_and_keys_of_different_number(hopper, causal, T, S, head_dim):
    compare(qkv(H=8, G=1, T=T, S=S, D=head_dim, dtype=BF16, device=hopper), causal=causal, score_ulp=FEW_KEYS_ULP)


@pytest.mark.parametrize("switches", ["causal", "full", "window"])
@pytest.mark.parametrize("mean", [1, 30, 500, 10**6])
def test_packed_documents(hopper, mean, switches):
    spans = document_spans(documents(2, 2000, mean, hopper))
    compare(qkv(B=2, H=4, G=2, T=2000, D=128, dtype=BF16, device=hopper), spans=spans, score_ulp=FEW_KEYS_ULP,
            **SWITCHES[switches])


def test_documents_by_cumulative_lengths_with_empty_ones(hopper):
    cumulative = torch.tensor([0, 0, 400, 400, 401, 1000], device=hopper, dtype=torch.int32)
    compare(qkv(T=1000, D=64, dtype=BF16, device=hopper), spans=length_spans(cumulative, 1000), score_ulp=FEW_KEYS_ULP)


@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize("B,H,G,T", [(4, 16, 4, 4096), (1, 16, 16, 16_384), (64, 8, 8, 130)], ids=str)
@pytest.mark.parametrize("causal", [False, True])
def test_many_programs_and_blocks_are_as_exact_as_the_portable_kernel(hopper, causal, B, H, G, T, head_dim):
    """Both against the portable kernel in fp32, where plain torch could not hold the scores."""
    inputs = [torch.randn(B, heads, T, head_dim, device=hopper).to(BF16) for heads in (H, G, G)]
    ours = flash_attention(*inputs, causal=causal)
    with path("portable"):
        near = flash_attention(*inputs, causal=causal)
        exact = flash_attention(*(x.float() for x in inputs), causal=causal)
    for got, other, want in zip(ours, near, exact, strict=True):
        bound = 2 * (other - want).abs().max() + 4 * torch.finfo(got.dtype).eps * want.abs().max()
        assert got.isfinite().all() and (got - want).abs().max() <= bound


@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize("causal", [False, True])
def test_the_same_bits_every_time(hopper, causal, head_dim):
    """A race between its warps would show here."""
    inputs = qkv(B=4, H=16, G=4, T=3000, D=head_dim, dtype=BF16, device=hopper)
    first = flash_attention(*inputs, causal=causal)
    for _ in range(20):
        assert all(torch.equal(a, b) for a, b in zip(first, flash_attention(*inputs, causal=causal), strict=True))


def test_any_layout_of_the_inputs(hopper):
    q, k, v = qkv(B=2, H=4, G=4, T=300, D=64, dtype=BF16, device=hopper)
    want = flash_attention(q, k, v)
    shifted = torch.zeros(1 + q.numel(), dtype=BF16, device=hopper)[1:].view(q.shape).copy_(q)
    views = [[x.transpose(a, b).contiguous().transpose(a, b) for x in (q, k, v)] for a, b in ((1, 2), (2, 3), (0, 2))]
    for inputs in (*views, (shifted, k, v), [torch.cat((x, x), -1)[..., :64] for x in (q, k, v)]):
        assert all(torch.equal(a, b) for a, b in zip(want, flash_attention(*inputs), strict=True))


def test_rows_further_apart_than_2_to_the_31(hopper):
    """Heads 2**31 elements apart: 8 GB of bf16, of which little is touched."""
    far = torch.zeros(2**32 + 200 * 64, dtype=BF16, device=hopper).as_strided((1, 3, 200, 64), (0, 2**31, 64, 1))
    near = qkv(H=3, G=3, T=200, D=64, dtype=BF16, device=hopper)[0]
    far.copy_(near)
    for got, want in zip(flash_attention(far, far, far), flash_attention(near, near, near), strict=True):
        assert torch.equal(got, want)


def test_compiled_by_inductor_it_is_the_same(hopper):
    inputs = qkv(T=700, D=128, dtype=BF16, device=hopper)
    got = torch.compile(lambda *x: flash_attention(*x), fullgraph=True)(*inputs)
    assert all(torch.equal(a, b) for a, b in zip(got, flash_attention(*inputs), strict=True))


def test_no_wait_for_the_device(hopper):
    inputs = qkv(T=256, D=64, dtype=BF16, device=hopper)
    for mode in ("default", "error"):  # the first time, compiling
        torch.cuda.set_sync_debug_mode(mode)
        try:
            flash_attention(*inputs)
        finally:
            torch.cuda.set_sync_debug_mode("default")
