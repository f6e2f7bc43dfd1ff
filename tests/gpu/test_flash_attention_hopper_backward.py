"""The backward pass of flash attention for Hopper on a GPU, beside plain torch and the portable kernels, whichever ship."""

from unittest import mock

import pytest
import torch

from officina.kernels import flash_attention_launch as launch
from officina.kernels.flash_attention import flash_attention
from officina.kernels.flash_attention_hopper_backward import why_not_hopper
from officina.kernels.flash_attention_tables import BACKWARD_PATH
from officina.kernels.masks import document_spans, length_spans
from officina.kernels.tables import arch_of
from tests.kernels.attention_cases import FEW_KEYS_ULP, compare, documents, qkv

pytestmark = pytest.mark.gpu

BF16 = torch.bfloat16
FP16 = torch.float16
SWITCHES = {"causal": {}, "full": dict(causal=False), "window": dict(window=300), "softcap": dict(softcap=20.0)}
EACH = [("window", 128, BF16), ("softcap", 128, BF16), ("softcap", 64, BF16), ("causal", 128, FP16),
        *((mask, head_dim, BF16) for mask in ("causal", "full") for head_dim in (64, 80, 96, 128))]
"""Each kernel of its own takes seconds to compile."""


def path(name):
    """All backward passes by `hopper` or `portable`."""
    return mock.patch.dict(BACKWARD_PATH, dict.fromkeys(BACKWARD_PATH, name))


@pytest.fixture
def hopper(cuda):
    """Every backward pass by the Hopper kernels, none by others in silence."""
    if why := why_not_hopper(arch_of(cuda), 64, 1, BF16):
        pytest.skip(why)
    choose = launch.backward_path

    def chosen(*args):
        assert choose(*args) == "hopper" or "hopper" not in BACKWARD_PATH.values()
        return choose(*args)

    with path("hopper"), mock.patch.object(launch, "backward_path", chosen):
        yield cuda


def gradients(inputs, **switches):
    """Of a fixed weighting of out and lse."""
    leaves = [x.detach().requires_grad_() for x in inputs]
    out, lse = flash_attention(*leaves, **switches)
    generator = torch.Generator(out.device).manual_seed(3)
    upper = [torch.randn(y.shape, generator=generator, device=y.device).to(inputs[0].dtype).to(y.dtype) for y in (out, lse)]
    return torch.autograd.grad((out, lse), leaves, upper)


@pytest.mark.parametrize("switches,head_dim,dtype", EACH, ids=str)
def test_it_is_as_exact_as_plain_torch(hopper, switches, head_dim, dtype):
    compare(qkv(B=2, H=4, G=2, T=1111, D=head_dim, dtype=dtype, device=hopper), **SWITCHES[switches])


@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize("T,S", [(1, 1), (1, 777), (17, 1025), (1025, 17), (128, 128), (129, 127), (512, 512)], ids=str)
@pytest.mark.parametrize("causal", [False, True])
def test_queries_and_keys_of_different_number(hopper, causal, T, S, head_dim):
    compare(qkv(H=8, G=1, T=T, S=S, D=head_dim, dtype=BF16, device=hopper), causal=causal, score_ulp=FEW_KEYS_ULP)


def test_keys_that_nobody_sees(hopper):
    compare(qkv(T=100, S=1500, D=128, dtype=BF16, device=hopper), window=50, score_ulp=FEW_KEYS_ULP)


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
@pytest.mark.parametrize("B,H,G,T", [(4, 16, 4, 4096), (1, 8, 8, 8192), (64, 8, 8, 130)], ids=str)
@pytest.mark.parametrize("causal", [False, True])
def test_many_programs_and_blocks_are_as_exact_as_the_portable_kernels(hopper, causal, B, H, G, T, head_dim):
    """Both against the portable kernels in fp32, where plain torch could not hold the scores."""
    inputs = [torch.randn(B, heads, T, head_dim, device=hopper).to(BF16) for heads in (H, G, G)]
    ours = gradients(inputs, causal=causal)
    with path("portable"):
        near = gradients(inputs, causal=causal, deterministic=True)
        leaves = [x.float().requires_grad_() for x in inputs]
        out, lse = flash_attention(*leaves, causal=causal, deterministic=True)
        generator = torch.Generator(hopper).manual_seed(3)
        upper = [torch.randn(y.shape, generator=generator, device=hopper).to(BF16).float() for y in (out, lse)]
        exact = torch.autograd.grad((out, lse), leaves, upper)
    for got, other, want in zip(ours, near, exact, strict=True):
        bound = 2 * (other - want).abs().max() + 4 * torch.finfo(BF16).eps * want.abs().max()
        assert got.isfinite().all() and (got - want).abs().max() <= bound


@pytest.mark.parametrize("deterministic", [False, True])
@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize("causal", [False, True])
def test_the_same_bits_every_time(hopper, causal, head_dim, deterministic):
    """A race between its warps would show here."""
    leaves = [x.requires_grad_() for x in qkv(B=4, H=16, G=4, T=3000, D=head_dim, dtype=BF16, device=hopper)]
    out, _ = flash_attention(*leaves, causal=causal, deterministic=deterministic)
    dout = torch.randn_like(out)
    first = torch.autograd.grad(out, leaves, dout, retain_graph=True)
    for _ in range(20):
        again = torch.autograd.grad(out, leaves, dout, retain_graph=True)
        assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))


def test_heads_do_not_spoil_each_other(hopper):
    """A gradient that overflows in one head, where a block of the other's numbers ends among its own."""
    leaves = [x.requires_grad_() for x in qkv(H=2, G=2, T=300, D=128, dtype=BF16, device=hopper)]
    out, _ = flash_attention(*leaves)
    dout = torch.ones_like(out)
    dout[:, 1] = float("inf")
    assert all(x[:, 0].isfinite().all() for x in torch.autograd.grad(out, leaves, dout))


def test_any_layout_of_the_inputs(hopper):
    q, k, v = qkv(B=2, H=4, G=4, T=300, D=64, dtype=BF16, device=hopper)
    want = gradients((q, k, v))
    shifted = torch.zeros(1 + q.numel(), dtype=BF16, device=hopper)[1:].view(q.shape).copy_(q)
    views = [[x.transpose(a, b).contiguous().transpose(a, b) for x in (q, k, v)] for a, b in ((1, 2), (2, 3), (0, 2))]
    for inputs in (*views, (shifted, k, v), [torch.cat((x, x), -1)[..., :64] for x in (q, k, v)]):
        assert all(torch.equal(a, b) for a, b in zip(want, gradients(inputs), strict=True))
    leaves = [x.requires_grad_() for x in (q, k, v)]
    out, _ = flash_attention(*leaves)
    found = [torch.autograd.grad(out, leaves, one, retain_graph=True)  # an expanded gradient, and what it stands for
             for one in (torch.ones((), dtype=BF16, device=hopper).expand(out.shape), torch.ones_like(out))]
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


def test_rows_further_apart_than_2_to_the_31(hopper):
    """Heads 2**31 elements apart: 8 GB of bf16, of which little is touched."""
    far = torch.zeros(2**32 + 200 * 64, dtype=BF16, device=hopper).as_strided((1, 3, 200, 64), (0, 2**31, 64, 1))
    near = qkv(H=3, G=3, T=200, D=64, dtype=BF16, device=hopper)[0]
    far.copy_(near)
    for got, want in zip(gradients((far, far, far)), gradients((near, near, near)), strict=True):
        assert torch.equal(got, want)


def test_compiled_by_inductor_it_is_the_same(hopper):
    spans = document_spans(documents(1, 700, 100, hopper))

    def layer(q, k, v):
        return flash_attention(q * 2, k, v, spans_B2S=spans)[0]

    results = []
    for run in (layer, torch.compile(layer, fullgraph=True)):
        leaves = [x.requires_grad_() for x in qkv(T=700, D=128, dtype=BF16, device=hopper)]
        out = run(*leaves)
        results.append([out, *torch.autograd.grad(out, leaves, torch.ones_like(out))])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_the_operator_keeps_torch_s_rules(hopper):
    inputs = [x.requires_grad_() for x in qkv(T=200, D=64, dtype=BF16, device=hopper)]
    torch.library.opcheck(torch.ops.officina.flash_attention.default, (*inputs, None, True, 0.125, 0, 0.0, False))


def test_no_wait_for_the_device(hopper):
    inputs = [x.requires_grad_() for x in qkv(T=256, D=64, dtype=BF16, device=hopper)]
    numbers = documents(1, 256, 50, hopper)
    for mode in ("default", "error"):  # the first time, compiling
        torch.cuda.set_sync_debug_mode(mode)
        try:
            flash_attention(*inputs, spans_B2S=document_spans(numbers))[0].float().sum().backward()
        finally:
            torch.cuda.set_sync_debug_mode("default")
