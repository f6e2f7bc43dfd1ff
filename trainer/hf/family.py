"""What a family of models is: which keys of config.json mean which switches, and how its tensors are called. Torch-free."""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace

from officina.trainer.config import DecoderConfig, RopeConfig
from officina.trainer.hf.keys import Keys, Values, rope_as_written

LLAMA_NORMS = {"attn_norm": "input_layernorm", "mlp_norm": "post_attention_layernorm"}
"""Our name of a block's norm -> that of the pre-norm models."""
_LAYER = {"attn.q": "self_attn.q_proj", "attn.k": "self_attn.k_proj", "attn.v": "self_attn.v_proj",
          "attn.o": "self_attn.o_proj", "attn.q_norm": "self_attn.q_norm", "attn.k_norm": "self_attn.k_norm",
          "mlp.gate": "mlp.gate_proj", "mlp.up": "mlp.up_proj", "mlp.down": "mlp.down_proj"}
_ENDS = {"embed": "model.embed_tokens", "norm": "model.norm", "head": "lm_head"}


@dataclass(frozen=True, slots=True)
class Family:
    """One `model_type`. Every family is a small file beside this one."""

    model_type: str
    architecture: str
    read: Callable[[Keys], Values]
    """Values of a DecoderConfig that the keys stand for; faults are left in the keys."""
    write: Callable[[DecoderConfig], Values]
    """The keys besides those of `common_keys`, in transformers 4's form."""
    norms: Mapping[str, str] = field(default_factory=lambda: LLAMA_NORMS)
    constants: Mapping[str, float] = field(default_factory=dict)
    """Tensors of one number in each layer that are no parameters: name below the layer -> value."""

    def their_name(self, ours: str) -> str:
        """The tensor's name in a file; KeyError for a parameter this family does not have."""
        owner, _, leaf = ours.rpartition(".")
        if owner in _ENDS:
            return f"{_ENDS[owner]}.{leaf}"
        _, layer, below = re.fullmatch(r"(blocks)\.(\d+)\.(.+)", owner).groups()
        if below == "mlp" and leaf in ("alpha_p", "alpha_n"):
            return f"model.layers.{layer}.mlp.act_fn.{leaf}"
        return f"model.layers.{layer}.{(_LAYER | dict(self.norms))[below]}.{leaf}"


def common(keys: Keys, activation: str, *, key: str = "hidden_act", head_dim_given: bool = False) -> Values:
    """What every family has. head_dim_given: the class's default is no quotient, so that the file must say it."""
    keys.skip("hidden_size", "num_attention_heads")
    keys.only(key, activation, why=f"is not the activation of this kind of model ({activation})")
    keys.only("attention_dropout", 0, 0.0, None, why="is not 0, and officina's attention has no dropout")
    keys.only("is_decoder", None, True, False, why="is not a decoder")
    width, heads = keys.need("hidden_size"), keys.need("num_attention_heads")
    head_dim = keys.need("head_dim") if head_dim_given else keys.may("head_dim", 0)
    tied = keys.may("tie_word_embeddings", None)
    return {
        "vocab_size": keys.need("vocab_size"), "n_layers": keys.need("num_hidden_layers"), "d_model": width,
        "n_heads": heads, "n_kv_heads": keys.may("num_key_value_heads", heads), "head_dim": head_dim,
        "d_ff": keys.need("intermediate_size"), "norm_eps": keys.need("rms_norm_eps"),
        "init_std": keys.may("initializer_range", 0.02), **({} if tied is None else {"tie_embeddings": tied}),
    }


def common_keys(model: DecoderConfig, activation: str, *, key: str = "hidden_act") -> Values:
    """The inverse of `common`, with RoPE in transformers 4's form."""
    theta, scaling = rope_as_written(model.rope)
    return {
        "vocab_size": model.vocab_size, "hidden_size": model.d_model, "intermediate_size": model.d_ff,
        "num_hidden_layers": model.n_layers, "num_attention_heads": model.n_heads,
        "num_key_value_heads": model.kv_heads, key: activation, "rms_norm_eps": model.norm_eps,
        "initializer_range": model.init_std, "tie_word_embeddings": model.tie_embeddings, "attention_dropout": 0.0,
        "rope_theta": theta, "rope_scaling": scaling,
    } | ({"head_dim": model.head_size} if model.head_size * model.n_heads != model.d_model else {})


def layer_flags(keys: Keys, types: list[str]) -> list[bool]:
    """`layer_types` as flags: is the layer windowed?"""
    known = {"sliding_attention": True, "full_attention": False}
    for kind in sorted(set(types) - known.keys()):
        keys.refuse("layer_types", kind, "is not known to officina", f"a model with {' and '.join(known)} only")
    return [known.get(kind, False) for kind in types]


def canonical(model: DecoderConfig) -> DecoderConfig:
    """The same model in one spelling: derived values written out or left out, patterns over all layers. What only says how
    it is computed or how it began is at its default, so that equal models compare equal."""
    n, default = model.n_layers, DecoderConfig()
    windowed, ropes = [bool(window) for window in model.windows], model.roped
    local = model.local_rope if any(windowed) and model.local_rope else None
    return replace(
        model, n_kv_heads=model.kv_heads, head_dim=model.head_size, window=model.window if any(windowed) else 0,
        window_pattern=windowed if any(windowed) else [True] * n, rope_pattern=ropes, rope=_canonical_rope(model.rope),
        local_rope=None if local is None or local == model.rope else _canonical_rope(local),
        attn_scale=None if model.attn_scale == model.head_size**-0.5 else model.attn_scale,
        attention_impl=default.attention_impl, kernels=default.kernels, init_std=default.init_std)


def _canonical_rope(rope: RopeConfig) -> RopeConfig:
    used = {"none": (), "linear": ("factor",),
            "llama3": ("factor", "original_seq_len", "low_freq_factor", "high_freq_factor"),
            "yarn": ("factor", "original_seq_len", "beta_fast", "beta_slow", "attention_factor")}[rope.scaling]
    return RopeConfig(theta=rope.theta, scaling=rope.scaling, **{name: getattr(rope, name) for name in used})
