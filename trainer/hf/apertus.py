"""Apertus: ungated xIELU, QK-norm per head, norms with names of their own."""

from officina.trainer.config import DecoderConfig
from officina.trainer.hf.family import Family, common, common_keys
from officina.trainer.hf.keys import Keys, Values


def _read(keys: Keys) -> Values:
    keys.only("mlp_bias", None, False, why="is true, and Apertus has no biases in the MLP")
    # Published files carry keys of the trainer; these are the values that the model's code assumes.
    keys.only("post_norm", None, False, why="places the norms elsewhere")
    keys.only("qk_norm", None, True, why="is off, and Apertus has QK-norm")
    if "rope_parameters" not in keys.raw and keys.raw.get("rope_scaling") is None:
        keys.refuse("rope_scaling", "null", "is read as no scaling by transformers 4 and as llama3's by transformers 5",
                    "\"rope_scaling\": {\"rope_type\": \"default\"}, or the model's own")
    bias = keys.may("attention_bias", False)
    return common(keys, "xielu") | {"rope": keys.rope(), "mlp": "xielu", "qk_norm": "head", "qkv_bias": bias, "o_bias": bias}


def _write(model: DecoderConfig) -> Values:
    values = common_keys(model, "xielu")
    return values | {"attention_bias": model.qkv_bias, "rope_scaling": values["rope_scaling"] or {"rope_type": "default"}}


APERTUS = Family("apertus", "ApertusForCausalLM", _read, _write,
                 norms={"attn_norm": "attention_layernorm", "mlp_norm": "feedforward_layernorm"},
                 constants={"mlp.act_fn.beta": 0.5, "mlp.act_fn.eps": -1e-6})
