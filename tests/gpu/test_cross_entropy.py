"""Cross-entropy on a GPU: the kernels in bf16, in place, over many rows, and inside the chunked projection."""

import pytest
import torch

from officina.kernels import linear_cross_entropy as module
from officina.kernels.cross_entropy import (
    IGNORE,
    VocabShard,
    combine_sums,
    cross_entropy,
    cross_entropy_,
    cross_entropy_reference,
    row_sums,
)
from officina.kernels.linear_cross_entropy import linear_cross_entropy, linear_cross_entropy_reference
from tests.kernels.rules import assert_same_bits, assert_twice_as_good

pytestmark = pytest.mark.gpu

TERMS = [{}, {"z_loss": 1e-3, "label_smoothing": 0.1, "softcap": 20.0}]


def inputs(device, N, V, dtype=torch.bfloat16):
    torch.manual_seed(N + V)
    labels = torch.randint(0, V, (N,), device=device)
    labels[::5] = IGNORE
    return (3 * torch.randn(N, V, device=device)).to(dtype), labels


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=["bf16", "fp16", "fp32"])
@pytest.mark.parametrize("N, V", [(7, 1000), (64, 50_257), (300, 128_256)])
@pytest.mark.parametrize("terms", TERMS, ids=lambda terms: "+".join(terms) or "plain")
def test_the_kernel_is_as_exact_as_plain_torch(cuda, N, V, dtype, terms):
    logits, labels = inputs(cuda, N, V, dtype)
    assert_twice_as_good(lambda x: cross_entropy(x, labels, impl="triton", **terms),
                         lambda x: cross_entropy_reference(x, labels, **terms), [logits])
    got = logits.clone()
    losses = cross_entropy_(got, labels, impl="triton", **terms)
    wide = logits.double().requires_grad_()
    want = cross_entropy_reference(wide, labels, **terms)
    torch.testing.assert_close(losses.double(), want, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(got.double(), torch.autograd.grad(want.sum(), wide)[0], rtol=1e-2, atol=1e-5)


def test_one_token_and_one_row_of_the_vocabulary(cuda):
    """The compiler takes a 1 for a constant."""
    logits, labels = torch.ones(1, 1, device=cuda, requires_grad=True), torch.zeros(1, dtype=torch.int64, device=cuda)
    losses = cross_entropy(logits, labels, impl="triton")
    # log and exp of a GPU are approximate: not quite 0.
    assert abs(losses.item()) < 1e-6 and abs(torch.autograd.grad(losses.sum(), logits)[0].item()) < 1e-6
    assert abs(cross_entropy_(logits.detach(), labels, impl="triton").item()) < 1e-6


def test_more_logits_than_32_bits_can_count(cuda):
    N, V = 2**31 // 65_536 + 8, 65_536  # 4.3 GB; the last 8 rows begin beyond 2^31
    logits = torch.randn(N, V, device=cuda, dtype=torch.bfloat16)
    labels = torch.randint(0, V, (N,), device=cuda)
    last = logits[-16:].float().requires_grad_()
    want = cross_entropy_reference(last, labels[-16:])
    losses = cross_entropy_(logits, labels, impl="triton")
    torch.testing.assert_close(losses[-16:], want, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(logits[-16:].float(), torch.autograd.grad(want.sum(), last)[0], rtol=1e-2, atol=1e-6)


def test_the_same_bits_every_time(cuda):
    logits, labels = inputs(cuda, 300, 128_256)
    assert_same_bits(lambda x: cross_entropy(x, labels, impl="triton"), [logits], times=5)


def test_parts_of_a_vocabulary_make_the_whole(cuda):
    logits, labels = inputs(cuda, 100, 32_000, torch.float32)
    sums = torch.stack([row_sums(logits[:, a:a + 16_000], labels, first=a, impl="triton") for a in (0, 16_000)])
    want = cross_entropy_reference(logits, labels, z_loss=1e-3)
    for a in (0, 16_000):
        part = logits[:, a:a + 16_000].contiguous()
        shard = VocabShard(a, 32_000, lambda own: combine_sums(sums))
        torch.testing.assert_close(cross_entropy(part, labels, z_loss=1e-3, shard=shard, impl="triton"), want)


@pytest.mark.parametrize("V", [1000, 50_257])
@pytest.mark.parametrize("chunk_tokens", [0, 100])
def test_the_projection_takes_the_kernel(cuda, V, chunk_tokens):
    torch.manual_seed(0)
    x = torch.randn(333, 64, device=cuda, dtype=torch.bfloat16)
    weight = (0.2 * torch.randn(V, 64, device=cuda)).to(torch.bfloat16)
    labels = torch.randint(0, V, (333,), device=cuda)
    labels[::7] = IGNORE
    assert_twice_as_good(
        lambda *t: linear_cross_entropy(*t, labels, z_loss=1e-3, chunk_tokens=chunk_tokens, impl="triton"),
        lambda *t: linear_cross_entropy_reference(*t, labels, z_loss=1e-3), [x, weight])


def test_adding_a_product_wide_is_exact_where_torch_can(cuda):
    """Whatever `_adds_wide` says of this torch, the sum is right; and it waits for nothing."""
    a, b = (torch.randn(64, 64, device=cuda, dtype=torch.bfloat16) for _ in range(2))
    total = torch.ones(64, 64, device=cuda)
    want = 1 + a.double() @ b.double()
    narrow = module._adds_wide(cuda, torch.float32, torch.bfloat16)
    module._add_product(total, a, b)
    torch.testing.assert_close(total.double(), want, rtol=1e-4 if narrow else 1e-2, atol=1e-4 if narrow else 0.2)


def test_bf16_gradient_is_scaled_in_fp32(cuda):
    """A scale such as 1 / step_tokens, rounded to bf16, would put every gradient off by up to 0.4 %."""
    torch.manual_seed(0)
    leaves = [torch.randn(n, 64, device=cuda, dtype=torch.bfloat16, requires_grad=True) for n in (333, 1000)]
    loss, scale = linear_cross_entropy(*leaves, torch.randint(0, 1000, (333,), device=cuda)), 1 / 699
    plain = torch.autograd.grad(loss, leaves, retain_graph=True)
    for got, unscaled in zip(torch.autograd.grad(loss * scale, leaves), plain, strict=True):  # 0.26 % away from bf16
        assert abs(got.double().norm() / unscaled.double().norm() / scale - 1) < 5e-4


def test_forward_and_backward_wait_for_nothing(cuda):
    x = torch.randn(256, 64, device=cuda, dtype=torch.bfloat16, requires_grad=True)
    weight = torch.randn(1000, 64, device=cuda, dtype=torch.bfloat16, requires_grad=True)
    labels = torch.randint(0, 1000, (256,), device=cuda)
    linear_cross_entropy(x, weight, labels, chunk_tokens=100).backward()  # compiles
    torch.cuda.set_sync_debug_mode("error")
    try:
        linear_cross_entropy(x, weight, labels, chunk_tokens=100).backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_compiled_it_is_one_graph(cuda):
    logits, labels = inputs(cuda, 64, 1000)
    logits.requires_grad_()

    def loss(x):
        return cross_entropy(2 * x, labels, z_loss=1e-3, impl="triton").sum()

    want = torch.autograd.grad(loss(logits), logits)
    torch.testing.assert_close(torch.autograd.grad(torch.compile(loss, fullgraph=True)(logits), logits), want)
