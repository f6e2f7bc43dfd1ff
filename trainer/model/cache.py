"""Keys and values of past tokens, for decoding one token at a time."""

from dataclasses import dataclass

import torch
from torch import Tensor


class LayerCache:
    """Keys and values of one layer; with a window, of its last `window` - 1 tokens only."""

    def __init__(self, window: int) -> None:
        self.window = window
        self.length = 0
        """Tokens held."""
        self._kv: Tensor | None = None
        """(2, B, G, capacity, K); the first `length` places are filled."""

    def append(self, k_BGTK: Tensor, v_BGTK: Tensor) -> tuple[Tensor, Tensor]:
        """Add new tokens; returns the keys and values they may see, (B, G, S, K) each, their own last."""
        new = torch.stack((k_BGTK, v_BGTK))
        T = new.shape[3]
        if self.window:
            seen = new if self._kv is None else torch.cat((self._kv, new), dim=3)
            kept = min(seen.shape[3], self.window - 1)
            self._kv = seen[:, :, :, seen.shape[3] - kept:]
            self.length = kept
            return seen[0], seen[1]
        if self._kv is None or self.length + T > self._kv.shape[3]:
            # Doubled, so that n tokens cost n log n copies and not n^2.
            grown = new.new_empty(*new.shape[:3], max(2 * self.length, self.length + T, 64), new.shape[4])
            if self._kv is not None:
                grown[:, :, :, :self.length] = self._kv[:, :, :, :self.length]
            self._kv = grown
        self._kv[:, :, :, self.length:self.length + T] = new
        self.length += T
        return self._kv[0, :, :, :self.length], self._kv[1, :, :, :self.length]


@dataclass(slots=True)
class KVCache:
    """The caches of all layers."""

    layers: list[LayerCache]
    length: int = 0
    """Tokens seen so far: the position of the next one."""
