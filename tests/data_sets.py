"""Small data sets for tests: token k of a source is a number that says where it is."""

from pathlib import Path

import numpy as np

from officina.trainer.config import BatchConfig, DataConfig, DecoderConfig, EvalConfig, RunConfig, SourceConfig
from officina.trainer.data.manifest import TokenizerInfo, write_manifest
from officina.trainer.data.shard_writer import SplitWriter


def write_tokens(folder: Path, lengths: dict[str, list[int]], *, base: int = 0, dtype: str = "u32",
                 shard_bytes: int = 1 << 30, trained: dict[str, np.ndarray] | None = None,
                 **about: object) -> dict[str, np.ndarray]:
    """Splits with documents of these lengths; tokens are base, base + 1, ... over a split. Returns the streams.

    trained: of each split, (tokens,) bool.
    """
    entries, streams = [], {}
    for split, of_split in lengths.items():
        stream = base + np.arange(sum(of_split))
        with SplitWriter(folder, split, dtype=dtype, shard_bytes=shard_bytes) as writer:
            for document in np.split(stream, np.cumsum(of_split)[:-1]):
                mask = None if trained is None else trained[split][document - base]
                writer.add(document.astype(np.uint32), trained=mask)
            entries += writer.close()
        streams[split] = stream
    write_manifest(folder, entries, {}, kind="tokens", dtype=dtype, name=folder.name, **about)
    return streams


def make_run(sources: dict[str, tuple[Path, float]], *, seq_len: int = 8, rows: int = 4, micro_rows: int = 2,
             seed: int = 0, max_rows: int = 16, vocab_size: int = 10**9, **data: object) -> RunConfig:
    """A run of a decoder over some data sets."""
    return RunConfig(
        seed=seed, model=DecoderConfig(vocab_size=vocab_size), eval=EvalConfig(max_rows=max_rows),
        data=DataConfig(sources={n: SourceConfig(path=str(p), weight=w) for n, (p, w) in sources.items()}, **data),
        batch=BatchConfig(seq_len=seq_len, global_tokens=rows * seq_len, micro_rows=micro_rows))


def tokenizer_info(sha256: str, vocab_size: int) -> TokenizerInfo:
    """A tokenizer that is only named."""
    return TokenizerInfo(sha256=sha256, vocab_size=vocab_size, eos="<|endoftext|>", eos_id=0)
