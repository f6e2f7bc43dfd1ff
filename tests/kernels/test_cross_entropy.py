"""Cross-entropy kernels, in Triton's interpreter, against plain torch; and the vocabulary that ranks share."""

import itertools

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from hypothesis import example, given, settings
from hypothesis import strategies as st

from officina.kernels.compiling import ARCHS, compile_for
from officina.kernels.cross_entropy import (
    IGNORE,
    VocabShard,
    combine_sums,
    compilations,
    cross_entropy,
    cross_entropy_,
    cross_entropy_reference,
    row_sums,
)
from officina.kernels.dispatch import tl
from tests.kernels.interpreter import interpreted
from tests.kernels.rules import assert_same_bits, assert_twice_as_good

TERMS = [dict(zip(("z_loss", "label_smoothing", "softcap"), values, strict=True))
         for values in itertools.product([0.0, 1e-2], [0.0, 0.1], [0.0, 5.0])]
ALL = TERMS[-1]


def inputs(N, V, dtype=torch.float32, labelled="some"):
    generator = torch.Generator().manual_seed(N + V)
    labels = torch.randint(0, V, (N,), generator=generator)
    if labelled != "all":
        labels[::2 if labelled == "some" else 1] = IGNORE
    return (3 * torch.randn(N, V, generator=generator)).to(dtype), labels


@interpreted
@settings(max_examples=20, deadline=None)
@given(N=st.sampled_from([0, 1, 2, 5]), V=st.sampled_from([1, 2, 15, 63, 64, 65, 200]), terms=st.sampled_from(TERMS),
       dtype=st.sampled_from([torch.float32, torch.float16]), labelled=st.sampled_from(["all", "some", "none"]))
@example(N=1, V=1, terms=ALL, dtype=torch.float32, labelled="all")
@example(N=5, V=200, terms=ALL, dtype=torch.float16, labelled="none")
@example(N=5, V=200, terms=ALL, dtype=torch.float32, labelled="some")
def test_the_kernel_is_as_exact_as_plain_torch(N, V, terms, dtype, labelled):
    logits, labels = inputs(N, V, dtype, labelled)
    assert_twice_as_good(lambda *x: cross_entropy(*x, impl="triton", **terms), lambda *x: cross_entropy_reference(*x, **terms),
                         (logits, labels))
    got = logits.clone()
    losses = cross_entropy_(got, labels, impl="triton", **terms)
    torch.testing.assert_close(losses, cross_entropy(logits, labels, impl="triton", **terms), rtol=1e-6, atol=1e-6)
    logits.requires_grad_()
    [want] = torch.autograd.grad(cross_entropy(logits, labels, impl="triton", **terms).sum(), logits)
    torch.testing.assert_close(got, want)
    assert not labels.eq(IGNORE).any() or got[labels == IGNORE].abs().max() == 0


@interpreted
def test_a_softcap_far_above_the_logits_costs_no_digits():
    logits, labels = inputs(5, 200, labelled="all")
    assert_twice_as_good(lambda x: cross_entropy(x, labels, softcap=50.0, impl="triton"),
                         lambda x: cross_entropy_reference(x, labels, softcap=50.0), [logits])


@pytest.mark.parametrize("impl", ["reference", "auto"])
@pytest.mark.parametrize("smoothing", [0.0, 0.2])
def test_the_reference_is_torchs_own_cross_entropy(impl, smoothing):
    logits, labels = inputs(9, 31, torch.float64)
    want = F.cross_entropy(logits, labels, reduction="none", label_smoothing=smoothing)
    torch.testing.assert_close(cross_entropy(logits, labels, label_smoothing=smoothing, impl=impl), want)
    capped = F.cross_entropy(4 * torch.tanh(logits / 4), labels, reduction="none")
    torch.testing.assert_close(cross_entropy(logits, labels, softcap=4.0), capped)
    squares = torch.where(labels == IGNORE, 0, logits.logsumexp(1).square())
    torch.testing.assert_close(cross_entropy(logits, labels, label_smoothing=smoothing, z_loss=0.3), want + 0.3 * squares)


@pytest.mark.parametrize("terms", TERMS)
def test_in_place_the_reference_gives_the_gradient_too(terms):
    logits, labels = inputs(9, 31, torch.float64)
    [want] = torch.autograd.grad(cross_entropy_reference(logits.requires_grad_(), labels, **terms).sum(), logits)
    got = logits.detach().clone()
    torch.testing.assert_close(cross_entropy_(got, labels, **terms), cross_entropy_reference(logits, labels, **terms).detach())
    torch.testing.assert_close(got, want)


@interpreted
@pytest.mark.parametrize("terms", [TERMS[0], ALL])
def test_gradients_are_those_of_the_function(terms):
    logits, labels = inputs(3, 7, torch.float64)
    assert torch.autograd.gradcheck(lambda x: cross_entropy(x, labels, impl="triton", **terms), logits.requires_grad_())
    [first] = torch.autograd.grad(cross_entropy(logits, labels, impl="triton").sum(), logits, create_graph=True)
    with pytest.raises(RuntimeError, match="cross_entropy_gradient has no derivative: kernels are differentiable once"):
        first.sum().backward()


@interpreted
def test_operators_keep_torchs_rules():
    logits, labels = inputs(4, 20)
    ops = torch.ops.officina
    sums = row_sums(logits, labels, impl="triton")
    torch.library.opcheck(ops.cross_entropy_sums.default, (logits.clone().requires_grad_(), labels, 0, 5.0))
    torch.library.opcheck(ops.cross_entropy_gradient.default, (logits, labels, sums, sums, 0, 0.0))
    torch.library.opcheck(ops.cross_entropy_gradient_.default, (logits.clone(), labels, sums, sums, 0, 0.0))
    torch.library.opcheck(ops.cross_entropy_.default, (logits.clone(), labels, 0.1, 0.1, 5.0))


@interpreted
def test_compiled_and_recomputed_functions_give_the_same():
    logits, labels = inputs(5, 70)
    logits.requires_grad_()

    def loss(x, labels):
        return cross_entropy(2 * x, labels, impl="triton", **ALL).sum()

    want = torch.autograd.grad(loss(logits, labels), logits)
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    again = torch.utils.checkpoint.checkpoint(loss, logits, labels, use_reentrant=False)
    torch.testing.assert_close(torch.autograd.grad(compiled(logits, labels), logits), want)
    torch.testing.assert_close(torch.autograd.grad(again, logits), want, rtol=0, atol=0)


@interpreted
@pytest.mark.parametrize("in_place", [False, True])
def test_offsets_beyond_32_bits_reach_their_rows(in_place):
    """A training batch of 32,768 tokens and 128,256 rows has 4.2e9 logits."""
    rows, labels = inputs(4, 70, torch.float16, "all")
    stride = 2**30 + 24  # rows 2 and 3 begin beyond 2^31 elements; only the touched pages of the 8 GiB exist
    logits = torch.empty(3 * stride + 70, dtype=torch.float16).as_strided((4, 70), (stride, 1))
    logits.copy_(rows)
    if in_place:
        pairs = [(cross_entropy_(x, labels, impl="triton"), x) for x in (logits, rows)]
    else:
        pairs = [(y, torch.autograd.grad(y.sum(), x)[0]) for x in (logits.requires_grad_(), rows.requires_grad_())
                 for y in [cross_entropy(x, labels, impl="triton")]]
    (losses, gradient), (want_losses, want_gradient) = pairs
    assert torch.equal(losses, want_losses) and torch.equal(gradient, want_gradient)


@interpreted
def test_the_same_bits_every_time_and_columns_may_be_strided():
    logits, labels = inputs(5, 130)
    assert_same_bits(lambda x: cross_entropy(x, labels, impl="triton", **ALL), [logits])
    strided = logits.T.contiguous().T
    assert torch.equal(*(cross_entropy(x, labels, impl="triton", **ALL) for x in (strided, logits)))
    overlapping = torch.randn(400).as_strided((5, 130), (60, 1))
    for impl, x in itertools.product(("triton", "reference"), (strided, logits[:1].expand(5, -1), overlapping)):
        with pytest.raises(ValueError, match=rf"logits of strides \({x.stride(0)}, {x.stride(1)}\) cannot become their"):
            cross_entropy_(x, labels, impl=impl)


@interpreted
def test_extreme_logits():
    """Rows of the vocabulary that are switched off, large logits, and what is no number stays none."""
    logits, labels = inputs(4, 100, labelled="all")
    logits[:, 40:] = -torch.inf
    labels %= 40
    logits[1] *= 1e4
    logits[2, 3] = torch.nan
    got = logits.clone()
    losses = cross_entropy_(got, labels, impl="triton")
    want = cross_entropy_reference(logits, labels)
    torch.testing.assert_close(losses, want, equal_nan=True)
    assert losses.isnan().tolist() == got.isnan().any(1).tolist() == [False, False, True, False]
    assert got[[0, 1, 3], 40:].abs().max() == 0


def check_wrong_labels(impl):
    logits, labels = inputs(4, 100, labelled="all")
    labels[0], labels[1], labels[2] = 100, -1, IGNORE
    for losses in (cross_entropy(logits, labels, impl=impl), cross_entropy_(logits, labels, impl=impl)):
        assert losses.isnan().tolist() == [True, True, False, False]
    leaf = inputs(4, 100, labelled="all")[0].requires_grad_()  # what the docstrings say of the gradients
    [gradient] = torch.autograd.grad(cross_entropy(leaf, labels, impl=impl).sum(), leaf)
    softmax = leaf.detach().softmax(1)
    assert not gradient[:3].any()
    torch.testing.assert_close(logits[:2], softmax[:2])
    torch.testing.assert_close(logits[3], gradient[3])


@interpreted
def test_a_label_that_is_no_row_makes_the_loss_nan_in_the_kernel():
    check_wrong_labels("triton")


def test_a_label_that_is_no_row_makes_the_loss_nan():
    check_wrong_labels("reference")


def check_shards(impl, dtype):
    """Three unequal parts of a vocabulary, one after the other in one process."""
    logits, labels = inputs(6, 100, dtype)
    bounds = [0, 64, 65, 100]
    parts = [logits[:, a:b].contiguous() for a, b in itertools.pairwise(bounds)]
    all_sums = torch.stack([row_sums(part, labels, first=a, softcap=5.0, impl=impl)
                            for part, a in zip(parts, bounds, strict=False)])
    [want] = torch.autograd.grad(cross_entropy_reference(logits.requires_grad_(), labels, **ALL).sum(), logits)
    want_losses = cross_entropy_reference(logits.detach(), labels, **ALL)
    for part, a, b in zip(parts, bounds, bounds[1:], strict=False):
        shard = VocabShard(a, 100, lambda own: combine_sums(all_sums))
        losses = cross_entropy(part.requires_grad_(), labels, shard=shard, impl=impl, **ALL)
        [gradient] = torch.autograd.grad(losses.sum(), part)
        in_place = part.detach().clone()
        torch.testing.assert_close(losses.detach(), cross_entropy_(in_place, labels, shard=shard, impl=impl, **ALL))
        torch.testing.assert_close(losses, want_losses, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(gradient, want[:, a:b], rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(in_place, want[:, a:b], rtol=1e-5, atol=1e-6)


def check_a_shard_that_is_switched_off(impl):
    logits, labels = inputs(4, 30)
    logits[:, 20:] = -torch.inf
    labels %= 20
    parts = logits[:, :20].contiguous(), logits[:, 20:].contiguous()
    sums = torch.stack([row_sums(part, labels, first=a, impl=impl) for part, a in zip(parts, (0, 20), strict=True)])
    shard = VocabShard(20, 30, lambda own: combine_sums(sums))
    losses = cross_entropy(off := parts[1].clone().requires_grad_(), labels, shard=shard, impl=impl)
    torch.testing.assert_close(losses, cross_entropy_reference(logits, labels))
    torch.testing.assert_close(losses.detach(), cross_entropy_(parts[1], labels, shard=shard, impl=impl))
    assert not parts[1].any() and not torch.autograd.grad(losses.sum(), off)[0].any()


@interpreted
def test_a_shard_that_is_switched_off_has_no_gradient_in_the_kernel():
    check_a_shard_that_is_switched_off("triton")


def test_a_shard_that_is_switched_off_has_no_gradient():
    check_a_shard_that_is_switched_off("reference")


@interpreted
def test_parts_of_a_vocabulary_make_the_whole_in_the_kernel():
    check_shards("triton", torch.float32)


def test_parts_of_a_vocabulary_make_the_whole():
    check_shards("reference", torch.float64)


def on_a_rank(ranks, terms):
    """This rank's losses and gradient, as two functions make them."""
    rank, world = ranks.env.rank, ranks.env.world_size
    logits, labels = inputs(6, 96, torch.float64)
    part = logits[:, rank * 48:(rank + 1) * 48].contiguous().requires_grad_()

    def combine(own):
        found = [torch.empty_like(own) for _ in range(world)]
        dist.all_gather(found, own)
        return combine_sums(torch.stack(found))

    shard = VocabShard(rank * 48, 96, combine)
    losses = cross_entropy(part, labels, shard=shard, **terms)
    [gradient] = torch.autograd.grad(losses.sum(), part)
    in_place = part.detach().clone()
    torch.testing.assert_close(cross_entropy_(in_place, labels, shard=shard, **terms), losses.detach())
    torch.testing.assert_close(in_place, gradient)
    return losses.tolist(), gradient.tolist()


@pytest.mark.parametrize("terms", [TERMS[0], ALL])
def test_two_ranks_share_a_vocabulary(pool, terms):
    found = pool.run(2, "tests.kernels.test_cross_entropy:on_a_rank", terms)
    logits, labels = inputs(6, 96, torch.float64)
    losses = cross_entropy_reference(logits.requires_grad_(), labels, **terms)
    [gradient] = torch.autograd.grad(losses.sum(), logits)
    for own_losses, _ in found:
        torch.testing.assert_close(own_losses, losses.tolist())
    torch.testing.assert_close(torch.cat([torch.tensor(part, dtype=torch.float64) for _, part in found], 1), gradient)


@pytest.mark.parametrize("arch, softcap", [*((arch, 0.0) for arch in ARCHS), ("sm_90", 30.0), ("gfx90a", 30.0)])
def test_shipped_configurations_do_not_spill_and_read_16_bytes_at_a_time(arch, softcap):
    for name, kernel, arguments, config in compilations(arch, softcap=softcap):
        usage = compile_for(kernel, arguments, config, arch)
        assert usage.spill_bytes == 0 and usage.registers <= 128 and usage.shared_bytes <= 1024, (name, usage)
        wide = "ld.global.L1::no_allocate.v4" if "global.L1" in usage.assembly else "ld.global.v4"
        assert (wide if arch.startswith("sm") else "_load_dwordx4") in usage.assembly, name


def test_errors_say_what_does_not_fit():
    logits, labels = inputs(3, 8)
    with pytest.raises(ValueError, match=r"logits \(3, 8\) and labels \(2,\) do not fit"):
        cross_entropy(logits, labels[:2])
    with pytest.raises(ValueError, match="label_smoothing=1.5 must be at least 0 and below 1"):
        cross_entropy(logits, labels, label_smoothing=1.5)
    for softcap in (-1.0, torch.inf, torch.nan):
        with pytest.raises(ValueError, match=f"softcap={softcap} must not be negative, and finite"):
            cross_entropy_(logits, labels, softcap=softcap)
    with pytest.raises(ValueError, match="shard's rows 5 to 13 are not among the vocabulary's 12"):
        cross_entropy(logits, labels, shard=VocabShard(5, 12, combine_sums))
    with pytest.raises(ValueError, match="impl=triton cannot run: the tensors are on the cpu"):
        cross_entropy(logits, labels, impl="triton")
    assert tl is not None
