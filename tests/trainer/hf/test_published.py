"""config.json of published models, as their files have it: each gives its published number of parameters, on the meta device.

Numbers: the sum over the published safetensors, or the model's card where that says billions only.
"""

import pytest

from officina.trainer.hf.config_file import read_config, write_config
from officina.trainer.hf.family import canonical
from officina.trainer.model.build import build_transformer
from officina.trainer.model.flops import parameter_count

LLAMA3_ROPE = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
               "original_max_position_embeddings": 8192}


def config(kind, architecture, L, d, ffn, H, KV, vocab, theta, eps, tied, **more):
    return {"model_type": kind, "architectures": [architecture], "num_hidden_layers": L, "hidden_size": d,
            "intermediate_size": ffn, "num_attention_heads": H, "num_key_value_heads": KV, "vocab_size": vocab,
            "rope_theta": theta, "rms_norm_eps": eps, "tie_word_embeddings": tied, "hidden_act": "silu", "use_cache": True,
            "torch_dtype": "bfloat16", "transformers_version": "4.46.0", "initializer_range": 0.02, **more}


def llama(*shape, **more):
    return config("llama", "LlamaForCausalLM", *shape, **{"rope_scaling": None, "attention_bias": False, **more})


def mistral(*shape, **more):
    return config("mistral", "MistralForCausalLM", *shape, **more)


def gemma(kind, architecture, *shape, **more):
    made = config(kind, architecture, *shape, **{
        "hidden_activation": "gelu_pytorch_tanh", "head_dim": 256, "query_pre_attn_scalar": 256, "attention_bias": False,
        "attn_logit_softcapping": None, "final_logit_softcapping": None, "cache_implementation": "hybrid", **more})
    made.pop("hidden_act")
    made.pop("tie_word_embeddings")  # their files do not say it
    return made


MODELS = {
    "EuroLLM-1.7B": (llama(24, 2048, 5632, 16, 8, 128_000, 1e4, 1e-5, False), 1.66),
    "EuroLLM-9B": (llama(42, 4096, 12_288, 32, 8, 128_000, 1e4, 1e-5, False, head_dim=128), 9.15),
    "Teuken-7B": (llama(32, 4096, 13_440, 32, 2, 250_680, 1e4, 1e-5, True), 7.45),
    "Viking-7B": (llama(32, 4096, 11_008, 32, 32, 131_072, 1e4, 1e-5, False,
                        untie_embeddings_and_output_weights=True), 7.55),
    "Salamandra-2B": (llama(24, 2048, 5440, 16, 16, 256_000, 1e4, 1e-5, False), 2_253_490_176),
    "Salamandra-7B": (llama(32, 4096, 11_008, 32, 8, 256_000, 1e4, 1e-6, False), 7_768_117_248),
    "Lucie-7B": (llama(32, 4096, 12_288, 32, 8, 65_024, 2e7, 1e-5, False), 6_706_958_336),
    "Llama-3.1-8B": (llama(32, 4096, 14_336, 32, 8, 128_256, 5e5, 1e-5, False, rope_scaling=LLAMA3_ROPE, mlp_bias=False,
                           pretraining_tp=1, attention_dropout=0.0), 8_030_261_248),
    "Llama-3.1-70B (Poro 2)": (llama(80, 8192, 28_672, 64, 8, 128_256, 5e5, 1e-5, False, rope_scaling=LLAMA3_ROPE),
                               70_553_706_496),
    "Llama-3.2-1B": (llama(16, 2048, 8192, 32, 8, 128_256, 5e5, 1e-5, True, rope_scaling=LLAMA3_ROPE | {"factor": 32.0},
                           head_dim=64), 1_235_814_400),
    "Minerva-7B": (mistral(32, 4096, 14_336, 32, 8, 51_200, 1e4, 1e-5, False, sliding_window=None), 7.40),
    "Minerva-1B": (mistral(16, 2048, 7168, 16, 4, 32_768, 1e4, 1e-5, False, sliding_window=2048), 1.01),
    "Mistral-7B-v0.1": (mistral(32, 4096, 14_336, 32, 8, 32_000, 1e4, 1e-5, False, sliding_window=4096), 7_241_732_096),
    "Mistral-7B-v0.3": (mistral(32, 4096, 14_336, 32, 8, 32_768, 1e6, 1e-5, False, sliding_window=None), 7_248_023_552),
    "Qwen2.5-7B": (config("qwen2", "Qwen2ForCausalLM", 28, 3584, 18_944, 28, 4, 152_064, 1e6, 1e-6, False,
                          use_sliding_window=False, sliding_window=131_072, max_window_layers=28), 7_615_616_512),
    "Qwen2.5-0.5B": (config("qwen2", "Qwen2ForCausalLM", 24, 896, 4864, 14, 2, 151_936, 1e6, 1e-6, True,
                            use_sliding_window=False, sliding_window=32_768, max_window_layers=24), 494_032_768),
    "Qwen3-0.6B": (config("qwen3", "Qwen3ForCausalLM", 28, 1024, 3072, 16, 8, 151_936, 1e6, 1e-6, True, head_dim=128,
                          attention_bias=False, use_sliding_window=False, sliding_window=None, max_window_layers=28,
                          rope_scaling=None), 596_049_920),
    "Qwen3-8B": (config("qwen3", "Qwen3ForCausalLM", 36, 4096, 12_288, 32, 8, 151_936, 1e6, 1e-6, False, head_dim=128,
                        attention_bias=False, use_sliding_window=False, sliding_window=None, max_window_layers=36),
                 8_190_735_360),
    "Apertus-8B": (config("apertus", "ApertusForCausalLM", 32, 4096, 21_504, 32, 8, 131_072, 12e6, 1e-5, False,
                          hidden_act="xielu", rope_scaling=LLAMA3_ROPE, attention_bias=False, mlp_bias=False,
                          post_norm=False, qk_norm=True), 8_053_338_176),
    "SmolLM3-3B": (config("smollm3", "SmolLM3ForCausalLM", 36, 2048, 11_008, 16, 4, 128_256, 5e6, 1e-6, True,
                          no_rope_layers=[1, 1, 1, 0] * 9, no_rope_layer_interval=4, use_sliding_window=False,
                          sliding_window=None, pretraining_tp=2, max_window_layers=28, mlp_bias=False,
                          layer_types=["full_attention"] * 36), 3_075_098_624),
    "OLMo-2-7B": (config("olmo2", "Olmo2ForCausalLM", 32, 4096, 11_008, 32, 32, 100_352, 5e5, 1e-6, False,
                         rope_scaling=None, attention_bias=False, attention_dropout=0.0), 7_298_617_344),
    "Gemma-2-2B": (gemma("gemma2", "Gemma2ForCausalLM", 26, 2304, 9216, 8, 4, 256_000, 1e4, 1e-6, True, sliding_window=4096,
                         attn_logit_softcapping=50.0, final_logit_softcapping=30.0), 2_614_341_888),
    "Gemma-2-9B": (gemma("gemma2", "Gemma2ForCausalLM", 42, 3584, 14_336, 16, 8, 256_000, 1e4, 1e-6, True, sliding_window=4096,
                         attn_logit_softcapping=50.0, final_logit_softcapping=30.0), 9_241_705_984),
    "Gemma-3-1B": (gemma("gemma3_text", "Gemma3ForCausalLM", 26, 1152, 6912, 4, 1, 262_144, 1e6, 1e-6, True, sliding_window=512,
                         sliding_window_pattern=6, rope_local_base_freq=1e4, rope_scaling=None), 999_885_952),
}


@pytest.mark.parametrize("name", MODELS)
def test_the_published_configuration_gives_the_published_number_of_parameters(name):
    raw, published = MODELS[name]
    family, model = read_config(raw, has_head="tie_word_embeddings" in raw)
    on_meta = sum(p.numel() for p in build_transformer(model).parameters())
    assert on_meta == parameter_count(model).total
    if isinstance(published, int):
        assert on_meta == published
    else:
        assert round(on_meta / 1e9, 2) == published
    assert write_config(model, family, base=raw) == raw
    back = write_config(model, family)
    assert canonical(read_config(back)[1]) == canonical(model)


def test_what_is_shipped_as_a_model_is_what_the_files_say():
    """configs/model/*.yaml against config.json, where both are here."""
    from officina.configs.compose import compose

    for name, option in {"EuroLLM-1.7B": "eurollm_1b7", "EuroLLM-9B": "eurollm_9b", "Teuken-7B": "teuken_7b",
                         "Viking-7B": "viking_7b", "Salamandra-2B": "salamandra_2b", "Lucie-7B": "lucie_7b",
                         "Minerva-7B": "minerva_7b", "SmolLM3-3B": "smollm3_3b", "Apertus-8B": "apertus_8b"}.items():
        assert canonical(compose([f"model={option}"]).model) == canonical(read_config(MODELS[name][0])[1]), name
