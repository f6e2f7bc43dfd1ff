"""Initial weights: a pure function of (seed, tensor name, element), so a rank makes only what it holds.

A tensor's elements are cut, in row-major order, into blocks of 2**18; each block has its own random stream, keyed by the seed,
the tensor's name and the block's number. Whatever range a rank asks for, under whatever sharding, it gets the same values.
numpy's SFC64 and its ziggurat normals use whole-number arithmetic: the same values on every kind of CPU.
"""

import hashlib
import math
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from officina.kernels.activations import XIELU_BETA
from officina.trainer.config import DecoderConfig
from officina.trainer.state import PARAM

BLOCK = 2**18
"""Elements of one random stream. Part of the definition of the initial weights: never change it."""

XIELU_ALPHA_P = math.log(math.expm1(0.8))
XIELU_ALPHA_N = math.log(math.expm1(0.8 - XIELU_BETA))
"""Both slopes begin at 0.8 after the softplus (arXiv:2411.13010, section 3)."""


@dataclass(frozen=True, slots=True)
class Fill:
    """How one tensor begins: normal with this standard deviation around `mean`; std 0 = constant."""

    numel: int
    mean: float
    std: float


class FillSource:
    """A `state.Source` of first weights, each by its fill."""

    def __init__(self, fills: Mapping[str, Fill], seed: int) -> None:
        self.fills, self.seed = fills, seed

    def read(self, name: str, slot: str, start: int, stop: int) -> Tensor:
        """Elements [start, stop) as fp32. Raises KeyError for anything but a parameter that has a fill."""
        if slot != PARAM:
            raise KeyError(f"initial weights have no slot {slot!r} (asked for {name})")
        fill = self.fills[name]
        if not 0 <= start <= stop <= fill.numel:
            raise IndexError(f"{name} has {fill.numel} elements; [{start}, {stop}) is outside")
        if not fill.std:
            return torch.full((stop - start,), fill.mean)
        values = np.empty(stop - start, dtype=np.float32)
        # numpy lets go of the interpreter's lock while it draws: one block per thread that torch may use.
        with ThreadPoolExecutor(torch.get_num_threads()) as threads:
            list(threads.map(lambda block: _draw(self.seed, name, block, start, stop, values),
                             range(start // BLOCK, -(-stop // BLOCK))))
        return torch.from_numpy(values).mul_(fill.std).add_(fill.mean)


class InitSource(FillSource):
    """A `state.Source` of the transformer's first weights."""

    def __init__(self, module: nn.Module, config: DecoderConfig, seed: int) -> None:
        super().__init__({name: fill_of(name, p.numel(), config) for name, p in module.named_parameters()}, seed)


class ValuesSource:
    """A `state.Source` of named values in memory: the first weights and buffers of a user's own module."""

    def __init__(self, values: Mapping[str, Tensor]) -> None:
        self.values = values

    def read(self, name: str, slot: str, start: int, stop: int) -> Tensor:
        """Elements [start, stop), fp32 or a buffer's own dtype. KeyError for an unknown name."""
        if slot != PARAM:
            raise KeyError(f"initial weights have no slot {slot!r} (asked for {name})")
        return self.values[name].reshape(-1)[start:stop]


def fill_of(name: str, numel: int, config: DecoderConfig) -> Fill:
    """Where the parameter `name` of the transformer begins; KeyError for a name that has no rule."""
    owner, _, kind = name.rpartition(".")
    layer = owner.rpartition(".")[2]
    if kind == "alpha_p":
        return Fill(numel, XIELU_ALPHA_P, 0.0)
    if kind == "alpha_n":
        return Fill(numel, XIELU_ALPHA_N, 0.0)
    if kind == "bias":
        return Fill(numel, 0.0, 0.0)
    if layer.endswith("norm"):
        return Fill(numel, 0.0 if config.norm_weight == "zero_centred" else 1.0, 0.0)
    if layer in ("o", "down"):
        # 2 n_layers of them add to the residual stream, whose variance shall not grow with depth (GPT-2).
        return Fill(numel, 0.0, config.init_std / math.sqrt(2 * config.n_layers))
    if layer in ("embed", "head", "q", "k", "v", "gate", "up"):
        return Fill(numel, 0.0, config.init_std)
    raise KeyError(f"no initial value is defined for parameter {name}")


def _draw(seed: int, name: str, block: int, start: int, stop: int, into: np.ndarray) -> None:
    """Write what [start, stop) has in common with the block into `into`, whose first element is `start`."""
    key = hashlib.blake2b(f"{seed}/{name}/{block}".encode(), digest_size=16).digest()
    stream = np.random.Generator(np.random.SFC64(int.from_bytes(key, "little")))
    first, last = max(start, block * BLOCK), min(stop, (block + 1) * BLOCK)
    # The ziggurat takes a varying number of draws a value: a block is always made from its beginning.
    values = stream.standard_normal(last - block * BLOCK, dtype=np.float32)
    into[first - start:last - start] = values[first - block * BLOCK:]
