"""A model in and out again: the same files, the same tokens; and what is no model is refused by name."""

import json
import re
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

pytest.importorskip("transformers")
from data_sets import write_tokens
from hf_models import CASES, SMALL, as_v4, save
from lives import begin, plain_run
from safetensors.torch import load_file, save_file

from officina.launch.cli import main
from officina.trainer.card import _compute, _data_table
from officina.trainer.checkpoint.read import open_checkpoint
from officina.trainer.config import CheckpointConfig, DecoderConfig, RopeConfig, RunConfig
from officina.trainer.convert import export_run, import_model
from officina.trainer.errors import OfficinaError
from officina.trainer.generate import generate, load
from officina.trainer.hf.base import open_base
from officina.trainer.hf.config_file import FAMILIES, family_for, read_config, write_config
from officina.trainer.hf.family import canonical
from officina.trainer.metrics import MetricsWriter, StartMetrics, StepMetrics, read_metrics
from officina.trainer.run_dir import load_config, save_config


def tensors(folder):
    return {name: value for file in sorted(folder.glob("*.safetensors")) for name, value in load_file(file).items()}


def our_tokens(run_dir, prompt, count):
    with open_checkpoint(run_dir) as opened:
        module = load(load_config(run_dir), opened, torch.device("cpu"))
    return list(generate(module, prompt, max_new_tokens=count, temperature=0))


def their_tokens(folder, prompt, count):
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager").eval()
    out = model.generate(torch.tensor([prompt]), max_new_tokens=count, min_new_tokens=count, do_sample=False)
    return out[0, len(prompt):].tolist()


FIRST = [case for case in CASES if "-" not in case or case == "qwen3-tied"]
"""One of each family, and a tied one; the odd shapes are in the full count."""


@pytest.mark.parametrize("case", [case if case in FIRST else pytest.param(case, marks=pytest.mark.slow) for case in CASES])
def test_in_and_out_gives_the_same_files_and_the_same_tokens(case, tmp_path):
    folder, run_dir, out = tmp_path / "in", tmp_path / "run", tmp_path / "out"
    v4 = list(CASES).index(case) % 2 == 0
    save(case, folder, shard="60KB", v4=v4)
    (folder / "README.md").write_text("---\nlicense: apache-2.0\n---\n# Card\n")
    (folder / "chat_template.jinja").write_text("{{ messages }}")
    hash_ = import_model(folder, run_dir)
    found = export_run(str(run_dir), out, max_shard_bytes=50_000)
    assert found["hash"] == hash_ and len(found["files"]) > 1

    before, after = tensors(folder), tensors(out)
    assert before.keys() == after.keys()
    for name, value in before.items():
        assert value.dtype == after[name].dtype and value.shape == after[name].shape
        assert value.reshape(-1).view(torch.uint8).equal(after[name].reshape(-1).view(torch.uint8)), name
    for name in ("config.json", "generation_config.json", "chat_template.jinja"):
        assert (out / name).read_text() == (folder / name).read_text() or json.loads((out / name).read_text()) == json.loads(
            (folder / name).read_text())
    card = (out / "README.md").read_text()
    assert "- in: apache-2.0" in card and "By token ids" in card
    assert 'license: "apache-2.0"' in card and hash_ in card and all(digest in card for digest in found["files"].values())

    prompt, vocab = [5, 17, 3, 60, 42], open_base(str(folder)).model.vocab_size
    assert max(prompt) < vocab
    ours = our_tokens(run_dir, prompt, 12)
    assert ours == their_tokens(out, prompt, 12)
    assert len(set(ours)) > 1 or case in ("apertus",)  # one token for ever would prove little

    shutil.rmtree(run_dir / "base")  # as if it had been trained from random weights: config.json is written anew
    export_run(str(run_dir), tmp_path / "anew", dtype="float32")
    assert ours == their_tokens(tmp_path / "anew", prompt, 12)
    config = json.loads((tmp_path / "anew/config.json").read_text())
    assert [config[f"{name}_token_id"] for name in ("bos", "eos", "pad")] == [None] * 3


def test_weights_of_several_dtypes_stay_as_they_are(tmp_path):
    """fp32 norms and an fp16 matrix among bf16 ones."""
    save("llama", tmp_path / "in")
    weights = tensors(tmp_path / "in")
    mixed = {n: v.float() if "norm" in n else v.half() if "q_proj" in n else v for n, v in weights.items()}
    save_file(mixed, tmp_path / "in/model.safetensors", metadata={"format": "pt"})
    import_model(tmp_path / "in", tmp_path / "run")
    export_run(str(tmp_path / "run"), tmp_path / "out")
    after = tensors(tmp_path / "out")
    assert all(after[n].dtype == v.dtype and torch.equal(after[n], v) for n, v in mixed.items())
    export_run(str(tmp_path / "run"), tmp_path / "wide", dtype="float32")
    assert {v.dtype for v in tensors(tmp_path / "wide").values()} == {torch.float32}
    assert json.loads((tmp_path / "wide/config.json").read_text())["dtype"] == "float32"


def test_a_run_from_random_weights_is_exported_as_the_family_that_fits(tmp_path, pool):
    write_tokens(tmp_path / "data", {"train": [60] * 5, "validation": [40]}, licence="CC-BY-4.0", languages=["fin_Latn"])
    model = DecoderConfig(vocab_size=320, n_layers=2, d_model=32, n_heads=2, n_kv_heads=1, d_ff=64, qk_norm="head",
                          head_dim=20, tie_embeddings=True)
    run = plain_run(tmp_path / "data", model=model, steps=2, checkpoint=CheckpointConfig(every_steps=1))
    begin(tmp_path / "run", run)
    (tmp_path / "run/base").mkdir()  # of a start from a model that came to no checkpoint
    (tmp_path / "run/base/weights.json").write_text('{"name": "other", "hash": "0", "parameters": 1}')
    assert pool.run(1, "tests.lives:live", str(tmp_path / "run")) == [0]
    found = export_run(str(tmp_path / "run/checkpoints/step-00000002"), tmp_path / "out")
    assert (found["family"], found["dtype"], found["step"]) == ("Qwen3ForCausalLM", "F32", 2)  # it computed in fp32
    prompt = list(range(7))
    assert our_tokens(tmp_path / "run", prompt, 12) == their_tokens(tmp_path / "out", prompt, 12)
    card = (tmp_path / "out/README.md").read_text()
    narrow = export_run(str(tmp_path / "run"), tmp_path / "narrow", dtype="bfloat16")  # rounded: other weights, and it says so
    assert narrow["hash"] == import_model(tmp_path / "narrow", tmp_path / "again") != found["hash"]
    for told in ("| CC-BY-4.0 | fin_Latn |", '\n- "fin"\n', "None: trained from random weights", "| optimizer steps | 2 |",
                 "perplexity", "training FLOPs"):
        assert told in card, told
    export_run(f"{tmp_path / 'run'}@1", tmp_path / "first")  # of an earlier step: what had been done by then
    card = (tmp_path / "first/README.md").read_text()
    assert "| optimizer steps | 1 |" in card and "perplexity" not in card and "None in the run's records" in card


def test_the_card_counts_rows_as_they_were_read():
    facts = {"title": "a set", "weight": 1.0}
    assert "| new | a set | 75.0% |" in _data_table([("old", facts), ("new", facts)], {"old": 2, "new": 6})
    assert "| new | a set | 50.0% |" in _data_table([("old", facts), ("new", facts)], {})


def test_the_card_counts_device_hours_by_the_ranks_that_made_each_step(tmp_path):
    with MetricsWriter(tmp_path) as writer:
        for begin, stop, ranks in ((0, 3, 8), (2, 4, 2)):  # step 3 was done again
            writer.write(StartMetrics(step=begin, action="start", engine="ddp", world_size=ranks, device="cpu",
                                      precision="fp32"))
            for n in range(begin + 1, stop + 1):
                writer.write(StepMetrics(step=n, tokens=1, loss_nats=1.0, grad_norm=1.0, lr=1.0, step_time_s=3600.0,
                                         data_wait_s=0.0, tokens_per_s=1.0))
    told = _compute(tmp_path, RunConfig(), read_metrics(tmp_path))
    assert "| time in steps | 4.00 h |" in told and "| device hours | 20.00 |" in told


def test_each_family_is_found_again_and_odd_switches_are_named(tmp_path):
    plain = dict(vocab_size=64, n_layers=2, d_model=32, n_heads=2, d_ff=64)
    for switches, kind in [(dict(), "llama"), (dict(window=8), "mistral"), (dict(qkv_bias=True), "qwen2"),
                           (dict(qk_norm="head"), "qwen3"), (dict(mlp="xielu", qk_norm="head"), "apertus"),
                           (dict(rope_pattern=[True, False]), "smollm3"),
                           (dict(qk_norm="full", norm_placement="post", norm_cast="after"), "olmo2")]:
        assert family_for(DecoderConfig(**plain, **switches)).model_type == kind
    with pytest.raises(OfficinaError, match=r"no family .* cannot hold model\.\w+"):
        family_for(DecoderConfig(**plain, mlp="xielu", norm_placement="sandwich"))


CHANGED = {
    "a window": dict(window=4, window_pattern=[True]), "windows in turn": dict(window=4, window_pattern=[True, False]),
    "no window": dict(window=0), "another theta": dict(rope=RopeConfig(theta=123.0)), "more tokens": dict(vocab_size=160),
    "yarn": dict(rope=RopeConfig(theta=500.0, scaling="yarn", factor=4.0, original_seq_len=32)),
    "windows with a RoPE": dict(window=4, window_pattern=[True, False], local_rope=RopeConfig(theta=77.0, scaling="linear")),
    "a cap": dict(logit_softcap=10.0)}


@pytest.mark.parametrize("change", CHANGED)
@pytest.mark.parametrize("case", CASES)
def test_what_changed_since_the_base_stands_in_the_configuration_or_is_refused(case, change):
    import transformers

    kind, options = CASES[case]
    kind = f"{kind}Text" if kind == "Gemma3" else kind
    config = json.loads(getattr(transformers, f"{kind}Config")(**{**SMALL, **options}).to_json_string())
    for base in (config, as_v4(config)):
        model = replace(read_config(base, has_head=True)[1], **CHANGED[change])
        try:
            family = family_for(model, base)
        except OfficinaError as error:
            assert re.search(r"no family .* cannot hold model\.\w+", str(error))
            continue
        written = write_config(model, family, base=base)
        assert canonical(read_config(written, has_head=True)[1]) == canonical(model)
        assert [written[f"{name}_token_id"] for name in ("bos", "eos", "pad")] == [1, 2, 0]


def test_a_llama_that_was_given_a_window_is_exported_as_a_mistral(tmp_path):
    """By --force a run may begin with another window than its base has, and Llama's keys have no window."""
    folder, run_dir = tmp_path / "in", tmp_path / "run"
    save("llama", folder)
    import_model(folder, run_dir)
    run = load_config(run_dir)
    save_config(replace(run, model=replace(run.model, window=4)), run_dir)
    assert export_run(str(run_dir), tmp_path / "out")["family"] == "MistralForCausalLM"
    prompt = [5, 17, 3, 60, 42, 7, 7]
    assert our_tokens(run_dir, prompt, 12) == their_tokens(tmp_path / "out", prompt, 12) != their_tokens(folder, prompt, 12)


# ---- refusals --------------------------------------------------------------------------------------------------------
@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    folder = tmp_path_factory.mktemp("llama")
    save("llama", folder)
    return json.loads((folder / "config.json").read_text()), (folder / "model.safetensors").read_bytes()


@pytest.fixture
def folder(llama, tmp_path):
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(llama[0]))
    (folder / "model.safetensors").write_bytes(llama[1])
    return folder


@pytest.mark.parametrize(("keys", "told"), [
    ({"residual_multiplier": 0.22}, "residual_multiplier=0.22: is not known to officina for this kind of model"),
    ({"rms_norm_eps": ...}, "rms_norm_eps: is not in the file, and the weights cannot prove it"),
    ({"rms_norm_eps": None}, "rms_norm_eps=null: has no value"),
    ({"hidden_act": "gelu"}, "hidden_act=gelu: is not the activation"),
    ({"hidden_act": ...}, "hidden_act"),
    ({"attention_dropout": 0.1}, "attention_dropout=0.1"),
    ({"pretraining_tp": 2}, "pretraining_tp=2"),
    ({"rope_parameters": ...}, "rope_theta: is not in the file"),
    ({"rope_parameters": {"rope_type": "default"}}, "rope_parameters.rope_theta: is not in the file"),
    ({"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2}}, "rope_parameters.rope_type=dynamic"),
    ({"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4, "factor": 2}}, "original_max_position_embeddings: is not in"),
    ({"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4, "factor": 2, "original_max_position_embeddings": 64,
                          "mscale": 0.7}}, "rope_parameters.mscale=0.7: is not known"),
    ({"rope_parameters": {"rope_type": "linear", "rope_theta": 1e4, "factor": 2, "surprise": 1}}, "surprise=1"),
    ({"rope_scaling": {"rope_type": "linear", "factor": 2.0}}, "stands beside rope_parameters, in whose place transformers"),
    ({"quantization_config": {"bits": 4}}, "quantization_config"),
    ({"auto_map": {"AutoModelForCausalLM": "evil.Model"}}, "auto_map"),
    ({"model_type": "gemma3"}, "model_type=gemma3: is not among the families"),
    ({"architectures": ["LlamaForSequenceClassification"]}, "architectures"),
    ({"untie_embeddings_and_output_weights": False}, "contradicts tie_word_embeddings"),
    ({"num_hidden_layers": 5}, "model.layers.4"),
    ({"num_hidden_layers": 3}, "is known to no llama model"),
    ({"vocab_size": 96}, "model.embed_tokens.weight is [97, 48] in model.safetensors and [96, 48] in the model"),
    ({"head_dim": 24}, "q_proj.weight is [48, 48] in model.safetensors and [96, 48]"),
    ({"tie_word_embeddings": True}, "lm_head.weight differs from model.embed_tokens.weight"),
    ({"hidden_size": "wide"}, "model.d_model"),
])
def test_a_configuration_that_is_not_understood_is_refused_by_name(folder, keys, told, capsys):
    config = json.loads((folder / "config.json").read_text()) | keys
    (folder / "config.json").write_text(json.dumps({k: v for k, v in config.items() if v is not ...}))
    assert main(["convert", "import", str(folder), "--to", str(folder.parent / "run")]) == 2
    assert told in capsys.readouterr().err


def test_a_softcap_that_transformers_keeps_and_never_uses_is_refused(tmp_path):
    save("gemma3", tmp_path)
    raw = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(raw | {"attn_logit_softcapping": 50.0}))
    with pytest.raises(OfficinaError, match=r"attn_logit_softcapping=50.0: is kept by transformers' Gemma 3 and caps nothing"):
        open_base(str(tmp_path))
    _, model = read_config(raw)
    with pytest.raises(OfficinaError, match=r"no family .* cannot hold model\.\w+"):
        family_for(replace(model, attn_softcap=50.0))


def test_what_two_versions_of_transformers_read_differently_is_refused(tmp_path):
    save("apertus", tmp_path, v4=True)
    raw = json.loads((tmp_path / "config.json").read_text())
    for keys in (raw | {"rope_scaling": None}, {k: v for k, v in raw.items() if k != "rope_scaling"}):
        (tmp_path / "config.json").write_text(json.dumps(keys))
        with pytest.raises(OfficinaError, match="no scaling by transformers 4 and as llama3's by transformers 5"):
            open_base(str(tmp_path))


def _without(folder, name):
    weights = load_file(folder / "model.safetensors")
    weights.pop(name)
    save_file(weights, folder / "model.safetensors")


def _cut(folder):
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-5])


def _quantized(folder):
    weights = load_file(folder / "model.safetensors")
    weights["lm_head.weight"] = weights["lm_head.weight"].to(torch.int8)
    save_file(weights, folder / "model.safetensors")


def _pickled(folder):
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")


def _index(folder, places):
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": places}))


@pytest.mark.parametrize(("damage", "told"), [
    (lambda f: _without(f, "model.norm.weight"), "model.norm.weight is in no file"),
    (_cut, "it was not copied to its end"), (_quantized, "lm_head.weight is stored as I8"),
    (_pickled, "is a pickle and may run code"),
    (lambda f: (f / "model.safetensors").unlink(), "has neither model.safetensors nor"),
    (lambda f: (f / "model.safetensors").write_bytes(b"version https://git-lfs.github.com/spec"), "is no whole safetensors"),
    (lambda f: _index(f, {"a": "model-2.safetensors"}), "has model.safetensors and model.safetensors.index.json, which names"),
    (lambda f: _index(f, {"a": "model-2.safetensors", "b": "model.safetensors"}), "model-2.safetensors is missing"),
    (lambda f: _index(f, {"a": "model.safetensors"}), "says that a is in model.safetensors, and it is not there"),
    (lambda f: _index(f, {"a": "../x.safetensors"}), "which is not beside it"),
    (lambda f: (f / "config.json").write_text("{"), "config.json cannot be read"),
    (lambda f: (f / "config.json").write_text("[]"), "holds list, not a set of keys"),
    (lambda f: (f / "config.json").unlink(), "has neither config.json"),
])
def test_damaged_files_are_refused_by_name(folder, damage, told, capsys):
    damage(folder)
    assert main(["convert", "import", str(folder), "--to", str(folder.parent / "run")]) == 2
    assert told in capsys.readouterr().err and not (folder.parent / "run").exists()


def test_a_tied_head_that_is_stored_twice_and_old_buffers_are_taken(folder):
    weights = load_file(folder / "model.safetensors")
    weights["lm_head.weight"] = weights["model.embed_tokens.weight"].clone()
    weights["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(6)
    save_file(weights, folder / "model.safetensors")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"tie_word_embeddings": True}))
    import_model(folder, folder.parent / "run")
    assert load_config(folder.parent / "run").model.tie_embeddings


def test_tying_is_told_by_the_weights_where_the_keys_are_silent(folder):
    config = json.loads((folder / "config.json").read_text())
    config.pop("tie_word_embeddings")
    (folder / "config.json").write_text(json.dumps(config))
    assert not open_base(str(folder)).model.tie_embeddings
    _without(folder, "lm_head.weight")
    assert open_base(str(folder)).model.tie_embeddings


def test_commands_and_their_refusals(folder, tmp_path, capsys):
    run, out = str(tmp_path / "run"), str(tmp_path / "out")
    assert main(["convert", "import", str(folder), "--to", run]) == 0
    assert "officina generate" in capsys.readouterr().out
    assert main(["convert", "export", run, "--to", out, "--max-shard", "60KB"]) == 0
    told = capsys.readouterr().out
    assert "LlamaForCausalLM, step 0" in told and "(bfloat16)" in told
    for words, message in [
            (["import", str(folder), "--to", run], "is not empty"), (["export", run, "--to", out], "never written over"),
            (["export", out, "--to", out + "2"], "is in Hugging Face's form already"),
            (["import", run, "--to", run + "2"], "is a run of officina already"),
            (["export", run, "--max-shard", "many", "--to", out + "3"], "has to be a size"),
            (["export", f"{run}@7", "--to", out + "4"], "step 7"),
            (["import", "nowhere", "--to", run + "3"], "nowhere does not exist")]:
        assert main(["convert", *words]) == 2
        assert message in capsys.readouterr().err
        assert Path(words[-1]).exists() == (words[-1] in (run, out)), "a refusal leaves what was there"
    assert main(["resume", run]) == 2  # an import is no run that could go on
    assert "init_from=" in capsys.readouterr().err
    assert FAMILIES.keys() >= {"llama", "mistral"}


# ---- memory ----------------------------------------------------------------------------------------------------------
PROGRAM = """
import json, re, sys
from pathlib import Path
from officina.trainer.convert import export_run, import_model
from officina.trainer.hf.base import open_base
folder = Path(sys.argv[1])
peak = lambda: 1024 * int(re.search(r"VmHWM:\\s*(\\d+)", Path("/proc/self/status").read_text())[1])  # this program's own
import torch
torch.zeros(8).bfloat16().float()
start = peak()
import_model(folder / "in", folder / "run"); after_import = peak()
export_run(str(folder / "run"), folder / "out")
print(json.dumps([after_import - start, peak() - start]))
"""


def test_memory_does_not_grow_with_the_model(tmp_path):
    """630 MB in fp32, of which the largest tensor is 197 MB: the peak is a few staging buffers."""
    from officina.trainer.hf.files import ToWrite, Writer

    vocab, width = 96_000, 512
    config = dict(model_type="llama", architectures=["LlamaForCausalLM"], vocab_size=vocab, hidden_size=width,
                  intermediate_size=8192, num_hidden_layers=4, num_attention_heads=8, num_key_value_heads=8,
                  hidden_act="silu", rms_norm_eps=1e-5, tie_word_embeddings=False, rope_theta=1e4, torch_dtype="bfloat16")
    folder = tmp_path / "in"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config))
    from officina.trainer.hf.config_file import read_config
    from officina.trainer.model.shapes import parameter_shapes as shapes_of
    family, model = read_config(config)
    plan = [ToWrite(family.their_name(name), "BF16", shape) for name, shape in shapes_of(model).items()]
    writer = Writer(folder, plan, 10**12)
    writer.write("model.safetensors", (bytes(tensor.bytes) for tensor in plan))
    largest, total = vocab * width * 4, 2 * sum(tensor.bytes for tensor in plan)
    assert total > 3 * largest
    done = subprocess.run([sys.executable, "-c", PROGRAM, str(tmp_path)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    in_bytes, out_bytes = json.loads(done.stdout.splitlines()[-1])
    print(f"largest tensor {largest / 1e6:.0f} MB, all {total / 1e6:.0f} MB; peak of import {in_bytes / 1e6:.0f} MB, "
          f"of both {out_bytes / 1e6:.0f} MB")
    assert 0 < in_bytes <= out_bytes < 2 * largest  # whole tensors in memory would be more


# ---- the commands, as a person uses them -----------------------------------------------------------------------------
def test_transformers_says_offline_what_officina_generate_says(tmp_path, capsys, monkeypatch):
    """A model whose tokenizer begins texts with a token: imported, exported, loaded by the classes that anybody uses."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
    from transformers import AutoModelForCausalLM, AutoTokenizer

    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    folder, run_dir, out = tmp_path / "in", tmp_path / "run", tmp_path / "out"
    save("qwen3", folder, vocab_size=320)
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({name: i for i, name in enumerate(["<pad>", "<s>", "</s>", *alphabet])}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<pad>", "<s>", "</s>"])
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps(
        {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "</s>", "chat_template": "{{ messages[0].content }}"}))

    assert main(["convert", "import", str(folder), "--to", str(run_dir)]) == 0
    assert main(["convert", "export", str(run_dir), "--to", str(out)]) == 0
    capsys.readouterr()
    assert main(["generate", str(run_dir), "<s>Grüezi", "--temperature", "0", "--max-new-tokens", "24"]) == 0
    with_it = capsys.readouterr().out
    assert main(["generate", str(run_dir), "Grüezi", "--temperature", "0", "--max-new-tokens", "24"]) == 0
    said = capsys.readouterr().out

    theirs, model = AutoTokenizer.from_pretrained(out), AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32)
    ids = theirs("Grüezi", return_tensors="pt")
    assert ids["input_ids"][0, 0] == 1 and with_it == f"<s>{said}"  # once, also where the prompt has it already
    tokens = model.generate(**ids, max_new_tokens=24, do_sample=False)[0]
    # what follows the last whole character is held back here and shown as a question mark there
    assert theirs.decode(tokens, skip_special_tokens=True).rstrip("\N{REPLACEMENT CHARACTER}").startswith(said.rstrip("\n"))
    assert len(said) > len("Grüezi") + 3
    assert theirs.apply_chat_template([{"role": "user", "content": "Hi"}], tokenize=False) == "Hi"
    assert model.generation_config.eos_token_id == 2
    assert 'prompt = tokenizer("Once upon a time"' in (out / "README.md").read_text()
    for name in ("tokenizer.json", "tokenizer_config.json"):
        assert (out / name).read_bytes() == (folder / name).read_bytes()
