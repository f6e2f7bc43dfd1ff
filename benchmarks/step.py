"""A training step of officina against the same model in a plain PyTorch loop, and against Hugging Face's Trainer.

    python -m officina.benchmarks.step

One process each on the CPU, turn by turn. officina runs `loop.train` as it is: loader, metrics, ledger, progress. The
plain loop has the same model class, precision, batch and optimizer and its batches in memory. Plain causal attention
everywhere (`data=joined`), since the others know no document masks.
"""

import argparse
import tempfile
from functools import partial
from pathlib import Path
from typing import Any

from officina.benchmarks.entrants import hf_trainer, officina, plain
from officina.benchmarks.record import record, summary, write_record
from officina.benchmarks.turns import Block, Entrant, blocks_in, compare, race
from officina.benchmarks.workload import synthetic_dataset, write_run
from officina.trainer.config import RunConfig
from officina.trainer.run_dir import load_config

WORDS = ["model=tiny", "data=joined", "steps=100000", "device=cpu", "checkpoint=at_end", "batch.seq_len=256",
         "batch.micro_rows=8", "batch.global_tokens=4096", "data.prefetch_batches=1", "name=ours"]
"""The demo's model: small, so that what the loop adds is large beside it."""


BLOCKS = {"fp32": 24, "bf16": 5, "bf16_pure": 5}
"""Of each entrant: processors that emulate bf16 need a minute for one."""


def run(*, blocks: int | None = None, steps: int = 4, precisions: tuple[str, ...] = ("fp32", "bf16"),
        words: list[str] | None = None) -> dict[str, Any]:
    """Measure; returns the record. blocks: of each entrant, in place of BLOCKS. words: further words of the run."""
    results: dict[str, Any] = {}
    for precision in precisions:
        with tempfile.TemporaryDirectory(prefix="officina-bench-") as scratch:
            found, config = measure(Path(scratch), [*WORDS, f"precision={precision}", *(words or [])],
                                    blocks or BLOCKS[precision], steps)
        results[precision] = report(found, config, steps)
    settings = {"words": [*WORDS, *(words or [])], "steps_per_block": steps, "device": "cpu"}
    return record("step", results, settings=settings, repeats=blocks_in(results))


def measure(scratch: Path, words: list[str], blocks: int, steps: int) -> tuple[dict[str, list[Block]], RunConfig]:
    """Blocks of each entrant, and the run they all follow."""
    data = synthetic_dataset(scratch / "data", vocab_size=2048, tokens=4_000_000)
    run_dir = write_run([*words, f"data.sources.synthetic.path={data}"], scratch / "runs")
    entrants = {
        "officina": Entrant(partial(officina, run_dir=run_dir)),
        "plain PyTorch": Entrant(partial(plain, run_dir=run_dir)),
        "HF Trainer": Entrant(partial(hf_trainer, run_dir=run_dir, scratch=scratch / "hf")),
    }
    return race(entrants, blocks=blocks, steps=steps), load_config(run_dir)


def report(found: dict[str, list[Block]], config: RunConfig, steps: int) -> dict[str, Any]:
    """Tokens per second, ratios, and the share of a step that is not the engine."""
    tokens = config.batch.rows * config.batch.seq_len * steps
    results: dict[str, Any] = {
        "tokens_per_s": {name: summary([tokens / b.seconds for b in blocks]) for name, blocks in found.items()},
        "step_s": {name: summary([b.seconds / steps for b in blocks]) for name, blocks in found.items()},
        "outside_engine_share": summary([1 - b.facts["engine_s"] / b.seconds for b in found["officina"]]),
    }
    for other in found:
        if other != "officina":
            results[f"speed against {other}"] = compare(found, "officina", other)
    return results


def main(argv: list[str] | None = None) -> None:
    """Measure and write the record."""
    parser = argparse.ArgumentParser(prog="python -m officina.benchmarks.step", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--blocks", type=int, help=f"timed blocks of each entrant (default: {BLOCKS})")
    parser.add_argument("--steps", type=int, default=4, help="steps a block (default: %(default)s)")
    parser.add_argument("--precision", nargs="+", default=["fp32", "bf16"], choices=list(BLOCKS))
    parser.add_argument("--out", type=Path, help="where the record goes (default: benchmarks/results/step.json)")
    parser.add_argument("words", nargs="*", metavar="WORD", help="further words of the run, such as batch.seq_len=512")
    args = parser.parse_args(argv)
    found = run(blocks=args.blocks, steps=args.steps, precisions=tuple(args.precision), words=args.words)
    print(write_record(found, args.out))
    for precision, result in found["results"].items():
        for name, value in result["tokens_per_s"].items():
            print(f"{precision:5} {name:14} {value['median']:>10,.0f} tokens/s")
        for name in result:
            if name.startswith("speed against"):
                ratio = result[name]
                print(f"{precision:5} {name}: {ratio['median']:.3f} ({ratio['low']:.3f} to {ratio['high']:.3f})")
        print(f"{precision:5} outside the engine: {result['outside_engine_share']['median']:.2%} of a step")


if __name__ == "__main__":
    main()
