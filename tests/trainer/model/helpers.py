"""Small modules with random weights, shared by the tests of the model."""

import random

import torch

from officina.trainer.config import DecoderConfig, RopeConfig
from officina.trainer.model.build import build_transformer

SMALL = dict(vocab_size=61, d_model=24, d_ff=40, n_layers=3, n_heads=4)


def small(**switches) -> DecoderConfig:
    return DecoderConfig(**{**SMALL, **switches})


def filled(config: DecoderConfig, *, seed: int = 1, std: float = 0.3, dtype=torch.float32):
    """The module on the CPU, norms around 1, everything else around 0."""
    module = build_transformer(config).to(dtype).to_empty(device="cpu")
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * std + ("norm" in name))
    return module


def random_config(random: random.Random) -> DecoderConfig:
    """Any combination of switches that goes together."""
    kv = random.choice([0, 1, 2, 4])
    window = random.choice([0, 0, 3, 5])
    choice = random.choice
    return small(
        vocab_size=choice([37, 61]), n_layers=choice([1, 2, 5]), n_kv_heads=kv, head_dim=choice([0, 2, 10]),
        mlp=choice(["swiglu", "geglu", "xielu"]), qkv_bias=choice([False, True]), o_bias=choice([False, True]),
        mlp_bias=choice([False, True]), qk_norm=choice(["none", "head", "full"]),
        norm_placement=choice(["pre", "post", "sandwich"]), norm_weight=choice(["plain", "zero_centred"]),
        norm_cast=choice(["before", "after"]), tie_embeddings=choice([False, True]), embed_scale=choice([1.0, 4.9]),
        rope=RopeConfig(theta=100.0, scaling=choice(["none", "linear"]), factor=2.0),
        local_rope=choice([None, RopeConfig(theta=10.0)]) if window else None,
        rope_pattern=choice([[True], [True, False], [False]]), window=window,
        window_pattern=choice([[True], [True, False]]), attn_scale=choice([None, 0.2]),
        attn_softcap=choice([0.0, 4.0]), logit_softcap=choice([0.0, 3.0]))
