"""Gemma 2 and the text model of Gemma 3: norms by 1 + w on both sides, tanh-GELU, scaled embeddings, windowed layers."""

from officina.trainer.config import DecoderConfig
from officina.trainer.hf.family import Family, common, common_keys, layer_flags
from officina.trainer.hf.keys import Keys, Values, rope_as_written

_ACTIVATION = "gelu_pytorch_tanh"
_NORMS = {"attn_norm": "input_layernorm", "attn_post_norm": "post_attention_layernorm",
          "mlp_norm": "pre_feedforward_layernorm", "mlp_post_norm": "post_feedforward_layernorm"}


def _common(keys: Keys) -> Values:
    keys.only("hidden_act", None, _ACTIVATION, "gelu", why="is not that of Gemma")  # hidden_activation counts
    keys.only("use_bidirectional_attention", None, False, why="is true: not a decoder")
    values = common(keys, _ACTIVATION, key="hidden_activation", head_dim_given=True)
    bias, scale = keys.may("attention_bias", False), keys.need("query_pre_attn_scalar")
    return values | {
        "qkv_bias": bias, "o_bias": bias, "mlp": "geglu", "norm_placement": "sandwich", "norm_weight": "zero_centred",
        "norm_cast": "after", "embed_scale": (values["d_model"] or 1)**0.5, "attn_scale": (scale or 1)**-0.5,
        "attn_softcap": keys.need("attn_logit_softcapping", null=0.0),
        "logit_softcap": keys.need("final_logit_softcapping", null=0.0), "window": keys.need("sliding_window", null=0)}


def _common_keys(model: DecoderConfig) -> Values:
    scale = model.head_size**-0.5 if model.attn_scale is None else model.attn_scale
    return common_keys(model, _ACTIVATION, key="hidden_activation") | {
        "head_dim": model.head_size, "attention_bias": model.qkv_bias, "query_pre_attn_scalar": round(scale**-2),
        "attn_logit_softcapping": model.attn_softcap or None, "final_logit_softcapping": model.logit_softcap or None,
        "sliding_window": model.window or None,
        "layer_types": ["sliding_attention" if window else "full_attention" for window in model.windows]}


def _read2(keys: Keys) -> Values:
    types = keys.may("layer_types", None)  # files of before it have the pattern that Gemma 2 always had
    return _common(keys) | {"rope": keys.rope(), "window_pattern": layer_flags(keys, types) if types else [True, False]}


def _read3(keys: Keys) -> Values:
    keys.only("attn_logit_softcapping", None, why="is kept by transformers' Gemma 3 and caps nothing there")
    values = _common(keys)
    types = keys.may("layer_types", None)
    keys.skip("sliding_window_pattern", "_sliding_window_pattern")
    if types is not None:
        pattern = layer_flags(keys, types)
    else:
        every = keys.need("sliding_window_pattern") or 1
        pattern = [(i + 1) % every != 0 for i in range(every)]
    return values | {
        "qk_norm": "head", "window_pattern": pattern, "rope": keys.rope("full_attention"),
        "local_rope": keys.rope("sliding_attention", theta_key="rope_local_base_freq", scaling_key=None)}


def _write3(model: DecoderConfig) -> Values:
    local = model.local_rope or model.rope
    return _common_keys(model) | {"rope_local_base_freq": rope_as_written(local)[0]}


GEMMA2 = Family("gemma2", "Gemma2ForCausalLM", _read2, _common_keys, norms=_NORMS)
GEMMA3 = Family("gemma3_text", "Gemma3ForCausalLM", _read3, _write3, norms=_NORMS)
