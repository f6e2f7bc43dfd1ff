"""The chunked projection and loss against its plain-torch reference."""

from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from torch.utils._python_dispatch import TorchDispatchMode

from officina.kernels import linear_cross_entropy as module
from officina.kernels.cross_entropy import IGNORE, VocabShard, combine_sums, row_sums
from officina.kernels.linear_cross_entropy import (
    linear_cross_entropy,
    linear_cross_entropy_reference,
    linear_token_scores,
)
from tests.kernels.interpreter import interpreted
from tests.kernels.rules import assert_same_bits, assert_twice_as_good


def inputs(N=37, V=53, D=16, dtype=torch.float32, scale=1.0):
    torch.manual_seed(0)
    x = torch.randn(N, D).to(dtype).requires_grad_()
    weight = (scale * torch.randn(V, D)).to(dtype).requires_grad_()
    labels = torch.randint(0, V, (N,))
    labels[::5] = IGNORE
    return x, weight, labels


@torch.no_grad()
def z_loss_of(x, weight, labels, terms):
    """The sum of the squared log-partition functions, written out."""
    logits, cap = x @ weight.T, terms.get("softcap", 0.0)
    logits = cap * torch.tanh(logits / cap) if cap else logits
    return terms.get("z_loss", 0.0) * logits.logsumexp(1)[labels != IGNORE].square().sum()


@pytest.mark.parametrize("softcap", [0.0, 3.0])
@pytest.mark.parametrize("z_loss, label_smoothing", [(0.0, 0.0), (1e-2, 0.0), (1e-2, 0.1)])
@pytest.mark.parametrize("chunk_tokens", [0, 1, 8, 37, 100])
def test_loss_and_gradients_equal_the_reference(chunk_tokens, z_loss, label_smoothing, softcap):
    x, weight, labels = inputs()
    terms = {"z_loss": z_loss, "label_smoothing": label_smoothing, "softcap": softcap}
    want = linear_cross_entropy_reference(x, weight, labels, **terms)
    got, z = linear_cross_entropy(x, weight, labels, chunk_tokens=chunk_tokens, split=True, **terms)
    torch.testing.assert_close(got, want, atol=0, rtol=2e-6)
    torch.testing.assert_close(z, z_loss_of(x, weight, labels, terms), atol=0, rtol=2e-6)
    assert got.dtype == torch.float32 and got.dim() == 0
    assert torch.equal(linear_cross_entropy(x, weight, labels, chunk_tokens=chunk_tokens, **terms), got)
    for g, w in zip(torch.autograd.grad(got * 0.3, (x, weight)), torch.autograd.grad(want * 0.3, (x, weight)), strict=True):
        torch.testing.assert_close(g, w, atol=2e-6, rtol=1e-5)


@interpreted
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("terms", [{}, {"z_loss": 1e-2, "label_smoothing": 0.1, "softcap": 3.0}])
def test_with_the_kernel_it_is_as_exact_as_plain_torch(terms, dtype):
    x, weight, labels = (t.detach() for t in inputs(N=13, V=70, dtype=dtype, scale=0.3))
    for chunk_tokens in (5, 100):
        def function(*t, chunk_tokens=chunk_tokens):
            return linear_cross_entropy(*t, chunk_tokens=chunk_tokens, impl="triton", **terms)

        assert_twice_as_good(function, lambda *t: linear_cross_entropy_reference(*t, **terms), (x, weight, labels))
    assert_same_bits(function, (x, weight, labels))
    with torch.no_grad():
        torch.testing.assert_close(function(x, weight, labels), linear_cross_entropy_reference(x, weight, labels, **terms))
    want = z_loss_of(x.float(), weight.float(), labels, terms)
    for part in (weight, weight.requires_grad_()):  # without gradient, and with
        z = linear_cross_entropy(x, part, labels, chunk_tokens=5, split=True, impl="triton", **terms)[1]
        torch.testing.assert_close(z, want, atol=0, rtol=1e-6 if dtype == torch.float32 else 1e-3)


@interpreted
def test_compiled_with_the_kernel_it_gives_the_same():
    check_compiled("triton")


def test_compiled_and_recomputed_it_gives_the_same():
    check_compiled("auto")


def check_compiled(impl):
    x, weight, labels = inputs()

    def loss(x, weight, labels):
        return linear_cross_entropy(2 * x, weight, labels, z_loss=0.1, chunk_tokens=10, impl=impl)

    want = torch.autograd.grad(loss(x, weight, labels), (x, weight))
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager", dynamic=True)
    for n in (37, 30):
        got = torch.autograd.grad(compiled(x[:n], weight, labels[:n]), (x, weight))
        torch.testing.assert_close(got, torch.autograd.grad(loss(x[:n], weight, labels[:n]), (x, weight)))
    again = torch.utils.checkpoint.checkpoint(loss, x, weight, labels, use_reentrant=False)
    torch.testing.assert_close(torch.autograd.grad(again, (x, weight)), want, rtol=0, atol=0)
    with torch.no_grad():
        torch.testing.assert_close(compiled(x, weight, labels), loss(x, weight, labels))
    torch.library.opcheck(torch.ops.officina.linear_cross_entropy.default, (
        x.detach(), weight.detach(), labels, 0.1, 0.0, 0.0, 10, "triton" if impl == "triton" else "reference", True, False))


def on_a_rank(ranks):
    """This rank's loss and gradients, its vocabulary being half of the rows."""
    rank = ranks.env.rank
    x, weight, labels = inputs(V=52, dtype=torch.float64)
    part = weight.detach()[rank * 26:(rank + 1) * 26].clone().requires_grad_()

    def combine(own):
        found = [torch.empty_like(own) for _ in range(2)]
        dist.all_gather(found, own)
        return combine_sums(torch.stack(found))

    sums = linear_cross_entropy(x, part, labels, shard=VocabShard(rank * 26, 52, combine), chunk_tokens=10, z_loss=0.1,
                                label_smoothing=0.1, softcap=3.0, split=True)
    dx, dpart = torch.autograd.grad(sums[0], (x, part))
    dist.all_reduce(dx)
    return sums.tolist(), dx.tolist(), dpart.tolist()


def test_two_ranks_share_a_vocabulary(pool):
    found = pool.run(2, "tests.kernels.test_linear_cross_entropy:on_a_rank")
    x, weight, labels = inputs(V=52, dtype=torch.float64)
    loss = linear_cross_entropy_reference(x, weight, labels, z_loss=0.1, label_smoothing=0.1, softcap=3.0)
    dx, dweight = (grad.tolist() for grad in torch.autograd.grad(loss, (x, weight)))
    z = z_loss_of(x, weight, labels, {"z_loss": 0.1, "softcap": 3.0})
    for own_sums, own_dx, _ in found:
        torch.testing.assert_close(own_sums, [loss.item(), z.item()])
        torch.testing.assert_close(own_dx, dx)
    torch.testing.assert_close([*found[0][2], *found[1][2]], dweight)


@interpreted
def test_parts_of_a_vocabulary_make_the_whole_in_the_kernel():
    x, weight, labels = inputs(N=5, V=60)
    terms = {"z_loss": 0.1, "label_smoothing": 0.1, "softcap": 3.0}
    want = linear_cross_entropy_reference(x, weight, labels, **terms)
    dx, dweight = torch.autograd.grad(want, (x, weight))
    sums = torch.stack([row_sums(x.detach() @ weight.detach()[a:a + 30].T, labels, first=a, softcap=3.0) for a in (0, 30)])
    parts = []
    for a in (0, 30):
        part = weight.detach()[a:a + 30].clone().requires_grad_()
        shard = VocabShard(a, 60, lambda own: combine_sums(sums))
        loss, z = linear_cross_entropy(x, part, labels, shard=shard, split=True, impl="triton", **terms)
        torch.testing.assert_close(loss, want, rtol=1e-5, atol=0)
        torch.testing.assert_close(z, z_loss_of(x, weight, labels, terms), rtol=1e-5, atol=0)
        parts.append(torch.autograd.grad(loss, (x, part)))
    torch.testing.assert_close(parts[0][0] + parts[1][0], dx, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(torch.cat([parts[0][1], parts[1][1]]), dweight, rtol=1e-4, atol=1e-5)


def test_a_wide_sum_takes_narrow_products_where_torch_can(monkeypatch):
    """On CUDA one call; here the call is put in torch's place."""
    total, a, b = torch.ones(3, 4), torch.randn(3, 5).bfloat16(), torch.randn(5, 4).bfloat16()
    want = 1 + (a @ b).float()
    module._add_product(plain := total.clone(), a, b)
    torch.testing.assert_close(plain, want)
    calls = []
    monkeypatch.setattr(module, "_adds_wide", lambda *_: True)
    monkeypatch.setattr(torch, "addmm", lambda *args, **words: calls.append(words))
    module._add_product(total, a, b)
    assert calls[0]["out_dtype"] == torch.float32 and calls[0]["out"] is total


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


def test_bf16_sums_more_than_two_chunks_in_fp32():
    x, weight, labels = inputs(N=512, dtype=torch.bfloat16)
    exact = torch.autograd.grad(linear_cross_entropy_reference(x.double(), weight.double(), labels), weight)[0]
    errors = [(torch.autograd.grad(linear_cross_entropy(x, weight, labels, chunk_tokens=c), weight)[0].double()
               - exact).norm() for c in (512, 256, 2)]
    assert max(errors[1:]) < 1.5 * errors[0]
    sums = [module._results(x, weight, c, True, True)[2].dtype for c in (512, 256, 255)]
    assert sums == [torch.bfloat16, torch.bfloat16, torch.float32]


def test_up_to_two_to_the_30_logits_are_two_chunks_on_a_gpu():
    def chunk(N, V, dtype=torch.bfloat16):
        return module._chunk_tokens(SimpleNamespace(is_cuda=True, shape=(N, 8), dtype=dtype), V)

    assert chunk(8192, 131_072) == 4096 and chunk(8193, 131_072) == chunk(8192, 131_072, torch.float32) == 2048
    assert chunk(2048, 131_072) == 2048 and chunk(2049, 131_072) == 1025


@pytest.mark.parametrize("dtypes", [(torch.float32, torch.float32), (torch.bfloat16, torch.float32),
                                    (torch.float32, torch.bfloat16)], ids=str)
def test_under_autocast_it_takes_autocasts_dtype(dtypes):
    x, weight, labels = inputs()
    leaves = [t.detach().to(dtype).requires_grad_() for t, dtype in zip((x, weight), dtypes, strict=True)]
    results = []
    for function in (linear_cross_entropy, linear_cross_entropy_reference):
        with torch.autocast("cpu", torch.bfloat16):
            loss = function(*leaves, labels)
        results.append((loss, *torch.autograd.grad(loss, leaves)))
    torch.testing.assert_close(*results, rtol=2e-2, atol=2e-2)
    assert results[0][0] == results[1][0] and [g.dtype for g in results[0][1:]] == list(dtypes)
    with torch.autocast("cpu", torch.bfloat16):
        assert linear_token_scores(*leaves, labels)[0].sum().sub(loss).abs() < 1e-3


def test_a_label_that_is_no_row_makes_the_sum_nan_and_no_gradient():
    x, weight, labels = inputs()
    labels[1] = len(weight)
    loss = linear_cross_entropy(x, weight, labels)
    [dx] = torch.autograd.grad(loss, x)
    assert loss.isnan() and dx.isfinite().all()
    torch.testing.assert_close(dx[1], ((x[1] @ weight.T).softmax(0) @ weight).detach())  # as the docstring says


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
    for function in (linear_cross_entropy, linear_token_scores):
        for wrong in ((x, weight[:0], labels), (x[None], weight, labels), (x, weight[0], labels), (x, weight, labels[1:])):
            with pytest.raises(ValueError, match=f"{function.__name__}: .* do not fit; need .* with V at least 1"):
                function(*wrong)
        with pytest.raises(ValueError, match=f"{function.__name__}: x is torch.bfloat16 and weight torch.float32; .*weight.to"):
            function(x.bfloat16(), weight, labels)
    with pytest.raises(ValueError, match="shard's rows 10 to 63 are not among the vocabulary's 60"):
        linear_cross_entropy(x, weight, labels, shard=VocabShard(10, 60, combine_sums))
    with pytest.raises(ValueError, match="impl=triton cannot run"):
        linear_cross_entropy(x, weight, labels, impl="triton")
