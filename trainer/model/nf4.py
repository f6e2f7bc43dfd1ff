"""Frozen weights in 4 bits: NormalFloat 4 in blocks of 64 along a row, each with its largest magnitude (arXiv:2305.14314).

A matrix (n_out, n_in) is held as one tensor of bytes (n_out, n_in * 9 / 16): in each row the codes, two a byte with the
first in the high half, then the magnitude of every block in fp32. So a row stands alone, and engines that shard rows or
flat ranges need to know nothing of it. Codes and magnitudes are those of bitsandbytes' `quantize_4bit` without double
quantisation.
"""

from collections.abc import Collection, Mapping

import torch
import torch.nn.functional as F
from torch import Tensor

from officina.trainer.errors import OfficinaError
from officina.trainer.model.shapes import NF4_BLOCK, nf4_row_bytes
from officina.trainer.state import PARAM, Source

LEVELS = (-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
          -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
          0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0)
"""The sixteen values, as shares of the block's largest magnitude (appendix E of the source)."""
_PART = 1 << 22
"""Elements packed or unpacked at a time where they are read."""


def pairs() -> Tensor:
    """(256, 2) fp32: the two values that a byte of codes stands for."""
    levels = torch.tensor(LEVELS, device="cpu")
    return torch.cartesian_prod(levels, levels)


def pack(weight: Tensor) -> Tensor:
    """(rows, n_in) fp32 -> (rows, bytes) uint8; n_in a multiple of 64. OfficinaError for numbers that are not finite."""
    rows, n_in = weight.shape
    blocks = weight.float().reshape(rows, n_in // NF4_BLOCK, NF4_BLOCK)
    largest = blocks.abs().amax(-1)
    if not torch.isfinite(largest).all():
        raise OfficinaError("the weights hold numbers that are not finite, which adapter.base=nf4 cannot hold. "
                            "Try: adapter.base=full, which shows what they do")
    levels = torch.tensor(LEVELS, device=weight.device)
    borders = (levels[1:] + levels[:-1]) / 2
    # Product with the inverse, not the quotient: the last bit decides at a border, and it is so that bitsandbytes rounds.
    shares = blocks * (1 / largest.clamp(min=1e-38)).unsqueeze(-1)
    codes = torch.bucketize(shares, borders, out_int32=True).to(torch.uint8).view(rows, n_in)
    return torch.cat([codes[:, ::2] << 4 | codes[:, 1::2], largest.view(torch.uint8)], dim=1)


def unpack(packed: Tensor, pairs: Tensor, dtype: torch.dtype) -> Tensor:
    """(rows, bytes) uint8 -> (rows, n_in) in `dtype`, the product in fp32. pairs: `pairs()` on the same device."""
    rows, n_in = packed.shape[0], packed.shape[1] * 16 // 9
    values = F.embedding(packed[:, :n_in // 2].int(), pairs).view(rows, -1, NF4_BLOCK)
    largest = packed[:, n_in // 2:].contiguous().view(torch.float32)
    return values.mul_(largest.unsqueeze(-1)).view(rows, n_in).to(dtype)


class _Product(torch.autograd.Function):
    """x W^T + b; only the packed weight is kept, and it is unpacked again for the gradient of x."""

    @staticmethod
    def forward(ctx, x: Tensor, packed: Tensor, pairs: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(packed, pairs)
        return F.linear(x, unpack(packed, pairs, x.dtype), bias)

    @staticmethod
    def backward(ctx, dy: Tensor) -> tuple[Tensor | None, ...]:
        packed, pairs = ctx.saved_tensors
        return dy @ unpack(packed, pairs, dy.dtype), None, None, None


def packed_linear(x: Tensor, packed: Tensor, pairs: Tensor, bias: Tensor | None) -> Tensor:
    """x W^T + b in the dtype of x, of a weight and a bias that are not trained."""
    return _Product.apply(x, packed, pairs, bias)


# ---- values --------------------------------------------------------------------------------------------------------
class PackedSource:
    """A `state.Source` in which the named matrices are packed: elements are bytes of the packed tensor."""

    def __init__(self, source: Source, packed: Mapping[str, tuple[int, int]]) -> None:
        """packed: name -> (n_out, n_in)."""
        self._source, self._packed = source, packed

    def read(self, name: str, slot: str, start: int, stop: int) -> Tensor:
        if name not in self._packed or slot != PARAM:
            return self._source.read(name, slot, start, stop)
        n_in = self._packed[name][1]
        row_bytes = nf4_row_bytes(n_in)
        first, last, step = start // row_bytes, -(-stop // row_bytes), max(1, _PART // n_in)
        parts = [pack(self._source.read(name, PARAM, row * n_in, min(last, row + step) * n_in).view(-1, n_in)).flatten()
                 for row in range(first, last, step)]
        return torch.cat(parts or [torch.empty(0, dtype=torch.uint8)])[start - first * row_bytes:stop - first * row_bytes]


class RoundedSource:
    """A `state.Source` in which the named matrices have the values that they have when packed, in fp32."""

    def __init__(self, source: Source, packed: Collection[str]) -> None:
        self._source, self._packed, self._pairs = source, frozenset(packed), pairs()

    def read(self, name: str, slot: str, start: int, stop: int) -> Tensor:
        if name not in self._packed or slot != PARAM:
            return self._source.read(name, slot, start, stop)
        first, last = start // NF4_BLOCK * NF4_BLOCK, -(-stop // NF4_BLOCK) * NF4_BLOCK  # rows are whole blocks
        parts = [unpack(pack(self._source.read(name, PARAM, at, min(last, at + _PART)).view(-1, NF4_BLOCK)), self._pairs,
                        torch.float32).flatten() for at in range(first, last, _PART)]
        return torch.cat(parts or [torch.empty(0)])[start - first:stop - first]
