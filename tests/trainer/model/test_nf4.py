"""Weights in 4 bits: codes against the nearest of the sixteen values and against bitsandbytes, gradients, ranges, memory."""

import pytest
import torch

from officina.trainer.errors import OfficinaError
from officina.trainer.model.init import ValuesSource
from officina.trainer.model.nf4 import LEVELS, PackedSource, RoundedSource, pack, packed_linear, pairs, unpack
from officina.trainer.model.shapes import nf4_row_bytes
from officina.trainer.state import PARAM

SHAPE = (24, 192)


def weights(seed: int = 0, shape: tuple[int, int] = SHAPE) -> torch.Tensor:
    random = torch.Generator().manual_seed(seed)
    w = torch.randn(shape, generator=random) * torch.rand(shape[0], 1, generator=random)
    w[3] = 0
    w[4, :64] = 1e-30
    w[5, 7] = 1000
    return w


def test_every_weight_becomes_the_nearest_of_sixteen_values():
    """Written apart from `pack`: distances to all values, block by block, in double precision."""
    w = weights()
    found = unpack(pack(w), pairs(), torch.float32)
    levels = torch.tensor(LEVELS, dtype=torch.float64)
    for row in range(SHAPE[0]):
        for block in range(0, SHAPE[1], 64):
            values = w[row, block:block + 64].double()
            size = values.abs().max()
            there = levels * size
            nearest = (values[:, None] - there).abs().min(1)
            away = (found[row, block:block + 64].double() - values).abs()
            assert torch.allclose(away, nearest.values, atol=1e-6 * size.item(), rtol=0)
            assert all((there - value).abs().min() <= 1e-6 * size for value in found[row, block:block + 64].double())
    assert torch.equal(found[3], torch.zeros(192)) and found[5, 7] == 1000


def test_the_values_are_quantiles_of_a_normal_distribution():
    """Appendix E of QLoRA: 8 quantiles below zero and 9 above, evenly spaced in probability up to an offset, scaled to 1."""
    normal = torch.distributions.Normal(0.0, 1.0)
    offset = 1 - (1 / 32 + 1 / 30) / 2  # of the two halves' outermost bins
    below = -normal.icdf(torch.linspace(offset, 0.5, 8, dtype=torch.float64)[:-1])
    above = normal.icdf(torch.linspace(offset, 0.5, 9, dtype=torch.float64)[:-1])
    expected = torch.cat([below, torch.zeros(1), above.flip(0)]) / above.max()
    assert (torch.tensor(LEVELS, dtype=torch.float64) - expected).abs().max() < 1e-5


def test_rounding_twice_is_rounding_once():
    once = unpack(pack(weights()), pairs(), torch.float32)
    assert torch.equal(unpack(pack(once), pairs(), torch.float32), once)


def test_bytes_and_values_are_those_of_bitsandbytes():
    functional = pytest.importorskip("bitsandbytes").functional
    w = weights(1, (64, 512))
    codes, state = functional.quantize_4bit(w, blocksize=64, quant_type="nf4", compress_statistics=False)
    packed = pack(w)
    assert torch.equal(packed[:, :256].flatten(), codes.flatten())
    assert torch.equal(packed[:, 256:].contiguous().view(torch.float32).flatten(), state.absmax)
    for dtype in (torch.float32, torch.bfloat16):
        state.dtype = dtype
        assert torch.equal(unpack(packed, pairs(), dtype), functional.dequantize_4bit(codes, state))


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_product_and_gradient_are_those_of_the_rounded_weight(dtype, bias):
    packed = pack(weights())
    plain = unpack(packed, pairs(), dtype)
    random = torch.Generator().manual_seed(2)
    b = torch.randn(24, generator=random).to(dtype) if bias else None
    x = torch.randn(2, 5, 192, generator=random).to(dtype).requires_grad_()
    other = x.detach().clone().requires_grad_()
    out, same = packed_linear(x, packed, pairs(), b), torch.nn.functional.linear(other, plain, b)
    assert torch.equal(out, same)
    upper = torch.randn(out.shape, generator=random).to(dtype)
    out.backward(upper)
    same.backward(upper)
    assert (x.grad - other.grad).abs().max() <= (1e-6 if dtype == torch.float32 else 1e-2) * other.grad.abs().max()


def test_only_the_packed_weight_is_kept_for_the_gradient():
    packed, table = pack(weights(3, (256, 1024))), pairs()
    kept: list[torch.Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        packed_linear(torch.randn(4, 1024, requires_grad=True), packed, table, None)
    assert sorted(t.numel() * t.element_size() for t in kept) == [table.numel() * 4, 256 * nf4_row_bytes(1024)]
    assert packed.numel() * 8 == 4.5 * 256 * 1024, "bits a weight"


def test_sources_read_any_range_as_part_of_the_whole():
    w = weights()
    source = ValuesSource({"a.weight": w, "b": torch.arange(5.0)})
    whole, rounded = pack(w).flatten(), unpack(pack(w), pairs(), torch.float32).flatten()
    held, values = PackedSource(source, {"a.weight": SHAPE}), RoundedSource(source, ["a.weight"])
    for a, b in ((0, len(whole)), (0, 0), (1, 2), (107, 109), (108, 216), (200, 2000), (len(whole) - 1, len(whole))):
        assert torch.equal(held.read("a.weight", PARAM, a, b), whole[a:b])
        assert torch.equal(values.read("a.weight", PARAM, a, b), rounded[a:b])
    assert torch.equal(held.read("b", PARAM, 1, 3), torch.tensor([1.0, 2.0]))


def test_numbers_that_are_not_finite_are_refused():
    w = weights()
    w[2, 2] = float("inf")
    with pytest.raises(OfficinaError, match="not finite, which adapter.base=nf4 cannot hold.*adapter.base=full"):
        pack(w)
