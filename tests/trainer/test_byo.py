"""Users' own models: the two examples under every engine, end to end by the command line, and every refusal."""

import importlib
import os
import re
import shlex
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch

from officina.trainer.config import BatchConfig, CustomModelConfig, DecoderConfig, LoggingConfig, RunConfig
from officina.trainer.errors import EXIT_DONE, ConfigError, OfficinaError
from officina.trainer.metrics import read_metrics
from officina.trainer.model.build import build_model, check_attention, check_kernels, resolve
from officina.trainer.objective import next_token_loss, record_loss
from officina.trainer.parallel.tensors import materialize
from officina.trainer.state import PARAM
from tests.lives import begin, losses
from tests.trainer import byo_cases
from tests.trainer.byo_cases import EXAMPLES, run_of

STEPS = 5
FOLDERS = {"vision_transformer": "tiles", "time_series": "load"}


@pytest.fixture(scope="module", autouse=True)
def examples_on_path():
    sys.path.insert(0, str(EXAMPLES))
    yield
    sys.path.remove(str(EXAMPLES))


@pytest.fixture(scope="module", params=FOLDERS)
def example(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp("data") / FOLDERS[request.param]
    importlib.import_module(request.param).make_data(str(folder), n_train=96, n_validation=16)
    return request.param, str(folder)


@pytest.fixture(scope="module")
def reference(example, pool):
    return assembled(pool.run(1, "tests.trainer.byo_cases:train", *example, "single", STEPS))


def assembled(results):
    """Losses, norms and the whole state, from what each rank returned."""
    state = {}
    for _, _, held in results:
        for name, slot, start, values in held:
            state.setdefault((name, slot), {})[start] = values
    whole = {key: np.concatenate([parts[start] for start in sorted(parts)]) for key, parts in state.items()}
    return results[0][0], results[0][1], whole


@pytest.mark.parametrize("engine,world", [("ddp", 2), ("fsdp2", 3), ("hsdp", 4), ("zero2", 2), ("zero3", 2)])
def test_the_examples_train_alike_under_every_engine(example, reference, pool, engine, world):
    if engine.startswith("zero"):
        pytest.importorskip("deepspeed")
    losses, norms, state = assembled(pool.run(world, "tests.trainer.byo_cases:train", *example, engine, STEPS))
    want_losses, want_norms, want_state = reference
    np.testing.assert_allclose(losses, want_losses, atol=1e-5)
    np.testing.assert_allclose(norms, want_norms, rtol=1e-5)
    assert state.keys() == want_state.keys()
    for (name, slot), values in want_state.items():
        if slot == PARAM:
            np.testing.assert_allclose(state[name, slot], values, atol=1e-5, err_msg=name)


def test_the_commands_of_the_page_train_a_vision_transformer_and_resume_it(tmp_path):
    """As they stand in docs/bring_your_own_model.md, but for fewer steps and tiles."""
    page = (EXAMPLES.parent / "docs/bring_your_own_model.md").read_text(encoding="utf-8").replace("\\\n", " ")
    make, *commands = map(shlex.split, re.findall(r"^    ((?:python |PYTHONPATH=)examples\W.*)", page, re.MULTILINE))
    assert make == ["python", "examples/vision_transformer.py", "data/tiles"]
    importlib.import_module("vision_transformer").make_data(str(tmp_path / "data/tiles"), n_train=128, n_validation=32)
    paths = filter(None, [str(EXAMPLES), os.environ.get("PYTHONPATH")])
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(paths), "OMP_NUM_THREADS": "1"}
    fewer = {"steps=100": "steps=8", "lr_schedule.warmup_steps=10": "lr_schedule.warmup_steps=1", "steps=200": "steps=12"}
    for path, officina, *words in commands:
        assert (path, officina) == ("PYTHONPATH=examples", "officina")
        done = subprocess.run([sys.executable, "-m", "officina.launch.cli", *(fewer.get(word, word) for word in words)],
                              cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=240)
        assert done.returncode == 0, done.stdout + done.stderr
    [script] = re.findall(r"```python\n(# my_weights\.py\n.*?)```", page, re.DOTALL)
    subprocess.run([sys.executable, "-c", script], cwd=tmp_path, env=environment, check=True, timeout=120)
    found = read_metrics(tmp_path / "runs/vit")
    vit = importlib.import_module("vision_transformer")
    module = vit.build(d_model=64, n_layers=2)
    module.load_state_dict(torch.load(tmp_path / "vit.pt"))
    records = list(map(vit.decode, vit.tiles(32, seed=2)))
    with torch.no_grad():
        held_out = vit.loss(module.eval(), {key: torch.stack([record[key] for record in records]) for key in records[0]})
    np.testing.assert_allclose(held_out.mean(), found.evals[-1].loss_nats, rtol=1e-4)  # as the run itself measured it
    assert [(g.start.action, g.start.engine, g.start.world_size, g.last_step) for g in found.generations] == [
        ("start", "fsdp2", 2, 8), ("resume", "ddp", 3, 12)]
    assert [step.step for step in found.steps] == list(range(1, 13)) and {step.tokens for step in found.steps} == {64}
    assert found.steps[-1].loss_nats < 0.9 * found.steps[0].loss_nats and found.evals[-1].step == 12


@pytest.mark.parametrize("example", ["vision_transformer", "time_series"])
def test_an_example_without_a_folder_says_how_it_is_called(example):
    done = subprocess.run([sys.executable, EXAMPLES / f"{example}.py"], capture_output=True, text=True, timeout=60)
    assert done.returncode == 1 and f"python examples/{example}.py data/" in done.stderr and "Traceback" not in done.stderr


def test_a_time_series_goes_through_the_loop_and_on_under_another_engine(tmp_path, pool):
    importlib.import_module("time_series").make_data(str(tmp_path / "load"), n_train=96, n_validation=16)
    run = replace(run_of("time_series", str(tmp_path / "load")), batch=BatchConfig(global_tokens=7, seq_len=1, micro_rows=2),
                  threads=1, logging=LoggingConfig(tensorboard=False))  # 7 records: some rank's last batch lacks one
    for name, legs in (("whole", [(1, "single", 4)]), ("parts", [(2, "fsdp2", 2), (3, "ddp", 4)])):
        for ranks, engine, steps in legs:
            begin(tmp_path / name, replace(run, engine=byo_cases.ENGINES[engine], steps=steps))
            assert set(pool.run(ranks, "tests.trainer.byo_cases:live", str(tmp_path / name))) == {EXIT_DONE}
    whole, parts = (np.array(list(losses(tmp_path / name).values())) for name in ("whole", "parts"))
    np.testing.assert_allclose(parts, whole, rtol=1e-5)


def test_ties_and_buffers_survive_the_meta_device():
    config = CustomModelConfig(factory="tests.trainer.byo_cases:tied", loss="tests.trainer.byo_cases:scalar_loss",
                               decoder="builtins:bytes")
    built = build_model(RunConfig(model=config, seed=5))
    assert built.module.head.weight is built.module.embed.weight and built.module.embed.weight.is_meta
    assert built.decode is bytes
    torch.manual_seed(5)
    original = byo_cases.tied()
    materialize(built.module, torch.device("cpu"))
    with torch.no_grad():
        for name, tensor in [*built.module.named_parameters(), ("seen", built.module.seen)]:
            tensor.copy_(built.source.read(name, PARAM, 0, tensor.numel()).view_as(tensor))
    assert built.module.head.weight is built.module.embed.weight
    assert torch.equal(built.module.seen, torch.arange(3)) and built.module.seen.dtype == torch.int64
    assert built.module.head.also_seen is built.module.seen
    tokens = torch.tensor([1, 2])
    assert torch.equal(built.module(tokens), original(tokens))


def test_the_seed_decides_the_first_values_and_nobody_elses_draws():
    config = CustomModelConfig(factory="tests.trainer.byo_cases:tied", loss="builtins:len", decoder="builtins:bytes")
    torch.manual_seed(0)
    first = torch.rand(1)
    torch.manual_seed(0)
    a, b, c = (build_model(RunConfig(model=config, seed=seed)).source.read("embed.weight", PARAM, 0, 32)
               for seed in (1, 1, 2))
    assert torch.equal(torch.rand(1), first)
    assert torch.equal(a, b) and not torch.equal(a, c)


def test_a_missing_record_counts_nothing_even_if_its_loss_is_not_finite():
    losses = torch.tensor([1.0, float("nan"), 2.0], requires_grad=True)
    total = record_loss(lambda module, fields: losses, "m:loss")(None, {"valid": torch.tensor([True, False, True])})
    total.backward()
    assert total.item() == 3 and losses.grad.tolist() == [1, 0, 1]


def test_the_users_loss_does_not_see_valid():
    seen = {}
    fields = {"valid": torch.tensor([True]), "image": torch.zeros(1)}
    record_loss(lambda module, fields: seen.update(fields) or fields["image"], "m:loss")(None, fields)
    assert seen.keys() == {"image"}


@pytest.mark.parametrize("name,found", [("scalar_loss", r"torch.float32 \(\)"), ("whole_loss", r"torch.int64 \(2, 3\)"),
                                        ("list_loss", "list")])
def test_a_loss_that_is_not_one_number_per_record_is_refused(name, found):
    fields = {"valid": torch.tensor([True, True]), "tokens": torch.zeros(2, 3, dtype=torch.int64)}
    loss = record_loss(getattr(byo_cases, name), f"byo_cases:{name}")
    with pytest.raises(OfficinaError, match=rf"model.loss=byo_cases:{name} returned {found}.*shape \(2,\)"):
        loss(byo_cases.tied(), fields)


@pytest.mark.parametrize("path,message", [
    ("time_series", "is not of the form package.module:name"),
    ("no_such_module_at_all:build", "cannot be imported: ModuleNotFoundError"),
    ("time_series:biuld", r"no callable biuld \(nothing found\). Try: model.factory=time_series:"),
    ("tests.trainer.byo_cases:NOT_CALLABLE", "no callable NOT_CALLABLE .a int found"),
])
def test_a_path_that_names_nothing_callable_is_refused(path, message):
    with pytest.raises(ConfigError, match=message):
        resolve(path, "model.factory")


@pytest.mark.parametrize("factory,args,message", [
    ("no_module", {}, r"model.factory=.*returned a dict, not an nn.Module"),
    ("on_meta", {}, "left weight on the meta device"),
    ("complex_one", {}, r"gave the complex parameter turn; .*torch.view_as_real"),
    ("tied", {"widht": 3}, r"does not take them: got an unexpected keyword argument 'widht'.*\(width: int = 4\)"),
])
def test_a_factory_that_cannot_be_used_is_refused(factory, args, message):
    config = CustomModelConfig(factory=f"tests.trainer.byo_cases:{factory}", loss="builtins:len",
                               decoder="builtins:bytes", args=args)
    with pytest.raises(ConfigError, match=message):
        build_model(RunConfig(model=config))


def test_a_named_attention_that_cannot_do_the_model_is_refused():
    with pytest.raises(ConfigError, match=r"model.attention_impl=sdpa: has no softcap, and model.attn_softcap=50"):
        check_attention(DecoderConfig(attention_impl="sdpa", attn_softcap=50), "cpu")
    with pytest.raises(ConfigError, match=r"model.attention_impl=flex: cannot run here.*model.attention_impl=auto"):
        check_attention(DecoderConfig(attention_impl="flex"), "cpu")
    with pytest.raises(ConfigError, match=r"model.attention_impl=triton: cannot run here.*model.attention_impl=auto"):
        check_attention(DecoderConfig(attention_impl="triton"), "cpu")
    for impl in ("flex", "triton"):
        check_attention(DecoderConfig(attention_impl=impl, head_dim=64), "cuda")


def test_kernels_by_name_that_cannot_run_are_refused():
    with pytest.raises(ConfigError, match=r"model.kernels=triton: cannot run here: .*need a GPU.*model.kernels=auto"):
        check_kernels(DecoderConfig(kernels="triton"), "cpu")
    check_kernels(DecoderConfig(kernels="triton"), "cuda")
    check_kernels(DecoderConfig(), "cpu")


def test_evaluation_leaves_the_z_loss_out():
    given = []

    def module(tokens, **arguments):
        given.append((arguments["z_loss"], arguments["documents_BT"]))
        return torch.tensor((5.0, 3.0)) if arguments["z_loss"] else torch.tensor(2.0)

    fields = {"tokens": torch.zeros(1, 1), "labels": torch.zeros(1, 1)}
    assert next_token_loss(0.1)(module, fields).tolist() == [2.0, 3.0]  # the cross-entropy, and what it does not hold
    with torch.no_grad():
        assert next_token_loss(0.1)(module, fields).tolist() == 2.0
    assert given == [(0.1, None), (0.0, None)]


def test_the_examples_learn(example):
    """Without any engine, on one thread: the examples are models that can learn their data."""
    name, folder = example
    from officina.trainer.data.loader import Loader
    user = importlib.import_module(name)
    torch.manual_seed(0)
    module = user.build(d_model=32)
    optimizer = torch.optim.AdamW(module.parameters(), 3e-3)
    losses = []
    with Loader(run_of(name, folder), rank=0, world_size=1, position=0) as loader:
        for _ in range(120):
            fields = [m.fields for m in loader.next_step().micros]
            joined = {key: torch.cat([f[key] for f in fields]) for key in fields[0]}
            loss = user.loss(module, joined).mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
    assert sum(losses[-8:]) < 0.5 * sum(losses[:8])
