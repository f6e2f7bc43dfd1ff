"""Adapters under every engine: the reference is a plain model whose weights are formed as W + scale B A."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from officina.trainer.config import LoraConfig
from officina.trainer.memory import measure_parts
from officina.trainer.model.build import build_model
from officina.trainer.model.lora import LoraLinear
from officina.trainer.parallel.engine import Parts, build_engine
from officina.trainer.state import PARAM
from tests.trainer.parallel.cases import ADAMW, MODEL, Case, distance, global_batch, join, micro_batches, reference
from tests.trainer.parallel.test_conformance import TIED, bf16_trace, expected, trace

LORA = LoraConfig(rank=4, alpha=8, targets=["*.q", "*.v", "*.down"])
MORE = LoraConfig(rank=4, alpha=16, rslora=True, targets=["*.q", "*.k", "*.v", "*.o", "*.gate", "*.up", "*.down"],
                  train=["embed", "*norm"])
"""Embedding and norms trained in full too."""
HERE = "tests.trainer.parallel.test_adapters"
SAMPLE = [("single", 1, MORE), ("ddp", 2, LORA), ("fsdp2", 4, MORE), ("hsdp", 4, LORA), ("zero1", 2, MORE), ("zero2", 2, LORA),
          ("zero3", 2, MORE)]
GRID = [("single", 1, LORA), ("ddp", 4, MORE), ("fsdp2", 2, LORA), ("fsdp2_fast", 2, MORE), ("fsdp2_offload", 2, LORA),
        ("hsdp", 4, MORE), ("zero1", 4, LORA), ("zero2", 4, MORE), ("zero3", 4, LORA), ("zero3_persist", 3, LORA),
        ("zero1_offload", 2, MORE), ("zero2_offload", 2, LORA), ("zero3_offload", 2, MORE)]


def trained_names(case: Case) -> set[str]:
    return {name for name, p in build_model(case.run).module.named_parameters() if p.requires_grad}


@pytest.mark.parametrize(("engine", "ranks", "adapter"), SAMPLE)
def test_engine_conforms_with_adapters(pool, engine, ranks, adapter):
    case = Case(engine, adapter=adapter, rows=7, steps=6)
    found, wanted = trace(pool, ranks, case), expected(case)
    assert distance(wanted, found).within(), distance(wanted, found)
    trained = trained_names(case)
    assert trained < {name for name, _ in found.state}
    for (name, slot), values in found.state.items():
        slots = {s for n, s in found.state if n == name}
        assert slots == ({"param", "exp_avg", "exp_avg_sq"} if name in trained else {"param"}), name
        if name not in trained:
            assert np.array_equal(values, wanted.state[name, slot]), f"frozen {name} changed"
    moved = [name for name in trained if not np.array_equal(found.state[name, "param"], first_values(case, name))]
    assert set(moved) == trained


def first_values(case: Case, name: str) -> np.ndarray:
    built = build_model(case.run)
    return built.source.read(name, PARAM, 0, dict(built.module.named_parameters())[name].numel()).double().numpy()


@pytest.mark.slow
@pytest.mark.parametrize(("engine", "ranks", "adapter"), GRID)
def test_engine_conforms_with_adapters_whole_grid(pool, engine, ranks, adapter):
    test_engine_conforms_with_adapters(pool, engine, ranks, adapter)


@pytest.mark.parametrize(("engine", "ranks"), [("single", 1), pytest.param("fsdp2", 2, marks=pytest.mark.slow)])
def test_tied_model_conforms(pool, engine, ranks):
    case = Case(engine, model=TIED, adapter=replace(MORE, targets=["*.q"]), steps=6)
    assert distance(expected(case), trace(pool, ranks, case)).within()


@pytest.mark.slow
@pytest.mark.parametrize(("engine", "ranks", "recompute"), [("single", 1, "selective"), ("fsdp2", 2, "full")])
def test_compiled_blocks_conform(pool, engine, ranks, recompute):
    case = Case(engine, adapter=LORA, steps=4, compile=True, recompute=recompute)
    away = distance(expected(case), trace(pool, ranks, case))
    assert away.within(params=2e-5, params_rms=1e-6), away


@pytest.mark.parametrize(("fault", "engine", "ranks"), [
    ("missing_reduce", "ddp", 2), ("missing_reduce", "fsdp2", 2), ("wrong_divisor", "zero2", 2), ("data_shift", "zero3", 2),
    ("scale", "single", 1), ("forgotten", "single", 1)])
def test_deliberate_faults_are_caught(pool, fault, engine, ranks):
    case = Case(engine, adapter=LORA, steps=4, fault=fault)
    wanted = expected(case)
    if fault == "scale":
        case = replace(case, fault="", adapter=replace(LORA, alpha=LORA.alpha * 1.01))
    if fault == "forgotten":  # one layer without its adapter
        case = replace(case, fault="", adapter=replace(LORA, targets=["*.q", "blocks.0.attn.v", "blocks.1.attn.v", "*.down"]))
    try:
        found = trace(pool, ranks, case)
    except AssertionError as seen_by_join:
        assert "saw other norms" in str(seen_by_join)
        return
    if fault == "forgotten":
        missing = {key: wanted.state[key] for key in wanted.state.keys() - found.state.keys()}
        found = replace(found, state=found.state | missing)
    away = distance(wanted, found)
    assert not away.within(), f"{fault} under {engine} was not noticed: {away}"


@pytest.mark.parametrize(("engine", "ranks"), [
    ("single", 1), ("fsdp2", 2), ("zero3", 2),
    *(pytest.param(engine, 2, marks=pytest.mark.slow) for engine in ("ddp", "zero1", "zero2"))])
def test_bf16_is_as_good_as_one_bf16_process_and_only_the_base_has_no_master(pool, engine, ranks):
    case = Case(engine, adapter=MORE, precision="bf16", steps=10, optim=replace(ADAMW, lr=3e-4))
    found = bf16_trace(pool, ranks, case, norms_within=2e-3)
    trained = trained_names(case)
    for (name, slot), values in found.state.items():
        low = (values.astype(np.float32).view(np.uint32) & 0xFFFF).any()
        if slot == PARAM and values.any():
            assert low == (name in trained), f"{name} is stored in {'fp32' if low else 'bf16'}"


@pytest.mark.parametrize(("engine", "ranks"), [
    ("ddp", 3), ("fsdp2", 2), pytest.param("zero2", 2, marks=pytest.mark.slow), ("zero3", 2)])
def test_resume_is_bitwise_also_with_dropout_and_recomputation(pool, engine, ranks):
    options = dict(adapter=replace(LORA, dropout=0.2), recompute="full", precision="bf16")
    whole = join(pool.run(ranks, f"{HERE}:train_seeded", Case(engine, steps=4, **options)))
    begun = join(pool.run(ranks, f"{HERE}:train_seeded", Case(engine, steps=2, **options)))
    ended = join(pool.run(ranks, f"{HERE}:train_seeded", Case(engine, steps=2, first=2, **options), begun.state, "moments"))
    assert ended.losses == whole.losses[2:] and ended.norms == whole.norms[2:]
    for key, values in whole.state.items():
        assert np.array_equal(values, ended.state[key]), f"{key}: {np.abs(values - ended.state[key]).max()}"


def train_seeded(ranks, case: Case, *args):
    """Like the loop, whose random numbers follow from the step: here one draw per optimizer step."""
    from tests.trainer.parallel import cases

    plain = cases.global_batch

    def seeded(step: int, case: Case):
        torch.manual_seed(100 * step + ranks.rank)
        return plain(step, case)

    cases.global_batch = seeded
    try:
        return cases.train(ranks, case, *args)
    finally:
        cases.global_batch = plain


@pytest.mark.parametrize(("begun", "ended"), [
    (("fsdp2", 3), ("zero2", 2)), pytest.param(("zero3", 2), ("fsdp2", 4), marks=pytest.mark.slow)])
def test_adapters_go_on_under_another_engine(pool, begun, ended):
    case = Case(adapter=MORE, steps=3)
    half = trace(pool, begun[1], replace(case, engine=begun[0]))
    rest = trace(pool, ended[1], replace(case, engine=ended[0], first=3), half.state, "moments")
    whole = reference(replace(case, splits=1, steps=6))
    assert distance(whole, rest, first=3).within(), distance(whole, rest, first=3)


# ---- memory --------------------------------------------------------------------------------------------------------
def memory_of(ranks, case: Case) -> tuple[int, int, int]:
    """Bytes of this rank's parameters, gradients and moments after a backward pass."""
    import gc

    gc.collect()
    before = measure_parts()
    engine = engine_of(ranks, case)
    micro = micro_batches(global_batch(0, case), range(case.rows), 1)[0]
    engine.forward_backward(micro, step_tokens=100, last=True)
    parts = measure_parts()
    engine.step(1.0)
    engine.close()
    return (parts.parameters - before.parameters, parts.gradients - before.gradients, parts.moments - before.moments)


def engine_of(ranks, case: Case):
    built = build_model(case.run)
    engine = build_engine(Parts(case.run, ranks, built.module, built.loss_fn, case.precision))
    engine.import_state(built.source, optimizer_steps=None)
    return engine


@pytest.mark.parametrize(("engine", "ranks", "precision"), [
    ("single", 1, "fp32"), ("single", 1, "bf16"), ("ddp", 2, "bf16"), ("fsdp2", 2, "fp32"), ("fsdp2", 2, "bf16"),
    ("zero1", 2, "bf16"), ("zero2", 2, "bf16"), ("zero3", 2, "fp32"), ("zero3", 2, "bf16")])
def test_frozen_weights_have_no_gradient_no_moments_and_in_bf16_no_master(pool, engine, ranks, precision):
    case = Case(engine, adapter=LORA, precision=precision)
    sizes = {name: p.numel() for name, p in build_model(case.run).module.named_parameters()}
    trained = sum(sizes[name] for name in trained_names(case))
    frozen = sum(sizes.values()) - trained
    parts = pool.run(ranks, f"{HERE}:memory_of", case)
    parameters, gradients, moments = (sum(column) for column in zip(*parts, strict=True))
    copies = ranks if engine in ("ddp", "zero1", "zero2") else 1
    slack = 4096 * ranks  # the counters of steps, padded rows of shards, the alignment of flat buffers
    if not engine.startswith("zero"):  # whose masters and gradients lie in flat tensors beside the parameters
        assert parameters >= copies * ((2 if precision == "bf16" else 4) * frozen + 4 * trained)
        assert gradients >= copies * 4 * trained
    assert parameters <= copies * ((2 if precision == "bf16" else 4) * frozen + 4 * trained) + slack
    assert gradients <= copies * 4 * trained + slack
    assert 8 * trained <= moments <= (copies if engine == "ddp" else 1) * 8 * trained + slack


def test_layers_and_values_that_adapters_add():
    built = build_model(Case(adapter=LORA).run)
    layers = {name for name, child in built.module.named_modules() if isinstance(child, LoraLinear)}
    assert layers == {f"blocks.{i}.{name}" for i in range(3) for name in ("attn.q", "attn.v", "mlp.down")}
    plain = build_model(Case().run)
    for name, parameter in plain.module.named_parameters():  # names and values of the base are those of the plain model
        assert torch.equal(built.source.read(name, PARAM, 0, parameter.numel()),
                           plain.source.read(name, PARAM, 0, parameter.numel()))
    a = built.source.read("blocks.0.mlp.down.lora_a", PARAM, 0, 4 * MODEL.d_ff)
    assert abs(a.std().item() * (3 * MODEL.d_ff) ** 0.5 - 1) < 0.1
    assert torch.equal(a[100:200], built.source.read("blocks.0.mlp.down.lora_a", PARAM, 100, 200))
    assert not built.source.read("blocks.0.mlp.down.lora_b", PARAM, 0, 64 * 4).any()
