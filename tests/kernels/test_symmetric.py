"""The symmetric product, in Triton's interpreter, against plain torch."""

from __future__ import annotations

from unittest import mock

import pytest
import torch

from officina.kernels import symmetric
from officina.kernels.dispatch import jit, tl, triton
from officina.kernels.symmetric import symmetric_product, symmetric_product_reference
from officina.kernels.tables import INTERPRETER, Config
from tests.kernels.interpreter import interpreted
from tests.kernels.rules import assert_twice_as_good

SHAPES = [(1, 1), (7, 70), (65, 3), (130, 40), (32, 16), (0, 5), (5, 0)]


def inputs(N, M, dtype=torch.float32):
    generator = torch.Generator().manual_seed(N + M)
    x, c = torch.randn(N, M, generator=generator), torch.randn(N, N, generator=generator)
    return x.to(dtype), (c + c.T).to(dtype)


@interpreted
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_the_product_is_as_exact_as_plain_torch(dtype):
    for shape in SHAPES:
        x, addend = inputs(*shape, dtype=dtype)
        assert_twice_as_good(lambda x: symmetric_product(x, alpha=0.5, impl="triton"),
                             lambda x: symmetric_product_reference(x, alpha=0.5), [x])
        assert_twice_as_good(lambda x, c: symmetric_product(x, alpha=2.0, beta=-3.0, addend_NN=c, impl="triton"),
                             lambda x, c: symmetric_product_reference(x, alpha=2.0, beta=-3.0, addend_NN=c), [x, addend])


@interpreted
def test_the_result_is_exactly_symmetric_and_the_same_every_time():
    x, addend = inputs(130, 50)
    got = symmetric_product(x, addend_NN=addend, beta=0.3, impl="triton")
    assert torch.equal(got, got.T) and got.count_nonzero() == got.numel()
    assert torch.equal(got, symmetric_product(x, addend_NN=addend, beta=0.3, impl="triton"))
    above = addend + torch.ones_like(addend).triu(1)
    assert torch.equal(got, symmetric_product(x, addend_NN=above, beta=0.3, impl="triton"))


@interpreted
def test_the_kernel_by_tma_gives_the_same(monkeypatch):
    """On Hopper, where rows begin at multiples of 16 bytes; what does not goes to the other kernel."""
    monkeypatch.setitem(symmetric.TABLE, INTERPRETER, {torch.float16: Config(32, 16, 4, 1, {"tma": 1})})
    described = triton.tools.tensor_descriptor.TensorDescriptor
    with mock.patch.object(described, "from_tensor", wraps=described.from_tensor) as describe:
        for N, M, by_tma in ((72, 40, True), (32, 16, True), (8, 8, True), (136, 8, True), (70, 40, False), (72, 33, False)):
            x, addend = inputs(N, M, dtype=torch.float16)
            describe.reset_mock()
            got = symmetric_product(x, alpha=2.0, beta=-3.0, addend_NN=addend, impl="triton")
            assert describe.call_count == 3 * by_tma, (N, M)
            assert torch.equal(got, got.T)
            assert_twice_as_good(lambda x: symmetric_product(x, alpha=0.5, impl="triton"),
                                 lambda x: symmetric_product_reference(x, alpha=0.5), [x])
            assert_twice_as_good(lambda x, c: symmetric_product(x, beta=-3.0, addend_NN=c, impl="triton"),
                                 lambda x, c: symmetric_product_reference(x, beta=-3.0, addend_NN=c), [x, addend])


@jit
def triangle_kernel(out, first, count, BLOCK: tl.constexpr):
    place = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    i, j = symmetric._place_in_triangle(first + place)
    tl.store(out + place, i, mask=place < count)
    tl.store(out + count + place, j, mask=place < count)


def check_places_in_triangle(device):
    """The first 2^20, of a matrix of 185,000 rows in tiles of 128, and some where the root in fp32 is rounded up."""
    for first, count in [(0, 2**20), (4999 * 5000 // 2 - 8, 16)]:
        places = torch.empty(2, count, dtype=torch.int32, device=device)
        triangle_kernel[(-(-count // 4096),)](places, first, count, 4096)  # as one program it compiles for minutes
        i, j = places.cpu().long()
        assert ((0 <= j) & (j <= i)).all() and torch.equal(i * (i + 1) // 2 + j, first + torch.arange(count))


@interpreted
def test_programs_cover_the_triangle():
    check_places_in_triangle("cpu")
    x = torch.randn(32 * 7, 2, generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(symmetric_product(x, impl="triton"), x @ x.T)


@interpreted
def test_any_strides_are_taken():
    x, addend = inputs(40, 24)
    for view in (x.T, x[:, ::2], x[::3]):
        torch.testing.assert_close(symmetric_product(view, impl="triton"), view @ view.T)
    torch.testing.assert_close(symmetric_product(x, addend_NN=addend.T, beta=1.0, impl="triton"), x @ x.T + addend)


@interpreted
def test_an_addend_times_zero_is_not_read():
    x, addend = inputs(5, 3)
    got = symmetric_product(x, addend_NN=addend * torch.nan, beta=0.0, impl="triton")
    assert torch.equal(got, symmetric_product(x, impl="triton"))


@interpreted
def test_gradients_and_operator():
    x, c = (t.requires_grad_() for t in inputs(5, 3, torch.float64))
    torch.autograd.gradcheck(lambda x: symmetric_product(x, alpha=1.5, impl="triton"), (x,), fast_mode=True)
    torch.autograd.gradcheck(lambda x, c: symmetric_product(x, alpha=1.5, beta=0.5, addend_NN=c + c.T, impl="triton"), (x, c),
                             fast_mode=True)
    x, c = (t.requires_grad_() for t in inputs(5, 3))
    torch.library.opcheck(torch.ops.officina.symmetric_product.default, (x, c, 1.5, 0.5))


@interpreted
def test_offsets_beyond_32_bits_reach_their_rows():
    stride = 2**30 + 8  # rows 2 and 3 begin beyond 2^31 elements; only the touched pages of the 8 GiB exist
    far = torch.empty(3 * stride + 16, dtype=torch.float16).as_strided((4, 16), (stride, 1))
    near, _ = inputs(4, 16, torch.float16)
    far.copy_(near)
    assert torch.equal(symmetric_product(far, impl="triton"), symmetric_product(near, impl="triton"))


def test_errors_say_what_does_not_fit():
    x, addend = inputs(4, 3)
    with pytest.raises(ValueError, match=r"x \(3,\) must be a matrix"):
        symmetric_product(x[0])
    with pytest.raises(ValueError, match=r"addend \(4, 3\) torch.float32 must be \(4, 4\) torch.float32"):
        symmetric_product(x, addend_NN=addend[:, :3])
    with pytest.raises(ValueError, match="impl=triton cannot run: the tensors are on the cpu"):
        symmetric_product(x, impl="triton")
    assert torch.equal(symmetric_product(x, addend_NN=addend, beta=2.0), torch.addmm(addend, x, x.T, beta=2.0))
