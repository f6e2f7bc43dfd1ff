"""Dispatch, tables, compiling without a GPU, and the interpreter process."""

from __future__ import annotations

import logging
import os
from unittest import mock

import pytest
import torch
from torch.autograd import forward_ad

from officina.kernels import dispatch
from officina.kernels.activations import swiglu, xielu
from officina.kernels.adamw import adamw_step_
from officina.kernels.attention import attention
from officina.kernels.compiling import ARCHS, compile_for
from officina.kernels.cross_entropy import VocabShard, cross_entropy, cross_entropy_
from officina.kernels.dispatch import choose_impl, jit, tl, triton, why_not_triton
from officina.kernels.flash_attention import flash_attention
from officina.kernels.linear_cross_entropy import linear_cross_entropy
from officina.kernels.rms_norm import add_rms_norm, rms_norm
from officina.kernels.rope import rope
from officina.kernels.symmetric import symmetric_product
from officina.kernels.tables import SAFE, Config, arch_of, look_up
from tests.distributed import RankFailure
from tests.kernels.interpreter import interpreted

TABLE = {"sm_90": {64: Config(128, 64, 8, 3)}, SAFE: {64: Config(64, 64, 4, 1), 128: Config(64, 32, 4, 1)}}


@jit
def scale_kernel(x, y, n, FACTOR: tl.constexpr, BLOCK: tl.constexpr):
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    value = tl.load(x + i, mask=i < n) * FACTOR
    if y is not None:
        value += tl.load(y + i, mask=i < n)
    tl.store(x + i, value, mask=i < n)


@jit
def greedy_kernel(x, N: tl.constexpr):
    """Holds N numbers while it adds them up: spills when few threads share them."""
    values = tl.load(x + tl.arange(0, N))
    tl.store(x + tl.arange(0, N), values / tl.sum(values))


def test_a_table_gives_the_architectures_own_configuration_else_the_safe_one_said_once(caplog):
    dispatch._log_new.cache_clear()
    with caplog.at_level(logging.INFO, "officina.kernels"):
        assert look_up("k", TABLE, "sm_90", 64) == Config(128, 64, 8, 3)
        assert look_up("k", TABLE, "sm_90", 128) == Config(64, 32, 4, 1)
        assert not caplog.records
        for _ in range(2):
            assert look_up("k", TABLE, "sm_120", 64) == Config(64, 64, 4, 1)
        assert look_up("k", TABLE, "interpreter", 64) == Config(64, 64, 4, 1)
    assert [r.getMessage() for r in caplog.records] == [
        "kernels: k has no table for sm_120: safe configurations, not tuned. Tables exist for sm_90"]
    with pytest.raises(KeyError, match="k: no configuration for 96; there are"):
        look_up("k", TABLE, "sm_90", 96)


def test_options_of_amd_go_to_amd_only():
    config = Config(64, 64, 4, 1, {"waves_per_eu": 2})
    assert config.options("sm_90") == {"num_warps": 4, "num_stages": 1}
    assert config.options("gfx90a") == {"num_warps": 4, "num_stages": 1, "waves_per_eu": 2}
    assert arch_of(torch.device("cpu")) == "interpreter"


def test_dispatch_falls_back_only_when_asked_to_choose(caplog):
    dispatch._log_new.cache_clear()
    assert choose_impl("op", "reference", None) == "reference"
    assert choose_impl("op", "triton", None) == choose_impl("op", "auto", None) == "triton"
    with caplog.at_level(logging.INFO, "officina.kernels"):
        for _ in range(2):
            assert choose_impl("op", "auto", why_not_triton(torch.ones(1), None)) == "reference"
    assert [r.getMessage() for r in caplog.records] == [
        "op: auto takes the reference: the tensors are on the cpu, kernels need a GPU"]
    with pytest.raises(ValueError, match="op: impl=triton cannot run: the tensors are on the cpu"):
        choose_impl("op", "triton", why_not_triton(torch.ones(1)))
    with pytest.raises(ValueError, match="impl='fast' is none of auto, triton, reference"):
        choose_impl("op", "fast", None)


def test_without_triton_kernels_say_how_to_get_it(monkeypatch):
    monkeypatch.setattr(dispatch, "triton", None)
    assert "officina[kernels]" in why_not_triton(torch.ones(1))
    assert dispatch.jit(len) is len
    from officina.kernels import compiling

    monkeypatch.setattr(compiling, "triton", None)
    with pytest.raises(ValueError, match=r"officina\[kernels\]"):
        compile_for(scale_kernel, {}, Config(1, 1, 1, 1), "sm_90")


@interpreted
def test_the_interpreter_refuses_bf16():
    assert dispatch.INTERPRETED and why_not_triton(torch.ones(1), torch.ones(1, dtype=torch.float16)) is None
    assert "bf16" in why_not_triton(torch.ones(1, dtype=torch.bfloat16))


@interpreted
@pytest.mark.parametrize("n", [1, 70])
def test_a_test_body_runs_in_the_interpreter(n):
    x = torch.arange(n, dtype=torch.float32)
    scale_kernel[(triton.cdiv(n, 32),)](x, None, n, 3, 32)
    torch.testing.assert_close(x, 3 * torch.arange(n, dtype=torch.float32))


def test_the_interpreters_failures_and_environment_stay_its_own(interpreter):
    assert "TRITON_INTERPRET" not in os.environ and not dispatch.INTERPRETED
    with pytest.raises(RankFailure, match="ZeroDivisionError"):
        interpreter.run("operator:truediv", 1, 0)
    assert interpreter.run("operator:truediv", 1, 2) == 0.5


@pytest.mark.parametrize("arch", ARCHS)
def test_a_kernel_compiles_without_a_gpu_and_its_costs_are_read(arch):
    arguments = {"x": "*bf16", "y": "*bf16", "n": "i32", "FACTOR": 3, "BLOCK": 1024}
    lean = compile_for(scale_kernel, arguments, Config(1, 1024, 4, 1, {"waves_per_eu": 2}), arch)
    assert 4 < lean.registers < 64 and lean.spill_bytes == 0 and lean.shared_bytes == 0
    assert (".target sm_" if arch.startswith("sm") else "amdgcn") in lean.assembly
    if arch in ("sm_90", "gfx942"):  # one of each maker is enough
        return
    N = 512 * (32 if arch.startswith("sm") else 64)  # 512 registers a thread: more than any of them has, beside the rest
    greedy = compile_for(greedy_kernel, {"x": "*fp32", "N": N}, Config(1, N, 1, 1), arch)
    assert greedy.spill_bytes > 0 and greedy.registers > lean.registers


def test_arguments_that_do_not_fit_the_kernel_are_named():
    with pytest.raises(ValueError, match="scale_kernel takes x, y, n, FACTOR, BLOCK; missing or unknown: BLOCK, Z"):
        compile_for(scale_kernel, {"x": "*fp32", "y": None, "n": "i32", "FACTOR": 2, "Z": 1}, Config(1, 1, 4, 1), "sm_80")


@interpreted
def test_second_derivatives_raise_instead_of_coming_out_as_zeros():
    q, k = (torch.randn(1, 2, 5, 16, requires_grad=True) for _ in range(2))
    weight, logits = torch.ones(16, requires_grad=True), torch.randn(5, 16, requires_grad=True)
    cos, sin = torch.randn(1, 1, 5, 8), torch.randn(1, 1, 5, 8)
    alphas = [torch.tensor([0.7], requires_grad=True) for _ in range(2)]
    for name, output, leaf in [
            ("rms_norm", rms_norm(logits, weight, impl="triton"), logits),
            ("rms_norm", add_rms_norm(logits, logits, weight, impl="triton")[0], logits),
            ("rope_norm", rope(q, k, cos, sin, q_weight_K=weight, k_weight_K=weight, impl="triton")[0], q),
            ("gated", swiglu(logits, logits, impl="triton"), logits),
            ("xielu", xielu(logits, *alphas, impl="triton"), logits),
            ("cross_entropy", cross_entropy(logits, torch.arange(5), impl="triton"), logits),
            ("flash_attention", flash_attention(q, k, k, impl="triton")[0], q)]:
        [first] = torch.autograd.grad(output.square().sum(), leaf, create_graph=True)
        with pytest.raises(RuntimeError, match=f"{name}_.* has no derivative: kernels are differentiable once"):
            first.sum().backward()
    shard = VocabShard(0, 16, torch.clone)
    for name, loss in [  # of incoming gradients that are constants
            ("linear_cross_entropy", linear_cross_entropy(logits, logits.detach(), torch.arange(5))),
            ("cross_entropy with a shard", cross_entropy(logits, torch.arange(5), shard=shard, impl="reference").sum())]:
        [first] = torch.autograd.grad(loss, logits, create_graph=True)
        with pytest.raises(RuntimeError, match=f"the gradient of {name} has no derivative: .* use {name.split()[0]}_reference"):
            torch.autograd.grad(loss + first.square().sum(), logits)
    plain, _ = rope(q, k, cos, sin, impl="triton")  # linear, and its backward pass is itself
    [first] = torch.autograd.grad(plain.square().sum(), q, create_graph=True)
    [second] = torch.autograd.grad(first.sum(), q)
    assert second.abs().sum() > 0


def calls():
    """Name -> a call of each function that has kernels, of its first tensor."""
    q, k = torch.randn(1, 2, 5, 16), torch.randn(1, 1, 5, 16)
    x, weight = torch.randn(5, 16), torch.ones(16)
    tables = torch.randn(2, 1, 1, 5, 8)
    return {
        "flash_attention": (lambda q, impl: flash_attention(q, k, k, impl=impl)[0], q),
        "attention": (lambda q, impl: attention(q, k, k, impl=impl), q),
        "rms_norm": (lambda x, impl: rms_norm(x, weight, impl=impl), x),
        "add_rms_norm": (lambda s, impl: add_rms_norm(x, s, weight, impl=impl)[0], x),
        "rope": (lambda q, impl: rope(q, k, *tables, impl=impl)[0], q),
        "rope with norm": (lambda w, impl: rope(q, k, *tables, q_weight_K=weight, k_weight_K=w, impl=impl)[1], weight),
        "swiglu": (lambda x, impl: swiglu(x, x, impl=impl), x),
        "xielu": (lambda x, impl: xielu(x, weight[:1], weight[:1], impl=impl), x),
        "cross_entropy": (lambda x, impl: cross_entropy(x, torch.arange(5), impl=impl), x),
        "linear_cross_entropy": (lambda x, impl: linear_cross_entropy(x, k[0, 0], torch.arange(5), impl=impl), x),
        "symmetric_product": (lambda x, impl: symmetric_product(x, impl=impl), x)}


@interpreted
def test_tangents_of_forward_mode_are_refused_by_the_kernels_and_kept_by_the_rest():
    for name, (function, x) in calls().items():
        with pytest.raises(ValueError, match=f"{name.partition(' ')[0]}: .* no forward-mode derivative.* Use"):
            torch.func.jvp(lambda x: function(x, "triton"), (x,), (x,))  # noqa: B023
        if "attention" != name != "linear_cross_entropy":
            with forward_ad.dual_level():
                got, want = (forward_ad.unpack_dual(function(forward_ad.make_dual(x, x), impl)).tangent
                             for impl in ("auto", "reference"))
                assert torch.equal(got, want) and got.any()


def adamw(p, impl):
    adamw_step_([p], *([torch.ones_like(p)] for _ in range(3)), torch.tensor(0.0), lr=0.1, beta1=0.9, beta2=0.9, eps=1e-8,
                weight_decay=0.0, impl=impl)


def losses_in_place(x, impl, **words):
    cross_entropy_(x, torch.arange(5), impl=impl, **words)


@interpreted
def test_kernels_are_launched_on_the_device_of_their_tensors():
    """Where that is not the current one, a launch would take one device's addresses for the other's."""
    on = []

    class Device:
        def __init__(self, tensor):
            self.tensor = tensor

        def __enter__(self):
            on.append(self.tensor.device)

        def __exit__(self, *_):
            on.pop()

    launched = []
    kernel, run = type(scale_kernel), type(scale_kernel).__getitem__

    def launch(self, grid):
        assert on, self
        launched.append(self)
        return run(self, grid)

    with mock.patch.object(torch.cuda, "device_of", Device), mock.patch.object(kernel, "__getitem__", launch):
        for function, x in (*calls().values(), (adamw, torch.ones(5)), (losses_in_place, torch.randn(5, 16))):
            x = x.clone().requires_grad_(function not in (adamw, losses_in_place))
            n = len(launched)
            out = function(x, "triton")
            if x.requires_grad:
                torch.autograd.grad(out.sum(), x)
            assert len(launched) > n


@interpreted
def test_what_a_kernel_writes_to_counts_as_a_new_version():
    for function, words in ((adamw, {}), (losses_in_place, {}), (losses_in_place, {"shard": VocabShard(0, 16, torch.clone)})):
        for impl in ("triton", "reference"):
            leaf = torch.randn(5, 16, requires_grad=True)
            x = leaf * 1
            y = x.square().sum()
            function(x.detach(), impl, **words)
            with pytest.raises(RuntimeError, match="modified by an inplace operation"):
                y.backward()
