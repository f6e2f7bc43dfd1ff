"""Adapters that PEFT made: imported, they compute what PEFT's own model does, go on training, and come back byte for byte."""

import json
import shutil
from dataclasses import replace

import pytest
import torch
from data_sets import write_tokens
from hf_models import build, save
from lives import begin, changed, losses, plain_run

peft = pytest.importorskip("peft")
pytest.importorskip("transformers")

from safetensors.torch import load_file, save_file  # noqa: E402

from officina.launch.start import plan_train  # noqa: E402
from officina.trainer.checkpoint.read import open_checkpoint  # noqa: E402
from officina.trainer.checkpoint.verify import Alone  # noqa: E402
from officina.trainer.config import LoraConfig  # noqa: E402
from officina.trainer.convert import export_adapter, import_model, main  # noqa: E402
from officina.trainer.errors import CheckpointError, ConfigError, OfficinaError  # noqa: E402
from officina.trainer.generate import load  # noqa: E402
from officina.trainer.hf.base import open_base  # noqa: E402
from officina.trainer.hf.peft import CONFIG_FILE, WEIGHTS_FILE  # noqa: E402
from officina.trainer.import_adapter import import_adapter  # noqa: E402
from officina.trainer.initial import plain_weights  # noqa: E402
from officina.trainer.model.targets import choose  # noqa: E402
from officina.trainer.run_dir import load_config  # noqa: E402

CASES = {
    "all linear layers": ("llama", dict(r=4, lora_alpha=12, target_modules="all-linear"), ["attn.*", "mlp.*"], []),
    "rslora, a regular expression": ("llama-head-dim", dict(
        r=4, lora_alpha=8, use_rslora=True, target_modules=r".*\.layers\.[13]\.(self_attn\.[qv]|mlp\.down)_proj"),
        [f"blocks.{i}.{name}" for i in (1, 3) for name in ("attn.q", "attn.v", "mlp.down")], []),
    "some layers": ("qwen3", dict(r=2, lora_alpha=1, target_modules=["q_proj", "o_proj"], layers_to_transform=[0, 2]),
                    [f"blocks.{i}.attn.{name}" for i in (0, 2) for name in ("q", "o")], []),
    "modules in full": ("apertus", dict(r=8, lora_alpha=16, target_modules=["q_proj", "up_proj"],
                                        modules_to_save=["lm_head", "down_proj"]), ["q", "up"], ["mlp.down", "head"]),
    "tied, biases": ("llama-tied-biases", dict(r=4, lora_alpha=12, target_modules=["q_proj", "v_proj"],
                                               modules_to_save=["embed_tokens"], ensure_weight_tying=True),
                     ["q", "v"], ["embed"]),
}
TOKENS = torch.randint(3, 90, (2, 24), generator=torch.Generator().manual_seed(0))


def trained_by_peft(case: str, folder, **shape):
    """(base folder, adapter folder, logits of PEFT's model): nothing in the adapter is at its first value."""
    name, options, _, _ = CASES[case]
    save(name, folder / "base", dtype="float32", **shape)
    model = peft.get_peft_model(build(name, **shape), peft.LoraConfig(task_type="CAUSAL_LM", **options)).eval()
    random = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn(parameter.shape, generator=random), alpha=0.1)
        logits = model(TOKENS, use_cache=False).logits
    model.save_pretrained(folder / "adapter")
    return folder / "base", folder / "adapter", logits


def logits_of(run_dir):
    with open_checkpoint(run_dir) as opened, plain_weights(run_dir, opened, Alone()) as merged, torch.no_grad():
        return load(load_config(run_dir), merged, torch.device("cpu"))(TOKENS)


@pytest.mark.parametrize("case", CASES)
def test_it_computes_what_peft_does_and_comes_back_as_it_was(case, tmp_path):
    base, adapter, wanted = trained_by_peft(case, tmp_path)
    run = import_adapter(adapter, tmp_path / "run", "run", base=str(base))
    ours = logits_of(tmp_path / "run")
    assert (ours - wanted).abs().max() <= 1e-5 * max(1.0, wanted.abs().max().item())
    _, options, targets, train = CASES[case]
    assert (run.adapter.rank, run.adapter.alpha, run.adapter.rslora) == (
        options["r"], options["lora_alpha"], options.get("use_rslora", False))
    assert choose(run.model, run.adapter) == choose(run.model, LoraConfig(targets=targets, train=train))
    export_adapter(str(tmp_path / "run"), tmp_path / "out")
    assert (tmp_path / "out" / WEIGHTS_FILE).read_bytes() == (adapter / WEIGHTS_FILE).read_bytes()
    again = import_adapter(tmp_path / "out", tmp_path / "again", "run", base=str(base))
    assert again == run and torch.equal(logits_of(tmp_path / "again"), ours)
    export_adapter(str(tmp_path / "again"), tmp_path / "out2")
    for name in (CONFIG_FILE, WEIGHTS_FILE):
        assert (tmp_path / "out2" / name).read_bytes() == (tmp_path / "out" / name).read_bytes()


def test_of_a_base_in_4_bits_it_is_merged_into_the_rounded_values(tmp_path):
    shape, lora = dict(hidden_size=64, intermediate_size=128), dict(r=4, task_type="CAUSAL_LM", target_modules="all-linear")
    save("llama", tmp_path / "base", dtype="float32", **shape)
    model = peft.get_peft_model(build("llama", **shape), peft.LoraConfig(**lora))
    model.save_pretrained(tmp_path / "adapter")  # B is zero: what is left is the base
    for nf4 in (False, True):
        import_adapter(tmp_path / "adapter", tmp_path / f"{nf4}", "run", base=str(tmp_path / "base"), nf4=nf4)
    with torch.no_grad():
        wanted = model(TOKENS, use_cache=False).logits
    away = [(logits_of(tmp_path / name) - wanted).abs().max() for name in ("False", "True")]
    assert away[0] < 1e-4 < 1e-2 < away[1]


@pytest.fixture(scope="module")
def imported(tmp_path_factory):
    """(base folder, adapter folder, run, data)."""
    folder = tmp_path_factory.mktemp("imported")
    base, adapter, _ = trained_by_peft("all linear layers", folder, vocab_size=320)
    import_adapter(adapter, folder / "run", "run", base=str(base))
    write_tokens(folder / "data", {"train": [60] * 5})
    return base, adapter, folder / "run", folder / "data"


def lived(pool, run_dir, ranks: int) -> list[int]:
    return pool.run(ranks, "tests.lives:live", str(run_dir))


def test_training_goes_on_with_it(pool, imported, tmp_path):
    """The first loss is that of the merged model; later starts need the run it came from no more."""
    base, _, run_dir, data = imported
    shutil.copytree(run_dir, tmp_path / "came-from")
    model = open_base(str(base)).model
    plain = plain_run(data, model=model, init_from=str(tmp_path / "came-from"), steps=1)
    adapter = replace(load_config(run_dir).adapter, init_from=str(tmp_path / "came-from"))
    more = replace(plain, init_from=str(base), adapter=adapter, steps=2)
    fresh = replace(more, adapter=replace(adapter, init_from=""), steps=1)
    for name, run in (("merged", plain), ("more", more), ("fresh", fresh)):
        begin(tmp_path / name, run)
        assert lived(pool, tmp_path / name, 1) == [0]
    first = {name: losses(tmp_path / name)[1][0] for name in ("merged", "more", "fresh")}
    assert first["more"] == pytest.approx(first["merged"], rel=1e-6) and abs(first["fresh"] - first["more"]) > 1e-2
    shutil.rmtree(tmp_path / "came-from")
    changed(tmp_path / "more", steps=3)
    assert lived(pool, tmp_path / "more", 1) == [0]


def test_beside_another_base_it_is_not_begun_with(pool, imported, tmp_path):
    _, _, run_dir, data = imported
    save("llama", tmp_path / "other", dtype="bfloat16", vocab_size=320)
    adapter = replace(load_config(run_dir).adapter, init_from=str(run_dir))
    run = plain_run(data, model=open_base(str(tmp_path / "other")).model, init_from=str(tmp_path / "other"), adapter=adapter)
    begin(tmp_path / "run", run)
    with pytest.raises(AssertionError, match="was trained beside other frozen weights"):
        lived(pool, tmp_path / "run", 1)
    assert issubclass(CheckpointError, OfficinaError)


def test_the_words_that_the_command_prints_begin_with_it(imported, tmp_path, capsys, monkeypatch):
    base, adapter, _, data = imported
    monkeypatch.chdir(tmp_path)
    assert main(["import", str(adapter), "--base", str(base), "--to", "runs/mine"]) == 0
    said = capsys.readouterr().out
    line, = (line for line in said.splitlines() if "officina train" in line)
    words = [word for word in line.split()[2:] if not word.startswith("data.")] + [f"data.sources.a.path={data}"]
    plan = plan_train(words, tmp_path / "more", world_size=1)
    assert not plan.problems, plan.problems
    assert plan.run.adapter.init_from == "runs/mine@0" and plan.run.init_from == str(base)
    for word, key in (("adapter.rank=8", "adapter.rank"), ("adapter.targets=[q]", "adapter.targets"),
                      ("adapter.train=[norm]", "adapter.train"), ("adapter.alpha=1", "adapter.alpha")):
        problem, = plan_train([*words, word], tmp_path / "more", world_size=1).problems
        assert problem.key == key and "with whose adapter the run begins" in problem.rule
        assert not plan_train([*words, word, problem.remedy], tmp_path / "more", world_size=1).problems
    import_model(base, tmp_path / "plain")
    for value, told in (("nowhere", "does not exist"), (tmp_path / "plain", "has no adapter"), (adapter, "PEFT's form")):
        problem, = plan_train([*words, f"adapter.init_from={value}"], tmp_path / "more", world_size=1).problems
        assert problem.key == "adapter.init_from" and told in problem.rule


def damaged(imported, tmp_path, config=None, tensors=None):
    base, adapter, _, _ = imported
    shutil.copytree(adapter, tmp_path / "adapter")
    raw = json.loads((adapter / CONFIG_FILE).read_text()) | (config or {})
    (tmp_path / "adapter" / CONFIG_FILE).write_text(json.dumps(raw))
    if tensors:
        save_file(tensors(load_file(adapter / WEIGHTS_FILE)), tmp_path / "adapter" / WEIGHTS_FILE, {"format": "pt"})
    return tmp_path / "adapter", str(base)


@pytest.mark.parametrize(("config", "told"), [
    ({"use_dora": True}, r"use_dora=True: is DoRA, which officina's adapters do not have; merge it in PEFT"),
    ({"rank_pattern": {"q_proj": 8}}, r"rank_pattern=.*another rank for some layers"),
    ({"alpha_pattern": {"q_proj": 8}}, r"alpha_pattern=.*another alpha for some layers"),
    ({"bias": "all"}, r"bias=all: trains biases beside the adapters"),
    ({"lora_bias": True}, r"lora_bias=True: is a bias in the adapter"),
    ({"peft_type": "LOHA"}, r"peft_type=LOHA: is another kind of adapter"),
    ({"task_type": "SEQ_CLS"}, r"task_type=SEQ_CLS: is not for a language model"),
    ({"init_lora_weights": "pissa"}, r"init_lora_weights=pissa: changes the base too"),
    ({"trainable_token_indices": [3]}, r"trainable_token_indices=.*training of single tokens"),
    ({"layer_replication": [[0, 2]]}, r"layer_replication=.*layers that are used twice"),
    ({"a_new_switch": 3}, r"a_new_switch=3: is not known to officina"),
])
def test_keys_of_what_is_not_there_are_refused_by_name(imported, tmp_path, config, told):
    adapter, base = damaged(imported, tmp_path, config)
    with pytest.raises(ConfigError, match=told):
        import_adapter(adapter, tmp_path / "run", "run", base=base)
    assert not (tmp_path / "run").exists()


def test_keys_that_are_off_are_taken(imported, tmp_path):
    adapter, base = damaged(imported, tmp_path, {"a_new_switch": False, "use_dora": None, "rank_pattern": {}})
    import_adapter(adapter, tmp_path / "run", "run", base=base)


Q = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"


@pytest.mark.parametrize(("tensors", "told"), [
    (lambda t: {name: value for name, value in t.items() if name != Q}, rf"{Q} is missing"),
    (lambda t: t | {Q: t[Q][:3]}, rf"{Q} is \[3, 48\] there and \[4, 48\] for this model"),
    (lambda t: t | {"base_model.model.score.weight": t[Q].clone()}, r"base_model.model.score.weight is no part of this model"),
    (lambda t: t | {Q: t[Q].double()}, r"is stored as F64, and weights are read as F32, F16, BF16"),
    (lambda t: t | {Q: t[Q] * float("inf")}, r"blocks.0.attn.q.lora_a holds numbers that are not finite"),
])
def test_tensors_that_do_not_fit_are_named(imported, tmp_path, tensors, told):
    adapter, base = damaged(imported, tmp_path, tensors=tensors)
    with pytest.raises(OfficinaError, match=told):
        import_adapter(adapter, tmp_path / "run", "run", base=base)


def test_what_the_command_refuses(imported, tmp_path):
    base, adapter, run_dir, _ = imported
    with pytest.raises(OfficinaError, match=r"which is no folder here, and nothing is downloaded.*--base FOLDER --to"):
        main(["import", str(adapter), "--to", str(tmp_path / "run")])
    with pytest.raises(OfficinaError, match=r"is not empty, and an import makes a new run directory"):
        main(["import", str(adapter), "--base", str(base), "--to", str(run_dir)])
    with pytest.raises(OfficinaError, match=r"--base and --nf4 are for an adapter in PEFT's form"):
        main(["import", str(base), "--nf4", "--to", str(tmp_path / "run")])
    with pytest.raises(OfficinaError, match=r"is an adapter in PEFT's form, not a model. .*convert import"):
        open_base(str(adapter))
    shutil.copytree(adapter, tmp_path / "pickle")
    (tmp_path / "pickle" / WEIGHTS_FILE).rename(tmp_path / "pickle/adapter_model.bin")
    with pytest.raises(OfficinaError, match=r"adapter_model.bin, which is a pickle"):
        import_adapter(tmp_path / "pickle", tmp_path / "run", "run", base=str(base))


def test_ends_of_a_tied_embedding_that_were_trained_apart_are_refused(tmp_path):
    base, adapter, _ = trained_by_peft("tied, biases", tmp_path)
    tensors = load_file(adapter / WEIGHTS_FILE)
    name = "base_model.model.lm_head.weight"
    assert torch.equal(tensors[name], tensors["base_model.model.model.embed_tokens.weight"])
    save_file(tensors | {name: tensors[name] + 1}, adapter / WEIGHTS_FILE, {"format": "pt"})
    with pytest.raises(OfficinaError, match="two ends of the tied embedding were trained apart"):
        import_adapter(adapter, tmp_path / "run", "run", base=str(base))
