"""A training step of LoRA: officina against PEFT with Hugging Face's Trainer.

    python -m officina.benchmarks.lora

One process each on the CPU, turn by turn: the same shapes, rows, batch, precision, rank and layers, no padding on either side,
so that tokens are tokens. officina runs `loop.train` as it is, the other has its rows in memory and logs nothing. One thread
each; beside the time that passed, the processor time of each process, which a busy machine disturbs less.
"""

import argparse
import os
import tempfile
from functools import partial
from pathlib import Path
from typing import Any

from officina.benchmarks.entrants import hf_trainer, officina
from officina.benchmarks.record import record, summary, write_record
from officina.benchmarks.turns import Entrant, blocks_in, compare, race
from officina.benchmarks.workload import synthetic_dataset, write_run
from officina.trainer.model.targets import trained_count
from officina.trainer.run_dir import load_config

OURS, THEIRS = "officina", "PEFT + HF Trainer"
WORDS = ["model=tiny", "adapter=lora", "data=joined", "steps=100000", "device=cpu", "checkpoint=at_end", "batch.seq_len=256",
         "batch.micro_rows=8", "batch.global_tokens=2048", "threads=1", "data.prefetch_batches=1", "name=ours"]


def run(*, blocks: int = 12, steps: int = 2, precisions: tuple[str, ...] = ("fp32",)) -> dict[str, Any]:
    """Measure; returns the record."""
    results: dict[str, Any] = {}
    before = os.getloadavg()
    for precision in precisions:
        with tempfile.TemporaryDirectory(prefix="officina-bench-") as scratch:
            results[precision] = measure(Path(scratch), [*WORDS, f"precision={precision}"], blocks, steps)
    settings = {"words": WORDS, "steps_per_block": steps, "device": "cpu", "load_average": [before, os.getloadavg()]}
    return record("lora", results, settings=settings, repeats=blocks_in(results))


def measure(scratch: Path, words: list[str], blocks: int, steps: int) -> dict[str, Any]:
    """Tokens per second of both, and their ratio."""
    data = synthetic_dataset(scratch / "data", vocab_size=2048, tokens=2_000_000)
    run_dir = write_run([*words, f"data.sources.synthetic.path={data}"], scratch / "runs")
    config = load_config(run_dir)
    found = race({OURS: Entrant(partial(officina, run_dir=run_dir)),
                  THEIRS: Entrant(partial(hf_trainer, run_dir=run_dir, scratch=scratch / "hf"))},
                 blocks=blocks, steps=steps, lead=1)
    tokens = config.batch.rows * config.batch.seq_len * steps
    trained, total = trained_count(config.model, config.adapter)
    cpu = {name: [tokens / b.facts["cpu_s"] for b in of] for name, of in found.items()}
    return {"tokens_per_cpu_s": {name: summary(of) for name, of in cpu.items()},
            f"tokens per CPU second against {THEIRS}": summary([a / b for a, b in zip(cpu[OURS], cpu[THEIRS], strict=True)]),
            "tokens_per_s": {name: summary([tokens / b.seconds for b in of]) for name, of in found.items()},
            f"speed against {THEIRS}": compare(found, OURS, THEIRS), "parameters": total, "trained_parameters": trained}


def main(argv: list[str] | None = None) -> int:
    """Measure and write benchmarks/results/lora.json."""
    parser = argparse.ArgumentParser(prog="python -m officina.benchmarks.lora", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--blocks", type=int, default=12, help="blocks of each (default: %(default)s)")
    parser.add_argument("--steps", type=int, default=2, help="steps in a block (default: %(default)s)")
    parser.add_argument("--precision", action="append", choices=["fp32", "bf16"], help="default: fp32")
    parser.add_argument("--out", type=Path, help="file of the record")
    args = parser.parse_args(argv)
    found = run(blocks=args.blocks, steps=args.steps, precisions=tuple(args.precision or ["fp32"]))
    path = write_record(found, args.out)
    for precision, result in found["results"].items():
        for name, speed in result["tokens_per_s"].items():
            print(f"{precision}  {name:<18} {speed['median']:10,.0f} tokens/s")
        for what in (f"speed against {THEIRS}", f"tokens per CPU second against {THEIRS}"):
            print(f"{precision}  {what}: {result[what]['median']:.3f}")
    print(f"record: {path}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
