"""Names and shapes of the transformer's parameters, by arithmetic on its configuration; no torch.

A login node so knows which layers there are; a test compares with the module for random combinations of switches.
"""

from officina.trainer.config import DecoderConfig

NF4_BLOCK = 64
"""Weights that share a magnitude where they are held in 4 bits: see nf4.py."""


def nf4_row_bytes(n_in: int) -> int:
    """Bytes of a row of n_in weights in 4 bits: half a byte for each, and 4 for each block."""
    return n_in // 2 + n_in // NF4_BLOCK * 4


def parameter_shapes(config: DecoderConfig) -> dict[str, tuple[int, ...]]:
    """Name -> shape of every parameter; a tied head has none of its own."""
    d, vocabulary = config.d_model, (config.vocab_size, config.d_model)
    shapes: dict[str, tuple[int, ...]] = {"embed.weight": vocabulary}
    for layer in range(config.n_layers):
        shapes |= {f"blocks.{layer}.{name}": shape for name, shape in _block(config).items()}
    shapes["norm.weight"] = (d,)
    return shapes if config.tie_embeddings else shapes | {"head.weight": vocabulary}


def _block(config: DecoderConfig) -> dict[str, tuple[int, ...]]:
    d, ff, head = config.d_model, config.d_ff, config.head_size
    q, kv, gated = config.n_heads * head, config.kv_heads * head, config.mlp != "xielu"
    shapes: dict[str, tuple[int, ...]] = {}

    def add(name: str, n_in: int, n_out: int, bias: bool) -> None:
        shapes[f"{name}.weight"] = (n_out, n_in)
        if bias:
            shapes[f"{name}.bias"] = (n_out,)

    for name, n_in, n_out, bias in (("q", d, q, config.qkv_bias), ("k", d, kv, config.qkv_bias), ("v", d, kv, config.qkv_bias),
                                    ("o", q, d, config.o_bias)):
        add(f"attn.{name}", n_in, n_out, bias)
    if config.qk_norm != "none":
        shapes["attn.q_norm.weight"] = (head if config.qk_norm == "head" else q,)
        shapes["attn.k_norm.weight"] = (head if config.qk_norm == "head" else kv,)
    if gated:
        add("mlp.gate", d, ff, config.mlp_bias)
    else:
        shapes |= {"mlp.alpha_p": (1,), "mlp.alpha_n": (1,)}
    add("mlp.up", d, ff, config.mlp_bias)
    add("mlp.down", ff, d, config.mlp_bias)
    norms = (("attn_norm", "mlp_norm") if config.norm_placement != "post" else ()) + (
        ("attn_post_norm", "mlp_post_norm") if config.norm_placement != "pre" else ())
    return shapes | {f"{norm}.weight": (d,) for norm in norms}
