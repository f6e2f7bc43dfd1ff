"""OLMo 2: norms after the sublayers, QK-norm over the full width before the head split."""

from officina.trainer.config import DecoderConfig
from officina.trainer.hf.family import Family, common, common_keys
from officina.trainer.hf.keys import Keys, Values


def _read(keys: Keys) -> Values:
    bias = keys.may("attention_bias", False)
    return common(keys, "silu") | {"rope": keys.rope(), "qk_norm": "full", "norm_placement": "post", "norm_cast": "after",
                                   "qkv_bias": bias, "o_bias": bias}


def _write(model: DecoderConfig) -> Values:
    return common_keys(model, "silu") | {"attention_bias": model.qkv_bias}


OLMO2 = Family("olmo2", "Olmo2ForCausalLM", _read, _write,
               norms={"attn_post_norm": "post_attention_layernorm", "mlp_post_norm": "post_feedforward_layernorm"})
