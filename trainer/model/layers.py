"""The layers of the transformer. They declare parameters; `init.InitSource` holds the first values.

Mixed precision needs no wrapper: each weight is cast to the dtype of the activations at its use. With fp32
master weights under one process or DDP this computes exactly what FSDP2 does whose policy hands the weights
over in bf16 (there the cast is nothing), and gradients come back to the masters in fp32.
Shapes: B rows, T tokens, D model width, V vocabulary.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from officina.kernels.activations import geglu, swiglu, xielu
from officina.kernels.cross_entropy import cross_entropy
from officina.kernels.linear_cross_entropy import linear_cross_entropy, linear_token_scores
from officina.kernels.rms_norm import add_rms_norm, rms_norm
from officina.trainer.config import DecoderConfig
from officina.trainer.model.nf4 import packed_linear
from officina.trainer.model.rope import at_least_fp32
from officina.trainer.model.shapes import nf4_row_bytes

_CHUNK_LOGITS = 2**25
"""Logits held at a time where each label's loss is wanted; they are computed again for the gradient."""


class Linear(nn.Module):
    """y = x W^T + b in the dtype of x."""

    def __init__(self, n_in: int, n_out: int, bias: bool = False) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(n_out, n_in))
        self.bias = nn.Parameter(torch.empty(n_out)) if bias else None

    def hold_packed(self, pairs: Tensor) -> None:
        """Hold the weight, which is never trained, in 4 bits: see nf4.py. pairs: one tensor for all layers."""
        n_out, n_in = self.weight.shape
        packed = torch.empty(n_out, nf4_row_bytes(n_in), dtype=torch.uint8, device=self.weight.device)
        self.weight = nn.Parameter(packed, requires_grad=False)
        self.register_buffer("pairs", pairs, persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        bias = None if self.bias is None else self.bias.to(x.dtype)
        if self.weight.dtype == torch.uint8:
            return packed_linear(x, self.weight, self.pairs, bias)
        return F.linear(x, self.weight.to(x.dtype), bias)


class RMSNorm(nn.Module):
    """x / rms(x), scaled by w or 1 + w; fp32 inside. Zhang & Sennrich, arXiv:1910.07467."""

    def __init__(self, width: int, config: DecoderConfig) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(width))
        self.options = {"eps": config.norm_eps, "zero_centred": config.norm_weight == "zero_centred",
                        "cast_first": config.norm_cast == "before", "impl": config.kernels}
        """Those of `kernels.rms_norm`."""

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor | tuple[Tensor, Tensor]:
        """The norm of x; with a residual the norm of their sum, and the sum, in one pass over memory."""
        if residual is None:
            return rms_norm(x, self.weight, **self.options)
        return add_rms_norm(x, residual, self.weight, **self.options)


class MLP(nn.Module):
    """down(silu(gate) up), down(gelu(gate) up), or down(xielu(up)) with two learned numbers a layer."""

    def __init__(self, config: DecoderConfig) -> None:
        super().__init__()
        self.kind, self.impl = config.mlp, config.kernels
        if self.kind == "xielu":
            self.alpha_p = nn.Parameter(torch.empty(1))
            self.alpha_n = nn.Parameter(torch.empty(1))
        else:
            self.gate = Linear(config.d_model, config.d_ff, config.mlp_bias)
        self.up = Linear(config.d_model, config.d_ff, config.mlp_bias)
        self.down = Linear(config.d_ff, config.d_model, config.mlp_bias)

    def forward(self, x_BTD: Tensor) -> Tensor:
        if self.kind == "xielu":
            return self.down(xielu(self.up(x_BTD), self.alpha_p, self.alpha_n, impl=self.impl))
        activation = swiglu if self.kind == "swiglu" else geglu
        return self.down(activation(self.gate(x_BTD), self.up(x_BTD), impl=self.impl))


class Vocabulary(nn.Module):
    """The (V, D) matrix between tokens and vectors, at either end of the model, or at both when tied.

    All uses are forward calls of the module that owns the weight, so that sharding engines, which gather
    weights around a module's forward, need not know about tying.
    """

    def __init__(self, config: DecoderConfig) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(config.vocab_size, config.d_model))
        self.softcap, self.impl = config.logit_softcap, config.kernels

    def forward(self, x: Tensor, use: str, labels_BT: Tensor | None = None, z_loss: float = 0.0) -> Tensor:
        """`embed`: (B, T) -> (B, T, D). `logits`: (B, T, D) -> (B, T, V) fp32. `loss`: -> 0-dim fp32 sum, or with
        z_loss (2,), see `linear_cross_entropy`.
        `scores`: -> (2, B, T) fp32, see `linear_token_scores`; with gradient, which computes the logits once more."""
        if use == "embed":
            return F.embedding(x, self.weight)
        weight = self.weight.to(x.dtype)
        if use == "loss":
            return linear_cross_entropy(x.flatten(0, -2), weight, labels_BT.flatten(), z_loss=z_loss, softcap=self.softcap,
                                        split=z_loss > 0, impl=self.impl)
        if use == "scores":
            labels_N = labels_BT.flatten()
            if not torch.is_grad_enabled():
                return linear_token_scores(x.flatten(0, -2), weight, labels_N, softcap=self.softcap,
                                           impl=self.impl).unflatten(1, labels_BT.shape)
            chunk = max(1, _CHUNK_LOGITS // weight.shape[0])
            parts = [checkpoint(self._scores, x_c, weight, labels_c, use_reentrant=False) for x_c, labels_c in zip(
                x.flatten(0, -2).split(chunk), labels_N.split(chunk), strict=True)]
            return torch.cat(parts, dim=1).unflatten(1, labels_BT.shape)
        return self._logits(x, weight)

    def _scores(self, x_ND: Tensor, weight: Tensor, labels_N: Tensor) -> Tensor:
        logits = F.linear(x_ND, weight)
        losses_N = cross_entropy(logits, labels_N, softcap=self.softcap, impl=self.impl)
        return torch.stack((losses_N, (logits.detach().argmax(-1) == labels_N).to(losses_N.dtype)))

    def _logits(self, x: Tensor, weight: Tensor) -> Tensor:
        logits = at_least_fp32(F.linear(x, weight))
        return self.softcap * torch.tanh(logits / self.softcap) if self.softcap else logits
