"""RMSNorm kernels, in Triton's interpreter, against the plain-torch reference."""

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from officina.kernels import rms_norm as module
from officina.kernels.rms_norm import add_rms_norm, add_rms_norm_reference, rms_norm, rms_norm_reference
from tests.kernels.interpreter import interpreted
from tests.kernels.rules import assert_same_bits, assert_twice_as_good

SWITCHES = list(itertools.product([False, True], [False, True]))


def inputs(*shape, dtype=torch.float32, weight_dtype=None, count=2):
    generator = torch.Generator().manual_seed(sum(shape))
    weight = 0.3 * torch.randn(shape[-1], generator=generator)
    return [*(torch.randn(shape, generator=generator).to(dtype) for _ in range(count - 1)), weight.to(weight_dtype or dtype)]


@interpreted
@settings(max_examples=20, deadline=None)
@given(N=st.sampled_from([0, 1, 2, 7, 33, 300]), D=st.sampled_from([3, 16, 40, 128, 257]), dtype=st.sampled_from(
    [torch.float32, torch.float16]), switches=st.sampled_from(SWITCHES), residual=st.booleans())
def test_kernels_are_as_exact_as_plain_torch(N, D, dtype, switches, residual):
    switches = dict(zip(("zero_centred", "cast_first"), switches, strict=True))
    functions = (add_rms_norm, add_rms_norm_reference) if residual else (rms_norm, rms_norm_reference)
    assert_twice_as_good(lambda *x: functions[0](*x, impl="triton", **switches), lambda *x: functions[1](*x, **switches),
                         inputs(N, D, dtype=dtype, count=3 if residual else 2))


@interpreted
def test_a_master_weight_in_fp32_gets_its_gradient_in_fp32():
    assert_twice_as_good(lambda *x: rms_norm(*x, impl="triton"), rms_norm_reference,
                         inputs(3, 5, 64, dtype=torch.float16, weight_dtype=torch.float32))


@interpreted
def test_rows_wider_than_the_registers_are_read_twice():
    x, residual, weight = inputs(3, module.RELOAD_WIDTH + 8, count=3)
    assert_twice_as_good(lambda *x: add_rms_norm(*x, impl="triton"), add_rms_norm_reference, (x, residual, weight))


@interpreted
def test_rows_may_be_strided_and_gradients_expanded():
    x, weight = inputs(6, 48)
    want = rms_norm_reference(x[:, 8:40], weight[:32])
    torch.testing.assert_close(rms_norm(x[:, 8:40], weight[:32], impl="triton"), want)
    torch.testing.assert_close(rms_norm(x.T[8:40], weight[:6], impl="triton"), rms_norm_reference(x.T[8:40], weight[:6]))
    leaves = [x.requires_grad_(), weight.requires_grad_()]
    got = torch.autograd.grad(rms_norm(*leaves, impl="triton").sum(), leaves)
    torch.testing.assert_close(got, torch.autograd.grad(rms_norm_reference(*leaves).sum(), leaves))


@interpreted
def test_weights_may_lie_in_any_way():
    x, residual, weight = (t.requires_grad_() for t in inputs(3, 8, count=3))
    for strange in (torch.randn(8, 3)[:, 0], weight.detach()[:1].expand(8)):
        for kernel, reference, leaves in ((rms_norm, rms_norm_reference, (x,)),
                                          (add_rms_norm, add_rms_norm_reference, (x, residual))):
            got, want = kernel(*leaves, strange, impl="triton"), reference(*leaves, strange)
            torch.testing.assert_close(got, want)
            torch.testing.assert_close(*(torch.autograd.grad(y[0].square().sum(), leaves) for y in (got, want)))


@interpreted
@pytest.mark.parametrize("shape", [(4, 8), (2, 3, 8), (8,)])
def test_two_leaves_get_gradients_of_their_own(shape):
    """Clipping in place, or another backward pass, would change both by one's; what is no leaf is not copied."""
    x, residual, weight = (t.requires_grad_() for t in inputs(*shape, count=3))
    sum(y.sum() for y in add_rms_norm(x, residual, weight, impl="triton")).backward()
    assert torch.equal(x.grad, residual.grad) and x.grad.data_ptr() != residual.grad.data_ptr()
    seen = []
    inner = [t * 1 for t in (x, residual)]
    for t in inner:
        t.register_hook(lambda grad: seen.append(grad.data_ptr()))
    add_rms_norm(*inner, weight, impl="triton")[0].sum().backward()
    assert len(seen) == 2 and seen[0] == seen[1]


@interpreted
def test_nothing_in_nothing_out():
    for shape in ((3, 0), (0, 5, 0), (0,), (0, 4), (2, 0, 4)):
        x, residual, weight = (t.requires_grad_() for t in inputs(*shape, count=3))
        outputs = rms_norm(x, weight, impl="triton"), *add_rms_norm(x, residual, weight, impl="triton")
        grads = torch.autograd.grad(sum(y.sum() for y in outputs), (x, residual, weight))
        assert all(t.shape == shape for t in (*outputs, *grads[:2])) and not grads[2].any()


@interpreted
@pytest.mark.parametrize("zero_centred", [False, True])
def test_gradients_are_those_of_the_function(zero_centred):
    x, residual, weight = (t.requires_grad_() for t in inputs(2, 3, dtype=torch.float64, count=3))
    torch.autograd.gradcheck(lambda *t: rms_norm(*t, zero_centred=zero_centred, impl="triton"), (x, weight), fast_mode=True)
    for used in (slice(0, 1), slice(1, 2), slice(0, 2)):
        torch.autograd.gradcheck(lambda *t, used=used: add_rms_norm(*t, zero_centred=zero_centred, impl="triton")[used],
                                 (x, residual, weight), fast_mode=True)


@interpreted
def test_operators_keep_torchs_rules():
    x, residual, weight = (t.requires_grad_() for t in inputs(5, 24, count=3))
    torch.library.opcheck(torch.ops.officina.rms_norm.default, (x, weight, 1e-6, False, True))
    torch.library.opcheck(torch.ops.officina.add_rms_norm.default, (x, residual, weight, 1e-6, True, False))


@interpreted
def test_compiled_and_recomputed_functions_give_the_same():
    x, residual, weight = (t.requires_grad_() for t in inputs(5, 24, count=3))

    def block(x, residual, weight):
        y, s = add_rms_norm(x, residual, weight, impl="triton")
        return rms_norm(y * s, weight, impl="triton")

    want = torch.autograd.grad(block(x, residual, weight).square().sum(), (x, residual, weight))
    compiled = torch.compile(block, fullgraph=True, backend="aot_eager")
    got = torch.autograd.grad(compiled(x, residual, weight).square().sum(), (x, residual, weight))
    recomputed = torch.utils.checkpoint.checkpoint(block, x, residual, weight, use_reentrant=False)
    again = torch.autograd.grad(recomputed.square().sum(), (x, residual, weight))
    torch.testing.assert_close(got, want)
    torch.testing.assert_close(again, want, rtol=0, atol=0)


@interpreted
def test_offsets_beyond_32_bits_reach_their_rows():
    stride = 2**30 + 24  # rows 2 and 3 begin beyond 2^31 elements; only the touched pages of the 8 GiB exist
    x = torch.empty(3 * stride + 16, dtype=torch.float16).as_strided((4, 16), (stride, 1))
    rows, weight = inputs(4, 16, dtype=torch.float16)
    x.copy_(rows)
    got, want = (torch.autograd.grad(rms_norm(t.requires_grad_(), weight, impl="triton").sum(), t)[0] for t in (x, rows))
    assert torch.equal(rms_norm(x, weight, impl="triton"), rms_norm(rows, weight, impl="triton")) and torch.equal(got, want)


@interpreted
def test_the_same_bits_every_time():
    assert_same_bits(lambda *x: add_rms_norm(*x, impl="triton"), inputs(70, 96, count=3))


def test_errors_say_what_does_not_fit():
    x, weight = inputs(3, 8)
    with pytest.raises(ValueError, match=r"x \(3, 8\) and weight \(7,\) do not fit"):
        rms_norm(x, weight[:7])
    with pytest.raises(ValueError, match=r"residual \(2, 8\) torch.float32 is not like x"):
        add_rms_norm(x, x[:2], weight)
    with pytest.raises(ValueError, match="impl=triton cannot run: the tensors are on the cpu"):
        rms_norm(x, weight, impl="triton")
    with pytest.raises(ValueError, match="rows of 16385 features, the kernel holds 16384 at most"):
        rms_norm(torch.ones(1, 16385), torch.ones(16385), impl="triton")
    assert torch.equal(rms_norm(x, weight), rms_norm_reference(x, weight))
