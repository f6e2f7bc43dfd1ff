"""SmolLM3: Llama with layers that have no position embedding (NoPE), tied embeddings."""

from officina.trainer.config import DecoderConfig
from officina.trainer.hf.family import Family, common, common_keys, layer_flags
from officina.trainer.hf.keys import Keys, Values


def _read(keys: Keys) -> Values:
    keys.only("pretraining_tp", 1, None, 2, why="splits the matrix products, which officina does not imitate")
    keys.skip("max_window_layers")  # in the published file, and read by no code of the family
    values = common(keys, "silu")
    bias, n_layers = keys.may("attention_bias", False), values["n_layers"] or 0
    interval, ropes = keys.may("no_rope_layer_interval", None), keys.may("no_rope_layers", None)
    if ropes is None and interval:
        ropes = [(i + 1) % interval != 0 for i in range(n_layers)]
    elif ropes is None:
        ropes = keys.need("no_rope_layers") or []
    used, window = keys.need("use_sliding_window"), keys.may("sliding_window", 0)
    types = keys.may("layer_types", None)
    if types is not None:
        flags = layer_flags(keys, types)
    else:
        flags = [bool(used and window) and not rope for rope in ropes]
    windows = {"window": window, "window_pattern": flags} if any(flags) else {}
    return values | windows | {"rope": keys.rope(), "rope_pattern": [bool(rope) for rope in ropes] or [True],
                               "qkv_bias": bias, "o_bias": bias, "mlp_bias": keys.may("mlp_bias", False)}


def _write(model: DecoderConfig) -> Values:
    return common_keys(model, "silu") | {
        "attention_bias": model.qkv_bias, "mlp_bias": model.mlp_bias,
        "no_rope_layers": [int(rope) for rope in model.roped],
        "use_sliding_window": any(model.windows), "sliding_window": model.window or None,
        "layer_types": ["sliding_attention" if w else "full_attention" for w in model.windows]}


SMOLLM3 = Family("smollm3", "SmolLM3ForCausalLM", _read, _write)
