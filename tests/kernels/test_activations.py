"""Activation kernels, in Triton's interpreter, against the plain-torch references."""

from __future__ import annotations

import pytest
import torch

from officina.kernels import activations
from officina.kernels.activations import geglu, geglu_reference, swiglu, swiglu_reference, xielu, xielu_reference
from officina.kernels.dispatch import jit, tl
from tests.kernels.interpreter import interpreted
from tests.kernels.rules import assert_same_bits, assert_twice_as_good

PAIRS = {"swiglu": (swiglu, swiglu_reference), "geglu": (geglu, geglu_reference), "xielu": (xielu, xielu_reference)}


def inputs(name, *shape, dtype=torch.float32, scale=3.0):
    generator = torch.Generator().manual_seed(sum(shape))
    first, second = (scale * torch.randn(shape, generator=generator).to(dtype) for _ in range(2))
    return [first, second] if name != "xielu" else [first, *(torch.tensor([alpha]).to(dtype) for alpha in (0.7, -0.4))]


@interpreted
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("name", PAIRS)
def test_kernels_are_as_exact_as_plain_torch(name, dtype):
    kernel, reference = PAIRS[name]
    for shape, scale in [((0, 9), 1), ((7, 1), 1), ((1, 70), 1e-3), ((2, 1030), 3), ((9, 65), 10), ((2, 3, 5), 1)]:
        # The gradients of xIELU's alphas are sums of terms of both signs, whose rounding their value does not show.
        assert_twice_as_good(lambda *x: kernel(*x, impl="triton"), reference, inputs(name, *shape, dtype=dtype, scale=scale),
                             loose={2: 32, 3: 32} if name == "xielu" else {})


@interpreted
@pytest.mark.parametrize("name", PAIRS)
def test_gradients_are_those_of_the_function(name):
    leaves = [x.requires_grad_() for x in inputs(name, 2, 7, dtype=torch.float64)]
    torch.autograd.gradcheck(lambda *x: PAIRS[name][0](*x, impl="triton"), leaves, fast_mode=True)


@interpreted
def test_xielu_on_both_sides_of_its_joints():
    x = torch.tensor([[-100.0, -1.0, -0.5, -0.4999, -1e-3, -1e-6, -5e-7, 0.0, 1e-7, 1.0]]).requires_grad_()
    alphas = torch.tensor([30.0]).requires_grad_(), torch.tensor([-30.0]).requires_grad_()
    results = []
    for function in (lambda *t: xielu(*t, impl="triton"), xielu_reference):
        y = function(x, *alphas)
        results.append((y, *torch.autograd.grad(y.sum(), (x, *alphas))))
    torch.testing.assert_close(*results, rtol=1e-6, atol=0)


@interpreted
@pytest.mark.parametrize("name", PAIRS)
def test_nan_reaches_all_gradients_and_of_nothing_there_are_none(name):
    results = []
    for function in (lambda *x: PAIRS[name][0](*x, impl="triton"), PAIRS[name][1]):
        leaves = [x.requires_grad_() for x in inputs(name, 2, 3)]
        leaves[0].data[0, 1] = torch.nan
        y = function(*leaves)
        results.append((y, *torch.autograd.grad(y.sum(), leaves)))
    torch.testing.assert_close(*results, equal_nan=True)
    assert all(x.isnan().any() for x in results[0])
    for shape in ((3, 0), (0, 5, 0), (0,), (0, 4)):
        leaves = [x.requires_grad_() for x in inputs(name, *shape)]
        y = PAIRS[name][0](*leaves, impl="triton")
        assert y.shape == shape and not any(x.any() for x in torch.autograd.grad(y.sum(), leaves))


@interpreted
@pytest.mark.parametrize("name", PAIRS)
def test_operators_keep_torchs_rules(name):
    leaves = [x.requires_grad_() for x in inputs(name, 3, 20)]
    operator = torch.ops.officina.xielu if name == "xielu" else torch.ops.officina.gated
    torch.library.opcheck(operator.default, (*leaves, *([] if name == "xielu" else [name == "geglu"])))
    compiled = torch.compile(lambda *x: PAIRS[name][0](*x, impl="triton").square(), fullgraph=True, backend="aot_eager")
    got = torch.autograd.grad(compiled(*leaves).sum(), leaves)
    want = torch.autograd.grad(PAIRS[name][1](*leaves).square().sum(), leaves)
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)


@interpreted
def test_only_the_inputs_are_kept():
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x.data_ptr()) or x, lambda x: x):
        gate, up = (x.requires_grad_() for x in inputs("swiglu", 4, 8))
        swiglu(gate, up, impl="triton")
    assert kept == [gate.data_ptr(), up.data_ptr()]


@interpreted
def test_halves_of_one_product_need_no_copy():
    both = inputs("swiglu", 6, 80)[0]
    gate, up = both.chunk(2, dim=-1)
    torch.testing.assert_close(swiglu(gate, up, impl="triton"), swiglu_reference(gate, up))
    torch.testing.assert_close(swiglu(gate.T, up.T, impl="triton"), swiglu_reference(gate, up).T)
    assert all(rows is half for rows, half in zip(activations._rows(gate, up), (gate, up), strict=True))
    assert activations._rows(both)[0].shape == (1, 480)


@jit
def block_kernel(out, task, F, BLOCK: tl.constexpr):
    row, column = activations._block(task, F, BLOCK)
    tl.store(out + tl.arange(0, BLOCK), row)
    tl.store(out + BLOCK + tl.arange(0, BLOCK), column)


@interpreted
def test_long_rows_have_offsets_beyond_32_bits():
    for task, F in ((2**21 - 1, 2**31 - 8), (3 * 2**20 + 1, 2**33), (7, 3 * 1024)):
        out = torch.empty(2, 1024, dtype=torch.int64)
        block_kernel[(1,)](out, task, F, 1024)
        row, block = divmod(task, -(-F // 1024))
        assert (out[0] == row).all() and torch.equal(out[1], block * 1024 + torch.arange(1024))


@interpreted
def test_offsets_beyond_32_bits_reach_their_rows():
    stride = 2**30 + 8  # rows 2 and 3 begin beyond 2^31 elements; only the touched pages of the 8 GiB exist
    far = torch.empty(3 * stride + 16, dtype=torch.float16).as_strided((4, 16), (stride, 1))
    for name in ("swiglu", "xielu"):
        near = inputs(name, 4, 16, dtype=torch.float16)
        far.copy_(near[0])
        results = []
        for first in (far, near[0]):
            leaves = [first.detach().requires_grad_(), *near[1:]]
            y = PAIRS[name][0](*leaves, impl="triton")
            results.append((y, *torch.autograd.grad(y.sum(), leaves[:1])))
        torch.testing.assert_close(*results, rtol=0, atol=0)


@interpreted
@pytest.mark.parametrize("name", PAIRS)
def test_the_same_bits_every_time(name):
    assert_same_bits(lambda *x: PAIRS[name][0](*x, impl="triton"), inputs(name, 6, 70))


def test_errors_say_what_does_not_fit():
    gate, up = inputs("swiglu", 2, 8)
    with pytest.raises(ValueError, match=r"swiglu: gate \(2, 8\) torch.float32 and up \(2, 7\) torch.float32 must be alike"):
        swiglu(gate, up[:, :7])
    with pytest.raises(ValueError, match="geglu: .* torch.float16 must be alike"):
        geglu(gate, up.half())
    with pytest.raises(ValueError, match=r"xielu: alpha_p \(2,\) and alpha_n \(1,\) must have one element each"):
        xielu(gate, torch.ones(2), torch.ones(1))
    with pytest.raises(ValueError, match=r"xielu: x \(\) has no axis; need \(..., F\), such as x\[None\]"):
        xielu(torch.tensor(1.0), torch.ones(1), torch.ones(1))
    with pytest.raises(ValueError, match=r"swiglu: gate \(\) .* must be alike, \(..., F\)"):
        swiglu(torch.tensor(1.0), torch.tensor(1.0))
    for name in PAIRS:
        with pytest.raises(ValueError, match=f"{name}: impl=triton cannot run: the tensors are on the cpu"):
            PAIRS[name][0](*inputs(name, 2, 8), impl="triton")
        assert torch.equal(PAIRS[name][0](*inputs(name, 2, 8)), PAIRS[name][1](*inputs(name, 2, 8)))
