"""What a seal costs: batches of a sealed data set against those of the same set in the open, in memory, in one thread.

    python -m officina.benchmarks.sealed

The first epoch opens every block whole and checks its tag; later ones decrypt the rows alone.
"""

import argparse
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

SEQ_LEN, ROWS = 4096, 8


def run(*, tokens: int = 50_000_000, repeats: int = 5) -> dict[str, Any]:
    """Measure both; returns the record."""
    from officina.benchmarks.record import interleaved, record, summary
    from officina.benchmarks.turns import median_interval
    from officina.trainer.config import BatchConfig, DataConfig, DecoderConfig, RunConfig, SourceConfig
    from officina.trainer.data.manifest import write_manifest
    from officina.trainer.data.reader import RowReader
    from officina.trainer.data.seal import Seal
    from officina.trainer.data.shard_writer import SplitWriter

    with tempfile.TemporaryDirectory(prefix="officina-bench-") as scratch:
        key = Path(scratch, "key")
        key.touch(mode=0o600)
        key.write_bytes(bytes(range(32)))
        ids = np.random.default_rng(0).integers(0, 1 << 15, tokens)
        readers: dict[str, RowReader] = {}
        for name, seal in (("open", None), ("sealed", Seal(key.read_bytes()))):
            folder = Path(scratch, name)
            with SplitWriter(folder, "train", dtype="u32", seal=seal) as writer:
                for document in np.array_split(ids, max(1, tokens // 740)):
                    writer.add(document)
                entries = writer.close()
            write_manifest(folder, entries, {}, kind="tokens", dtype="u32", name=name, sealed=seal.key_id if seal else "")
            source = SourceConfig(path=str(folder), key=str(key) if seal else "")
            plan = RunConfig(model=DecoderConfig(vocab_size=1 << 15), data=DataConfig(sources={"main": source}),
                             batch=BatchConfig(seq_len=SEQ_LEN, global_tokens=ROWS * SEQ_LEN))
            readers[name] = RowReader(plan)
        n = readers["open"].rows["main"] // ROWS

        def epoch(name: str) -> float:
            begun = time.perf_counter()
            for first in range(0, n * ROWS, ROWS):
                readers[name].read(np.arange(first, first + ROWS))
            return time.perf_counter() - begun

        first = {name: epoch(name) for name in readers}
        found = interleaved({name: lambda name=name: epoch(name) for name in readers}, repeats)
    results = {name: {"first_epoch_tokens_per_s": n * ROWS * SEQ_LEN / first[name],
                      "tokens_per_s": summary([n * ROWS * SEQ_LEN / t for t in times])} for name, times in found.items()}
    shares = [a / b for a, b in zip(found["open"], found["sealed"], strict=True)]
    low, high = median_interval(shares)
    results["sealed"]["share_of_open"] = summary(shares) | {"low": low, "high": high}
    return record("sealed", results, repeats=repeats, settings={"tokens": tokens, "seq_len": SEQ_LEN, "rows": ROWS})


def main(argv: list[str] | None = None) -> None:
    """Measure and write the record."""
    parser = argparse.ArgumentParser(prog="python -m officina.benchmarks.sealed", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=50_000_000)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--out", type=Path, help="where the record goes (default: benchmarks/results/sealed.json)")
    args = parser.parse_args(argv)
    found = run(tokens=args.tokens, repeats=args.repeats)
    from officina.benchmarks.record import write_record

    print(write_record(found, args.out))
    for name, result in found["results"].items():
        print(f"{name:<8} {result['tokens_per_s']['median'] / 1e6:,.0f} M tokens/s, first epoch "
              f"{result['first_epoch_tokens_per_s'] / 1e6:,.0f}")
    print(f"a sealed set keeps {found['results']['sealed']['share_of_open']['median']:.1%} of the rate")


if __name__ == "__main__":
    main()
