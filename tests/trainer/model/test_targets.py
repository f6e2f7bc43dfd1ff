"""Patterns of an adapter against the layers there are, and what is refused, each with a remedy that works."""

import random
from dataclasses import replace

import pytest

from officina.configs.compose import compose
from officina.trainer.config import DecoderConfig, LoraConfig, RunConfig
from officina.trainer.errors import ConfigError
from officina.trainer.model.build import build_model, build_transformer
from officina.trainer.model.flops import parameter_count
from officina.trainer.model.shapes import parameter_shapes
from officina.trainer.model.targets import adapter_problems, choose

XIELU = ["model.mlp=xielu", "model.qk_norm=head"]
TIED = ["model.tie_embeddings=true"]


def test_shapes_are_those_of_the_module_for_random_switches():
    draw = random.Random(0)
    for _ in range(40):
        config = DecoderConfig(
            vocab_size=draw.choice([7, 64]), n_layers=draw.choice([1, 3]), d_model=draw.choice([32, 48]), n_heads=4,
            n_kv_heads=draw.choice([0, 1, 2]), head_dim=draw.choice([0, 6]), d_ff=draw.choice([16, 40]),
            mlp=draw.choice(["swiglu", "geglu", "xielu"]), qkv_bias=draw.random() < 0.5, o_bias=draw.random() < 0.5,
            mlp_bias=draw.random() < 0.5, qk_norm=draw.choice(["none", "head", "full"]),
            norm_placement=draw.choice(["pre", "post", "sandwich"]), tie_embeddings=draw.random() < 0.5)
        module = build_transformer(config)
        assert list(parameter_shapes(config).items()) == [(name, tuple(p.shape)) for name, p in module.named_parameters()]
        assert sum(p.numel() for p in module.parameters()) == parameter_count(config).total


@pytest.mark.parametrize(("patterns", "expected"), [
    (["q"], ["blocks.0.attn.q", "blocks.1.attn.q"]),
    (["attn.q", "mlp.down"], ["blocks.0.attn.q", "blocks.0.mlp.down", "blocks.1.attn.q", "blocks.1.mlp.down"]),
    (["blocks.1.attn.*"], [f"blocks.1.attn.{name}" for name in "qkvo"]),
    (["1.attn.[kv]"], ["blocks.1.attn.k", "blocks.1.attn.v"]),
])
def test_a_pattern_is_a_name_or_the_end_of_one(patterns, expected):
    chosen = choose(DecoderConfig(n_layers=2), LoraConfig(targets=patterns))
    assert list(chosen.linears) == expected and not chosen.whole
    assert "attn.q" not in choose(DecoderConfig(), LoraConfig(targets=["n.q"])).linears


def test_default_targets_are_all_linear_layers_of_the_blocks():
    for model in (DecoderConfig(n_layers=2), DecoderConfig(n_layers=2, mlp="xielu")):
        linears = choose(model, LoraConfig()).linears
        assert len(linears) == 2 * (7 if model.mlp == "swiglu" else 6)


def test_what_is_held_in_4_bits():
    """Every frozen matrix of the blocks, with an adapter or without; nothing that is trained, no embedding, no norm."""
    model = DecoderConfig(n_layers=2)
    chosen = choose(model, LoraConfig(base="nf4", targets=["q"], train=["blocks.1.mlp.up", "embed"]))
    every = {f"blocks.{i}.{name}.weight" for i in range(2)
             for name in ("attn.q", "attn.k", "attn.v", "attn.o", "mlp.gate", "mlp.up", "mlp.down")}
    assert set(chosen.packed) == every - {"blocks.1.mlp.up.weight"}
    assert chosen.packed["blocks.0.mlp.down.weight"] == (256, 768) and not choose(model, LoraConfig()).packed


def test_modules_trained_in_full():
    model = DecoderConfig(n_layers=2, mlp="xielu", qk_norm="head")
    chosen = choose(model, LoraConfig(train=["embed", "*norm"]))
    assert {"embed.weight", "norm.weight", "blocks.1.attn.q_norm.weight", "blocks.0.mlp_norm.weight"} <= set(chosen.whole)
    assert "head.weight" in chosen.frozen and "blocks.0.mlp.alpha_p" in chosen.frozen
    whole_block = choose(model, LoraConfig(targets=["blocks.0.*"], train=["blocks.1"]))
    assert all(name.startswith("blocks.1.") for name in whole_block.whole) and "blocks.1.mlp.alpha_p" in whole_block.whole


REFUSED = [
    ("rows that blocks of 64 do not cut", ["adapter.base=nf4", "model.d_ff=100"], "adapter.base",
     "blocks of 64 weights, and those of blocks.0.mlp.down.weight are 100 long"),
    ("hf names", ["adapter.targets=[q_proj,v_proj]"], "adapter.targets",
     r"q_proj matches no layer. The layers there are: attn.q, attn.k, attn.v, attn.o, mlp.gate, mlp.up, mlp.down"),
    ("no gate in xIELU", ["adapter.targets=[gate,up]", *XIELU], "adapter.targets",
     r"gate matches no layer. The layers there are: attn.q, attn.k, attn.v, attn.o, mlp.up, mlp.down"),
    ("a layer beyond the last", ["adapter.targets=[blocks.99.attn.q]"], "adapter.targets", "matches no layer"),
    ("tied embedding", ["adapter.targets=[q,embed]", *TIED], "adapter.targets",
     r"one matrix at both ends \(model.tie_embeddings=true\).*adapter.train=\[embed\]"),
    ("tied head", ["adapter.targets=[lm_head]", *TIED], "adapter.targets", "one matrix at both ends"),
    ("untied head", ["adapter.targets=[q,head]"], "adapter.targets", r"Train it in full: adapter.train=\[head\]"),
    ("a head that is tied", ["adapter.train=[head]", *TIED], "adapter.train", "head is tied to embed"),
    ("no such module", ["adapter.train=[norms]"], "adapter.train", r"norms matches no module. The modules there are: attn"),
    ("both ways", ["adapter.train=[mlp]"], "adapter.train", "one or the other"),
    ("nothing", ["adapter.targets=[]"], "adapter.targets", "nothing would be trained"),
    ("no low rank", ["adapter.rank=512"], "adapter.rank", "narrowest layer"),
    ("muon", ["optim=muon"], "optim", "orthogonalises"),
    ("custom model", ["model=custom", "model.factory=a:b", "model.loss=a:b", "model.decoder=a:b"], "adapter",
     "for the built-in decoder"),
]


@pytest.mark.parametrize(("words", "key", "rule"), [case[1:] for case in REFUSED], ids=[case[0] for case in REFUSED])
def test_what_is_refused_and_that_the_remedy_works(words, key, rule):
    run = compose(["adapter=lora", *words])
    with pytest.raises(ConfigError, match=rule):
        raise ConfigError(list(adapter_problems(run)))
    for _ in range(4):
        found = list(adapter_problems(run))
        if not found:
            return
        assert found[0].key == key
        words = [*words, found[0].remedy]
        run = compose(["adapter=lora", *words] if found[0].key != "adapter" else [*words, "adapter=none"])
    raise AssertionError(f"still refused after {words}")


def test_names_of_peft_are_translated():
    problem, = adapter_problems(compose(["adapter=lora", "adapter.targets=[q_proj,v_proj,mlp.down]"]))
    assert problem.remedy == "adapter.targets=[q,v,mlp.down]"


def test_a_rank_refuses_too():
    run = RunConfig(adapter=LoraConfig(targets=["nothing"]))
    with pytest.raises(ConfigError, match="nothing matches no layer"):
        build_model(run)
    assert build_model(replace(run, adapter=LoraConfig())).module is not None
