"""The chunked projection and loss against its plain-torch reference."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from officina.kernels.cross_entropy import IGNORE
from officina.kernels.linear_cross_entropy import linear_cross_entropy, linear_cross_entropy_reference


def inputs(N=37, V=53, D=16, dtype=torch.float32, scale=1.0):
    torch.manual_seed(0)
    x = torch.randn(N, D).to(dtype).requires_grad_()
    weight = (scale * torch.randn(V, D)).to(dtype).requires_grad_()
    labels = torch.randint(0, V, (N,))
    labels[::5] = IGNORE
    return x, weight, labels


@pytest.mark.parametrize("softcap", [0.0, 3.0])
@pytest.mark.parametrize("z_loss", [0.0, 1e-2])
@pytest.mark.parametrize("chunk_tokens", [0, 1, 8, 37, 100])
def test_loss_and_gradients_equal_the_reference(chunk_tokens, z_loss, softcap):
    x, weight, labels = inputs()
    want = linear_cross_entropy_reference(x, weight, labels, z_loss=z_loss, softcap=softcap)
    got = linear_cross_entropy(x, weight, labels, z_loss=z_loss, softcap=softcap, chunk_tokens=chunk_tokens)
    torch.testing.assert_close(got, want, atol=0, rtol=2e-6)
    assert got.dtype == torch.float32 and got.dim() == 0
    for g, w in zip(torch.autograd.grad(got * 0.3, (x, weight)), torch.autograd.grad(want * 0.3, (x, weight)), strict=True):
        torch.testing.assert_close(g, w, atol=2e-6, rtol=1e-5)


def test_gradients_in_fp64_are_those_of_the_function():
    x, weight, labels = inputs(N=7, V=11, D=5, dtype=torch.float64)
    for z_loss, softcap in ((0.0, 0.0), (0.1, 0.0), (0.1, 2.0)):
        assert torch.autograd.gradcheck(
            lambda x, w, z=z_loss, c=softcap: linear_cross_entropy(x, w, labels, z_loss=z, softcap=c, chunk_tokens=3),
            (x, weight))


@pytest.mark.parametrize("needs", [(True, False), (False, True)])
def test_only_the_gradient_that_is_asked_for(needs):
    x, weight, labels = inputs()
    x.requires_grad_(needs[0])
    weight.requires_grad_(needs[1])
    linear_cross_entropy(x, weight, labels).backward()
    assert (x.grad is not None, weight.grad is not None) == needs


def test_bf16_gradient_is_scaled_in_fp32():
    """A scale such as 1 / step_tokens, rounded to bf16, would put every gradient off by up to 0.4 %."""
    x, weight, labels = inputs(dtype=torch.bfloat16)
    scale = 1 / 1017  # 0.19 % away from the nearest bf16 number
    linear_cross_entropy(x, weight, labels).backward()
    plain = x.grad.float(), weight.grad.float()
    x.grad = weight.grad = None
    (linear_cross_entropy(x, weight, labels) * scale).backward()
    for got, unscaled in zip((x.grad.float(), weight.grad.float()), plain, strict=True):
        ratio = (got.double().norm() / unscaled.double().norm() / scale).item()
        assert abs(ratio - 1) < 5e-4


def test_bf16_sums_chunks_in_fp32():
    x, weight, labels = inputs(N=512, dtype=torch.bfloat16)
    exact = torch.autograd.grad(linear_cross_entropy_reference(x.double(), weight.double(), labels), weight)[0]
    errors = [(torch.autograd.grad(linear_cross_entropy(x, weight, labels, chunk_tokens=c), weight)[0].double()
               - exact).norm() for c in (512, 2)]
    assert errors[1] < 1.5 * errors[0]


def test_without_labels_the_sum_is_zero_and_so_are_all_gradients():
    x, weight, labels = inputs()
    loss = linear_cross_entropy(x, weight, torch.full_like(labels, IGNORE), z_loss=0.1)
    loss.backward()
    assert loss.item() == 0 and x.grad.abs().max() == 0 and weight.grad.abs().max() == 0


class Watch(TorchDispatchMode):
    """Elements of the largest tensor that any operation returns, and the number of matrix products."""

    def __init__(self):
        super().__init__()
        self.numel = self.products = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        self.products += "mm" in function.__name__
        for tensor in out if isinstance(out, (tuple, list)) else (out,):
            if isinstance(tensor, torch.Tensor):
                self.numel = max(self.numel, tensor.numel())
        return out


def test_all_logits_are_never_held():
    x, weight, labels = inputs(N=600, V=400, D=8)
    with Watch() as watch:
        linear_cross_entropy(x, weight, labels, chunk_tokens=50, z_loss=0.1, softcap=5.0).backward()
    assert watch.numel == 50 * 400
    with Watch() as watch:
        linear_cross_entropy_reference(x, weight, labels).backward()
    assert watch.numel == 600 * 400  # the measurement sees them where they are


def test_three_products_a_chunk_and_without_gradient_one():
    x, weight, labels = inputs()
    with Watch() as watch:
        linear_cross_entropy(x, weight, labels, chunk_tokens=10).backward()
    assert watch.products == 4 * 3
    with torch.no_grad(), Watch() as watch:
        linear_cross_entropy(x, weight, labels, chunk_tokens=10)
    assert watch.products == 4


def test_inputs_are_left_alone():
    x, weight, labels = inputs()
    before = [t.detach().clone() for t in (x, weight, labels)]
    linear_cross_entropy(x, weight, labels, softcap=2.0, z_loss=0.1).backward()
    assert all(torch.equal(a, b) for a, b in zip(before, (x, weight, labels), strict=True))


def test_errors_name_the_shapes():
    x, weight, labels = inputs()
    with pytest.raises(ValueError, match=r"x \(37, 16\), weight \(53, 15\)"):
        linear_cross_entropy(x, weight[:, :15], labels)
    with pytest.raises(ValueError, match=r"labels \(36,\)"):
        linear_cross_entropy(x, weight, labels[1:])
