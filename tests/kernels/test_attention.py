"""Every implementation against the plain-torch reference, and the reference against the definition."""

import functools
import logging
import math
from unittest import mock

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from officina.kernels import attention as module
from officina.kernels import dispatch
from officina.kernels.attention import attention, attention_reference, plan_attention
from officina.kernels.masks import dense_mask, document_spans
from tests.kernels.interpreter import interpreted

CPU = torch.device("cpu")


def qkv(B=2, H=4, G=2, T=11, S=None, D=16, dtype=torch.float32, device="cpu", grad=False):
    torch.manual_seed(B * 1000 + T)
    shapes = ((B, H, T, D), (B, G, S or T, D), (B, G, S or T, D))
    return [torch.randn(shape, dtype=dtype, device=device).requires_grad_(grad) for shape in shapes]


def by_definition(q, k, v, *, causal, scale, window, softcap, documents):
    """One query and one key at a time, in Python numbers."""
    B, H, T, D = q.shape
    G, S = k.shape[1], k.shape[2]
    out = torch.zeros(B, H, T, D, dtype=torch.float64)
    for b in range(B):
        for h in range(H):
            g = h // (H // G)
            for t in range(T):
                place = S - T + t
                keys = [s for s in range(S) if (not causal or s <= place) and (not window or place - s < window)
                        and (documents is None or documents[b, s] == documents[b, place])]
                scores = [scale * float(q[b, h, t].double() @ k[b, g, s].double()) for s in keys]
                scores = [softcap * math.tanh(x / softcap) for x in scores] if softcap else scores
                weights = [math.exp(x - max(scores)) for x in scores]
                out[b, h, t] = sum(w * v[b, g, s].double() for w, s in zip(weights, keys, strict=True)) / sum(weights)
    return out


@settings(max_examples=40, deadline=None)
@given(st.data())
def test_sdpa_and_reference_follow_the_definition(data):
    G = data.draw(st.sampled_from([1, 2]))
    T = data.draw(st.integers(1, 9))
    S = T + data.draw(st.sampled_from([0, 0, 1, 4]))
    causal = data.draw(st.booleans())
    window = data.draw(st.sampled_from([0, 1, 3, 50])) if causal else 0
    softcap = data.draw(st.sampled_from([0.0, 5.0]))
    documents = data.draw(st.sampled_from([None, torch.randint(0, 3, (2, S)).sort()[0]]))
    q, k, v = qkv(H=2 * G, G=G, T=T, S=S, D=4)
    want = by_definition(q, k, v, causal=causal, scale=0.3, window=window, softcap=softcap, documents=documents)
    for impl in ("auto", "reference") + (() if softcap else ("sdpa",)):
        got = attention(q, k, v, causal=causal, scale=0.3, window=window, softcap=softcap, documents_BS=documents, impl=impl)
        torch.testing.assert_close(got.double(), want, atol=2e-6, rtol=1e-5)


@pytest.mark.parametrize("documents", [None, torch.tensor([[0] * 4 + [1] * 7, [0] * 11])])
@pytest.mark.parametrize("window", [0, 3])
def test_sdpa_gradients_equal_the_reference(window, documents):
    grads = []
    for impl in ("sdpa", "reference"):
        inputs = qkv(grad=True)
        out = attention(*inputs, window=window, documents_BS=documents, impl=impl)
        grads.append(torch.autograd.grad(out.square().sum(), inputs))
    for got, want in zip(*grads, strict=True):
        torch.testing.assert_close(got, want, atol=1e-5, rtol=1e-5)


def test_a_document_is_untouched_by_what_stands_before_it():
    q, k, v = qkv(B=1)
    documents = torch.tensor([[0] * 5 + [1] * 6])
    packed = attention(q, k, v, documents_BS=documents)
    alone = attention(q[:, :, 5:], k[:, :, 5:], v[:, :, 5:])
    torch.testing.assert_close(packed[:, :, 5:], alone, atol=1e-6, rtol=1e-6)
    k2 = k.clone()
    k2[:, :, :5] += 1
    torch.testing.assert_close(attention(q, k2, v, documents_BS=documents)[:, :, 5:], packed[:, :, 5:], atol=0, rtol=0)


@pytest.mark.parametrize("softcap", [0.0, 5.0])
@pytest.mark.parametrize("window", [0, 6])
@interpreted
def test_triton_equals_the_reference_forward_and_backward(window, softcap):
    documents = torch.tensor([[0] * 4 + [1] * 14, [0] * 18])
    results = []
    for impl in ("triton", "reference"):
        inputs = qkv(T=18, grad=True)
        out = attention(*inputs, window=window, softcap=softcap, documents_BS=documents, impl=impl)
        results.append([out, *torch.autograd.grad(out.square().sum(), inputs)])
    for got, want in zip(*results, strict=True):
        torch.testing.assert_close(got, want, atol=1e-5, rtol=1e-5)


@interpreted
def test_triton_follows_torchs_switch_for_deterministic_algorithms():
    with mock.patch.object(module, "flash_attention", return_value=(None, None)) as kernel:
        for wanted in (True, False):
            torch.use_deterministic_algorithms(wanted)
            attention(*qkv(T=3), impl="triton")
    assert [call.kwargs["deterministic"] for call in kernel.call_args_list] == [True, False]


@interpreted
def test_the_kernels_get_no_window_that_cuts_nothing():
    with mock.patch.object(module, "flash_attention", return_value=(None, None)) as kernel:
        for window in (2, 3, 2**31 - 1):
            attention(*qkv(T=3), window=window, impl="triton")
    assert [call.kwargs["window"] for call in kernel.call_args_list] == [2, 0, 0]


@interpreted
def test_one_row_of_documents_serves_all_rows():
    documents = torch.tensor([[0] * 4 + [1] * 7])
    want = attention(*qkv(), documents_BS=documents.expand(2, -1), impl="reference")
    for impl in ("triton", "reference", "sdpa", "auto"):
        torch.testing.assert_close(attention(*qkv(), documents_BS=documents, impl=impl), want, atol=1e-6, rtol=1e-5)


def test_a_number_that_comes_back_is_another_document():
    q, k, v = qkv(B=1, T=6)
    documents = torch.tensor([[0, 0, 1, 1, 0, 0]])
    for impl in ("auto", "reference"):
        got = attention(q, k, v, documents_BS=documents, impl=impl)
        torch.testing.assert_close(got, attention(q, k, v, documents_BS=torch.tensor([[0, 0, 1, 1, 2, 2]])), atol=1e-6, rtol=0)


def test_auto_takes_the_kernels_on_a_gpu_in_16_bits(monkeypatch):
    monkeypatch.setattr(module, "why_not_flash", lambda *_: None)
    choose = functools.partial(module._choose, "auto", masked=False, softcap=0.0, n_queries=8, n_keys=8,
                               device=torch.device("cuda"), head_dim=64, dtype=torch.bfloat16)
    assert choose() == choose(masked=True) == choose(softcap=5.0) == choose(n_keys=20) == "triton"
    assert choose(n_queries=1) == choose(dtype=torch.float32) == choose(device=CPU) == "sdpa"


def test_plain_causal_needs_no_mask_tensor():
    plan = plan_attention(8, 8, device=CPU, head_dim=16)
    assert plan.impl == "sdpa" and plan.is_causal and plan.mask is None
    assert plan_attention(8, 8, window=8, device=CPU, head_dim=16).mask is None  # a window that cuts nothing
    assert plan_attention(1, 8, device=CPU, head_dim=16).mask is None  # one query sees all keys
    assert plan_attention(8, 8, window=3, device=CPU, head_dim=16).mask.shape == (8, 8)


def test_flex_forward_equals_the_reference():
    """The eager form of flex attention: the same mask and score functions that a GPU compiles."""
    documents = torch.tensor([[0] * 60 + [1] * 68, [0] * 128], dtype=torch.int32)
    q, k, v = qkv(T=128)
    for window, softcap, docs in [(0, 0.0, documents), (17, 0.0, None), (9, 5.0, documents), (0, 5.0, None),
                                  (0, 0.0, documents[:1])]:
        spans = None if docs is None else document_spans(docs)
        plan = module.AttentionPlan("flex", False, None, module._block_mask(128, 128, True, window, spans, CPU),
                                    module._softcap_mod(softcap) if softcap else None)
        got = module._flex(q, k, v, plan, 0.25)
        want = attention_reference(q, k, v, mask=dense_mask(128, 128, True, window, spans, CPU), scale=0.25, softcap=softcap)
        torch.testing.assert_close(got, want, atol=2e-6, rtol=1e-5)


@pytest.mark.gpu
@pytest.mark.parametrize("window,softcap,packed", [(0, 0.0, True), (100, 0.0, False), (64, 30.0, True)])
def test_flex_on_a_gpu_equals_the_reference_forward_and_backward(window, softcap, packed):
    if not torch.cuda.is_available():
        pytest.skip("no GPU")
    documents = (torch.arange(512, device="cuda") // 150).expand(2, 512).int() if packed else None
    results = []
    for impl, dtype in (("flex", torch.bfloat16), ("reference", torch.bfloat16), ("reference", torch.float32)):
        inputs = [x.to("cuda", dtype).detach().requires_grad_() for x in qkv(T=512, D=64)]
        out = attention(*inputs, window=window, softcap=softcap, documents_BS=documents, impl=impl)
        results.append([out, *torch.autograd.grad(out.float().square().sum(), inputs)])
    for got, plain, exact in zip(*results, strict=True):  # at most twice the rounding of the plain bf16 form
        assert (got - exact).abs().max() <= 2 * (plain - exact).abs().max() + 1e-3


def test_errors_say_what_does_not_fit():
    q, k, v = qkv()
    for wrong in ((q[:, :3], k, v), (q[0], k, v), (q, k[:, :0], v[:, :0])):
        with pytest.raises(ValueError, match="attention: .* H a multiple of G"):
            attention(*wrong)
    for impl in ("auto", "reference", "sdpa", "flex", "triton"):
        for window, causal in ((3, False), (-1, True)):
            with pytest.raises(ValueError, match=f"attention: window={window} needs causal=True and at least one key"):
                attention(q, k, v, causal=causal, window=window, impl=impl)
        for softcap in (-2.0, math.inf):
            with pytest.raises(ValueError, match=f"attention: softcap={softcap} must not be negative, and finite"):
                attention(q, k, v, softcap=softcap, impl=impl)
        with pytest.raises(ValueError, match=r"documents \(3, 11\) do not fit 2 rows; need \(2, 11\), or \(1, 11\) for all"):
            attention(q, k, v, documents_BS=torch.zeros(3, 11), impl=impl)
    with pytest.raises(ValueError, match="11 queries but only 4 keys"):
        attention(q, k[:, :, :4], v[:, :, :4])
    with pytest.raises(ValueError, match="documents have 5 places"):
        attention(q, k, v, documents_BS=torch.zeros(2, 5))
    with pytest.raises(ValueError, match="impl=sdpa has no softcap"):
        attention(q, k, v, softcap=5.0, impl="sdpa")
    with pytest.raises(ValueError, match="impl=flex cannot run: flex attention has no backward on the cpu"):
        attention(q, k, v, impl="flex")
    with pytest.raises(ValueError, match="impl=triton cannot run: the tensors are on the cpu"):
        attention(q, k, v, impl="triton")
    assert "head_dim of at least 16" in module.flex_missing(torch.device("cuda"), 8)


def test_auto_says_once_why_it_falls_back(caplog):
    dispatch._log_new.cache_clear()
    with caplog.at_level(logging.INFO, "officina.kernels"):
        for _ in range(3):
            attention(*qkv(), softcap=5.0)
    assert [r.getMessage() for r in caplog.records] == [
        "attention: auto takes the reference: sdpa has no softcap, flex attention has no backward on the cpu"]
