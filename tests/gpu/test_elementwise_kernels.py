"""Norms, RoPE, activations, AdamW and the symmetric product on a GPU: as exact as plain torch, compiled too, same bits."""

import pytest
import torch

from officina.kernels.activations import geglu, geglu_reference, swiglu, swiglu_reference, xielu, xielu_reference
from officina.kernels.adamw import adamw_step_
from officina.kernels.rms_norm import add_rms_norm, add_rms_norm_reference, rms_norm, rms_norm_reference
from officina.kernels.rope import rope, rope_reference
from officina.kernels.symmetric import symmetric_product, symmetric_product_reference
from tests.kernels.rules import assert_same_bits, assert_twice_as_good
from tests.kernels.test_symmetric import check_places_in_triangle

pytestmark = pytest.mark.gpu

DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
UNARY = {"rms_norm": (rms_norm, rms_norm_reference), "swiglu": (swiglu, swiglu_reference), "geglu": (geglu, geglu_reference),
         "add_rms_norm": (add_rms_norm, add_rms_norm_reference), "xielu": (xielu, xielu_reference)}


def inputs(name: str, N: int, D: int, dtype: torch.dtype, device: torch.device) -> list[torch.Tensor]:
    torch.manual_seed(N + D)
    first, second = torch.randn(2, N, D, device=device, dtype=dtype)
    weight = torch.randn(D, device=device, dtype=dtype)
    return {"rms_norm": [first, weight], "add_rms_norm": [first, second, weight],
            "xielu": [first, weight[:1].abs(), weight[1:2]]}.get(name, [first, second])


@DTYPES
@pytest.mark.parametrize("N,D", [(1000, 4096), (4099, 128), (77, 2050), (130, 16_384)])
@pytest.mark.parametrize("name", UNARY)
def test_kernels_are_as_exact_as_plain_torch(cuda, name, N, D, dtype):
    kernel, reference = UNARY[name]
    # Gradients of weights and alphas are sums over all rows, whose rounding their value does not show.
    sums = {"rms_norm": {2: 32}, "add_rms_norm": {4: 32}, "xielu": {2: 32, 3: 32}}.get(name, {})
    assert_twice_as_good(lambda *x: kernel(*x, impl="triton"), reference, inputs(name, N, D, dtype, cuda), loose=sums)


@DTYPES
@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("norm", [False, True])
@pytest.mark.parametrize("K,P", [(128, 64), (64, 16), (80, 40)])
def test_rope_is_as_exact_as_plain_torch(cuda, K, P, norm, interleaved, dtype):
    torch.manual_seed(0)
    q, k = (torch.randn(2, 700, heads, K, device=cuda, dtype=dtype).transpose(1, 2) for heads in (32, 8))
    weights = [torch.randn(K, device=cuda, dtype=dtype) for _ in range(2)] if norm else []
    angles = torch.rand(2, 1, 700, P, device=cuda) * 100

    def call(function, q, k, *weights, **impl):
        weights = dict(zip(("q_weight_K", "k_weight_K"), weights, strict=False))
        return function(q, k, angles.cos(), angles.sin(), interleaved=interleaved, **weights, **impl)

    assert_twice_as_good(lambda *x: call(rope, *x, impl="triton"), lambda *x: call(rope_reference, *x), [q, k, *weights],
                         loose={4: 32, 5: 32})  # the weights' gradients, as above


@DTYPES
@pytest.mark.parametrize("N,M", [(1000, 512), (129, 77), (2048, 4096)])
def test_symmetric_product_is_as_exact_as_plain_torch(cuda, N, M, dtype):
    torch.manual_seed(0)
    x, c = torch.randn(N, M, device=cuda, dtype=dtype), torch.randn(N, N, device=cuda, dtype=dtype)
    c = c + c.T
    assert_twice_as_good(lambda x, c: symmetric_product(x, alpha=2.0, beta=0.5, addend_NN=c, impl="triton"),
                         lambda x, c: symmetric_product_reference(x, alpha=2.0, beta=0.5, addend_NN=c), [x, c])
    check_places_in_triangle(cuda)
    found = symmetric_product(x, addend_NN=c, beta=0.5, impl="triton")
    assert torch.equal(found, found.T)


@DTYPES
def test_ten_adamw_steps_are_as_exact_as_torchs(cuda, dtype):
    torch.manual_seed(0)
    shapes = [(4096, 512), (1,), (1023,), (77, 13)]
    start = [torch.randn(shape, device=cuda) for shape in shapes]
    exact, theirs = ([torch.nn.Parameter(p.to(kind)) for p in start] for kind in (torch.float64, torch.float32))
    optimizers = [torch.optim.AdamW(params, lr=1e-2, weight_decay=0.1, fused=True) for params in (exact, theirs)]
    ours, moments = [p.clone() for p in start], [[torch.zeros_like(p) for p in start] for _ in range(2)]
    copies, count = [p.bfloat16() for p in start], torch.zeros((), device=cuda)
    for _ in range(10):
        grads = [torch.randn_like(p).to(dtype) for p in start]
        for params, optimizer in zip((exact, theirs), optimizers, strict=True):
            for parameter, grad in zip(params, grads, strict=True):
                parameter.grad = 0.5 * grad.to(parameter.dtype)
            optimizer.step()
        adamw_step_(ours, grads, *moments, count, copies=copies, lr=1e-2, beta1=0.9, beta2=0.999, eps=1e-8, weight_decay=0.1,
                    grad_scale=torch.tensor(0.5, device=cuda), skip=torch.tensor(False, device=cuda), impl="triton")
    for want, near, got, copy in zip(exact, theirs, ours, copies, strict=True):
        error, allowed = ((x.detach().double() - want.detach()).abs().max() for x in (got, near))
        assert error <= 2 * allowed + 4 * torch.finfo(torch.float32).eps * want.abs().max()
        assert torch.equal(copy, got.bfloat16())
    adamw_step_(ours, grads, *moments, count, lr=1.0, beta1=0.9, beta2=0.999, eps=1e-8, weight_decay=0.1,
                skip=torch.tensor(True, device=cuda), impl="triton")
    assert torch.equal(copies[0], ours[0].bfloat16()) and count == 10


@pytest.mark.parametrize("name", UNARY)
def test_compiled_kernels_give_the_same_and_the_same_bits(cuda, name):
    kernel, _ = UNARY[name]
    leaves = [x.requires_grad_() for x in inputs(name, 300, 256, torch.bfloat16, cuda)]

    def block(*x):
        y = kernel(*(2 * t for t in x), impl="triton")
        return (y[0] * y[1] if isinstance(y, tuple) else y).float().square().sum()

    want = torch.autograd.grad(block(*leaves), leaves)
    got = torch.autograd.grad(torch.compile(block, fullgraph=True)(*leaves), leaves)
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, rtol=2e-2, atol=2e-2 * float(b.abs().max()))
    assert_same_bits(lambda *x: kernel(*x, impl="triton"), inputs(name, 5000, 1024, torch.bfloat16, cuda), times=4)


def test_more_than_two_to_the_31_elements(cuda):
    N, D = 2**20 + 3, 2048
    x, weight = torch.empty(N, D, device=cuda, dtype=torch.bfloat16), torch.ones(D, device=cuda, dtype=torch.bfloat16)
    x[-5:] = torch.randn(5, D, device=cuda)
    assert x.numel() > 2**31
    with torch.no_grad():
        torch.testing.assert_close(rms_norm(x, weight, impl="triton")[-5:], rms_norm_reference(x[-5:], weight))
        torch.testing.assert_close(swiglu(x, x, impl="triton")[-5:], swiglu_reference(x[-5:], x[-5:]))
