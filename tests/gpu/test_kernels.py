"""Attention and the loss on a GPU against their references in fp64."""

import pytest
import torch

from officina.kernels.attention import attention, attention_reference
from officina.kernels.cross_entropy import IGNORE
from officina.kernels.linear_cross_entropy import linear_cross_entropy, linear_cross_entropy_reference
from officina.kernels.masks import dense_mask, document_spans

pytestmark = pytest.mark.gpu

BOUND = {torch.float32: 2e-5, torch.bfloat16: 1e-2}
"""On |found - reference| / |reference|. bf16 holds 8 bits, so each rounding is up to 4e-3 off."""


def relative(found: torch.Tensor, wanted: torch.Tensor) -> float:
    return ((found.double() - wanted.double()).norm() / wanted.double().norm()).item()


def documents(B: int, T: int, device: torch.device) -> torch.Tensor:
    torch.manual_seed(3)
    return (torch.rand(B, T, device=device) < 0.02).int().cumsum(1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("packed", [False, True], ids=["whole", "packed"])
@pytest.mark.parametrize("window", [0, 100])
@pytest.mark.parametrize("impl", ["sdpa", "flex", "triton", "auto"])
def test_attention_and_its_gradients(device, impl, window, packed, dtype):
    if impl in ("flex", "triton") and device.type != "cuda":
        pytest.skip(f"{impl} attention needs a GPU")
    B, H, G, T, D = 2, 8, 2, 384, 64
    torch.manual_seed(0)
    inputs = [torch.randn(B, heads, T, D, device=device, dtype=dtype).requires_grad_() for heads in (H, G, G)]
    direction = torch.randn(B, H, T, D, device=device, dtype=dtype)
    docs = documents(B, T, device) if packed else None
    found = attention(*inputs, window=window, documents_BS=docs, impl=impl)
    grads = torch.autograd.grad(found, inputs, direction)

    wide = [x.detach().double().requires_grad_() for x in inputs]
    mask = dense_mask(T, T, True, window, None if docs is None else document_spans(docs), device)
    wanted = attention_reference(*wide, mask=mask, scale=D**-0.5, softcap=0.0)
    wanted_grads = torch.autograd.grad(wanted, wide, direction.double())
    assert found.dtype == dtype and relative(found, wanted) < BOUND[dtype]
    for grad, wanted_grad in zip(grads, wanted_grads, strict=True):
        assert relative(grad, wanted_grad) < BOUND[dtype]


def test_flex_attention_with_softcap(cuda):
    torch.manual_seed(0)
    q, k, v = (torch.randn(1, heads, 256, 64, device=cuda) * 3 for heads in (4, 2, 2))
    found = attention(q, k, v, softcap=5.0, impl="flex")
    wanted = attention_reference(q.double(), k.double(), v.double(), mask=dense_mask(256, 256, True, 0, None, cuda),
                                 scale=64**-0.5, softcap=5.0)
    assert relative(found, wanted) < BOUND[torch.float32]


def test_a_document_is_not_seen_by_the_next(device):
    q, k, v = (torch.randn(1, 4, 256, 64, device=device) for _ in range(3))
    docs = (torch.arange(256, device=device) >= 100).int()[None]
    before = attention(q, k, v, documents_BS=docs)
    k[:, :, :100] += 1
    assert torch.equal(attention(q, k, v, documents_BS=docs)[:, :, 100:], before[:, :, 100:])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("z_loss, softcap", [(0.0, 0.0), (1e-3, 0.0), (0.0, 20.0)])
@pytest.mark.parametrize("chunk_tokens", [0, 100])
def test_loss_and_its_gradients(device, dtype, z_loss, softcap, chunk_tokens):
    torch.manual_seed(0)
    x = torch.randn(333, 64, device=device, dtype=dtype).requires_grad_()
    weight = (torch.randn(1000, 64, device=device) * 0.2).to(dtype).requires_grad_()
    labels = torch.randint(0, 1000, (333,), device=device)
    labels[::7] = IGNORE
    loss = linear_cross_entropy(x, weight, labels, z_loss=z_loss, softcap=softcap, chunk_tokens=chunk_tokens)
    grads = torch.autograd.grad(loss * 0.3, (x, weight))
    wide = [t.detach().double().requires_grad_() for t in (x, weight)]
    wanted = linear_cross_entropy_reference(*wide, labels, z_loss=z_loss, softcap=softcap)
    wanted_grads = torch.autograd.grad(wanted * 0.3, wide)
    assert loss.dtype == torch.float32 and relative(loss, wanted) < BOUND[dtype]
    for grad, wanted_grad in zip(grads, wanted_grads, strict=True):
        assert relative(grad, wanted_grad) < BOUND[dtype]


def test_the_loss_never_holds_all_logits(cuda):
    """8,192 tokens of a vocabulary of 128,256: all logits are 4.2 GB in fp32, and their gradient as much again."""
    torch.manual_seed(0)
    x = torch.randn(8192, 512, device=cuda, dtype=torch.bfloat16).requires_grad_()
    weight = torch.randn(128_256, 512, device=cuda, dtype=torch.bfloat16).requires_grad_()
    labels = torch.randint(0, 128_256, (8192,), device=cuda)
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    linear_cross_entropy(x, weight, labels).backward()
    assert torch.cuda.max_memory_allocated() - before < 8192 * 128_256 * 4
