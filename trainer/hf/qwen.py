"""Qwen2 and 2.5 (biases on q, k and v), Qwen3 (QK-norm per head, head width of its own)."""

from officina.trainer.config import DecoderConfig
from officina.trainer.hf.family import Family, common, common_keys, layer_flags
from officina.trainer.hf.keys import Keys, Values


def _windows(keys: Keys, n_layers: int | None) -> Values:
    """Layers from `max_window_layers` on have a window, if `use_sliding_window`."""
    used, window = keys.need("use_sliding_window"), keys.may("sliding_window", 0)
    first, types = keys.may("max_window_layers", None), keys.may("layer_types", None)
    if not used or not window or not n_layers:
        if types and any(layer_flags(keys, types)):
            keys.refuse("layer_types", "sliding_attention", "contradicts use_sliding_window=false", "full_attention only")
        return {}
    if types is None and first is None:
        keys.need("max_window_layers")
        return {}
    return {"window": window, "window_pattern": layer_flags(keys, types) if types else [i >= first for i in range(n_layers)]}


def _window_keys(model: DecoderConfig) -> Values:
    pattern = [bool(window) for window in model.windows]
    first = pattern.index(True) if any(pattern) else model.n_layers
    return {"use_sliding_window": any(pattern), "sliding_window": model.window or None, "max_window_layers": first,
            "layer_types": ["sliding_attention" if w else "full_attention" for w in pattern]}


def _read2(keys: Keys) -> Values:
    values = common(keys, "silu")
    return values | {"rope": keys.rope(), "qkv_bias": True, **_windows(keys, values["n_layers"])}


def _write2(model: DecoderConfig) -> Values:
    return common_keys(model, "silu") | _window_keys(model)


def _read3(keys: Keys) -> Values:
    values = common(keys, "silu", head_dim_given=True)
    bias = keys.may("attention_bias", False)
    return values | {"rope": keys.rope(), "qk_norm": "head", "qkv_bias": bias, "o_bias": bias,
                     **_windows(keys, values["n_layers"])}


def _write3(model: DecoderConfig) -> Values:
    return common_keys(model, "silu") | _window_keys(model) | {
        "head_dim": model.head_size, "attention_bias": model.qkv_bias}


QWEN2 = Family("qwen2", "Qwen2ForCausalLM", _read2, _write2)
QWEN3 = Family("qwen3", "Qwen3ForCausalLM", _read3, _write3)
