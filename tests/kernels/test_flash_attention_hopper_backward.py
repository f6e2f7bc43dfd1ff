"""The backward pass of flash attention for Hopper without a GPU, as test_flash_attention_hopper.py does with the forward pass:
the kernels' own source in the emulator, on small tiles and in many orders of events. out and lse come from plain torch."""

import inspect
import itertools
import logging
from contextlib import contextmanager
from types import SimpleNamespace
from unittest import mock

import pytest
import torch

from officina.kernels import dispatch
from officina.kernels import flash_attention_hopper as hopper
from officina.kernels import flash_attention_hopper_backward as backward
from officina.kernels import flash_attention_launch as launch
from officina.kernels.dispatch import triton
from officina.kernels.flash_attention import flash_attention, flash_attention_reference
from officina.kernels.flash_attention_tables import BACKWARD_KEYS_HOPPER, BACKWARD_PATH, BACKWARD_QUERIES_HOPPER
from officina.kernels.masks import dense_mask, document_spans, length_spans
from officina.kernels.tables import Config
from tests.kernels.attention_cases import FEW_KEYS_ULP, INF, compare, documents, qkv
from tests.kernels.hopper_emulator import Emulated

BF16, FP16 = torch.bfloat16, torch.float16
pytestmark = pytest.mark.skipif(hopper.why_not_hopper("sm_90", 64, 1, BF16) is not None, reason="made for another triton")
KEPT, PASSING = 32, 8
"""Rows that a program keeps and of a block that passes by, in the emulator."""
SHIPPED = dict(BACKWARD_KEYS_HOPPER), dict(BACKWARD_QUERIES_HOPPER)
KEYS = [(width, causal) for width in (64, 128) for causal in (False, True)]


class Delta:
    """delta_kernel in plain torch."""

    def __getitem__(self, grid):
        def run(out, dout, dlse, lse, delta, *_, **__):
            delta.copy_((out.float() * dout.float()).sum(-1))
            if dlse is not None:
                delta.sub_(torch.where(lse == -torch.inf, 0.0, dlse))
        return run


def plain_forward(q, k, v, out, lse, spans, causal, scale, window, softcap):
    mask = dense_mask(q.shape[2], k.shape[2], causal, window, spans, q.device)
    made = flash_attention_reference(q, k, v, mask=mask, scale=scale, softcap=softcap)
    out.copy_(made[0])
    lse.copy_(made[1])


@contextmanager
def emulated(*, stages=2, seed=0, kernels=backward):
    """Hopper's path taken on the CPU: arch and tables say so, and the emulator stands for the GPU."""
    keys, queries = Config(PASSING, KEPT, 4, stages), Config(KEPT, PASSING, 4, stages)
    with (mock.patch.object(launch, "arch_of", lambda device: "sm_90"), mock.patch.object(launch, "forward", plain_forward),
          mock.patch("officina.kernels.flash_attention.why_not_triton_on", lambda device: None),
          mock.patch.object(launch.kernels, "delta_kernel", Delta()),
          mock.patch.dict(BACKWARD_PATH, {("sm_90", *key): "hopper" for key in KEYS}),
          mock.patch.dict(BACKWARD_KEYS_HOPPER, {"sm_90": {(*key, 16): keys for key in KEYS}}),
          mock.patch.dict(BACKWARD_QUERIES_HOPPER, {"sm_90": {(*key, 16): queries for key in KEYS}}),
          mock.patch.object(backward, "keys_kernel", Emulated(kernels.keys_kernel, seed)),
          mock.patch.object(backward, "queries_kernel", Emulated(kernels.queries_kernel, seed))):
        yield


CASES = {
    "causal": (dict(T=70), {}),
    "full": (dict(T=70, S=45), dict(causal=False)),
    "whole_tiles": (dict(T=64, S=64), dict(causal=False)),
    "decoding": (dict(T=5, S=70), {}),
    "blind": (dict(T=70, S=33), {}),
    "window": (dict(T=90), dict(window=20)),
    "window_of_1": (dict(T=40), dict(window=1, score_ulp=FEW_KEYS_ULP)),
    "window_and_cache": (dict(T=40, S=75), dict(window=20)),
    "keys_that_nobody_sees": (dict(T=20, S=150), dict(window=9)),
    "softcap_window": (dict(T=50), dict(softcap=2.0, window=17)),
    "scale": (dict(T=40), dict(scale=1.7)),
    "heads_80": (dict(T=40, D=80), {}),
    "heads_128": (dict(T=40, D=128), {}),
    "groups": (dict(B=2, H=6, G=2, T=20), {}),
    "groups_full": (dict(B=2, H=6, G=2, T=40), dict(causal=False)),
    "one_head_of_keys": (dict(H=4, G=1, T=75), {}),
    "one_token": (dict(T=1), dict(score_ulp=FEW_KEYS_ULP)),
    "many_queries_one_key": (dict(T=40, S=1), dict(causal=False, score_ulp=FEW_KEYS_ULP)),
}


@pytest.mark.parametrize("case", CASES)
def test_gradients_are_as_exact_as_plain_torch(case):
    """Of out and of lse, in q, k and v."""
    shapes, switches = CASES[case]
    for dtype, stages in ((BF16, 2), (FP16, 3)):
        with emulated(stages=stages):
            compare(qkv(**{"D": 64, **shapes}, dtype=dtype), **switches)


@pytest.mark.parametrize("switches", [{}, dict(causal=False), dict(window=11), dict(softcap=2.0)], ids=str)
def test_packed_documents(switches):
    words = dict(score_ulp=FEW_KEYS_ULP, **switches)
    with emulated():
        compare(qkv(B=2, H=2, T=70, D=64, dtype=BF16), spans=document_spans(documents(2, 70, 20)), **words)
        compare(qkv(B=2, H=1, T=30, S=70, D=64, dtype=BF16), spans=document_spans(documents(2, 70, 25)), **words)
        lengths = torch.tensor([0, 5, 5, 6, 46, 70], dtype=torch.int32)
        compare(qkv(T=70, D=64, dtype=BF16), spans=length_spans(lengths, 70), **words)


def gradients(inputs, **switches):
    """Of a fixed weighting of out and lse."""
    leaves = [x.detach().clone().requires_grad_() for x in inputs]
    out, lse = flash_attention(*leaves, impl="triton", **switches)
    dout = torch.randn(out.shape, generator=torch.Generator().manual_seed(3)).to(out.dtype)
    return torch.autograd.grad((out, lse), leaves, (dout, dout[..., 0].float()))


@pytest.mark.parametrize("stages", [2, 3])
def test_any_order_of_events_gives_the_same_bits(stages):
    """One block, two, as many as there are buffers, one more, and many; of one head and of two that share keys."""
    for blocks, heads in itertools.product(sorted({1, 2, stages, stages + 1, 2 * stages + 1, 7}), (1, 2)):
        inputs = qkv(H=heads, T=blocks * PASSING - 1, S=KEPT - 3, D=64, dtype=BF16)
        other = qkv(H=heads, T=KEPT - 3, S=blocks * PASSING - 1, D=64, dtype=BF16)
        found = []
        for seed in range(4):
            with emulated(stages=stages, seed=seed):
                found.append([*gradients(inputs, causal=False), *gradients(other, causal=False)])
                if not seed:
                    compare(inputs, causal=False, score_ulp=FEW_KEYS_ULP)
        assert all(torch.equal(a, b) for other in found for a, b in zip(found[0], other, strict=True))


@pytest.mark.parametrize("head_dim", [64, 96])
def test_with_the_tiles_of_the_tables(head_dim):
    keys, queries = SHIPPED
    with emulated(), mock.patch.dict(BACKWARD_KEYS_HOPPER, keys), mock.patch.dict(BACKWARD_QUERIES_HOPPER, queries):
        compare(qkv(H=1, T=300, D=head_dim, dtype=BF16))
        compare(qkv(H=1, T=129, S=127, D=head_dim, dtype=BF16), causal=False)
        compare(qkv(H=2, T=290, D=head_dim, dtype=BF16), spans=document_spans(documents(1, 290, 60)))


def spoilt_by_another_head():
    """Whether a gradient that overflows in the second head reaches the first, whose last numbers are loaded with its."""
    leaves = [x.requires_grad_() for x in qkv(H=2, G=2, T=20, D=64, dtype=BF16)]
    out, _ = flash_attention(*leaves, causal=False, impl="triton")
    dout = torch.ones_like(out)
    dout[:, 1] = INF
    return not all(x[:, 0].isfinite().all() for x in torch.autograd.grad(out, leaves, dout))


def test_heads_do_not_spoil_each_other():
    with emulated():
        assert not spoilt_by_another_head()


MUTANTS = {
    "the loader does not wait for buffers to be read": ("mbarrier.wait(empty.index(stage), before)", "pass"),
    "the loader waits for the wrong round": ("(j // STAGES & 1) ^ 1", "j // STAGES & 1"),
    "bytes of lse are not counted": (
        "a_desc.block_type.nbytes + (4 * SIZE if NUMBERS else 0)\n"
        "    b",
        "a_desc.block_type.nbytes\n"
        "    b"),
    "bytes of delta are not counted": (
        "b_desc.block_type.nbytes + (4 * SIZE if NUMBERS else 0)\n"
        "    for",
        "b_desc.block_type.nbytes\n"
        "    for"),
    "lse of another head": ("other * distance + start", "start"),
    "numbers that lie closer than they were spaced": ("(b * H + first_head) * distance", "(b * H + first_head) * T"),
    "queries of another head": ("[batch, passing_head + other, start, 0], a_full", "[batch, passing_head, start, 0], a_full"),
    "gradients of another head": ("[batch, passing_head + other, start, 0], b_full", "[batch, passing_head, start, 0], b_full"),
    "keys of another consumer": (
        "row + i * ROWS, 0], kept_full.index(i), kept_a",
        "row + (1 - i) * ROWS, 0], kept_full.index(i), kept_a"),
    "buffers are free after one consumer": ("init(empty.index(i), count=CONSUMERS)", "init(empty.index(i), count=1)"),
    "barriers are not fenced": ("count=CONSUMERS)\n    fence_async_shared()", "count=CONSUMERS)"),
    "the wrong blocks are masked": ("gl.where(j < edges, edge", "gl.where(j < edges - 1, edge"),
    "scores' softcap is left out of their gradients": ("slope = 1 - tanh * tanh", "slope = 1.0"),
    # the keys kernel
    "a consumer does not wait for gradients of out": ("mbarrier.wait(b_full.index(stage), j // STAGES & 1)\n    less", "less"),
    "a consumer does not wait for the next queries": (
        "mbarrier.wait(a_full.index(after % STAGES), after // STAGES & 1)\n"
        "    s = _scores(keys",
        "s = _scores(keys"),
    "a consumer does not wait for the first queries": (
        "mbarrier.wait(barriers[1].index(0), 0)\n"
        "    s = warpgroup_mma_wait(0, deps=(_scores(k,",
        "s = warpgroup_mma_wait(0, deps=(_scores(k,"),
    "a consumer does not wait for its keys": (
        "mbarrier.wait(barriers[0].index(WHO), 0)\n"
        "    mbarrier.wait(barriers[1].index(0), 0)\n"
        "    s = warpgroup_mma_wait(0, deps=(_scores(k,",
        "mbarrier.wait(barriers[1].index(0), 0)\n"
        "    s = warpgroup_mma_wait(0, deps=(_scores(k,"),
    "scores of keys are used before they are there": (
        "s = warpgroup_mma_wait(0, deps=(s,))\n"
        "    dp = warpgroup_mma(",
        "s = warpgroup_mma_wait(1, deps=(s,))\n"
        "    dp = warpgroup_mma("),
    "dp of keys is used before it is there": (
        "dp = warpgroup_mma_wait(1, deps=(dp,))",
        "dp = warpgroup_mma_wait(2, deps=(dp,))"),
    "ds of keys is not kept": (
        "dv, weights, dk, ds = warpgroup_mma_wait(1, deps=(dv, weights, dk, ds))",
        "dv, weights, dk = warpgroup_mma_wait(1, deps=(dv, weights, dk))"),
    "queries are given back too early": (
        "    dv, weights, dk, ds = warpgroup_mma_wait(1, deps=(dv, weights, dk, ds))\n"
        "    mbarrier.arrive(empty.index(stage))",
        "    mbarrier.arrive(empty.index(stage))\n"
        "    dv, weights, dk, ds = warpgroup_mma_wait(1, deps=(dv, weights, dk, ds))"),
    "the next scores of keys are those of this block": (
        "_scores(keys, _flat(q.index(after % STAGES))",
        "_scores(keys, _flat(q.index(stage))"),
    "delta of another head is taken": ("less = gl.where(rows < T, less, 0.0)", "less = less"),
    "edges of keys are not masked": ("group, seen, T, S, scale, cap, True", "group, seen, T, S, scale, cap, False"),
    "keys that nobody sees are left out": (
        "n = gl.maximum(group * (span[4] + span[3] - span[2]), 1)",
        "n = group * (span[4] + span[3] - span[2])"),
    "dk is not scaled": ("k.store((dk * dscale)", "k.store((dk)"),
    "dk is written over keys in use": ("    s = warpgroup_mma_wait(0, deps=(s,))\n\n    k.store", "\n    k.store"),
    "dk and dv are not fenced": ("    v.store(dv.to(q.dtype))\n    fence_async_shared()", "    v.store(dv.to(q.dtype))"),
    "dv goes to the rows of another": (
        "tma.async_copy_shared_to_global(dv_desc, [b, g, begin_key, 0]",
        "tma.async_copy_shared_to_global(dv_desc, [b, g, key, 0]"),
    "dv is not waited for": ("kept_v.index(WHO))\n    tma.store_wait(0)", "kept_v.index(WHO))"),
    # the queries kernel
    "a consumer does not wait for values": ("mbarrier.wait(b_full.index(stage), j // STAGES & 1)\n    s = warp", "s = warp"),
    "a consumer does not wait for the next keys": (
        "mbarrier.wait(a_full.index(after % STAGES), after // STAGES & 1)\n"
        "    s = _scores(queries",
        "s = _scores(queries"),
    "scores of queries are used before they are there": (
        "s = warpgroup_mma_wait(0, deps=(s,))\n"
        "    dp = _scores(",
        "s = warpgroup_mma_wait(1, deps=(s,))\n"
        "    dp = _scores("),
    "dp of queries is used before it is there": (
        "dp = warpgroup_mma_wait(0, deps=(dp,))",
        "dp = warpgroup_mma_wait(1, deps=(dp,))"),
    "keys are given back too early": (
        "    dq, ds = warpgroup_mma_wait(1, deps=(dq, ds))\n"
        "    mbarrier.arrive(empty.index(stage))",
        "    mbarrier.arrive(empty.index(stage))\n"
        "    dq, ds = warpgroup_mma_wait(1, deps=(dq, ds))"),
    "ds of queries is not kept": ("dq, ds = warpgroup_mma_wait(1, deps=(dq, ds))", "dq = warpgroup_mma_wait(1, deps=(dq,))"),
    "edges of queries are not masked": ("seen, top, less, scale, cap, True", "seen, top, less, scale, cap, False"),
    "delta is left out of dq": ("ds = _operand(p * (dp - gl.expand_dims(less, 1))", "ds = _operand(p * (dp - 0)"),
    "dq is not scaled": ("q.store((dq * dscale)", "q.store((dq)"),
    "dq is not fenced": (
        "q.store((dq * dscale).to(k.dtype))  # its queries' place: nobody else reads them, and it is done with them\n"
        "    fence_async_shared()",
        "q.store((dq * dscale).to(k.dtype))"),
    "dq is not waited for": ("kept_q.index(WHO))\n    tma.store_wait(0)", "kept_q.index(WHO))"),
    "keys of another group": ("(h // group, 0), 1, T, n, span)", "(0, 0), 1, T, n, span)"),
}


@pytest.mark.parametrize("name", MUTANTS)
def test_the_emulator_finds_each_fault(name):
    """A kernel with one line changed for the worse fails, by an error or by its numbers, in one of a few orders of events."""
    old, new = MUTANTS[name]
    source = inspect.getsource(backward)
    assert source.count(old) == 1, f"{source.count(old)} times in the kernels: {old}"
    names = dict(vars(backward))
    exec(compile(source.replace(old, new), "backward mutant", "exec"), names)  # a name of its own in the cache of sources

    def fails(seed):
        with emulated(kernels=SimpleNamespace(**names), seed=seed):
            try:
                compare(qkv(B=2, H=4, G=2, T=62, D=64, dtype=BF16))
                compare(qkv(T=91, S=30, D=64, dtype=BF16), causal=False)
                compare(qkv(T=30, S=91, D=64, dtype=BF16), causal=False, softcap=2.0)
                compare(qkv(T=10, S=90, D=64, dtype=BF16), window=5)
                assert not spoilt_by_another_head()
            except AssertionError:
                return True
        return False

    assert any(map(fails, range(8)))


# ---- which path ----------------------------------------------------------------------------------------------------
def test_the_paths_are_those_that_a_gpu_has_measured():
    keys = {("sm_90", *key) for key in KEYS}
    assert BACKWARD_PATH == dict.fromkeys(keys, "hopper")
    for table in (BACKWARD_KEYS_HOPPER, BACKWARD_QUERIES_HOPPER):
        assert {("sm_90", *key[:2]) for key in table["sm_90"]} == keys
    with pytest.raises(ValueError, match="num_stages=1 must be 2 or more"):
        backward.constants(Config(64, 128, 4, 1))


def test_the_path_is_chosen_by_the_table_for_what_it_can_do(caplog):
    dispatch._log_new.cache_clear()
    q, k, _ = qkv(T=4, D=64, dtype=BF16)
    assert launch.backward_path(q, k, True) == "portable"
    with emulated(), caplog.at_level(logging.INFO, "officina.kernels"):
        assert launch.backward_path(q, k, True) == "hopper" and not caplog.records
        for _ in range(2):
            assert launch.backward_path(q.float(), k, True) == "portable"
        assert caplog.text.count("it computes in bf16 and fp16, not torch.float32") == 1
        wide, keys, _ = qkv(T=4, D=192, dtype=BF16)
        assert launch.backward_path(wide, keys, True) == "portable" and len(caplog.records) == 1
        with mock.patch.dict(BACKWARD_PATH, {("sm_90", 256, True): "hopper"}):
            assert launch.backward_path(wide, keys, True) == "portable"
        assert "heads are 192 wide, its backward pass takes 128 at most" in caplog.text
        with mock.patch.dict(BACKWARD_PATH, {("sm_90", 64, True): "portable"}):
            assert launch.backward_path(q, k, True) == "portable" and launch.backward_path(q, k, False) == "hopper"


@pytest.mark.parametrize("deterministic", [False, True])
def test_it_stands_for_both_kinds_of_backward_pass(deterministic):
    inputs = qkv(T=40, D=64, dtype=BF16)
    with emulated(), mock.patch.object(launch, "_run", wraps=launch._run) as run:
        gradients(inputs, deterministic=deterministic)
        assert [call.args[0] for call in run.call_args_list[1:]] == [backward.keys_kernel, backward.queries_kernel]
        assert [call.args[1] for call in run.call_args_list[1:]] == [2, 2 * 2]  # 40 of 32 rows: a head of keys, two of queries


def test_any_layout_of_the_inputs():
    """As the model has it, contiguous, keys shared by expansion, heads' own axis scattered, shifted by one element."""
    inputs = qkv(B=2, H=2, G=2, T=20, D=64, dtype=BF16)
    views = [lambda x: x, lambda x: x.transpose(1, 2).contiguous().transpose(1, 2),
             lambda x: x.transpose(2, 3).contiguous().transpose(2, 3),
             lambda x: torch.zeros(1 + x.numel(), dtype=BF16)[1:].view(x.shape).copy_(x)]
    with emulated():
        found = []
        for view in views:
            leaves = [view(x).requires_grad_() for x in inputs]
            out, _ = flash_attention(*leaves, impl="triton")
            for upper in (torch.ones_like(out), view(torch.ones_like(out))):
                found.append(torch.autograd.grad(out, leaves, upper, retain_graph=True))
            found.append(torch.autograd.grad(out.float().sum(), leaves))  # an expanded gradient
        assert all(torch.equal(a, b) for other in found for a, b in zip(found[0], other, strict=True))


@pytest.mark.parametrize("packed", [False, True], ids=["whole", "packed"])
@pytest.mark.parametrize("head_dim,causal", itertools.product((64, 80, 128), (False, True)))
def test_what_is_launched_is_what_the_compile_test_compiles(head_dim, causal, packed):
    """Up to the compiler: types, constants and alignment that Triton's launcher finds are those that `compilations` states."""
    q, k, v = qkv(B=2, H=8, G=2, T=70, D=head_dim, dtype=BF16)
    spans = document_spans(documents(2, 70, 20)) if packed else None
    driver = SimpleNamespace(get_current_device=lambda: 0, get_current_stream=lambda device: 0,
                             get_current_target=lambda: triton.backends.compiler.GPUTarget("cuda", 90, 32))
    cases = [case for case in launch.compilations("sm_90", head_dims=(head_dim,), causal=(causal,), packed=packed)
             if case[0].startswith(("backward_keys_hopper", "backward_queries_hopper"))]
    assert len(cases) == 2
    before = triton.runtime.driver._active
    triton.runtime.driver.set_active(driver)
    key = ("sm_90", max(64, launch.padded(head_dim)), causal)
    try:
        with (mock.patch.object(launch, "arch_of", lambda device: "sm_90"), mock.patch.object(launch, "forward", plain_forward),
              mock.patch.object(launch.kernels, "delta_kernel", Delta()), mock.patch.dict(BACKWARD_PATH, {key: "hopper"}),
              mock.patch("officina.kernels.flash_attention.why_not_triton_on", lambda device: None),
              mock.patch.object(type(cases[0][1]), "_do_compile", autospec=True, return_value=None) as compiled):
            gradients((q, k, v), causal=causal, spans_B2S=spans)
    finally:
        triton.runtime.driver._active = before
        for _, kernel, _, _ in cases:
            kernel.device_caches.clear()
    for (_, kernel, arguments, _), call in zip(cases, compiled.call_args_list, strict=True):
        given, _, signature, _, constants, options, attributes, _ = call.args
        assert given is kernel
        names = list(arguments)
        for place, (name, value) in enumerate(arguments.items()):
            if signature[name] == "constexpr":
                assert constants[(place,)] == value, name
            else:
                assert signature[name] == value, name
        aligned = {names[place] for (place,), value in attributes.items() if ["tt.divisibility", 16] in value}
        assert aligned == {name for name, value in arguments.items() if isinstance(value, str) and value.startswith("*")}
        assert (options.num_warps, options.maxnreg) == (4, None)


def test_the_operator_keeps_torch_s_rules():
    inputs = [x.requires_grad_() for x in qkv(T=20, D=64, dtype=BF16)]
    with emulated():
        torch.library.opcheck(torch.ops.officina.flash_attention.default, (*inputs, None, True, 0.125, 0, 0.0, False))
