"""Llama and what is built like it: EuroLLM, Teuken, Viking, Salamandra, Lucie, Poro 2."""

from officina.trainer.config import DecoderConfig
from officina.trainer.hf.family import Family, common, common_keys
from officina.trainer.hf.keys import Keys, Values


def _read(keys: Keys) -> Values:
    keys.only("pretraining_tp", 1, None, why="splits the matrix products, which officina does not imitate")
    values = common(keys, "silu")
    bias = keys.may("attention_bias", False)
    # Viking's files carry a key of the trainer that made them.
    untied = keys.may("untie_embeddings_and_output_weights", None)
    if untied is not None and untied == values.get("tie_embeddings", not untied):
        keys.refuse("untie_embeddings_and_output_weights", untied, "contradicts tie_word_embeddings", "remove one of them")
    return values | {"rope": keys.rope(), "qkv_bias": bias, "o_bias": bias, "mlp_bias": keys.may("mlp_bias", False)}


def _write(model: DecoderConfig) -> Values:
    return common_keys(model, "silu") | {"head_dim": model.head_size, "attention_bias": model.qkv_bias,
                                         "mlp_bias": model.mlp_bias, "pretraining_tp": 1}


LLAMA = Family("llama", "LlamaForCausalLM", _read, _write)
