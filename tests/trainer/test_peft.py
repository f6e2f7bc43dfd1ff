"""Adapters against PEFT: the same logits and gradients, and what is exported loads there and computes the same."""

import json
import re
import shutil
from dataclasses import replace
from functools import partial

import pytest
import torch
from data_sets import write_tokens
from hf_models import build, save
from lives import begin, plain_run

peft = pytest.importorskip("peft")
transformers = pytest.importorskip("transformers")

from officina.trainer.checkpoint.read import open_checkpoint  # noqa: E402
from officina.trainer.config import LoraConfig, RopeConfig  # noqa: E402
from officina.trainer.convert import export_adapter, export_run, main  # noqa: E402
from officina.trainer.errors import OfficinaError  # noqa: E402
from officina.trainer.hf.base import open_base  # noqa: E402
from officina.trainer.hf.config_file import FAMILIES  # noqa: E402
from officina.trainer.hf.peft import peft_config, peft_name  # noqa: E402
from officina.trainer.initial import JoinedSource, base_weights  # noqa: E402
from officina.trainer.model.build import build_model  # noqa: E402
from officina.trainer.model.shapes import parameter_shapes  # noqa: E402
from officina.trainer.model.targets import choose  # noqa: E402
from officina.trainer.parallel.tensors import materialize  # noqa: E402
from officina.trainer.run_dir import load_config, save_config  # noqa: E402
from officina.trainer.state import PARAM  # noqa: E402

LORA = LoraConfig(rank=4, alpha=12)
CASES = {
    "llama": ("llama", LORA),
    "some layers, rslora": ("llama-head-dim", replace(LORA, rslora=True, targets=["blocks.1.attn.*", "blocks.3.mlp.up"])),
    "biases, tied": ("llama-tied-biases", replace(LORA, train=["embed"], targets=["q", "v"])),
    "xIELU": ("apertus", replace(LORA, train=["*norm", "head"])),
    "sandwich norms": ("gemma2", LORA),
}


def peft_model(base, run, family):
    config = peft_config(run.model, run.adapter, choose(run.model, run.adapter), family, "base")
    options = {key: value for key, value in config.items() if key not in ("peft_type", "inference_mode")}
    return peft.get_peft_model(base, peft.LoraConfig(**options))


@pytest.mark.parametrize("case", CASES)
def test_logits_and_gradients_of_a_step_are_those_of_peft(case, tmp_path):
    name, adapter = CASES[case]
    save(name, tmp_path / "base", dtype="float32")
    base = open_base(str(tmp_path / "base"))
    run = replace(plain_run(tmp_path, model=base.model), init_from=str(tmp_path / "base"), adapter=adapter)
    theirs = peft_model(build(name), run, base.family).train()
    built = build_model(run)
    module = built.module.to_empty(device="cpu")
    named = {key.replace(".modules_to_save.default", "").replace(".default", "").replace(".base_layer", ""): p
             for key, p in theirs.named_parameters() if "original_module" not in key}
    random = torch.Generator().manual_seed(1)
    with base_weights(run, built.first, parameter_shapes(run.model), _ALONE, tmp_path) as weights, torch.no_grad():
        for ours, parameter in module.named_parameters():
            other = named[peft_name(ours, base.family)]
            if "lora" in ours:  # B too, or A would have no gradient
                other.normal_(0, 0.1, generator=random)
                parameter.copy_(other)
            else:
                parameter.copy_(weights.read(ours, PARAM, 0, parameter.numel()).view_as(parameter))
                assert torch.equal(parameter, other), ours
    tokens = torch.randint(3, 97, (2, 24), generator=random)
    labels = torch.randint(3, 97, (2, 24), generator=random)
    want, got = theirs(tokens, use_cache=False).logits, module(tokens)
    assert (got - want).abs().max() <= 1e-5 * max(1.0, want.abs().max().item())
    torch.nn.functional.cross_entropy(want.flatten(0, 1), labels.flatten(), reduction="sum").backward()
    module(tokens, labels_BT=labels).backward()
    trained = {name for name, p in module.named_parameters() if p.requires_grad}
    assert {peft_name(name, base.family) for name in trained} == {name for name, p in named.items() if p.requires_grad}
    whole = torch.stack([p.grad.norm() for p in named.values() if p.grad is not None]).norm()
    for ours, parameter in module.named_parameters():
        expected = named[peft_name(ours, base.family)].grad
        if ours not in trained:
            assert parameter.grad is None and expected is None
            continue
        assert (parameter.grad - expected).norm() <= 2e-5 * expected.norm() + 1e-7 * whole, ours


class _Alone:
    rank, world_size = 0, 1

    def sum(self, numbers):
        return list(numbers)


_ALONE = _Alone()


@pytest.fixture(scope="module")
def trained(tmp_path_factory, pool):
    """case -> (run directory, base folder) of three steps."""
    folder = tmp_path_factory.mktemp("peft")
    write_tokens(folder / "data", {"train": [60] * 5})
    made = {}

    def train(case: str, name: str, adapter: LoraConfig, **shape):
        if case not in made:
            base, run_dir = folder / f"base-{case}", folder / f"run-{case}"
            save(name, base, dtype="float32", vocab_size=320, **shape)
            run = plain_run(folder / "data", model=open_base(str(base)).model, init_from=str(base), adapter=adapter, steps=3)
            begin(run_dir, replace(run, optim=replace(run.optim, lr=1e-2)))
            assert pool.run(1, "tests.lives:live", str(run_dir)) == [0]
            made[case] = run_dir, base
        return made[case]

    return train


@pytest.mark.parametrize("case", ["llama", "some layers, rslora", "biases, tied", "xIELU"])
def test_an_exported_adapter_loads_in_peft_and_computes_the_same(trained, case, tmp_path):
    name, adapter = CASES[case]
    run_dir, base = trained(case, name, adapter)
    told = export_adapter(str(run_dir), tmp_path / "adapter")
    export_run(str(run_dir), tmp_path / "merged", dtype="float32")
    assert told["base"] == base.name and told["step"] == 3
    assert str(base.parent) not in (tmp_path / "adapter/adapter_config.json").read_text()

    load = transformers.AutoModelForCausalLM.from_pretrained
    tokens = torch.randint(3, 320, (2, 24), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        before = load(base)(tokens).logits
        with_adapter = peft.PeftModel.from_pretrained(load(base), tmp_path / "adapter").eval()
        theirs, merged = with_adapter(tokens).logits, load(tmp_path / "merged").eval()(tokens).logits
        ours = our_logits(run_dir, tokens)
    size = max(1.0, ours.abs().max().item())
    assert (theirs - ours).abs().max() <= 1e-5 * size
    assert (merged - ours).abs().max() <= 1e-5 * size
    assert (before - ours).abs().max() > 1e-2


def our_logits(run_dir, tokens):
    """Unmerged: the module with its adapters."""
    from officina.trainer.run_dir import load_config

    run = load_config(run_dir)
    built = build_model(run)
    module = built.module
    materialize(module, torch.device("cpu"))
    module.eval()
    shapes = parameter_shapes(run.model)
    with open_checkpoint(run_dir) as opened, base_weights(run, built.first, shapes, _ALONE, run_dir) as base:
        source = built.held(JoinedSource(opened, base, built.frozen))
        for name, parameter in module.named_parameters():
            parameter.copy_(source.read(name, PARAM, 0, parameter.numel()).view_as(parameter))
    return module(tokens)


def test_an_adapter_of_a_base_in_4_bits_computes_the_same_in_peft_beside_bitsandbytes(trained, tmp_path, capsys):
    pytest.importorskip("bitsandbytes")
    run_dir, base = trained("4 bits", "llama", replace(LORA, base="nf4"), hidden_size=64, intermediate_size=128)
    assert main(["export", str(run_dir), "--to", str(tmp_path / "adapter"), "--adapter"]) == 0
    exec(re.search(r'python -c "(.*BitsAndBytesConfig.*)"', capsys.readouterr().out)[1], {})
    four = transformers.BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32)
    load = partial(transformers.AutoModelForCausalLM.from_pretrained, base, dtype=torch.float32, device_map="cpu")
    tokens = torch.randint(3, 320, (2, 24), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        # Not in evaluation, for which bitsandbytes computes in bf16 on some processors. Nothing is dropped out here.
        theirs = peft.PeftModel.from_pretrained(load(quantization_config=four), tmp_path / "adapter").train()(tokens).logits
        on_the_base_as_it_is = peft.PeftModel.from_pretrained(load(), tmp_path / "adapter").eval()(tokens).logits
        ours = our_logits(run_dir, tokens)
    size = max(1.0, ours.abs().max().item())
    assert (theirs - ours).abs().max() <= 1e-5 * size < 1e-3 < (on_the_base_as_it_is - ours).abs().max()


def test_the_command_says_how_to_load_it(trained, tmp_path, capsys):
    run_dir, base = trained("llama", *CASES["llama"])
    assert main(["export", str(run_dir), "--to", str(tmp_path / "a"), "--adapter"]) == 0
    said = capsys.readouterr().out
    assert "adapter of step 3" in said and f"for {base.name} (weights " in said
    assert f"P.from_pretrained(M.from_pretrained('{base}')" in said
    config = json.loads((tmp_path / "a/adapter_config.json").read_text())
    assert config["target_modules"] == ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    with pytest.raises(OfficinaError, match=r"never written over another"):
        export_adapter(str(run_dir), tmp_path / "a")
    assert "other positions" not in said
    run, moved = load_config(run_dir), shutil.copytree(run_dir, tmp_path / "moved")  # as --force lets a run begin
    save_config(replace(run, model=replace(run.model, rope=RopeConfig(theta=77.0))), moved)
    assert main(["export", str(moved), "--to", str(tmp_path / "b"), "--adapter"]) == 0
    said = capsys.readouterr().out
    assert "other positions, windows or tokens than the base's config.json says" in said and f"export {moved} --to" in said


def test_a_run_without_adapter_has_none_to_export(tmp_path):
    begin(tmp_path / "run", plain_run(tmp_path))
    with pytest.raises(OfficinaError, match=r"has no adapter \(adapter=none\); its whole model: officina convert export"):
        export_adapter(str(tmp_path / "run"), tmp_path / "a")


def test_every_family_has_names_for_every_layer():
    for family in FAMILIES.values():
        for name in ("attn.q", "attn.o", "mlp.up", "mlp.down"):
            assert peft_name(f"blocks.0.{name}.lora_a", family).endswith("_proj.lora_A.weight")
