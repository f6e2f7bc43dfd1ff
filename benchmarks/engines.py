"""Tokens per second of every engine on the same ranks, and of plain DDP and FSDP2 loops beside them.

    python -m officina.benchmarks.engines

All live at once and take turns. officina's engines run inside `loop.train` as it is.
"""

import argparse
import importlib.util
import tempfile
from functools import partial
from pathlib import Path
from typing import Any

from officina.benchmarks.entrants import officina, plain
from officina.benchmarks.record import record, summary, write_record
from officina.benchmarks.turns import Entrant, blocks_in, compare, race
from officina.benchmarks.workload import synthetic_dataset, write_run
from officina.trainer.run_dir import load_config

ENGINES = {"ddp": ["engine=ddp"], "fsdp2": ["engine=fsdp2"], "hsdp": ["engine=hsdp", "engine.shard_size=1"],
           "zero1": ["engine=zero1"], "zero2": ["engine=zero2"], "zero3": ["engine=zero3"]}
"""HSDP on 2 ranks: groups of one, so that its replication is what is measured; groups of two would be FSDP2 again."""
PLAIN = {"plain DDP": ("ddp", "ddp"), "plain FSDP2": ("fsdp2", "fsdp2")}
"""Entrant -> how the plain loop shards, and the engine it is compared with."""
WORDS = ["model=tiny", "data=joined", "steps=100000", "device=cpu", "checkpoint=at_end", "batch.seq_len=256",
         "batch.micro_rows=4", "batch.global_tokens=4096", "data.prefetch_batches=1"]


def run(*, ranks: int = 2, blocks: int = 4, steps: int = 4, precisions: tuple[str, ...] = ("fp32", "bf16"),
        words: list[str] | None = None) -> dict[str, Any]:
    """Measure; returns the record. Engines whose package is missing are left out."""
    results: dict[str, Any] = {}
    words = [*WORDS, *(words or [])]
    engines = {name: choice for name, choice in ENGINES.items()
               if not name.startswith("zero") or importlib.util.find_spec("deepspeed")}
    for precision in precisions:
        with tempfile.TemporaryDirectory(prefix="officina-bench-") as scratch:
            data = synthetic_dataset(Path(scratch) / "data", vocab_size=2048, tokens=4_000_000)
            common = [*words, f"precision={precision}", f"data.sources.synthetic.path={data}"]
            dirs = {name: write_run([*common, *choice, f"name={name}"], Path(scratch) / "runs", ranks)
                    for name, choice in engines.items()}
            entrants = {name: Entrant(partial(officina, run_dir=path), ranks) for name, path in dirs.items()}
            entrants |= {name: Entrant(partial(plain, run_dir=dirs[like], how=how), ranks)
                         for name, (how, like) in PLAIN.items()}
            found = race(entrants, blocks=blocks, steps=steps)
            batch = load_config(dirs["ddp"]).batch
        tokens = batch.rows * batch.seq_len * steps
        results[precision] = {
            "tokens_per_s": {name: summary([tokens / b.seconds for b in timed]) for name, timed in found.items()},
            "speed against ddp": {name: compare(found, name, "ddp") for name in found if name != "ddp"},
            "speed against plain": {like: compare(found, like, name) for name, (_, like) in PLAIN.items()},
        }
    settings = {"words": words, "ranks": ranks, "steps_per_block": steps}
    return record("engines", results, settings=settings, repeats=blocks_in(results))


def main(argv: list[str] | None = None) -> None:
    """Measure and write the record."""
    parser = argparse.ArgumentParser(prog="python -m officina.benchmarks.engines", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--blocks", type=int, default=4, help="timed blocks of each entrant (default: %(default)s)")
    parser.add_argument("--steps", type=int, default=4, help="steps a block (default: %(default)s)")
    parser.add_argument("--precision", nargs="+", default=["fp32", "bf16"], choices=["fp32", "bf16", "bf16_pure"])
    parser.add_argument("--out", type=Path, help="where the record goes (default: benchmarks/results/engines.json)")
    parser.add_argument("words", nargs="*", metavar="WORD", help="further words of the runs")
    args = parser.parse_args(argv)
    found = run(ranks=args.ranks, blocks=args.blocks, steps=args.steps, precisions=tuple(args.precision), words=args.words)
    print(write_record(found, args.out))
    for precision, result in found["results"].items():
        for name, value in result["tokens_per_s"].items():
            ratio = result["speed against ddp"].get(name, {"median": 1.0})["median"]
            print(f"{precision:5} {name:12} {value['median']:>10,.0f} tokens/s   {ratio:.2f} x DDP")


if __name__ == "__main__":
    main()
