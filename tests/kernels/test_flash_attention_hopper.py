"""The Hopper kernel of flash attention without a GPU: its own source in an emulator of what Gluon offers there, on small tiles
and in many orders of events, and its launch up to the compiler. What that makes of it: test_flash_attention_compiled.py."""

import inspect
import itertools
import logging
import tempfile
from contextlib import contextmanager
from types import SimpleNamespace
from unittest import mock

import pytest
import torch

from officina.kernels import dispatch
from officina.kernels import flash_attention_hopper as hopper
from officina.kernels import flash_attention_launch as launch
from officina.kernels import hopper_descriptors as descriptors
from officina.kernels.dispatch import triton
from officina.kernels.flash_attention import flash_attention, flash_attention_reference
from officina.kernels.flash_attention_tables import FORWARD_HOPPER, FORWARD_PATH
from officina.kernels.masks import dense_mask, document_spans, length_spans
from officina.kernels.tables import Config
from tests.kernels.attention_cases import INF, documents, qkv
from tests.kernels.hopper_emulator import Emulated

BF16, FP16 = torch.bfloat16, torch.float16
pytestmark = pytest.mark.skipif(hopper.why_not_hopper("sm_90", 64, 1, BF16) is not None, reason="made for another triton")
SHIPPED = dict(FORWARD_HOPPER)
ROWS, KEYS = 16, 8
"""Of a consumer and of a block, in the emulator: rows of 70 tokens have whole, ragged, edge and unseen blocks there."""


@contextmanager
def emulated(*, consumers=2, stages=2, ping_pong=1, seed=0, kernel=hopper.forward_kernel):
    """Hopper's path taken on the CPU: arch and tables say so, and the emulator stands for the GPU."""
    config = Config(consumers * ROWS, KEYS, 4, stages, {"ping_pong": ping_pong})
    keys = [(width, causal) for width in (64, 128, 256) for causal in (False, True)]
    with (mock.patch.object(launch, "arch_of", lambda device: "sm_90"),
          mock.patch.dict(FORWARD_PATH, {("sm_90", *key): "hopper" for key in keys}),
          mock.patch.dict(FORWARD_HOPPER, {"sm_90": {(*key, 16): config for key in keys}}),
          mock.patch.object(hopper, "ROWS", ROWS), mock.patch.object(hopper, "forward_kernel", Emulated(kernel, seed))):
        yield


def forward(q, k, v, *, causal=True, window=0, softcap=0.0, scale=None, spans=None):
    """The operator: what flash_attention calls on a GPU."""
    return torch.ops.officina.flash_attention(q, k, v, spans, causal, q.shape[-1] ** -0.5 if scale is None else scale, window,
                                              softcap, True)


def assert_as_exact(inputs, *, causal=True, window=0, softcap=0.0, scale=None, spans=None):
    """The two-times rule of tests/kernels/rules.py for the outputs; rows that see nothing are 0 and -inf to the letter."""
    q, k, v = inputs
    mask = dense_mask(q.shape[2], k.shape[2], causal, window, spans, q.device)
    words = dict(mask=mask, scale=q.shape[-1] ** -0.5 if scale is None else scale, softcap=softcap)
    exact = flash_attention_reference(*(x.double() for x in inputs), **words)
    plain = flash_attention_reference(*inputs, **words, compute_dtype=q.dtype)
    ours = forward(q, k, v, causal=causal, window=window, softcap=softcap, scale=scale, spans=spans)
    blind = ~mask.any(-1).expand(ours[1].shape)
    assert torch.equal(ours[1] == -INF, blind) and not ours[0][blind].any()
    for want, near, got in zip(exact, plain, ours, strict=True):
        seen, finite = got[~blind], want[~blind]
        assert seen.isfinite().all()
        if seen.numel():
            bound = 2 * (near[~blind].double() - finite).abs().max() + 4 * torch.finfo(got.dtype).eps * finite.abs().max()
            assert (seen.double() - finite).abs().max() <= bound


CASES = {
    "causal": (dict(T=70), {}),
    "full": (dict(T=70, S=45), dict(causal=False)),
    "whole_tiles": (dict(T=64, S=64), dict(causal=False)),
    "decoding": (dict(T=5, S=70), {}),
    "blind": (dict(T=70, S=33), {}),
    "window": (dict(T=90), dict(window=20)),
    "window_of_1": (dict(T=40), dict(window=1)),
    "window_and_cache": (dict(T=40, S=75), dict(window=20)),
    "softcap_window": (dict(T=50), dict(softcap=2.0, window=17)),
    "scale": (dict(T=40), dict(scale=1.7)),
    "heads_80": (dict(T=40, D=80), {}),
    "heads_128": (dict(T=40, D=128), {}),
    "heads_256": (dict(T=35, D=256), dict(causal=False)),
    "groups": (dict(B=2, H=6, G=2, T=20), {}),
    "one_head_of_keys": (dict(H=4, G=1, T=33), {}),
    "one_token": (dict(T=1), {}),
    "many_queries_one_key": (dict(T=40, S=1), dict(causal=False)),
}


@pytest.mark.parametrize("consumers", [2, 3])
@pytest.mark.parametrize("case", CASES)
def test_the_kernel_is_as_exact_as_plain_torch(case, consumers):
    shapes, switches = CASES[case]
    with emulated(consumers=consumers):
        assert_as_exact(qkv(**{"D": 64, **shapes}, dtype=BF16 if consumers == 2 else FP16), **switches)


@pytest.mark.parametrize("switches", [{}, dict(causal=False), dict(window=11), dict(softcap=2.0)], ids=str)
def test_packed_documents(switches):
    with emulated():
        assert_as_exact(qkv(B=2, H=2, T=70, D=64, dtype=BF16), spans=document_spans(documents(2, 70, 20)), **switches)
        assert_as_exact(qkv(B=2, H=1, T=30, S=70, D=64, dtype=BF16), spans=document_spans(documents(2, 70, 25)), **switches)
        lengths = torch.tensor([0, 5, 5, 6, 46, 70], dtype=torch.int32)
        assert_as_exact(qkv(T=70, D=64, dtype=BF16), spans=length_spans(lengths, 70), **switches)


@pytest.mark.parametrize("ping_pong", [0, 1])
@pytest.mark.parametrize("consumers", [2, 3])
@pytest.mark.parametrize("stages", [1, 2, 3])
def test_any_order_of_events_gives_the_same_bits(stages, consumers, ping_pong):
    """One block, two, as many as there are buffers, one more, and many."""
    for blocks in sorted({1, 2, stages, stages + 1, 2 * stages + 1, 7}):
        inputs = qkv(H=1, T=consumers * ROWS - 3, S=blocks * KEYS - 1, D=64, dtype=BF16)
        found = []
        for seed in range(4):
            with emulated(consumers=consumers, stages=stages, ping_pong=ping_pong, seed=seed):
                found.append(forward(*inputs, causal=False))
                if not seed:
                    assert_as_exact(inputs, causal=False)
        assert all(torch.equal(a, b) for other in found for a, b in zip(found[0], other, strict=True))


@pytest.mark.parametrize("head_dim", [64, 96, 256])
def test_with_the_tiles_of_the_table(head_dim):
    with emulated(), mock.patch.object(hopper, "ROWS", 64), mock.patch.dict(FORWARD_HOPPER, SHIPPED):
        assert_as_exact(qkv(H=1, T=300, D=head_dim, dtype=BF16))
        assert_as_exact(qkv(H=1, T=129, S=127, D=head_dim, dtype=BF16), causal=False)
        assert_as_exact(qkv(H=1, T=290, D=head_dim, dtype=BF16), spans=document_spans(documents(1, 290, 60)))


MUTANTS = {
    "the loader does not wait for keys to be read": ("mbarrier.wait(k_empty.index(stage), free)", "pass"),
    "the loader does not wait for values to be read": ("mbarrier.wait(v_empty.index(stage), free)", "pass"),
    "the loader does not wait for queries to be read": ("mbarrier.wait(q_empty.index(own), (turn // 2 & 1) ^ 1)", "pass"),
    "the loader waits for the wrong round": ("((past + j) // STAGES & 1) ^ 1", "(past + j) // STAGES & 1"),
    "the loader forgets the blocks of the tile before": ("        past += n\n        turn += 1", "        turn += 1"),
    "a plan is read before it is there": ("mbarrier.wait(plan_full.index(slot), turn // plan_full.shape[0] & 1)", "pass"),
    "a plan is overwritten before it is read": ("PLANS: gl.constexpr = 3", "PLANS: gl.constexpr = 1"),
    "a tile is left out": ("gl.num_programs(0) + gl.atomic_add", "gl.num_programs(0) + 1 + gl.atomic_add"),
    "a consumer does not wait for queries": ("mbarrier.wait(q_full.index(place), tile // 2 & 1)", "pass"),
    "a consumer does not wait for keys": (
        "mbarrier.wait(k_full.index(stage), c // STAGES & 1)\n    _my_turn(turn, c, WHO, PING_PONG)\n    s = _scores(q,",
        "s = _scores(q,"),
    "a consumer does not wait for a tile's first keys": (
        "mbarrier.wait(k_full.index(stage), c // STAGES & 1)\n    _my_turn(turn, c, WHO, PING_PONG)\n    s = _scores(_flat",
        "s = _scores(_flat"),
    "a consumer does not wait for values": ("    mbarrier.wait(v_full.index(last), (c - 1) // STAGES & 1)\n    out", "    out"),
    "a consumer waits for the wrong round of keys": (
        "mbarrier.wait(k_full.index(stage), c // STAGES & 1)\n    _my_turn(turn, c, WHO, PING_PONG)\n    s = _scores(q,",
        "mbarrier.wait(k_full.index(stage), 1 + c // STAGES & 1)\n    _my_turn(turn, c, WHO, PING_PONG)\n    s = _scores(q,"),
    "a consumer waits for the wrong round of values": (
        "(c - 1) // STAGES & 1)\n        out", "c // STAGES & 1)\n        out"),
    "queries are given back before their products are done": ("index((done - 1) % 2 *", "index(done % 2 *"),
    "a tile's first keys are given back before their product is done": (
        "s = warpgroup_mma_wait(0, deps=(s,))\n        mbarrier.arrive(k_empty.index(c % STAGES))",
        "mbarrier.arrive(k_empty.index(c % STAGES))\n        s = warpgroup_mma_wait(0, deps=(s,))"),
    "the very first keys are given back before their product is done": (
        "s = warpgroup_mma_wait(0, deps=(s,))\n    mbarrier.arrive(k_empty.index(0))",
        "mbarrier.arrive(k_empty.index(0))\n    s = warpgroup_mma_wait(0, deps=(s,))"),
    "a tile's scores begin with queries of another": ("(queries.index(place)), _flat", "(queries.index(WHO)), _flat"),
    "no queries come behind the last tile": ("    _load_queries(q_desc, 0, 0, 0, turn, q, q_full, q_empty)  #", "    #"),
    "a tile's output is used before it is there": (
        "warpgroup_mma_wait(1, deps=(out, p))", "warpgroup_mma_wait(2, deps=(out, p))"),
    "values are given back before their product is done": (
        "warpgroup_mma_wait(1, deps=(s,))", "warpgroup_mma_wait(1, deps=(s,))\n    mbarrier.arrive(v_empty.index(last))"),
    "a tile's last values are not given back": ("mbarrier.arrive(v_empty.index(last))\n\n", "pass\n\n"),
    "scores are used before they are there": ("warpgroup_mma_wait(1, deps=(s,))", "warpgroup_mma_wait(2, deps=(s,))"),
    "weights are not kept": ("out, p = warpgroup_mma_wait(0, deps=(out, p))  #", "out = warpgroup_mma_wait(0, deps=(out,))  #"),
    "buffers are free after one consumer": ("init(k_empty.index(i), count=CONSUMERS)", "init(k_empty.index(i), count=1)"),
    "bytes of a copy are miscounted": ("expect(v_full.index(stage), v_desc", "expect(v_full.index(stage), 2 * v_desc"),
    "nobody begins": ("^ (WHO == 0))", ")"),
    "barriers are not fenced": ("count=CONSUMERS)\n    fence_async_shared()", "count=CONSUMERS)"),
    "out is not fenced": ("        fence_async_shared()\n        tma.async_copy_shared", "        tma.async_copy_shared"),
    "out is not waited for": ("        tma.store_wait(0)  # of the tile before\n", ""),
    "the last out is not waited for": ("STAGES))\n    tma.store_wait(0)\n", "STAGES))\n"),
    "out goes to the rows of another": ("row + WHO * ROWS, 0], place)", "row, 0], place)"),
    "edges are not masked": ("seen, scale, cap, True, SOFTCAP, WHO", "seen, scale, cap, False, SOFTCAP, WHO"),
    "begins are not masked": ("if at_begin:", "if False:"),
    "ends are not masked": ("if at_end:", "if False:"),
    "a tile's first block begins nobody": ("seen, before > 0,", "seen, before < 0,"),
    "a tile's first block ends nobody": ("(before == 0) | both", "before < 0"),
    "later blocks begin nobody": ("seen, c < edges[0],", "seen, c < 0,"),
    "later blocks end nobody": ("(c >= edges[0]) | edges[3]", "c < 0"),
    "no block is at both edges": ("both = masked == n if CAUSAL else True", "both = n < 0"),
    "a column's own bits are dropped": ("(first - start, 1) - (keys & 6)", "(first - start, 1)"),
    "the wrong blocks are masked": ("gl.where(j < masked, _edge", "gl.where(j < masked - 1, _edge"),
    "a tile without edges has none masked": ("masked = gl.maximum(masked, 1)", "masked = gl.maximum(masked, 0)"),
    "the sum is not faded": ("    out *= gl.expand_dims(gl.convert_layout(fade", "    gl.expand_dims(gl.convert_layout(fade"),
    "keys of another head": ("k_desc, [b, h // group, start, 0]", "k_desc, [b, h // group * 0, start, 0]"),
    "queries of another consumer": ("row + i * ROWS, 0]", "row + (1 - i) * ROWS, 0]"),
}


@pytest.mark.parametrize("name", MUTANTS)
def test_the_emulator_finds_each_fault(name):
    """A kernel with one line changed for the worse fails, by an error or by its numbers, in one of a few orders of events."""
    old, new = MUTANTS[name]
    source = inspect.getsource(hopper)
    assert source.count(old) == 1, f"{source.count(old)} times in the kernel: {old}"
    names = dict(vars(hopper))
    exec(compile(source.replace(old, new), "mutant", "exec"), names)

    def fails(seed):
        with emulated(kernel=names["forward_kernel"], seed=seed):
            try:
                assert_as_exact(qkv(H=4, G=2, T=52, D=64, dtype=BF16))
                assert_as_exact(qkv(T=30, S=91, D=64, dtype=BF16), causal=False)
                assert_as_exact(qkv(T=30, S=64, D=64, dtype=BF16), causal=False)
                assert_as_exact(qkv(H=12, G=12, T=9, S=7, D=64, dtype=BF16), causal=False)  # tiles of one block
                assert_as_exact(qkv(H=2, T=70, D=64, dtype=BF16), window=45)  # blocks at one edge
                assert_as_exact(qkv(H=2, T=40, D=64, dtype=BF16), window=3)  # and at both
            except AssertionError:
                return True
        return False

    assert any(map(fails, range(8)))


def test_any_layout_of_the_inputs():
    """As the model has it, contiguous, keys shared by expansion, heads' own axis scattered, shifted by one element."""
    q, k, v = qkv(B=2, H=2, G=2, T=20, D=64, dtype=BF16)
    want = flash_attention_reference(q, k, v, mask=dense_mask(20, 20, True, 0, None, q.device), scale=0.125)
    shifted = torch.zeros(1 + q.numel(), dtype=BF16)[1:].view(q.shape).copy_(q)
    with emulated():
        for like in (lambda x: x, lambda x: x.transpose(1, 2).contiguous().transpose(1, 2),
                     lambda x: x.transpose(2, 3).contiguous().transpose(2, 3)):
            out, lse = forward(like(q), like(k), like(v))
            torch.testing.assert_close((out, lse), want, atol=2e-2, rtol=1e-2)
            assert out.transpose(1, 2).is_contiguous() and lse.is_contiguous()
        torch.testing.assert_close(forward(shifted, k, v), want, atol=2e-2, rtol=1e-2)
        one = [x[:, :1].expand(x.shape) for x in (k, v)]
        assert_as_exact([q, *one])


def test_what_tma_can_walk_is_not_copied_and_descriptors_are_legal():
    q = torch.zeros(2, 20, 4, 64, dtype=BF16).transpose(1, 2)
    alone = torch.zeros(1280, dtype=BF16).as_strided((1, 1, 20, 64), (3, 5, 64, 1))  # strides of axes of one mean nothing
    for x in (q, q.contiguous(), q[:, 1:, 3:], q[..., :24], alone):
        assert descriptors.loadable(x) is x
        made = descriptors.descriptor(x, 64, 64)
        assert made.shape == list(x.shape) and made.block_shape == [1, 1, 64, 64] and made.strides[-1] == 1
        assert all(stride % 8 == 0 and stride > 0 for stride in made.strides[:-1])
        assert made.base.data_ptr() == x.data_ptr() and made.layout.swizzle_byte_width == 128
    for x in (q[..., 4:44], q.transpose(2, 3), q[:, :1].expand(q.shape), torch.zeros(2, 20, 4, 68, dtype=BF16)[..., :64]):
        copy = descriptors.loadable(x)
        assert copy is not x and copy.is_contiguous() and torch.equal(copy, x)


@pytest.mark.parametrize("shape,strides", [((1, 1, 520), (0, 0, 2**22)), ((2, 2, 5), (2**32, 2**31, 64))],
                         ids=["rows", "heads"])
def test_offsets_beyond_32_bits(shape, strides):
    """Elements more than 2**31 apart, in a file with holes: pages that nobody touches take no memory."""
    near = torch.randn(*shape, 64, generator=torch.Generator().manual_seed(1)).to(FP16)
    with tempfile.NamedTemporaryFile() as file, emulated():
        n = 64 + sum((size - 1) * stride for size, stride in zip(shape, strides, strict=True))
        assert n > 2**31
        file.truncate(2 * n)
        far = torch.from_file(file.name, shared=True, size=n, dtype=FP16).as_strided(near.shape, (*strides, 1))
        far.copy_(near)
        assert descriptors.loadable(far) is far
        results = [forward(x[..., -3:, :], x, x) for x in (far, near)]
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


# ---- which path ----------------------------------------------------------------------------------------------------
def test_the_paths_are_those_that_a_gpu_has_measured():
    keys = {("sm_90", width, causal) for width in (64, 128, 256) for causal in (False, True)}
    assert FORWARD_PATH == {key: "hopper" if key[1] <= 128 else "portable" for key in keys}
    assert {("sm_90", *key[:2]) for key in FORWARD_HOPPER["sm_90"]} == keys


def test_the_path_is_chosen_by_the_table_for_what_it_can_do(caplog):
    dispatch._log_new.cache_clear()
    q, k, _ = qkv(T=4, D=64, dtype=BF16)
    assert launch.forward_path(q, k, True) == "portable"
    with emulated(), caplog.at_level(logging.INFO, "officina.kernels"):
        assert launch.forward_path(q, k, True) == "hopper" and not caplog.records
        for other, why in ((q.float(), "it computes in bf16 and fp16, not torch.float32"), (q[..., :60], "heads are 60 wide")):
            for _ in range(2):
                assert launch.forward_path(other, k, True) == "portable"
            assert caplog.text.count(why) == 1
        assert launch.forward_path(q, k[:, :, :0], True) == "portable" and "there are no keys" in caplog.text
        with mock.patch.dict(FORWARD_PATH, {("sm_90", 64, True): "portable"}):
            assert launch.forward_path(q, k, True) == "portable" and launch.forward_path(q, k, False) == "hopper"
    assert "it needs Hopper (sm_90), this is sm_100" in hopper.why_not_hopper("sm_100", 64, 1, BF16)
    with mock.patch.object(triton, "__version__", "3.8.0"):
        assert hopper.why_not_hopper("sm_90", 64, 1, BF16) == "it needs the Gluon of triton 3.6 or 3.7, this is triton 3.8.0"


def test_the_public_function_takes_it_and_hoppers_backward_pass():
    leaves = [x.requires_grad_() for x in qkv(T=40, D=64, dtype=BF16)]
    with (emulated(), mock.patch("officina.kernels.flash_attention.why_not_triton_on", lambda device: None),
          mock.patch.object(launch, "_run", wraps=launch._run) as run):
        out, lse = flash_attention(*leaves, impl="triton")
        assert run.call_args.args[0] is hopper.forward_kernel and run.call_args.args[1] == 2  # multiprocessors
        run.side_effect = lambda kernel, *_, **__: None
        torch.autograd.grad(out.float().sum(), leaves)
    assert [call.args[0].__name__ for call in run.call_args_list[1:]] == [
        "delta_kernel", "keys_kernel", "queries_kernel"]
    want = flash_attention_reference(*leaves, mask=dense_mask(40, 40, True, 0, None, out.device), scale=0.125)
    torch.testing.assert_close((out, lse), want, atol=2e-2, rtol=1e-2)


@pytest.mark.parametrize("packed", [False, True], ids=["whole", "packed"])
@pytest.mark.parametrize("head_dim,causal,softcap", [
    *itertools.product((64, 80, 128, 256), (False, True), (0.0,)), (64, True, 30.0), (128, True, 30.0)])
def test_what_is_launched_is_what_the_compile_test_compiles(head_dim, causal, softcap, packed):
    """Up to the compiler: types, constants and alignment that Triton's launcher finds are those that `compilations` states."""
    q, k, v = qkv(B=2, H=8, G=2, T=70, D=head_dim, dtype=BF16)
    spans = document_spans(documents(2, 70, 20)) if packed else None
    driver = SimpleNamespace(get_current_device=lambda: 0, get_current_stream=lambda device: 0,
                             get_current_target=lambda: triton.backends.compiler.GPUTarget("cuda", 90, 32))
    cases = launch.compilations("sm_90", head_dims=(head_dim,), causal=(causal,), packed=packed, softcap=softcap > 0)
    [(_, kernel, arguments, config)] = [case for case in cases if case[0].startswith("forward_hopper")]
    before = triton.runtime.driver._active
    triton.runtime.driver.set_active(driver)
    try:
        with (mock.patch.object(launch, "arch_of", lambda device: "sm_90"),
              mock.patch.dict(FORWARD_PATH, {("sm_90", max(64, launch.padded(head_dim)), causal): "hopper"}),
              mock.patch.object(type(kernel), "_do_compile", autospec=True, return_value=None) as compiled):
            forward(q, k, v, causal=causal, spans=spans, softcap=softcap)
    finally:
        triton.runtime.driver._active = before
        kernel.device_caches.clear()
    _, _, signature, _, constants, options, attributes, _ = compiled.call_args.args
    names = list(arguments)
    for place, (name, value) in enumerate(arguments.items()):
        if signature[name] == "constexpr":
            assert constants[(place,)] == value, name
        else:
            assert signature[name] == value, name
    aligned = {names[place] for (place,), value in attributes.items() if ["tt.divisibility", 16] in value}
    assert aligned == {name for name, value in arguments.items() if isinstance(value, str) and value.startswith("*")}
    assert (options.num_warps, options.maxnreg) == (4, None) and config.num_warps == 4
