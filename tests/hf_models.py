"""Small random models that transformers itself builds and saves: several odd shapes of each family."""

import copy
import json
from pathlib import Path

SMALL = dict(vocab_size=97, hidden_size=48, intermediate_size=80, num_hidden_layers=4, num_attention_heads=4,
             num_key_value_heads=2, max_position_embeddings=256, initializer_range=0.03, pad_token_id=0, bos_token_id=1,
             eos_token_id=2)
LLAMA3 = dict(rope_type="llama3", rope_theta=500.0, factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0,
              original_max_position_embeddings=64)
YARN = dict(rope_type="yarn", rope_theta=500.0, factor=4.0, original_max_position_embeddings=16, beta_fast=8.0)
LINEAR = dict(rope_type="linear", rope_theta=700.0, factor=3.0)
PLAIN = dict(rope_type="default", rope_theta=20_000.0)
WINDOWS = ["sliding_attention", "full_attention", "sliding_attention", "full_attention"]

CASES = {
    "llama": ("Llama", dict(rms_norm_eps=1e-5, rope_parameters=PLAIN)),
    "llama-head-dim": ("Llama", dict(head_dim=20, num_attention_heads=3, num_key_value_heads=1, vocab_size=131,
                                     rope_parameters=LLAMA3)),
    "llama-tied-biases": ("Llama", dict(attention_bias=True, mlp_bias=True, tie_word_embeddings=True, rope_parameters=LINEAR)),
    "llama-mha-yarn": ("Llama", dict(num_key_value_heads=4, rope_parameters=YARN, num_hidden_layers=1)),
    "mistral": ("Mistral", dict(sliding_window=None, rope_parameters=PLAIN)),
    "mistral-window": ("Mistral", dict(sliding_window=7, head_dim=16, rope_parameters=YARN | {"attention_factor": 1.25})),
    "qwen2": ("Qwen2", dict(rope_parameters=PLAIN, rms_norm_eps=1e-5)),
    "qwen2-tied-window": ("Qwen2", dict(tie_word_embeddings=True, use_sliding_window=True, sliding_window=9,
                                        max_window_layers=2, rope_parameters=YARN)),
    "qwen3": ("Qwen3", dict(head_dim=20, rope_parameters=PLAIN, vocab_size=151)),
    "qwen3-tied": ("Qwen3", dict(head_dim=12, tie_word_embeddings=True, attention_bias=True, rope_parameters=LINEAR)),
    "apertus": ("Apertus", dict(rope_parameters=LLAMA3)),
    "apertus-tied": ("Apertus", dict(rope_parameters=PLAIN, tie_word_embeddings=True, num_attention_heads=6,
                                     num_key_value_heads=2, rms_norm_eps=1e-6)),
    "smollm3": ("SmolLM3", dict(no_rope_layers=[1, 1, 0, 1], rope_parameters=PLAIN | {"rope_theta": 5e6})),
    "smollm3-untied": ("SmolLM3", dict(tie_word_embeddings=False, num_hidden_layers=5, rope_parameters=LINEAR,
                                       attention_bias=True)),
    "olmo2": ("Olmo2", dict(rms_norm_eps=1e-6, rope_parameters=PLAIN)),
    "olmo2-mha": ("Olmo2", dict(num_key_value_heads=4, rope_parameters=YARN, tie_word_embeddings=True)),
    "gemma2": ("Gemma2", dict(head_dim=16, sliding_window=9, layer_types=WINDOWS, query_pre_attn_scalar=24,
                              rope_parameters=PLAIN)),
    "gemma2-odd": ("Gemma2", dict(head_dim=20, sliding_window=5, query_pre_attn_scalar=48, attn_logit_softcapping=None,
                                  final_logit_softcapping=20.0, num_hidden_layers=3, rope_parameters=LINEAR)),
    "gemma3": ("Gemma3", dict(
        head_dim=16, sliding_window=9, query_pre_attn_scalar=24, num_hidden_layers=7,
        rope_parameters=dict(sliding_attention=dict(rope_type="default", rope_theta=300.0),
                             full_attention=dict(rope_type="linear", rope_theta=9000.0, factor=8.0)))),
    "gemma3-mqa": ("Gemma3", dict(
        head_dim=24, num_key_value_heads=1, sliding_window=6, layer_types=WINDOWS, query_pre_attn_scalar=24,
        rope_parameters=dict(sliding_attention=dict(rope_type="default", rope_theta=1e4),
                             full_attention=dict(rope_type="default", rope_theta=1e6)))),
}


def build(case: str, **more):
    """The model in fp32, with norms and biases that are no constants."""
    import torch
    import transformers

    kind, options = CASES[case]
    text = "Text" if kind == "Gemma3" else ""
    config = getattr(transformers, f"{kind}{text}Config")(**{**SMALL, **options, **more})
    torch.manual_seed(0)
    model = getattr(transformers, f"{kind}ForCausalLM")(config).float().eval()
    for name, parameter in model.named_parameters():
        torch.nn.init.normal_(parameter, 1.0 if "norm" in name else 0.0, 0.2)
    return model


def save(case: str, folder: Path, *, dtype: str = "bfloat16", shard: str = "5GB", v4: bool = False, **more):
    """Build it, write it as transformers does, and return what it then holds, in fp32."""
    import torch

    model = build(case, **more)
    copy.deepcopy(model).to(getattr(torch, dtype)).save_pretrained(folder, max_shard_size=shard)
    for parameter in model.parameters():  # only these: RoPE's frequencies stay in fp32
        parameter.data = parameter.data.to(getattr(torch, dtype)).float()
    if v4:
        path = folder / "config.json"
        path.write_text(json.dumps(as_v4(json.loads(path.read_text())), indent=2))
    return model


def as_v4(config: dict) -> dict:
    """config.json as transformers 4 wrote it, and as most published files are."""
    config = dict(config, transformers_version="4.52.0")
    config["torch_dtype"] = config.pop("dtype", "bfloat16")
    rope = config.pop("rope_parameters")
    local = rope.get("sliding_attention")
    rope = dict(rope.get("full_attention", rope))
    if local:
        config["rope_local_base_freq"] = local["rope_theta"]
        config.pop("_sliding_window_pattern", None)
    config["rope_theta"] = rope.pop("rope_theta")
    plain = rope["rope_type"] == "default" and config["model_type"] != "apertus"
    config["rope_scaling"] = None if plain else rope
    return config
