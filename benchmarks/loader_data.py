"""The data set that the loaders are compared on, and a run over it."""

from pathlib import Path
from typing import Any

import numpy as np

from officina.benchmarks.loader_anchors import BATCH, SEED, SEQ_LEN
from officina.trainer.config import BatchConfig, DataConfig, DecoderConfig, RunConfig, SourceConfig
from officina.trainer.data.manifest import write_manifest
from officina.trainer.data.shard_writer import SplitWriter


def write_tokens(folder: Path, n: int) -> int:
    """Random tokens in documents of log-normal length (mean 740), for the others as tokens.npy, for us as shards."""
    rng = np.random.default_rng(0)
    lengths = np.maximum(rng.lognormal(np.log(420), 1.06, n // 740).astype(int), 2)
    ends = np.cumsum(lengths)
    tokens = rng.integers(1, 50_000, ends[-1], dtype=np.uint32)
    tokens[ends - 1] = 0
    np.save(folder / "tokens.npy", tokens)
    np.save(folder / "ends.npy", ends)
    with SplitWriter(folder / "officina", "train", dtype="u32", shard_bytes=128 << 20) as writer:
        for document in np.split(tokens, ends[:-1]):
            writer.add(document)
        entries = writer.close()
    write_manifest(folder / "officina", entries, {}, kind="tokens", dtype="u32", name="bench")
    return int(ends[-1])


def make_run(folders: dict[str, Path], rows: int = BATCH, **data: Any) -> RunConfig:
    """A run over data sets with `rows` a step."""
    sources = {name: SourceConfig(path=str(folder)) for name, folder in folders.items()}
    return RunConfig(seed=SEED, model=DecoderConfig(vocab_size=50_000), data=DataConfig(sources=sources, **data),
                     batch=BatchConfig(seq_len=SEQ_LEN, global_tokens=rows * SEQ_LEN, micro_rows=BATCH))
