"""What is trained on in a benchmark: synthetic shards, and a run directory made as `officina train` makes it."""

from pathlib import Path

import numpy as np

from officina.trainer.data.manifest import write_manifest
from officina.trainer.data.shard_writer import SplitWriter

MEDIAN_DOCUMENT_TOKENS = 600
"""Lengths are log-normal around it with sigma 1.2, as web text's are."""


def synthetic_dataset(folder: Path, *, vocab_size: int, tokens: int, seed: int = 0) -> Path:
    """Write a data set of about `tokens` random token ids, Zipf-distributed as in text; returns its folder."""
    rng = np.random.default_rng(seed)
    dtype = "u16" if vocab_size <= 1 << 16 else "u32"
    # Inverse of the distribution function of 1 / rank: ranks from uniform numbers.
    ids = np.minimum(np.exp(rng.random(tokens) * np.log(vocab_size + 1)).astype(np.int64) - 1, vocab_size - 1)
    lengths = np.maximum(1, rng.lognormal(np.log(MEDIAN_DOCUMENT_TOKENS), 1.2, tokens // 64 + 1).astype(np.int64))
    ends = np.cumsum(lengths)
    with SplitWriter(folder, "train", dtype=dtype) as writer:
        for document in np.split(ids, ends[ends < tokens]):
            writer.add(document)
        entries = writer.close()
    stats = {"train": {"documents": sum(e.documents for e in entries), "tokens": sum(e.tokens for e in entries)}}
    write_manifest(folder, entries, stats, kind="tokens", dtype=dtype, name="synthetic",
                   description="Random token ids for speed measurements")
    return folder


def write_run(words: list[str], runs_dir: Path, ranks: int = 1) -> Path:
    """Compose, check and write a run, as `officina train` does before it starts the ranks; returns its directory."""
    from officina.launch.start import plan_train, write_start

    plan = plan_train(words, runs_dir, world_size=ranks).checked()
    write_start(plan, ranks)
    return plan.run_dir
