"""Bring your own model: a transformer that forecasts a day of electricity load from the four days before.

    python examples/time_series.py data/load                # write 2,048 series for training and 256 held out
    PYTHONPATH=examples officina train model=custom \\
        model.factory=time_series:build model.loss=time_series:loss model.decoder=time_series:decode \\
        data.sources.load.path=data/load \\
        batch.seq_len=1 batch.global_tokens=64 batch.micro_rows=32 steps=100 lr_schedule.warmup_steps=10

Shapes: B records, T hours of the past, H hours of the forecast, P patches, D model width.
"""

import sys
from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor, nn

PAST, HORIZON = 96, 24
"""Hours that are seen and hours that are forecast."""


class Forecaster(nn.Module):
    """Patches of six hours, causal attention over them, the forecast from the last one."""

    def __init__(self, d_model: int, n_layers: int, n_heads: int, hours_per_patch: int) -> None:
        super().__init__()
        self.hours_per_patch = hours_per_patch
        n_patches = PAST // hours_per_patch
        self.embed = nn.Linear(hours_per_patch, d_model)
        self.places = nn.Parameter(0.02 * torch.randn(n_patches, d_model))
        self.blocks = nn.ModuleList(
            nn.TransformerEncoderLayer(d_model, n_heads, 4 * d_model, dropout=0.0, activation="gelu",
                                       batch_first=True, norm_first=True) for _ in range(n_layers))
        self.forecast = nn.Linear(d_model, HORIZON)
        # Buffers may be saved or not, as in any module; this one is computed again whenever the module is built.
        self.register_buffer("mask", nn.Transformer.generate_square_subsequent_mask(n_patches), persistent=False)

    def forward(self, past_BT: Tensor) -> Tensor:
        mean, std = past_BT.mean(1, keepdim=True), past_BT.std(1, keepdim=True) + 1e-3
        x_BPD = self.embed(((past_BT - mean) / std).unflatten(1, (-1, self.hours_per_patch))) + self.places
        for block in self.blocks:
            x_BPD = block(x_BPD, src_mask=self.mask)
        return self.forecast(x_BPD[:, -1]) * std + mean


def build(d_model: int = 64, n_layers: int = 2, n_heads: int = 4, hours_per_patch: int = 6) -> nn.Module:
    """The factory: `model.args` are its keyword arguments."""
    return Forecaster(d_model, n_layers, n_heads, hours_per_patch)


def loss(module: nn.Module, fields: dict[str, Tensor]) -> Tensor:
    """Mean squared error over the horizon, one number per record (B,)."""
    return (module(fields["past"]) - fields["future"]).square().mean(1)


def decode(record: bytes) -> dict[str, Tensor]:
    """One record: PAST + HORIZON little-endian fp32 numbers."""
    series = torch.frombuffer(bytearray(record), dtype=torch.float32)
    return {"past": series[:PAST], "future": series[PAST:]}


def series(n: int, seed: int) -> Iterator[bytes]:
    """n generated series: a daily and a half-daily rhythm of random size and phase, a drift, noise."""
    random = np.random.default_rng(seed)
    hours = np.arange(PAST + HORIZON)
    for _ in range(n):
        load = random.uniform(-1, 1) + random.uniform(-0.003, 0.003) * hours
        for period in (24, 12):
            load = load + random.uniform(0.2, 1) * np.sin(2 * np.pi * hours / period + random.uniform(0, 2 * np.pi))
        yield (load + 0.05 * random.normal(size=hours.size)).astype("<f4").tobytes()


def make_data(directory: str, n_train: int = 2048, n_validation: int = 256) -> None:
    """Write the series as a data set of records with two splits."""
    from officina.trainer.data.shard_writer import write_records

    about = dict(name="generated load", licence="CC0-1.0", description="Generated hourly load series.")
    write_records(directory, series(n_train, seed=1), split="train", **about)
    write_records(directory, series(n_validation, seed=2), split="validation", name=about["name"])


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    make_data(sys.argv[1])
