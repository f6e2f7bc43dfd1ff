"""The life of a run with an adapter: its checkpoint names frozen weights by hash and they are read from where it began."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from data_sets import write_tokens
from hf_models import save
from lives import begin, changed, losses, plain_run, states
from safetensors.torch import load_file, save_file

from officina.launch.start import plan_resume
from officina.trainer.checkpoint.layout import read_commit, step_dir
from officina.trainer.checkpoint.read import open_checkpoint
from officina.trainer.checkpoint.verify import Alone
from officina.trainer.config import DDPConfig, DecoderConfig, FSDP2Config, LoraConfig, SingleConfig, ZeroConfig
from officina.trainer.errors import EXIT_CONTINUE, EXIT_DONE, CheckpointError
from officina.trainer.generate import load
from officina.trainer.hf.base import open_base
from officina.trainer.initial import GrownSource, JoinedSource, content_of, open_weights, plain_weights
from officina.trainer.model.build import build_model
from officina.trainer.model.init import ValuesSource
from officina.trainer.model.lora import MergedSource
from officina.trainer.model.nf4 import pack, pairs, unpack
from officina.trainer.model.shapes import parameter_shapes
from officina.trainer.model.targets import choose
from officina.trainer.parallel.tensors import materialize
from officina.trainer.run_dir import load_config
from officina.trainer.state import PARAM

LORA = LoraConfig(rank=4, alpha=8, dropout=0.1, train=["*norm"])
QLORA = replace(LORA, base="nf4")


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models") / "small-llama"
    save("llama", folder, shard="60KB", vocab_size=320, hidden_size=64, intermediate_size=128)
    return folder


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data") / "text"
    write_tokens(folder, {"train": [60] * 5})
    return folder


def run_from(llama: Path, data: Path, **changes):
    changes = {"adapter": LORA, **changes}
    return plain_run(data, model=open_base(str(llama)).model, init_from=str(llama), steps=6, **changes)


def lived(pool, run_dir: Path, ranks: int, **kwargs) -> int:
    statuses = pool.run(ranks, "tests.lives:live", str(run_dir), **kwargs)
    assert len(set(statuses)) == 1, statuses
    return statuses[0]


@pytest.mark.parametrize(("engine", "ranks", "precision", "adapter"), [
    (SingleConfig(), 1, "fp32", LORA), (FSDP2Config(), 2, "bf16", LORA), (FSDP2Config(), 2, "bf16", QLORA),
    pytest.param(DDPConfig(), 3, "bf16", LORA, marks=pytest.mark.slow),
    (ZeroConfig(stage=3, persistence_threshold=0), 2, "bf16", LORA),
    pytest.param(ZeroConfig(stage=3, persistence_threshold=0), 2, "bf16", QLORA, marks=pytest.mark.slow),
    pytest.param(ZeroConfig(stage=2), 2, "bf16_pure", LORA, marks=pytest.mark.slow)])
def test_stopped_and_resumed_is_bitwise_the_uninterrupted_run(pool, llama, data, tmp_path, engine, ranks, precision, adapter):
    run = run_from(llama, data, engine=engine, precision=precision, adapter=adapter)
    begin(tmp_path / "whole", run)
    assert lived(pool, tmp_path / "whole", ranks) == EXIT_DONE
    begin(tmp_path / "parts", run)
    assert lived(pool, tmp_path / "parts", ranks, stop_after=4) == EXIT_CONTINUE
    assert lived(pool, tmp_path / "parts", ranks) == EXIT_DONE
    assert losses(tmp_path / "parts") == losses(tmp_path / "whole")
    ours, theirs = states(tmp_path / "parts", 6), states(tmp_path / "whole", 6)
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[key], theirs[key]) for key in theirs)

    built = build_model(run)
    sizes = {name: p.numel() for name, p in built.module.named_parameters()}
    stored = {name for name, _ in ours}
    assert stored == set(sizes) - set(built.frozen) and "blocks.0.attn.q.lora_a" in stored and "norm.weight" in stored
    commit = read_commit(step_dir(tmp_path / "parts", 6))
    assert set(commit.train_state.frozen) == set(built.frozen)
    assert commit.data_bytes <= 12 * sum(sizes[name] for name in stored) * 1.5 + 2000 * ranks  # headers and padding


@pytest.fixture(scope="module")
def trained(llama, data, tmp_path_factory, pool):
    """A run of 3 of its 6 steps."""
    run_dir = tmp_path_factory.mktemp("runs") / "lora"
    run = run_from(llama, data)
    begin(run_dir, replace(run, steps=3, adapter=replace(run.adapter, dropout=0.0)))
    assert lived(pool, run_dir, 1) == EXIT_DONE
    return run_dir


def moved(trained: Path, to: Path, **changes) -> Path:
    shutil.copytree(trained, to)
    changed(to, steps=6, **changes)
    return to


def test_it_goes_on_under_other_engines_and_from_a_base_that_has_moved(pool, llama, trained, tmp_path):
    whole = moved(trained, tmp_path / "whole")
    assert lived(pool, whole, 1) == EXIT_DONE
    other = tmp_path / "elsewhere"
    shutil.copytree(llama, other)
    for name, engine, ranks in (("fsdp2", FSDP2Config(), 3), ("zero2", ZeroConfig(stage=2), 2)):
        run_dir = moved(trained, tmp_path / name, engine=engine, init_from=str(other))
        assert lived(pool, run_dir, ranks) == EXIT_DONE
        ours, theirs = states(run_dir, 6), states(whole, 6)
        assert max((ours[key] - theirs[key]).abs().max().item() for key in theirs) < 1e-5


def test_other_frozen_weights_are_named_with_their_file(pool, llama, trained, tmp_path):
    other = tmp_path / "other"
    shutil.copytree(llama, other)
    index = json.loads((other / "model.safetensors.index.json").read_text())["weight_map"]
    file = other / index["model.layers.1.mlp.up_proj.weight"]
    tensors = load_file(file)
    tensors["model.layers.1.mlp.up_proj.weight"][3, 5] += 0.25
    save_file(tensors, file, {"format": "pt"})
    run_dir = moved(trained, tmp_path / "run", init_from=str(other))
    told = rf"blocks.1.mlp.up.weight in {file}\n.*\n?.*officina resume {run_dir} init_from=FOLDER"
    with pytest.raises(AssertionError, match=told):
        lived(pool, run_dir, 1)
    with open_checkpoint(run_dir) as opened, pytest.raises(CheckpointError, match="beside other frozen weights"), \
            plain_weights(run_dir, opened, Alone()):
        pass


def test_a_base_that_is_gone_is_a_problem_of_the_plan(trained, tmp_path, llama):
    run_dir = moved(trained, tmp_path / "run", init_from=str(tmp_path / "nowhere"))
    problem, = (p for p in plan_resume(run_dir, [], world_size=1).problems if p.key == "init_from")
    assert "does not exist" in str(problem)
    assert not plan_resume(run_dir, [f"init_from={llama}"], world_size=1).problems
    told = r"frozen weights .*init_from in .*config.yaml"
    with open_checkpoint(run_dir) as opened, pytest.raises(CheckpointError, match=told), \
            plain_weights(run_dir, opened, Alone()):
        pass


def test_merged_weights_compute_what_the_adapters_do(trained):
    run, cpu = load_config(trained), torch.device("cpu")
    tokens = torch.randint(0, 320, (2, 24), generator=torch.Generator().manual_seed(0))
    with open_checkpoint(trained) as opened, plain_weights(trained, opened, Alone()) as merged:
        plain = load(run, merged, cpu)
        for name, shape in parameter_shapes(run.model).items():  # ranges cut anywhere are those of the whole
            numel = torch.Size(shape).numel()
            whole = merged.read(name, PARAM, 0, numel)
            at = numel // 3 + 1
            assert torch.equal(torch.cat([merged.read(name, PARAM, 0, at), merged.read(name, PARAM, at, numel)]), whole)
    built = build_model(run)
    module = built.module.to_empty(device=cpu).eval()
    base = base_of(run)
    with open_checkpoint(trained) as opened, torch.no_grad():
        for name, parameter in module.named_parameters():
            source = base if name in built.frozen else opened
            parameter.copy_(source.read(name, PARAM, 0, parameter.numel()).view_as(parameter))
        away = (module(tokens) - plain(tokens)).abs().max()
        moved = (load(run, base, cpu)(tokens) - plain(tokens)).abs().max()
    assert away < 1e-5 * max(1.0, plain(tokens).abs().max().item()) and moved > 1e-3


def test_a_base_in_4_bits_is_referenced_as_it_is_and_merged_as_it_was_trained_beside(pool, llama, data, tmp_path):
    run = run_from(llama, data, adapter=replace(QLORA, dropout=0.0))
    begin(tmp_path / "run", run)
    assert lived(pool, tmp_path / "run", 1) == EXIT_DONE
    base, built, chosen = base_of(run), build_model(run), choose(run.model, run.adapter)
    frozen = content_of(base, {name: parameter_shapes(run.model)[name] for name in built.frozen}, Alone())
    stated = read_commit(step_dir(tmp_path / "run", 6)).train_state.frozen
    assert {name: int(value, 16) for name, value in stated.items()} == frozen

    trained, name = states(tmp_path / "run", 6), "blocks.1.mlp.down"
    n_out, n_in = chosen.packed[f"{name}.weight"]
    as_it_is = base.read(f"{name}.weight", PARAM, 0, n_out * n_in).view(n_out, n_in)
    rounded = unpack(pack(as_it_is), pairs(), torch.float32)
    change = 2 * trained[f"{name}.lora_b", PARAM].view(n_out, 4) @ trained[f"{name}.lora_a", PARAM].view(4, n_in)
    tokens = torch.randint(0, 320, (2, 24), generator=torch.Generator().manual_seed(0))
    module = built.module
    materialize(module, torch.device("cpu"))
    module.eval()
    with torch.no_grad(), open_checkpoint(tmp_path / "run") as opened, \
            plain_weights(tmp_path / "run", opened, Alone()) as merged:
        found = merged.read(f"{name}.weight", PARAM, 0, n_out * n_in).view(n_out, n_in)
        assert (found - rounded - change).abs().max() < 1e-6 < 1e-4 < (found - as_it_is - change).abs().max()
        held = built.held(JoinedSource(opened, base, built.frozen))
        for each, parameter in module.named_parameters():
            parameter.copy_(held.read(each, PARAM, 0, parameter.numel()).view_as(parameter))
        plain = load(run, merged, torch.device("cpu"))(tokens)
        assert (module(tokens) - plain).abs().max() < 1e-5 * max(1.0, plain.abs().max().item())


def test_merged_weights_are_the_same_bits_however_they_are_cut():
    """A matrix product of few rows sums in another order than one of many; hashes of frozen weights must not follow that."""
    model = DecoderConfig(vocab_size=64, d_model=192, n_layers=1, n_heads=4, d_ff=256)
    for rank, alpha in ((8, 16), (16, 20)):
        adapter, draw = LoraConfig(rank=rank, alpha=alpha), torch.Generator().manual_seed(rank)
        shapes = parameter_shapes(model)
        layers = choose(model, adapter).adapter_shapes(rank)
        values = {name: torch.randn(shape, generator=draw) / 8 for name, shape in (shapes | layers).items()}
        name, scale = "blocks.0.mlp.down", adapter.scale
        merged, (n_out, n_in) = MergedSource(ValuesSource(values), model, adapter), shapes[f"{name}.weight"]
        numel = n_out * n_in
        whole = merged.read(f"{name}.weight", PARAM, 0, numel)
        for step in (n_in, 3 * n_in, 5 * n_in + 7, 1001):
            parts = [merged.read(f"{name}.weight", PARAM, at, min(numel, at + step)) for at in range(0, numel, step)]
            assert torch.equal(torch.cat(parts), whole)
        w, a, b = (values[f"{name}.{leaf}"].double() for leaf in ("weight", "lora_a", "lora_b"))
        assert torch.allclose(whole.view(n_out, n_in).double(), w + scale * b @ a, atol=1e-6)


def test_they_are_read_where_the_run_could_not_compute(trained, tmp_path):
    """On a login node, of a run that asked for kernels of a GPU by name."""
    run = moved(trained, tmp_path / "run")
    changed(run, model=replace(load_config(run).model, kernels="triton"))
    with open_checkpoint(run) as opened, plain_weights(run, opened, Alone()) as merged, \
            open_checkpoint(trained) as other, plain_weights(trained, other, Alone()) as same:
        assert torch.equal(*(source.read("blocks.0.attn.q.weight", PARAM, 0, 48) for source in (merged, same)))


def base_of(run) -> ValuesSource:
    shapes = parameter_shapes(run.model)
    with open_weights(open_base(run.init_from), shapes, Alone()) as base:
        return ValuesSource({name: base.read(name, PARAM, 0, torch.Size(shape).numel()) for name, shape in shapes.items()})


def test_a_run_can_start_from_one_with_an_adapter(pool, trained, data, tmp_path):
    """Its weights are then the merged ones; the first loss is that of the merged model."""
    again = plain_run(data, model=open_base(str(trained)).model, init_from=str(trained), steps=1, name="again")
    begin(tmp_path / "again", again)
    begin(tmp_path / "lora", replace(again, name="lora", adapter=replace(LORA, dropout=0.0)))
    assert lived(pool, tmp_path / "again", 1) == lived(pool, tmp_path / "lora", 1) == EXIT_DONE
    assert losses(tmp_path / "again")[1][0] == pytest.approx(losses(tmp_path / "lora")[1][0], rel=1e-6)
    changed(tmp_path / "lora", steps=2, engine=DDPConfig())  # its frozen weights are those of before, merged on other ranks
    assert lived(pool, tmp_path / "lora", 2) == EXIT_DONE


# ---- new tokens ----------------------------------------------------------------------------------------------------
def test_new_rows_are_the_mean_of_the_old_ones_and_recorded(pool, llama, data, tmp_path):
    run = run_from(llama, data, adapter=replace(LORA, train=["embed", "head"]))
    grown = replace(run, model=replace(run.model, vocab_size=333), steps=1, optim=replace(run.optim, lr=1e-9))
    begin(tmp_path / "grown", grown)
    assert lived(pool, tmp_path / "grown", 1) == EXIT_DONE
    found = states(tmp_path / "grown", 1)
    for name in ("embed.weight", "head.weight"):
        old = base_of(run).read(name, PARAM, 0, 320 * run.model.d_model).view(320, -1)
        new = found[name, "param"].view(333, -1)
        assert torch.allclose(new[:320], old, atol=1e-6) and torch.allclose(new[320:], old.mean(0), atol=1e-6)
    record = json.loads((tmp_path / "grown/base/weights.json").read_text())
    assert record["new_rows"] == {"first": 320, "stop": 333, "values": "mean of the rows before"}


def test_new_rows_do_not_depend_on_how_they_are_read():
    model = DecoderConfig(vocab_size=50, d_model=6, n_layers=1, n_heads=1)
    old = {"embed.weight": torch.randn(50, 6, generator=torch.Generator().manual_seed(0)), "norm.weight": torch.ones(6)}
    source = GrownSource(ValuesSource(old), 50, 57, model.d_model)
    whole = source.read("embed.weight", PARAM, 0, 57 * 6)
    assert torch.equal(whole[:300], old["embed.weight"].flatten()) and len(whole) == 342
    assert torch.allclose(whole[300:].view(7, 6), old["embed.weight"].mean(0).expand(7, 6))
    for a, b in ((0, 5), (290, 310), (299, 300), (301, 342), (305, 317), (341, 342)):
        assert torch.equal(source.read("embed.weight", PARAM, a, b), whole[a:b])
    assert torch.equal(source.read("norm.weight", PARAM, 0, 6), torch.ones(6))
