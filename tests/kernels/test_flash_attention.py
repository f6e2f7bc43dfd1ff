"""Flash attention in Triton's interpreter against plain torch; its reference against finite differences.

Tiles are small there (32 queries by 16 keys), so that rows of 70 tokens already have whole, ragged, edge and unseen blocks.
"""

import itertools
import logging
import tempfile
from functools import partial
from unittest import mock

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts

from officina.kernels import flash_attention_launch as launch
from officina.kernels.attention import attention
from officina.kernels.compiling import ARCHS
from officina.kernels.flash_attention import flash_attention, flash_attention_reference
from officina.kernels.masks import dense_mask, document_spans, length_spans
from officina.trainer.parallel.blocks import _keep_products
from tests.kernels.attention_cases import FEW_KEYS_ULP, INF, compare, documents, qkv
from tests.kernels.interpreter import interpreted
from tests.kernels.rules import assert_same_bits, assert_twice_as_good

CPU = torch.device("cpu")
FP16, FP32 = torch.float16, torch.float32


CASES = {
    "causal": (dict(T=70), {}),
    "full": (dict(T=70, S=45), dict(causal=False)),
    "decoding": (dict(T=5, S=70), {}),
    "blind": (dict(T=70, S=33), {}),
    "window": (dict(T=90), dict(window=20)),
    "window_of_1": (dict(T=40), dict(window=1)),
    "wide_window": (dict(T=40), dict(window=1000)),
    "window_and_cache": (dict(T=40, S=75), dict(window=20)),
    "softcap": (dict(T=50), dict(softcap=2.0)),
    "softcap_window": (dict(T=50), dict(softcap=2.0, window=17)),
    "scale": (dict(T=40), dict(scale=1.7)),
    "negative_scale": (dict(T=40), dict(scale=-0.3)),
    "heads_80": (dict(T=40, D=80), {}),
    "heads_3": (dict(T=20, D=3), {}),
    "heads_256": (dict(T=35, D=256), {}),
    "groups": (dict(B=2, H=6, G=2, T=20), {}),
    "one_token": (dict(T=1), {}),
    "many_queries_one_key": (dict(T=40, S=1), dict(causal=False)),
}


@pytest.mark.parametrize("deterministic", [False, True], ids=["fused", "split"])
@pytest.mark.parametrize("case", CASES)
@interpreted
def test_kernels_are_as_exact_as_plain_torch(case, deterministic):
    shapes, switches = CASES[case]
    # Each case in one precision a mode: both are met, and every switch with either.
    compare(qkv(**shapes, dtype=FP16 if deterministic else FP32), deterministic=deterministic, **switches)


@pytest.mark.parametrize("deterministic", [False, True], ids=["fused", "split"])
@pytest.mark.parametrize("switches", [{}, dict(causal=False), dict(window=11), dict(softcap=2.0)], ids=str)
@interpreted
def test_packed_documents(switches, deterministic):
    compare(qkv(B=2, H=2, T=70), spans=document_spans(documents(2, 70, 20)), deterministic=deterministic, **switches)


@interpreted
def test_packed_documents_with_a_cache_before_them():
    compare(qkv(B=2, H=1, T=30, S=70), spans=document_spans(documents(2, 70, 25)))


@pytest.mark.parametrize("lengths", [[70], [0, 70, 0], [1] * 70, [5, 0, 0, 40, 25], [32, 16, 22]], ids=str)
@interpreted
def test_documents_by_cumulative_lengths(lengths):
    cumulative = torch.tensor([0, *itertools.accumulate(lengths)], dtype=torch.int32)
    inputs = qkv(H=1, T=70)
    compare(inputs, spans=length_spans(cumulative, 70), score_ulp=FEW_KEYS_ULP)
    packed = flash_attention(*inputs, spans_B2S=length_spans(cumulative, 70), impl="triton")[0]
    alone = [flash_attention(*(x[:, :, a:b] for x in inputs), impl="triton")[0] for a, b in itertools.pairwise(cumulative)]
    torch.testing.assert_close(packed, torch.cat(alone, 2), atol=1e-6, rtol=1e-6)


def fuzz(data, longest):
    def draw(name, *choices):
        return data.draw(st.sampled_from(choices), name)

    packed, causal = draw("packed", False, True), draw("causal", False, True)
    T = draw("T", *(t for t in (1, 2, 15, 16, 17, 31, 32, 33, 47, 64, 65, 97) if t <= longest))
    S = max(0, T + draw("more keys", 0, 0, 0, 1, 16, 30, *(() if packed else (-1, -20))))
    G = draw("G", 1, 2)
    inputs = qkv(B=draw("B", 1, 2), H=G * draw("heads a group", 1, 2, 3), G=G, T=T, S=S, D=draw("D", 1, 8, 16, 24, 64),
                 dtype=draw("dtype", FP16, FP32))
    mean = draw("tokens a document", 1, 3, 20, 1000)
    compare(inputs, causal=causal, window=draw("window", 0, 1, 16, 33, 500) if causal else 0,
            softcap=draw("softcap", 0.0, 0.0, 3.0), deterministic=draw("deterministic", False, True),
            spans=document_spans(documents(len(inputs[0]), S, mean)) if packed else None, score_ulp=FEW_KEYS_ULP)


@interpreted
@settings(max_examples=12, deadline=None, derandomize=True)
@given(st.data())
def test_random_shapes_and_switches(data):
    fuzz(data, 33)


@pytest.mark.slow
@interpreted
@settings(max_examples=300, deadline=None)
@given(st.data())
def test_many_random_shapes_and_switches(data):
    fuzz(data, 97)


@interpreted
def test_partial_results_merge_into_the_whole():
    """Over two halves of the keys, merged by lse, which passes gradients on; queries 0 to 29 see nothing of the second."""
    def whole(q, k, v):
        return flash_attention_reference(q, k, v, mask=dense_mask(60, 60, True, 0, None, CPU), scale=0.25,
                                         compute_dtype=q.dtype)[0]

    def halves(q, k, v):
        out1, lse1 = flash_attention(q[:, :, 30:], k[:, :, :30], v[:, :, :30], causal=False, scale=0.25, impl="triton")
        out2, lse2 = flash_attention(q, k[:, :, 30:], v[:, :, 30:], scale=0.25, impl="triton")
        first = flash_attention(q[:, :, :30], k[:, :, :30], v[:, :, :30], scale=0.25, impl="triton")[0]
        assert (lse2[:, :, :30] == -INF).all() and not out2[:, :, :30].any()
        lse = torch.logaddexp(lse1, lse2[:, :, 30:])
        merged = (lse1 - lse).exp()[..., None] * out1 + (lse2[:, :, 30:] - lse).exp()[..., None] * out2[:, :, 30:]
        return torch.cat((first, merged), 2)

    assert_twice_as_good(halves, whole, qkv(T=60), factor=3)  # two sums more than in one piece


@interpreted
def test_gradients_into_rows_that_see_nothing_vanish_even_as_nan():
    q, k, v = (x.requires_grad_() for x in qkv(T=40, S=20))
    for deterministic in (False, True):
        out, lse = flash_attention(q, k, v, deterministic=deterministic, impl="triton")
        dout, dlse = (torch.ones_like(x).masked_fill(blind, float("nan"))
                      for x, blind in ((out, (lse == -INF)[..., None]), (lse, lse == -INF)))
        got = torch.autograd.grad((out, lse), (q, k, v), (dout, dlse))
        assert all(x.isfinite().all() for x in got) and not got[0][:, :, :20].any() and got[0][:, :, 20:].any()


@interpreted
def test_keys_past_the_last_have_no_part_however_low_the_scores():
    """The last tile of keys is padded with zeros, whose score of 0 would be exp(1000) times that of any true key."""
    q, k, v = qkv(T=40, S=45)
    leaves = [x.requires_grad_() for x in (q + 8, k - 8, v)]
    mask = torch.ones(40, 45, dtype=torch.bool)
    want = flash_attention_reference(*leaves, mask=mask, scale=1.0)
    assert want[1].max() < -500
    for deterministic in (False, True):
        got = flash_attention(*leaves, causal=False, scale=1.0, deterministic=deterministic, impl="triton")
        torch.testing.assert_close(got, want, atol=1e-3, rtol=1e-5)
        torch.testing.assert_close(torch.autograd.grad(got[0].sum(), leaves), torch.autograd.grad(
            want[0].sum(), leaves, retain_graph=True), atol=1e-2, rtol=1e-3)


@interpreted
def test_each_output_can_be_differentiated_alone():
    q, k, v = qkv(T=20)
    mask = dense_mask(20, 20, True, 0, None, CPU)
    assert_twice_as_good(lambda *x: flash_attention(*x, impl="triton")[0],
                         lambda *x: flash_attention_reference(*x, mask=mask, scale=0.25)[0], (q, k, v))
    assert_twice_as_good(lambda *x: flash_attention(*x, v, impl="triton")[1],
                         lambda *x: flash_attention_reference(*x, v, mask=mask, scale=0.25)[1], (q, k))


@pytest.mark.parametrize("deterministic", [False, True], ids=["fused", "split"])
@interpreted
def test_blocks_that_nobody_sees_are_not_visited(deterministic):
    """NaN in a visited block spreads even where it is masked, since 0 NaN is NaN."""
    def run(seen, **switches):
        q, k, v = qkv(T=160)
        k[:, :, ~seen] = v[:, :, ~seen] = float("nan")
        leaves = [x.requires_grad_() for x in (q, k, v)]
        out, _ = flash_attention(*leaves, deterministic=deterministic, impl="triton", **switches)
        mine = out[:, :, 64:96]
        return mine, *(x[:, :, 64:96] for x in torch.autograd.grad(mine.sum(), leaves))

    place = torch.arange(160)
    spans = document_spans((place >= 64).int()[None] + (place >= 96).int()[None])
    assert all(x.isfinite().all() for x in run((place >= 64) & (place < 96), spans_B2S=spans, causal=False))
    assert all(x.isfinite().all() for x in run((place >= 64) & (place < 96), spans_B2S=spans))
    assert run((place >= 48) & (place < 96), window=17)[0].isfinite().all()  # place 64 sees keys 48 to 64
    assert not run((place >= 64) & (place < 96), window=17)[0].isfinite().all()


@interpreted
def test_deterministic_gradients_have_the_same_bits_because_nothing_is_added_atomically():
    """What the kernels compile to is looked at in test_flash_attention_compiled.py."""
    for deterministic, kernels in ((True, ["delta", "backward_keys", "backward_queries"]), (False, ["delta", "backward_keys"])):
        leaves = [x.requires_grad_() for x in qkv(T=20)]
        out, _ = flash_attention(*leaves, deterministic=deterministic, impl="triton")
        with mock.patch.object(launch, "_run", wraps=launch._run) as run:
            torch.autograd.grad(out.sum(), leaves)
        assert [call.args[0].__name__.removesuffix("_kernel") for call in run.call_args_list] == kernels
        assert run.call_args_list[1].kwargs["FUSED"] is not deterministic
    assert_same_bits(lambda *x: flash_attention(*x, deterministic=True, impl="triton"), qkv(H=4, G=2, T=20))


def test_gfx90a_which_would_add_floats_by_compare_and_swap_has_the_split_backward_only():
    assert [arch for arch in (*ARCHS, "sm_120", "gfx1100") if not launch.adds_atomically(arch)] == ["gfx90a", "gfx1100"]


@interpreted
def test_heads_in_waves_through_the_cache():
    """Two of three heads fit: a wave of two, then one of one."""
    inputs = qkv(B=1, H=3, G=3, T=40)
    with mock.patch.object(launch, "CACHE_BYTES", 2 * 2 * 40 * 16 * 4):
        assert launch._wave(40, inputs[1], None) == 2
        for deterministic in (False, True):
            compare(inputs, deterministic=deterministic)


def test_waves_of_packed_heads_are_larger_and_none_is_small():
    """24 MiB: one head of 32k keys, 24 of 2k; 40 heads are then two waves of 20, not 24 and 16."""
    k = torch.empty(1, 40, 32_768, 128, dtype=torch.bfloat16, device="meta")
    spans = torch.empty(1, 2, 32_768, dtype=torch.int32, device="meta")
    assert launch._wave(32_768, k, None) == 1 and launch._wave(32_768, k, spans) == 20
    assert launch._wave(8192, k[:, :16, :8192], None) == 6 and launch._wave(40, k[:, :3, :40], None) == 3


@interpreted
def test_any_layout_of_the_inputs():
    """As the model has it (heads last but one), keys shared by expansion, heads' own axis scattered, gradients of stride 0."""
    q, k, v = (x.transpose(1, 2).contiguous().transpose(1, 2) for x in qkv(H=2, G=2, T=40))
    scattered = q.transpose(2, 3).contiguous().transpose(2, 3)
    three = [x.expand(3, *x.shape[1:]) for x in (q, k)]
    for q_like, k_like in ((q, k), (scattered, k[:, :1].expand(k.shape)), three):
        leaves = [q_like.detach().requires_grad_(), k_like.detach().requires_grad_(),
                  v.expand(len(q_like), *v.shape[1:]).detach().requires_grad_()]
        out, lse = flash_attention(*leaves, impl="triton")
        assert out.transpose(1, 2).is_contiguous() and lse.is_contiguous()
        want = flash_attention_reference(*leaves, mask=dense_mask(40, 40, True, 0, None, CPU), scale=0.25)
        torch.testing.assert_close((out, lse), want, atol=2e-6, rtol=1e-5)
        torch.testing.assert_close(torch.autograd.grad(out.sum(), leaves), torch.autograd.grad(want[0].sum(), leaves),
                                   atol=1e-5, rtol=1e-5)


@interpreted
def test_spans_may_lie_in_any_way():
    """Shared by all rows, row beside row, cut out of longer ones."""
    leaves = [x.requires_grad_() for x in qkv(B=3, H=1, T=20)]

    def run(spans):
        out, _ = flash_attention(*leaves, causal=False, spans_B2S=spans, deterministic=True, impl="triton")
        return out, *torch.autograd.grad(out.square().sum(), leaves)

    spans = document_spans(documents(3, 20, 5))
    for strange in (spans[:1].expand(3, -1, -1), spans.transpose(0, 1).contiguous().transpose(0, 1),
                    torch.cat((spans, spans), 2)[:, :, :20]):
        assert not strange.is_contiguous()
        assert all(map(torch.equal, run(strange), run(strange.contiguous())))


@pytest.mark.parametrize("deterministic", [False, True], ids=["fused", "split"])
@interpreted
def test_a_window_at_the_end_of_32_bits_is_none(deterministic):
    leaves = [x.requires_grad_() for x in qkv(T=20)]
    results = []
    for window in (0, 2**31 - 1, 2**31 - 4):
        out, _ = flash_attention(*leaves, window=window, deterministic=deterministic, impl="triton")
        results.append((out, *torch.autograd.grad(out.square().sum(), leaves)))
    for other in results[1:]:
        torch.testing.assert_close(other, results[0])  # dq is added up in any order


@interpreted
def test_compiled_for_all_shapes_it_needs_no_scale():
    """Of a head width known by a symbol only, the default scale is one too."""
    inputs = qkv(T=9)
    for function in (flash_attention, attention):
        compiled = torch.compile(partial(function, impl="triton"), fullgraph=True, backend="aot_eager", dynamic=True)
        torch.testing.assert_close(compiled(*inputs), function(*inputs, impl="triton"))


@pytest.mark.parametrize("shape,strides", [((1, 1, 520), (0, 0, launch.MAX_ROW_STRIDE)), ((2, 2, 5), (2**32, 2**31, 16))],
                         ids=["rows", "heads"])
@interpreted
def test_offsets_beyond_32_bits(shape, strides):
    """Elements more than 2**31 apart, in a file with holes: pages that nobody touches take no memory."""
    near = torch.randn(*shape, 16, generator=torch.Generator().manual_seed(1)).to(FP16)
    with tempfile.NamedTemporaryFile() as file:
        n = 16 + sum((size - 1) * stride for size, stride in zip(shape, strides, strict=True))
        assert n > 2**31
        file.truncate(2 * n)
        far = torch.from_file(file.name, shared=True, size=n, dtype=FP16).as_strided(near.shape, (*strides, 1))
        far.copy_(near)
        results = []
        for x in (far, near):
            leaves = [y.detach().requires_grad_() for y in (x[..., -3:, :], x, x)]
            out, lse = flash_attention(*leaves, deterministic=True, impl="triton")
            results.append([out, lse, *torch.autograd.grad(out.sum(), leaves)])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@interpreted
def test_nothing_in_nothing_out():
    for shapes in (dict(T=0), dict(T=5, S=0), dict(B=0)):
        leaves = [x.requires_grad_() for x in qkv(**shapes)]
        out, lse = flash_attention(*leaves, impl="triton")
        assert not out.any() and (lse == -INF).all()
        assert not any(x.any() for x in torch.autograd.grad(out.sum() + lse.sum(), leaves))


@pytest.mark.parametrize("packed", [False, True], ids=["whole", "packed"])
@interpreted
def test_the_operators_keep_torchs_rules(packed):
    q, k, v = (x.transpose(1, 2).contiguous().transpose(1, 2).requires_grad_() for x in qkv(T=20))
    spans = document_spans(documents(1, 20, 7)) if packed else None
    switches = (spans, True, 0.25, 0, 0.0, True)
    torch.library.opcheck(torch.ops.officina.flash_attention.default, (q, k, v, *switches))
    out, lse = torch.ops.officina.flash_attention(q, k, v, *switches)
    backward = torch.ops.officina.flash_attention_backward.default
    for dlse in (None, torch.randn_like(lse)):
        dout, *saved = (x.detach() for x in (torch.randn_like(out), out, lse, q, k, v))
        torch.library.opcheck(backward, (dout, dlse, *saved, *switches), test_utils=("test_schema", "test_faketensor"))


@interpreted
def test_compiled_and_recomputed_it_is_the_same():
    spans = document_spans(documents(1, 40, 12))

    def layer(q, k, v):
        return flash_attention(q * 2, k, v, window=9, spans_B2S=spans, deterministic=True, impl="triton")[0].sin()

    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    keep = partial(create_selective_checkpoint_contexts, _keep_products)
    recomputed, selective = (partial(checkpoint, layer, use_reentrant=False, **k) for k in ({}, {"context_fn": keep}))
    results = []
    for run, launches in ((layer, 1), (compiled, 1), (recomputed, 2), (selective, 1)):
        leaves = [x.requires_grad_() for x in qkv(T=40)]
        with mock.patch.object(launch, "forward", wraps=launch.forward) as forward:
            out = run(*leaves)
            results.append([out, *torch.autograd.grad(out.square().sum(), leaves)])
        assert forward.call_count == launches
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


@pytest.mark.parametrize("window,softcap", [(0, 0.0), (2, 0.0), (0, 1.5)])
def test_the_reference_has_the_gradients_of_its_outputs(window, softcap):
    """By finite differences in fp64; the first query sees nothing."""
    leaves = [x.double().requires_grad_() for x in qkv(T=4, S=3, D=3)]
    mask = dense_mask(4, 3, True, window, None, CPU)

    def function(*x):
        out, lse = flash_attention_reference(*x, mask=mask, scale=0.7, softcap=softcap)
        return out, lse.masked_fill(lse == -INF, 0)

    assert torch.autograd.gradcheck(function, leaves)


def test_spans_of_documents():
    spans = document_spans(torch.tensor([[7, 7, 3, 3, 3, 7], [0, 1, 2, 3, 4, 5]]))
    assert spans.dtype == torch.int32 and spans.tolist() == [[[0, 0, 2, 2, 2, 5], [2, 2, 5, 5, 5, 6]],
                                                             [[0, 1, 2, 3, 4, 5], [1, 2, 3, 4, 5, 6]]]
    assert length_spans(torch.tensor([0, 2, 2, 5, 5, 6]), 6).tolist() == [[[0, 0, 2, 2, 2, 5], [2, 2, 5, 5, 5, 6]]]
    assert length_spans(torch.tensor([0, 2]), 4).tolist() == [[[0, 0, 2, 2], [2, 2, 4, 4]]]  # the rest is one more
    assert length_spans(torch.tensor([2, 3]), 4).tolist() == [[[0, 0, 2, 3], [2, 2, 3, 4]]]  # and so is what is before
    assert length_spans(torch.tensor([0, 2, 9]), 4).tolist() == [[[0, 0, 2, 2], [2, 2, 4, 4]]]  # kernels would read key 8
    assert length_spans(torch.tensor([-1, 2, 9, 12]), 3).tolist() == [[[0, 0, 2], [2, 2, 3]]]
    assert document_spans(torch.zeros(2, 0)).shape == (2, 2, 0)


def test_auto_takes_the_reference_without_a_gpu_and_says_so(caplog):
    from officina.kernels import dispatch

    dispatch._log_new.cache_clear()
    inputs = qkv()
    with caplog.at_level(logging.INFO, "officina.kernels"):
        got = flash_attention(*inputs)
    assert "flash_attention: auto takes the reference: the tensors are on the cpu" in caplog.text
    assert torch.equal(got[0], flash_attention(*inputs, impl="reference")[0])


def test_errors_say_what_does_not_fit():
    q, k, v = qkv(H=4, G=2)
    for wrong in ((q[:, :3], k, v), (q, k, v[..., :8]), (q[0], k, v), (q, k[:, :0], v[:, :0]), [x[..., :0] for x in (q, k, v)]):
        with pytest.raises(ValueError, match="H a multiple of G"):
            flash_attention(*wrong)
    with pytest.raises(ValueError, match="one dtype and one device"):
        flash_attention(q.half(), k, v)
    with pytest.raises(ValueError, match="window=3 needs causal=True"):
        flash_attention(q, k, v, causal=False, window=3)
    with pytest.raises(ValueError, match="window=-1 needs"):
        flash_attention(q, k, v, window=-1)
    for softcap in (-2.0, INF, float("nan")):
        with pytest.raises(ValueError, match=f"softcap={softcap} must not be negative, and finite; 0 = none"):
            flash_attention(q, k, v, softcap=softcap)
    for scale in (0.0, INF):
        with pytest.raises(ValueError, match="must be a finite number other than 0"):
            flash_attention(q, k, v, scale=scale)
    for spans in (torch.zeros(1, 2, 9, dtype=torch.int32), torch.zeros(1, 2, 50),
                  torch.zeros(1, 2, 50, dtype=torch.int32, device="meta")):
        with pytest.raises(ValueError, match=f"on {spans.device} do not fit .* need \\(1, 2, 50\\) int32 on cpu"):
            flash_attention(q, k, v, spans_B2S=spans)
    with pytest.raises(ValueError, match="no more queries than keys"):
        flash_attention(q, k[:, :, :20], v[:, :, :20], spans_B2S=torch.zeros(1, 2, 20, dtype=torch.int32))
    with pytest.raises(ValueError, match="impl=triton cannot run: heads are 257 wide, the kernels take 256"):
        flash_attention(*qkv(T=2, D=257), impl="triton")
    with pytest.raises(ValueError, match="impl=triton cannot run: the kernels compute in bf16, fp16 and fp32, not torch.f"):
        flash_attention(q.double(), k.double(), v.double(), impl="triton")
    with pytest.raises(ValueError, match="impl=triton cannot run: the tensors are on the cpu"):
        flash_attention(q, k, v, impl="triton")


@interpreted
def test_the_interpreter_refuses_bf16():
    with pytest.raises(ValueError, match="interpreter computes bf16 wrongly"):
        flash_attention(*qkv(dtype=torch.bfloat16), impl="triton")
