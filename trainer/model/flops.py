"""Parameters and floating-point operations of the transformer, by arithmetic on its configuration; no torch.

Counted are matrix products (2 m n k each), forward and backward; norms, activations and the softmax are left out, as every
published MFU does. Attention is counted in both conventions: `causal` counts the pairs of query and key that the mask lets
through, full counts every pair (6 P + 12 L D T, PaLM's appendix B, arXiv:2204.02311). Recomputation is never counted.
"""

import math
from dataclasses import dataclass

from officina.trainer.config import AdapterConfig, DecoderConfig, LoraConfig, NoAdapterConfig
from officina.trainer.model.shapes import parameter_shapes
from officina.trainer.model.targets import choose, linear_layers

_NONE = NoAdapterConfig()


@dataclass(frozen=True, slots=True)
class ParameterCounts:
    """Parameters of the model; a tied head counts once, as embedding."""

    total: int
    embedding: int
    head: int
    non_embedding: int
    """All but embedding and head."""


def parameter_count(config: DecoderConfig) -> ParameterCounts:
    """Exact number of parameters."""
    counts = {name: math.prod(shape) for name, shape in parameter_shapes(config).items()}
    total, embedding, head = sum(counts.values()), counts["embed.weight"], counts.get("head.weight", 0)
    return ParameterCounts(total, embedding, head, total - embedding - head)


def flops_per_token(config: DecoderConfig, seq_len: int, *, causal: bool, adapter: AdapterConfig = _NONE) -> float:
    """Training FLOPs (3 x forward) per token, mean over a row of seq_len tokens.

    causal: count the query-key pairs that the mask lets through; else min(seq_len, window) keys a query. adapter: with LoRA a
    frozen matrix has no gradient of its own, so it costs 2 x forward (about 4 P + 2 P_trained); the inputs of the first block,
    whose gradient nobody needs, are counted with the rest.
    """
    matmuls = 2 * (sum(map(math.prod, linear_layers(config).values())) + config.vocab_size * config.d_model)
    saved = 0
    if isinstance(adapter, LoraConfig):
        chosen = choose(config, adapter)
        head = "embed.weight" if config.tie_embeddings else "head.weight"
        frozen = {name: shape for name, shape in parameter_shapes(config).items()
                  if name not in chosen.whole and (name == head or (name.startswith("blocks.") and len(shape) == 2))}
        saved = 2 * sum(map(math.prod, frozen.values()))
        matmuls += 2 * sum(map(math.prod, chosen.adapter_shapes(adapter.rank).values()))
    keys = sum(mean_keys(seq_len, window, causal=causal) for window in config.windows)
    attention = 4 * config.n_heads * config.head_size * keys
    return 3 * (matmuls + attention) - saved


def mean_keys(seq_len: int, window: int, *, causal: bool) -> float:
    """Keys per query, mean over a row of seq_len tokens; window 0 = none."""
    window = min(window, seq_len) if window else seq_len
    if not causal:
        return float(window)
    growing = window * (window + 1) // 2  # the first `window` queries see 1, 2, ... keys
    return (growing + (seq_len - window) * window) / seq_len
