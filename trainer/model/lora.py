"""Low-rank adapters in the transformer: y = W x + scale B (A x), W frozen. Hu et al., arXiv:2106.09685.

The frozen weights keep their names, so whatever holds the plain model's weights fills the one with adapters too. Single-device
code: engines see parameters with and without a gradient.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from officina.trainer.config import DecoderConfig, LoraConfig
from officina.trainer.model.init import Fill, FillSource
from officina.trainer.model.layers import Linear
from officina.trainer.model.nf4 import pairs
from officina.trainer.model.targets import LORA_A, LORA_B, Chosen, choose
from officina.trainer.state import PARAM, Source

_CACHED = 1 << 16
"""Elements of B A that are computed at a time."""


class LoraLinear(Linear):
    """A linear layer with an adapter, all in the dtype of x."""

    def __init__(self, base: Linear, rank: int, scale: float, dropout: float) -> None:
        nn.Module.__init__(self)
        self.weight, self.bias = base.weight, base.bias
        n_out, n_in = base.weight.shape
        self.lora_a = nn.Parameter(base.weight.new_empty(rank, n_in))
        self.lora_b = nn.Parameter(base.weight.new_empty(n_out, rank))
        self.scale, self.dropout = scale, dropout

    def forward(self, x: Tensor) -> Tensor:
        y = super().forward(x)
        dropped = F.dropout(x, self.dropout, self.training) if self.dropout else x
        h = F.linear(dropped, self.lora_a.to(x.dtype))
        # One pass over y: it is added to while B h is computed.
        return torch.addmm(y.flatten(0, -2), h.flatten(0, -2), self.lora_b.to(x.dtype).t(), alpha=self.scale).view_as(y)


def add_lora(module: nn.Module, model: DecoderConfig, adapter: LoraConfig) -> Chosen:
    """Give the transformer its adapters, in place, and freeze what is not trained. Returns what was chosen."""
    chosen = choose(model, adapter)
    for name in chosen.linears:
        owner, _, leaf = name.rpartition(".")
        parent = module.get_submodule(owner)
        setattr(parent, leaf, LoraLinear(getattr(parent, leaf), adapter.rank, adapter.scale, adapter.dropout))
    frozen, table = set(chosen.frozen), pairs()
    for name in chosen.packed:
        module.get_submodule(name.rpartition(".")[0]).hold_packed(table)
    for name, parameter in module.named_parameters():
        parameter.requires_grad_(name not in frozen)
    return chosen


# ---- values --------------------------------------------------------------------------------------------------------
def adapter_fills(chosen: Chosen, rank: int, seed: int) -> FillSource:
    """First values of the adapters: A normal with the variance of PEFT's uniform draw, 1 / (3 n_in); B zero, so that the
    first step sees the base model."""
    return FillSource({name: Fill(math.prod(shape), 0.0, 1 / math.sqrt(3 * shape[1]) if name.endswith(LORA_A) else 0.0)
                       for name, shape in chosen.adapter_shapes(rank).items()}, seed)


class AdapterSource:
    """A `state.Source`: adapters at their beginning, all else from `base`."""

    def __init__(self, base: Source, adapters: FillSource) -> None:
        self._base, self._adapters = base, adapters

    def read(self, name: str, slot: str, start: int, stop: int) -> Tensor:
        return (self._adapters if name in self._adapters.fills else self._base).read(name, slot, start, stop)


class MergedSource:
    """A `state.Source` of the plain transformer: W + scale B A of a model with adapters, in fp32, some rows at a time.

    The same bits however it is cut and on every processor, since checkpoints name frozen weights by their hash: a matrix
    product would sum in another order by the number of rows and the library.
    """

    def __init__(self, source: Source, model: DecoderConfig, adapter: LoraConfig) -> None:
        self._source, self._rank, self._scale = source, adapter.rank, adapter.scale
        self._linears = {f"{name}.weight": shape for name, shape in choose(model, adapter).linears.items()}

    def read(self, name: str, slot: str, start: int, stop: int) -> Tensor:
        values = self._source.read(name, slot, start, stop)
        if name not in self._linears or slot != PARAM or start == stop:
            return values
        (_, n_in), rank, layer = self._linears[name], self._rank, name.removesuffix(".weight")
        first, last = start // n_in, -(-stop // n_in)
        a = self._source.read(f"{layer}.{LORA_A}", PARAM, 0, rank * n_in).float().view(rank, n_in)
        b = self._source.read(f"{layer}.{LORA_B}", PARAM, first * rank, last * rank).float().view(-1, rank)
        change = torch.cat([_product(part, a) for part in b.split(max(1, _CACHED // n_in))]).mul_(self._scale)
        return values.float() + change.flatten()[start - first * n_in:stop - first * n_in]


def _product(b: Tensor, a: Tensor) -> Tensor:
    """b a, every element summed in the order of the rank: products and sums apart, so that none is fused with another."""
    total, term = torch.zeros(len(b), a.shape[1]), torch.empty(len(b), a.shape[1])
    for column, row in zip(b.unbind(1), a, strict=True):
        total += torch.mul(column[:, None], row, out=term)
    return total
