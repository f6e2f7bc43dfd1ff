"""Bring your own model: a vision transformer that tells kinds of land cover on small satellite-like tiles.

    python examples/vision_transformer.py data/tiles        # write 2,048 tiles for training and 256 held out
    PYTHONPATH=examples officina train model=custom \\
        model.factory=vision_transformer:build model.loss=vision_transformer:loss \\
        model.decoder=vision_transformer:decode data.sources.tiles.path=data/tiles \\
        batch.seq_len=1 batch.global_tokens=64 batch.micro_rows=32 steps=100 lr_schedule.warmup_steps=10

Nothing here knows of ranks, devices or checkpoints: an nn.Module, a loss, a decoder.
Shapes: B records, P patches, D model width, C classes.
"""

import sys
from collections.abc import Iterator

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

SIZE, CHANNELS, CLASSES = 32, 3, 4
"""A tile is (3, 32, 32) uint8; the classes are water, field, town, forest."""


class Block(nn.Module):
    """Pre-norm encoder block with full (not causal) attention."""

    def __init__(self, d_model: int, n_heads: int) -> None:
        super().__init__()
        self.n_heads = n_heads
        self.norm1, self.norm2 = nn.LayerNorm(d_model), nn.LayerNorm(d_model)
        self.qkv, self.out = nn.Linear(d_model, 3 * d_model), nn.Linear(d_model, d_model)
        self.mlp = nn.Sequential(nn.Linear(d_model, 4 * d_model), nn.GELU(), nn.Linear(4 * d_model, d_model))

    def forward(self, x_BPD: Tensor) -> Tensor:
        q, k, v = self.qkv(self.norm1(x_BPD)).unflatten(-1, (3, self.n_heads, -1)).permute(2, 0, 3, 1, 4)
        x_BPD = x_BPD + self.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
        return x_BPD + self.mlp(self.norm2(x_BPD))


class VisionTransformer(nn.Module):
    """Patches, a stack of blocks, the mean over the patches, classes."""

    def __init__(self, patch: int, d_model: int, n_layers: int, n_heads: int) -> None:
        super().__init__()
        self.patches = nn.Conv2d(CHANNELS, d_model, patch, stride=patch)
        self.places = nn.Parameter(0.02 * torch.randn((SIZE // patch) ** 2, d_model))
        self.blocks = nn.ModuleList(Block(d_model, n_heads) for _ in range(n_layers))
        self.norm, self.head = nn.LayerNorm(d_model), nn.Linear(d_model, CLASSES)

    def forward(self, image_BCHW: Tensor) -> Tensor:
        x_BPD = self.patches(image_BCHW).flatten(2).transpose(1, 2) + self.places
        for block in self.blocks:
            x_BPD = block(x_BPD)
        return self.head(self.norm(x_BPD.mean(1)))


def build(patch: int = 8, d_model: int = 64, n_layers: int = 2, n_heads: int = 4) -> nn.Module:
    """The factory: `model.args` are its keyword arguments."""
    return VisionTransformer(patch, d_model, n_layers, n_heads)


def loss(module: nn.Module, fields: dict[str, Tensor]) -> Tensor:
    """One loss per record, (B,)."""
    return F.cross_entropy(module(fields["image"]), fields["label"], reduction="none")


def decode(record: bytes) -> dict[str, Tensor]:
    """One record: a byte for the class, then the tile."""
    numbers = torch.frombuffer(bytearray(record), dtype=torch.uint8)
    return {"label": numbers[0].long(), "image": numbers[1:].view(CHANNELS, SIZE, SIZE).float() / 127.5 - 1}


def tiles(n: int, seed: int) -> Iterator[bytes]:
    """n generated tiles: smooth water, striped fields, blocks of a town, speckled forest."""
    random = np.random.default_rng(seed)
    row, column = np.mgrid[0:SIZE, 0:SIZE]
    for _ in range(n):
        kind = int(random.integers(CLASSES))
        phase, angle = random.uniform(0, 2 * np.pi, 2)
        along = np.cos(angle) * row + np.sin(angle) * column
        grain = random.normal(size=(SIZE, SIZE))
        shape = (np.sin(along / 9 + phase), np.sign(np.sin(along + phase)),
                 np.sign(np.sin(row / 2 + phase) * np.sin(column / 2 + phase)), 1.5 * grain)[kind]
        tint = random.uniform(90, 160, (CHANNELS, 1, 1))
        tile = tint + 40 * shape + 12 * random.normal(size=(CHANNELS, SIZE, SIZE))
        yield bytes([kind]) + tile.clip(0, 255).astype(np.uint8).tobytes()


def make_data(directory: str, n_train: int = 2048, n_validation: int = 256) -> None:
    """Write the tiles as a data set of records with two splits."""
    from officina.trainer.data.shard_writer import write_records

    about = dict(name="generated land cover", licence="CC0-1.0", description="Generated tiles of four kinds.")
    write_records(directory, tiles(n_train, seed=1), split="train", **about)
    write_records(directory, tiles(n_validation, seed=2), split="validation", name=about["name"])


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    make_data(sys.argv[1])
