"""Mistral: Llama without biases, with a sliding window in all layers or in none (Minerva)."""

from officina.trainer.config import DecoderConfig
from officina.trainer.hf.family import Family, common, common_keys
from officina.trainer.hf.keys import Keys, Values


def _read(keys: Keys) -> Values:
    return common(keys, "silu") | {"rope": keys.rope(), "window": keys.need("sliding_window", null=0)}


def _write(model: DecoderConfig) -> Values:
    return common_keys(model, "silu") | {"head_dim": model.head_size, "sliding_window": model.window or None}


MISTRAL = Family("mistral", "MistralForCausalLM", _read, _write)
