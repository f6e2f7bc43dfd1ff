"""Rotary embedding kernels, in Triton's interpreter, against the plain-torch reference."""

import math

import pytest
import torch

from officina.kernels.rope import MAX_PAIRS, rope, rope_reference
from tests.kernels.interpreter import interpreted
from tests.kernels.rules import assert_same_bits, assert_twice_as_good

CASES = [  # B, H, G, T, K, P
    (1, 1, 1, 1, 2, 1), (2, 4, 2, 7, 64, 32), (2, 3, 1, 5, 80, 40), (1, 6, 2, 3, 96, 16), (1, 2, 2, 70, 16, 8),
    (2, 2, 1, 0, 8, 4), (2, 32, 8, 3, 128, 64), (1, 16, 8, 2, 512, 256)]


def inputs(B, H, G, T, K, dtype=torch.float32):
    """q and k as they come from their linear maps, transposed views of (B, T, H, K)."""
    generator = torch.Generator().manual_seed(B + T + K)
    return [torch.randn(B, T, heads, K, generator=generator).to(dtype).transpose(1, 2) for heads in (H, G)]


def tables(T, P, rows=1):
    """Positions differ from row to row, as in packed documents."""
    positions = torch.arange(T)[None] % 50 + 3 * torch.arange(rows)[:, None]
    angles = positions[:, None, :, None] * 10_000.0 ** (-torch.arange(P) / P)
    return angles.cos().float(), angles.sin().float()


def norm_weights(K, dtype=torch.float32):
    return [(0.1 * torch.randn(K, generator=torch.Generator().manual_seed(seed))).to(dtype) for seed in (1, 2)]


@interpreted
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("interleaved", [False, True])
def test_rotation_is_as_exact_as_plain_torch(interleaved, dtype):
    for B, H, G, T, K, P in CASES:
        cos, sin = tables(T, P, rows=B)
        assert_twice_as_good(lambda q, k: rope(q, k, cos, sin, interleaved=interleaved, impl="triton"),  # noqa: B023
                             lambda q, k: rope_reference(q, k, cos, sin, interleaved=interleaved),  # noqa: B023
                             inputs(B, H, G, T, K, dtype))


@interpreted
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("zero_centred,cast_first,interleaved", [(False, True, False), (True, False, True)])
def test_norm_and_rotation_are_as_exact_as_plain_torch(zero_centred, cast_first, interleaved, dtype):
    for B, H, G, T, K, P in CASES[1:]:
        cos, sin = tables(T, P)

        def both(function, q, k, q_weight, k_weight, cos=cos, sin=sin, **impl):
            return function(q, k, cos, sin, q_weight_K=q_weight, k_weight_K=k_weight, zero_centred=zero_centred,
                            cast_first=cast_first, interleaved=interleaved, **impl)

        assert_twice_as_good(lambda *x: both(rope, *x, impl="triton"), lambda *x: both(rope_reference, *x),
                             [*inputs(B, H, G, T, K, dtype), *norm_weights(K, dtype)])


def test_the_reference_turns_pairs_by_their_angle():
    angle = 0.3
    x = torch.tensor([1.0, 0.0, 7.0, 8.0, 9.0]).view(1, 1, 1, 5)
    cos, sin = torch.full((1, 1, 1, 1), math.cos(angle)), torch.full((1, 1, 1, 1), math.sin(angle))
    got = rope(x, x, cos, sin)[0].flatten()
    torch.testing.assert_close(got, torch.tensor([math.cos(angle), math.sin(angle), 7.0, 8.0, 9.0]))
    x = torch.arange(8.0).view(1, 1, 1, 8)
    half = rope(x, x, *tables(1, 4))[0]
    pairs = torch.tensor([0, 4, 1, 5, 2, 6, 3, 7])
    torch.testing.assert_close(rope(x[..., pairs], x, *tables(1, 4), interleaved=True)[0], half[..., pairs])


@interpreted
def test_gradients_are_those_of_the_function():
    cos, sin = tables(2, 2, rows=2)
    q, k = (x.detach().requires_grad_() for x in inputs(2, 2, 1, 2, 6, torch.float64))
    weights = [w.requires_grad_() for w in norm_weights(6, torch.float64)]
    torch.autograd.gradcheck(lambda *x: rope(*x, cos, sin, interleaved=True, impl="triton"), (q, k), fast_mode=True)
    torch.autograd.gradcheck(lambda q, k, *w: rope(q, k, cos, sin, q_weight_K=w[0], k_weight_K=w[1], impl="triton"),
                             (q, k, *weights), fast_mode=True)


@interpreted
def test_operators_keep_torchs_rules():
    cos, sin = tables(3, 8)
    q, k = (x.detach().requires_grad_() for x in inputs(2, 2, 1, 3, 16))
    weights = [w.requires_grad_() for w in norm_weights(16)]
    torch.library.opcheck(torch.ops.officina.rope.default, (q, k, cos, sin, False, False))
    torch.library.opcheck(torch.ops.officina.rope_norm.default, (q, k, cos, sin, *weights, 1e-6, False, False, True))

    def block(q, k, *weights):
        q, k = rope(q, k, cos, sin, q_weight_K=weights[0], k_weight_K=weights[1], impl="triton")
        q, k = rope(q, k, cos, sin, impl="triton")
        return (q * k).square().sum()

    leaves = [q, k, *weights]
    want = torch.autograd.grad(block(*leaves), leaves)
    got = torch.autograd.grad(torch.compile(block, fullgraph=True, backend="aot_eager")(*leaves), leaves)
    again = torch.autograd.grad(torch.utils.checkpoint.checkpoint(block, *leaves, use_reentrant=False), leaves)
    torch.testing.assert_close(got, want)
    torch.testing.assert_close(again, want, rtol=0, atol=0)


@interpreted
def test_any_strides_are_taken_and_nothing_is_written_to_the_inputs():
    cos, sin = tables(5, 8, rows=2)
    packed = torch.randn(2, 5, 6, 16)  # queries and keys side by side, as of one product
    before = packed.clone()
    q, k = packed[:, :, :4].transpose(1, 2), packed[:, :, 4:].transpose(1, 2)
    for queries, keys in ((q, k), (q.contiguous(), k.contiguous()), (q.mT.contiguous().mT, k)):
        got, want = rope(queries, keys, cos, sin, impl="triton"), rope_reference(queries, keys, cos, sin)
        torch.testing.assert_close(got, want)
        assert got[0].transpose(1, 2).is_contiguous()
    assert torch.equal(packed, before)


@interpreted
def test_norm_weights_may_lie_in_any_way():
    cos, sin = tables(5, 8)
    q, k = (x.detach().requires_grad_() for x in inputs(1, 2, 1, 5, 16))
    weights = dict(zip(("q_weight_K", "k_weight_K"), torch.randn(16, 2).T, strict=True))
    got, want = (function(q, k, cos, sin, **weights, **impl) for function, impl in (
        (rope, {"impl": "triton"}), (rope_reference, {})))
    torch.testing.assert_close(got, want)
    torch.testing.assert_close(*(torch.autograd.grad(sum(y.square().sum() for y in two), (q, k)) for two in (got, want)))


@interpreted
def test_offsets_beyond_32_bits_reach_their_tokens():
    stride = 2**30 + 8  # tokens 2 and 3 begin beyond 2^31 elements; only the touched pages of the 8 GiB exist
    far = torch.empty(3 * stride + 32, dtype=torch.float16).as_strided((1, 2, 4, 16), (4 * stride, 16, stride, 1))
    near = inputs(1, 2, 2, 4, 16, torch.float16)
    far.copy_(near[0])
    weights = norm_weights(16, torch.float16)
    results = []
    for q in (far, near[0]):
        leaves = [q.detach().requires_grad_(), near[1]]
        plain = rope(*leaves, *tables(4, 8), impl="triton")
        normed = rope(*leaves, *tables(4, 8), q_weight_K=weights[0], k_weight_K=weights[1], impl="triton")
        results.append((*plain, *normed, *torch.autograd.grad(normed[0].sum(), leaves[:1])))
    torch.testing.assert_close(*results, rtol=0, atol=0)


@interpreted
def test_the_same_bits_every_time():
    cos, sin = tables(40, 8)
    assert_same_bits(lambda q, k, *w: rope(q, k, cos, sin, q_weight_K=w[0], k_weight_K=w[1], impl="triton"),
                     [*inputs(2, 3, 1, 40, 16), *norm_weights(16)])


def test_errors_say_what_does_not_fit():
    q, k = inputs(2, 4, 2, 3, 8)
    cos, sin = tables(3, 4)
    with pytest.raises(ValueError, match=r"q \(2, 4, 3, 8\) torch.float32 and k \(2, 2, 2, 8\) torch.float32 do not fit"):
        rope(q, k[:, :, :2], cos, sin)
    with pytest.raises(ValueError, match=r"q \(4, 3, 8\) .* do not fit; need \(B, H, T, K\)"):
        rope(q[0], k, cos, sin)
    with pytest.raises(ValueError, match=r"cos \(1, 1, 3\) and sin \(1, 1, 3\) do not fit"):
        rope(q, k, cos[..., 0], sin[..., 0])
    with pytest.raises(ValueError, match=r"cos \(1, 1, 2, 4\) and sin \(1, 1, 3, 4\) do not fit q .* need \(2 or 1, 1, 3, P\)"):
        rope(q, k, cos[:, :, :2], sin)
    with pytest.raises(ValueError, match="with 2 P at most 8"):
        rope(q, k, *tables(3, 5))
    with pytest.raises(ValueError, match=r"norm weights \(8,\) and None must both be \(8,\)"):
        rope(q, k, cos, sin, q_weight_K=torch.ones(8))
    with pytest.raises(ValueError, match="rope: impl=triton cannot run: the tensors are on the cpu"):
        rope(q, k, cos, sin, impl="triton")
    wide = torch.ones(1, 1, 1, 2 * MAX_PAIRS + 2)
    with pytest.raises(ValueError, match=f"{MAX_PAIRS + 1} pairs and 0 features beside them, the kernel holds {MAX_PAIRS}"):
        rope(wide, wide, *tables(1, MAX_PAIRS + 1), impl="triton")
