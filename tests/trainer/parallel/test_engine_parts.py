"""The pieces that engines are made of, and what they refuse."""

from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn
from torch.torch_version import TorchVersion
from torch.utils._python_dispatch import TorchDispatchMode

from officina.trainer.batch import Batch
from officina.trainer.config import CustomModelConfig, FSDP2Config, HSDPConfig, MuonConfig, RunConfig, SingleConfig, ZeroConfig
from officina.trainer.errors import ConfigError, OfficinaError
from officina.trainer.model.build import build_model
from officina.trainer.parallel import fsdp2
from officina.trainer.parallel.blocks import find_blocks
from officina.trainer.parallel.engine import ENGINES, Parts, build_engine, resolve_precision
from officina.trainer.parallel.tensors import deal, materialize
from officina.trainer.ranks import RankEnv, Ranks
from tests.trainer.parallel.cases import Case, global_batch, micro_batches

ALONE = Ranks(RankEnv(0, 0, 1, 1, "none"), torch.device("cpu"))


def engine_of(case: Case = Case(), ranks: Ranks = ALONE, **changes):  # noqa: B008
    run = replace(case.run, **changes)
    built = build_model(run)
    engine = build_engine(Parts(run, ranks, built.module, built.loss_fn, case.precision))
    engine.import_state(built.source, optimizer_steps=None)
    return engine


def only_batch(case: Case = Case()) -> Batch:  # noqa: B008
    return micro_batches(global_batch(0, case), range(case.rows), 1)[0]


# ---- blocks --------------------------------------------------------------------------------------------------------
class Count(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.calls: dict[str, int] = {}

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function.overloadpacket.__name__
        self.calls[name] = self.calls.get(name, 0) + 1
        return function(*args, **(kwargs or {}))


def calls_of(recompute: str) -> dict[str, int]:
    engine, batch = engine_of(Case(recompute=recompute)), only_batch()
    with Count() as count:
        engine.forward_backward(batch, step_tokens=batch.loss_tokens, last=True)
    return count.calls


def test_recomputation_recomputes_what_it_says():
    none, selective, full = map(calls_of, ("none", "selective", "full"))
    assert none["silu"] == 3 and selective["silu"] == full["silu"] == 6
    attention = next(name for name in none if name.startswith("_scaled_dot_product") and "backward" not in name)
    for product in ("addmm", attention):
        assert selective[product] == none[product], product
    # Six of a block's seven products: nothing of the last one's output is needed to go back.
    assert full["addmm"] == none["addmm"] + 3 * 6 and full[attention] == 2 * none[attention]


@pytest.mark.parametrize("how", [{"recompute": "full"}, {"recompute": "selective"}, {"compile": True}])
def test_names_stay_clean(how):
    plain, changed = engine_of(), engine_of(Case(**how))
    assert [n for n, _ in plain.module.named_parameters()] == [n for n, _ in changed.module.named_parameters()]
    assert {(p.name, p.slot) for p in plain.export_state()} == {(p.name, p.slot) for p in changed.export_state()}


@pytest.mark.slow
@pytest.mark.parametrize("engine", ["single", "fsdp2"])
@pytest.mark.parametrize("recompute", ["none", "selective", "full"])
def test_many_blocks_compile_once(engine, recompute):
    """Two graphs, one to train and one to evaluate; from the ninth on, torch would silently compile no more of them."""
    from torch._dynamo.utils import counters

    torch._dynamo.reset()
    counters.clear()
    case = Case(engine, model=replace(Case().model, n_layers=10), recompute=recompute, compile=True)
    made, batch = engine_of(case), only_batch(case)
    for _ in range(2):
        made.forward_backward(batch, step_tokens=batch.loss_tokens, last=True)
        made.step(1.0)
    made.evaluate(batch)
    assert counters["stats"]["unique_graphs"] == 2 and not counters["graph_break"]
    made.close()


def test_missing_blocks_are_named():
    module = nn.Sequential(nn.ModuleList([nn.Linear(2, 2)]))
    run = RunConfig(model=CustomModelConfig(factory="a:b", loss="a:b", decoder="a:b", blocks="model.layers"))
    with pytest.raises(ConfigError, match=r"model.blocks=model.layers: names no filled nn.ModuleList.*Try: model.blocks=0"):
        find_blocks(module, run)
    with pytest.raises(ConfigError, match="keep the repeated layers in an nn.ModuleList"):
        find_blocks(nn.Linear(2, 2), run)


# ---- tensors -------------------------------------------------------------------------------------------------------
def test_materialize_keeps_ties_and_dtypes():
    with torch.device("meta"):
        module = nn.ModuleDict({"a": nn.Linear(3, 3), "b": nn.Linear(3, 3), "n": nn.BatchNorm1d(3)})
    module["b"].weight = module["a"].weight
    materialize(module, torch.device("cpu"), dtype=torch.bfloat16)
    assert module["b"].weight is module["a"].weight and not module["a"].weight.is_meta
    assert module["a"].bias.dtype == torch.bfloat16 and module["n"].num_batches_tracked.dtype == torch.int64
    kept = module["a"].weight
    materialize(module, torch.device("cpu"))
    assert module["a"].weight is kept


def test_a_buffer_that_nothing_can_fill_is_refused():
    module = nn.Module()
    module.register_buffer("ramp", torch.empty(3, device="meta"), persistent=False)
    with pytest.raises(OfficinaError, match=r"buffer .*ramp is not persistent .* Register it with persistent=True"):
        materialize(module, torch.device("cpu"))


def test_dealing_is_even_and_the_same_everywhere():
    sizes = {f"p{i}": size for i, size in enumerate([50, 30, 30, 20, 10, 10, 10])}
    owners = deal(sizes, 3)
    loads = [sum(size for name, size in sizes.items() if owners[name] == rank) for rank in range(3)]
    assert sum(loads) == 160 and max(loads) - min(loads) <= 10
    assert deal(dict(reversed(sizes.items())), 3) == owners


# ---- what is refused -----------------------------------------------------------------------------------------------
def test_single_with_more_ranks():
    run = Case().run
    built = build_model(run)
    two = Ranks(RankEnv(0, 0, 2, 2, "none"), torch.device("cpu"))
    with pytest.raises(ValueError, match="engine=single has one process, but there are 2 ranks"):
        build_engine(Parts(run, two, built.module, built.loss_fn, "fp32"))


def test_muon_under_zero():
    with pytest.raises(ConfigError, match=r"optim=muon: engine=zero hands .* flat slices .*Try: optim=adamw, or engine=fsdp2"):
        engine_of(engine=ZeroConfig(), optim=MuonConfig())


def test_scalar_parameter_under_fsdp2():
    run = Case(engine="fsdp2").run
    module = nn.Module()
    module.blocks, module.heat = nn.ModuleList([nn.Linear(2, 2)]), nn.Parameter(torch.zeros(()))
    with pytest.raises(OfficinaError, match=r"heat has no dimension, and engine=fsdp2 .* shape \(1,\), or use engine=ddp"):
        build_engine(Parts(run, ALONE, module, lambda *_: None, "fp32"))


def hsdp_of_three(ranks):
    with pytest.raises(OfficinaError, match=r"engine.shard_size=2 does not divide the 3 ranks. Try: engine.shard_size=1"):
        engine_of(Case(engine="hsdp"), ranks=ranks)


def test_hsdp_that_does_not_divide(pool):
    pool.run(3, "tests.trainer.parallel.test_engine_parts:hsdp_of_three")


def test_whole_numbers_under_fsdp2_with_a_torch_that_cannot_shard_them(monkeypatch):
    module = torch.nn.Module()
    module.codes = torch.nn.Parameter(torch.zeros(4, dtype=torch.uint8), requires_grad=False)
    monkeypatch.setattr(torch, "__version__", TorchVersion("2.11.0"))
    with pytest.raises(OfficinaError, match=r"engine=fsdp2: PyTorch 2\.11\.0 cannot shard codes, .* Try: engine=ddp"):
        fsdp2.build(SimpleNamespace(module=module, run=RunConfig(engine=FSDP2Config())))


@pytest.mark.parametrize("found", [None, "0.19.7"])
def test_zero_without_deepspeed_or_with_one_that_sums_wrongly(found, monkeypatch):
    monkeypatch.setattr("officina.trainer.environment._version", lambda name: found)
    with pytest.raises(OfficinaError, match=r"engine=zero needs .*deepspeed.* pip install 'officina\[deepspeed\]'"):
        engine_of(engine=ZeroConfig())


def test_every_engine_of_the_configuration_is_in_the_table():
    for config in (SingleConfig, FSDP2Config, HSDPConfig, ZeroConfig):
        assert config.__dataclass_fields__["kind"].default in ENGINES


def test_precision():
    cpu = torch.device("cpu")
    assert resolve_precision("bf16_pure", cpu) == "bf16_pure"
    assert resolve_precision("auto", cpu) in ("fp32", "bf16")


# ---- steps ---------------------------------------------------------------------------------------------------------
def test_gradients_accumulate_and_are_cleared():
    engine, batch = engine_of(), only_batch()
    half = engine_of()
    for micro in micro_batches(batch.fields, range(8), 2):
        half.forward_backward(micro, step_tokens=batch.loss_tokens, last=True)
    engine.forward_backward(batch, step_tokens=batch.loss_tokens, last=True)
    for one, other in zip(engine.module.parameters(), half.module.parameters(), strict=True):
        assert torch.allclose(one.grad, other.grad, atol=1e-7)
    engine.step(1.0)
    assert all(p.grad is None for p in engine.module.parameters()) and engine.optimizer_steps == 1


def test_a_batch_without_loss_tokens_counts_nothing():
    engine, batch = engine_of(), only_batch()
    batch.fields["labels"].fill_(-100)
    assert engine.forward_backward(batch, step_tokens=17, last=True) == 0
    assert engine.step(1.0).grad_norm == 0


def test_norm_is_that_before_clipping_and_the_rate_is_scaled():
    engine, batch = engine_of(optim=replace(Case().optim, clip_norm=0.1)), only_batch()
    engine.forward_backward(batch, step_tokens=batch.loss_tokens, last=True)
    before = torch.nn.utils.get_total_norm([p.grad for p in engine.module.parameters()]).item()
    gradients = [p.grad for p in engine.module.parameters()]
    weight = engine.module.norm.weight.detach().clone()
    outcome = engine.step(0.0)
    assert outcome.applied and outcome.grad_norm == pytest.approx(before, rel=1e-6) and before > 0.1
    assert torch.nn.utils.get_total_norm(gradients).item() == pytest.approx(0.1, rel=1e-4)
    assert torch.equal(engine.module.norm.weight, weight)


def test_import_without_moments_starts_them_anew():
    engine, batch = engine_of(), only_batch()
    engine.forward_backward(batch, step_tokens=batch.loss_tokens, last=True)
    engine.step(1.0)
    engine.import_state(build_model(Case().run).source, optimizer_steps=None)
    fresh = {(p.name, p.slot): p.values for p in engine_of().export_state()}
    for piece in engine.export_state():
        assert torch.equal(piece.values, fresh[piece.name, piece.slot]), piece.name
    assert engine.optimizer_steps == 0


def test_evaluation_has_no_gradient_and_no_z_loss():
    engine, batch = engine_of(), only_batch()
    loss = engine.evaluate(batch)
    assert loss.shape == () and loss.dtype == torch.float32 and not loss.requires_grad
    assert np.isclose(loss.item(), engine.forward_backward(batch, step_tokens=1, last=True).item(), rtol=1e-6)
    assert engine.module.training
