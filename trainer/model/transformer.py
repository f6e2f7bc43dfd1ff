"""The decoder-only transformer: one module, switched by `DecoderConfig`, that knows no devices and no ranks.

It may be built under `torch.device("meta")`; nothing but the parameters has to be filled afterwards.
Shapes: B rows, T tokens, D model width, H query heads, K head width, V vocabulary.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from officina.kernels.attention import AttentionPlan, attention, plan_attention
from officina.kernels.rope import rope
from officina.trainer.config import DecoderConfig, RopeConfig
from officina.trainer.model.cache import KVCache, LayerCache
from officina.trainer.model.layers import MLP, Linear, RMSNorm, Vocabulary
from officina.trainer.model.rope import rope_frequencies, rope_tables


@dataclass(frozen=True, slots=True)
class Shared:
    """What all blocks of one forward share; an object because FSDP2 would cast tensor arguments to bf16."""

    ropes: tuple[tuple[Tensor, Tensor], ...]
    """cos and sin of `rope` and of `local_rope`."""
    plans: Mapping[int, AttentionPlan]
    """Attention plan of each window in use."""


class Attention(nn.Module):
    """Grouped-query attention of one layer; `rope` and `window` are the layer's own."""

    def __init__(self, config: DecoderConfig, layer: int) -> None:
        super().__init__()
        heads, kv_heads, head = config.n_heads, config.kv_heads, config.head_size
        self.head_size = head
        own_rope = rope_of_layer(config, layer)
        self.rope = None if own_rope is None else _ropes(config).index(own_rope)
        self.window = config.windows[layer]
        self.scale = head**-0.5 if config.attn_scale is None else config.attn_scale
        self.softcap = config.attn_softcap
        self.qk_norm, self.impl = config.qk_norm, config.kernels
        self.q = Linear(config.d_model, heads * head, config.qkv_bias)
        self.k = Linear(config.d_model, kv_heads * head, config.qkv_bias)
        self.v = Linear(config.d_model, kv_heads * head, config.qkv_bias)
        self.o = Linear(heads * head, config.d_model, config.o_bias)
        if self.qk_norm != "none":
            per_head = self.qk_norm == "head"
            self.q_norm = RMSNorm(head if per_head else heads * head, config)
            self.k_norm = RMSNorm(head if per_head else kv_heads * head, config)

    def forward(self, x_BTD: Tensor, shared: Shared, cache: LayerCache | None) -> Tensor:
        q, k, v = self.q(x_BTD), self.k(x_BTD), self.v(x_BTD)
        if self.qk_norm == "full":
            q, k = self.q_norm(q), self.k_norm(k)
        q, k, v = (x.unflatten(-1, (-1, self.head_size)) for x in (q, k, v))
        if self.qk_norm == "head" and self.rope is None:
            q, k = self.q_norm(q), self.k_norm(k)
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        if self.rope is not None:
            options = {"impl": self.impl}
            if self.qk_norm == "head":  # in one launch; ZeRO-3 gathers another module's weight where it is asked for
                options = self.q_norm.options | {"q_weight_K": self.q_norm.weight, "k_weight_K": self.k_norm.weight}
            q, k = rope(q, k, *shared.ropes[self.rope], **options)
        if cache is not None:
            k, v = cache.append(k, v)
        out_BHTK = attention(q, k, v, scale=self.scale, window=self.window, softcap=self.softcap,
                             plan=shared.plans[self.window])
        return self.o(out_BHTK.transpose(1, 2).flatten(-2))


class Block(nn.Module):
    """Attention and MLP, each added to the residual stream, with norms where `norm_placement` puts them."""

    def __init__(self, config: DecoderConfig, layer: int) -> None:
        super().__init__()
        self.before = config.norm_placement in ("pre", "sandwich")
        self.after = config.norm_placement in ("post", "sandwich")
        self.attn = Attention(config, layer)
        self.mlp = MLP(config)
        if self.before:
            self.attn_norm = RMSNorm(config.d_model, config)
            self.mlp_norm = RMSNorm(config.d_model, config)
        if self.after:
            self.attn_post_norm = RMSNorm(config.d_model, config)
            self.mlp_post_norm = RMSNorm(config.d_model, config)

    def forward(self, x_BTD: Tensor, *, shared: Shared, cache: LayerCache | None = None) -> Tensor:
        h = self.attn(self.attn_norm(x_BTD) if self.before else x_BTD, shared, cache)
        if self.before and not self.after:
            h, x_BTD = self.mlp_norm(h, x_BTD)
            return x_BTD + self.mlp(h)
        x_BTD = x_BTD + (self.attn_post_norm(h) if self.after else h)
        h = self.mlp(self.mlp_norm(x_BTD) if self.before else x_BTD)
        return x_BTD + (self.mlp_post_norm(h) if self.after else h)


class Transformer(nn.Module):
    """Decoder-only language model; `blocks` is the unit of sharding, recomputation and compilation."""

    def __init__(self, config: DecoderConfig) -> None:
        """Raises ValueError where heads do not divide."""
        super().__init__()
        if config.n_heads % config.kv_heads:
            raise ValueError(f"model.n_heads={config.n_heads} is not a multiple of model.n_kv_heads={config.kv_heads}")
        if not config.head_dim and config.d_model % config.n_heads:
            raise ValueError(f"model.d_model={config.d_model} is not a multiple of "
                             f"model.n_heads={config.n_heads}; set model.head_dim")
        if config.head_size % 2 and any(rope_of_layer(config, i) for i in range(config.n_layers)):
            raise ValueError(f"model.head_dim={config.head_size} is odd; RoPE turns pairs")
        self.config = config
        self.compute_dtype: torch.dtype | None = None
        """Dtype of the activations, set by the engine; None = that of the parameters."""
        self.embed = Vocabulary(config)
        self.blocks = nn.ModuleList(Block(config, layer) for layer in range(config.n_layers))
        self.norm = RMSNorm(config.d_model, config)
        self.head = None if config.tie_embeddings else Vocabulary(config)
        self._windows = set(config.windows)
        self._frequencies: dict[tuple[RopeConfig, torch.device], Tensor] = {}

    def forward(self, tokens_BT: Tensor, *, labels_BT: Tensor | None = None, documents_BT: Tensor | None = None,
                positions_BT: Tensor | None = None, z_loss: float = 0.0, cache: KVCache | None = None,
                scores: bool = False) -> Tensor:
        """Logits (B, T, V), or with labels the sum of the losses of all labels but IGNORE, 0-dim; fp32.

        Args:
            documents_BT: a number per document; attention stays within it. None: each row is one document.
            positions_BT: place of each token for RoPE; None: counted from the beginning of the row or cache.
            z_loss: weight of the squared log-partition function in the loss; the result then is (2,): that sum, and the z-loss
                in it, which has no gradient.
            scores: with labels, the loss of each and whether it is the most likely token: (2, B, T) instead of the sum.
            cache: keys and values of the tokens before these; these are added to it. Not with documents.
        """
        if cache is not None and documents_BT is not None:
            raise ValueError("a cache holds one document per row: pass documents_BT or cache, not both")
        x_BTD = self.embed(tokens_BT, "embed")
        if self.compute_dtype is not None:
            x_BTD = x_BTD.to(self.compute_dtype)
        if self.config.embed_scale != 1:
            # The factor is rounded to the dtype of the activations, as Gemma's is.
            x_BTD = x_BTD * x_BTD.new_full((), self.config.embed_scale)
        shared = self._share(tokens_BT, documents_BT, positions_BT, cache, x_BTD.dtype)
        for layer, block in enumerate(self.blocks):
            # x is the one positional argument: DeepSpeed and checkpointing watch the positional ones.
            x_BTD = block(x_BTD, shared=shared, cache=None if cache is None else cache.layers[layer])
        if cache is not None:
            cache.length += tokens_BT.shape[1]
        x_BTD = self.norm(x_BTD)
        head = self.embed if self.head is None else self.head
        if labels_BT is None:
            return head(x_BTD, "logits")
        return head(x_BTD, "scores" if scores else "loss", labels_BT, z_loss)

    def new_cache(self) -> KVCache:
        """An empty cache for decoding; layers with a window keep only what it still sees."""
        return KVCache([LayerCache(window) for window in self.config.windows])

    def _share(self, tokens_BT: Tensor, documents_BT: Tensor | None, positions_BT: Tensor | None,
               cache: KVCache | None, dtype: torch.dtype) -> Shared:
        device, T = tokens_BT.device, tokens_BT.shape[1]
        past = 0 if cache is None else cache.length
        if positions_BT is None:
            positions_BT = torch.arange(past, past + T, device=device)[None]
        ropes = tuple(
            rope_tables(self._frequencies_on(rope, device), rope_frequencies(rope, self.config.head_size)[1],
                        positions_BT) for rope in _ropes(self.config))
        plans = {}
        for window in self._windows:
            n_keys = T + (min(past, window - 1) if window else past)
            plans[window] = plan_attention(
                T, n_keys, window=window, softcap=self.config.attn_softcap, documents_BS=documents_BT,
                impl=self.config.attention_impl, device=device, head_dim=self.config.head_size, dtype=dtype)
        return Shared(ropes, plans)

    def _frequencies_on(self, rope: RopeConfig, device: torch.device) -> Tensor:
        if (rope, device) not in self._frequencies:
            numbers, _ = rope_frequencies(rope, self.config.head_size)
            made = torch.tensor(numbers, dtype=torch.float32, device=device)
            if type(made) is not Tensor:  # a fake tensor must not outlive the mode that made it
                return made
            self._frequencies[rope, device] = made
        return self._frequencies[rope, device]


def rope_of_layer(config: DecoderConfig, layer: int) -> RopeConfig | None:
    """RoPE of the layer, None = no position embedding."""
    if not config.roped[layer]:
        return None
    local = config.local_rope if config.windows[layer] else None
    return local or config.rope


def _ropes(config: DecoderConfig) -> list[RopeConfig]:
    return [config.rope] + ([config.local_rope] if config.local_rope else [])
