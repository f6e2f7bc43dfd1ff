"""The multi-tensor AdamW step, in Triton's interpreter, against plain torch, torch.optim.AdamW and fp64."""

import pytest
import torch

from officina.kernels import adamw as module
from officina.kernels.adamw import adamw_step_
from tests.kernels.interpreter import interpreted

HYPER = {"lr": 1e-2, "beta1": 0.9, "beta2": 0.999, "eps": 1e-8, "weight_decay": 0.1}
SHAPES = [(3,), (2048,), (5, 1000), (0, 4), (1,), (4097,)]


def state(dtype=torch.float32, grad_dtype=torch.float32, copy_dtype=None, shapes=SHAPES):
    """params, grads, exp_avgs, exp_avg_sqs, copies, step: the same numbers in every dtype."""
    generator = torch.Generator().manual_seed(3)
    columns = [[torch.randn(shape, generator=generator) for shape in shapes] for _ in range(4)]
    params, grads, exp_avgs, exp_avg_sqs = columns
    copies = [] if copy_dtype is None else [p.to(copy_dtype) for p in params]
    grads = [g.to(grad_dtype).to(dtype if dtype == torch.float64 else grad_dtype) for g in grads]
    return ([p.to(dtype) for p in params], grads, [m.to(dtype) for m in exp_avgs],
            [v.square().to(dtype) for v in exp_avg_sqs], copies, torch.tensor(4.0))


def step(impl, everything, **changes):
    *lists, copies, count = everything
    adamw_step_(*lists, count, copies=copies, impl=impl, **{**HYPER, **changes})
    return [t for tensors in (lists[0], lists[2], lists[3], copies, [count]) for t in tensors]


@interpreted
@pytest.mark.parametrize("grad_dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("steps_done", [0, 4, 100_000])
def test_one_step_is_as_exact_as_plain_torch(steps_done, grad_dtype):
    results = []
    for impl, dtype in (("triton", torch.float32), ("reference", torch.float32), ("reference", torch.float64)):
        everything = state(dtype, grad_dtype)
        everything[-1].fill_(steps_done)
        results.append(step(impl, everything, grad_scale=torch.tensor(0.3)))
    for got, near, want in zip(*results, strict=True):
        if want.numel():
            floor = 4 * torch.finfo(torch.float32).eps * want.abs().max()
            assert (got - want).abs().max() <= 2 * (near - want).abs().max() + floor


@interpreted
@pytest.mark.parametrize("beta1,beta2", [(0.0, 0.99), (0.9, 0.0), (0.0, 0.0)])
def test_a_beta_of_zero_keeps_no_average(beta1, beta2):
    got, want = (step(impl, state(shapes=[(70,)]), beta1=beta1, beta2=beta2) for impl in ("triton", "reference"))
    torch.testing.assert_close(got, want)


@interpreted
def test_in_fp64_gradients_go_to_the_reference():
    wide = state(shapes=[(3,)])
    wide = wide[0], [g.double() for g in wide[1]], *wide[2:]
    torch.testing.assert_close(step("auto", wide), step("reference", state(shapes=[(3,)])))
    with pytest.raises(ValueError, match="grads are torch.float64, the kernel takes torch.float32, torch.float16, "):
        step("triton", wide)


@interpreted
def test_ten_steps_are_those_of_torch():
    params, *_ = state()
    theirs = [torch.nn.Parameter(p.clone()) for p in params]
    optimizer = torch.optim.AdamW(theirs, lr=HYPER["lr"], betas=(0.9, 0.999), eps=1e-8, weight_decay=0.1)
    moments = [[torch.zeros_like(p) for p in params] for _ in range(2)]
    count = torch.tensor(0.0)
    for seed in range(10):
        generator = torch.Generator().manual_seed(seed)
        grads = [torch.randn(p.shape, generator=generator) for p in params]
        for parameter, grad in zip(theirs, grads, strict=True):
            parameter.grad = grad
        optimizer.step()
        adamw_step_(params, grads, *moments, count, impl="triton", **HYPER)
    assert count == 10
    for ours, parameter in zip(params, theirs, strict=True):
        torch.testing.assert_close(ours, parameter.detach(), rtol=2e-6, atol=2e-6)


@interpreted
def test_copies_are_the_rounded_parameters_and_gradients_stay():
    everything = state(copy_dtype=torch.float16)
    grads = [g.clone() for g in everything[1]]
    step("triton", everything)
    for master, copy in zip(everything[0], everything[4], strict=True):
        assert torch.equal(copy, master.half())
    assert all(torch.equal(a, b) for a, b in zip(grads, everything[1], strict=True))


@interpreted
@pytest.mark.parametrize("impl", ["triton", "reference"])
def test_a_skipped_step_leaves_everything_as_it_is(impl):
    for skip in (True, False):
        before, after = state(copy_dtype=torch.float16), state(copy_dtype=torch.float16)
        after[1][1].fill_(float("nan") if skip else 1.0)
        step(impl, after, skip=torch.tensor(skip))
        same = [torch.equal(a, b) for column in (0, 2, 3, 4) for a, b in zip(before[column], after[column], strict=True)
                if a.numel()]
        assert all(same) if skip else not any(same)
        assert after[-1] == (4 if skip else 5)


@interpreted
def test_parts_of_a_flat_buffer_need_no_alignment():
    flat = torch.randn(5003)
    ours, theirs = state(shapes=[(5002,)]), state(shapes=[(5002,)])
    for everything in (ours, theirs):
        everything[0][0].copy_(flat[1:])
    ours = ([flat[1:]], *ours[1:])
    assert ours[0][0].data_ptr() % 16 == 4
    first = flat[0].clone()
    for got, want in zip(step("triton", ours), step("reference", theirs), strict=True):
        torch.testing.assert_close(got, want)
    assert flat[0] == first


@interpreted
def test_blocks_beyond_32_bits_reach_their_elements():
    tail = 70
    n = 2**31 + tail  # 8 GiB each, of which only the last block is ever touched
    columns, near = [torch.empty(n) for _ in range(4)], state(shapes=[(tail,)])
    for column, values in zip(columns, near, strict=False):
        column[n - tail:] = values[0]
    block = module._blocks((n,), 2048, torch.device("cpu"))[-1:]
    whole, module._blocks = module._blocks, lambda *_: block
    try:
        step("triton", ([columns[0]], [columns[1]], [columns[2]], [columns[3]], [], torch.tensor(4.0)))
    finally:
        module._blocks = whole
    step("reference", near)
    for column, values in zip(columns, near, strict=False):
        torch.testing.assert_close(column[n - tail:], values[0])


@interpreted
def test_the_operator_keeps_torchs_rules_and_gives_the_same_bits():
    *lists, copies, count = state(shapes=[(3,), (70,)], copy_dtype=torch.float16)
    arguments = (*lists, copies, count, torch.tensor(0.5), torch.tensor(False), 1e-2, 0.9, 0.99, 1e-8, 0.1)
    torch.library.opcheck(torch.ops.officina.adamw_.default, arguments)
    first, second = step("triton", state()), step("triton", state())
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_errors_say_what_does_not_fit():
    params, grads, exp_avgs, exp_avg_sqs, copies, count = state(copy_dtype=torch.float16)
    for changes, message in [
            ({"grads": grads[1:]}, "5 grads for 6 params; need one for each"),
            ({"exp_avgs": [m.half() for m in exp_avgs]}, r"exp_avgs\[0\] is \(3,\) torch.float16.*need \(3,\) torch.float32"),
            ({"exp_avg_sqs": [exp_avg_sqs[0], *exp_avg_sqs[:-1]]}, r"exp_avg_sqs\[1\] is \(3,\) .*need \(2048,\)"),
            ({"grads": [*grads[:2], grads[2].T.contiguous().T, *grads[3:]]}, r"grads\[2\] .*contiguous: False"),
            ({"copies": [copies[0].float(), *copies[1:]]}, r"copies\[1\] is \(2048,\) torch.float16.*torch.float32"),
            ({"exp_avgs": [m.to("meta") for m in exp_avgs]}, r"exp_avgs\[0\] is .* on meta, contiguous: True; need .* on cpu"),
            ({"step": torch.zeros(2)}, r"step is \(2,\) on cpu; need one element on cpu"),
            ({"impl": "triton"}, "impl=triton cannot run: the tensors are on the cpu"),
            ({"impl": "triton", "params": [p.double() for p in params], "exp_avgs": [m.double() for m in exp_avgs],
              "exp_avg_sqs": [v.double() for v in exp_avg_sqs]}, "params are torch.float64, the kernel updates torch.float32")]:
        arguments = {"params": params, "grads": grads, "exp_avgs": exp_avgs, "exp_avg_sqs": exp_avg_sqs, "step": count,
                     "copies": copies, **HYPER} | changes
        with pytest.raises(ValueError, match=message):
            adamw_step_(**arguments)
    adamw_step_([], [], [], [], count, **HYPER)
    assert count == 4
