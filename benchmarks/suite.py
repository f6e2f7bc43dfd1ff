"""The list of benchmarks, and `officina bench [NAME ... | all | list] [--out DIR] [--quick]`."""

import argparse
import os
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

from officina.trainer.errors import EXIT_BUG, EXIT_DONE, EXIT_USER, OfficinaError


@dataclass(frozen=True, slots=True)
class Benchmark:
    """A module of this folder with a command line of its own."""

    about: str
    minutes: str
    """About how long it takes, on two cores or on a GPU."""
    quick: tuple[str, ...]
    """Words that make it short: enough to see that it runs, too short for figures."""
    on_gpu: bool = False
    """Whether its figures need a GPU; `all` leaves it out, but for --quick."""
    needs: tuple[str, ...] = ()
    """Packages of the extra `test` that it measures against."""


BENCHMARKS = {
    "step": Benchmark("a training step against a plain PyTorch loop and Hugging Face's Trainer", "6",
                      ("--blocks", "1", "--steps", "1", "--precision", "fp32"), needs=("transformers", "accelerate")),
    "engines": Benchmark("tokens per second of every engine on 2 ranks, and of plain DDP and FSDP2 loops", "4",
                         ("--blocks", "1", "--steps", "1", "--precision", "fp32")),
    "lora": Benchmark("a training step of LoRA against PEFT with Hugging Face's Trainer", "4",
                      ("--blocks", "1", "--steps", "1"), needs=("transformers", "accelerate", "peft")),
    "sft": Benchmark("a step of fine-tuning on conversations against TRL's SFTTrainer, packed, padded and one by one", "3",
                     ("--blocks", "1", "--precision", "fp32")),
    "start": Benchmark("time from the command to the first step", "2", ("--repeats", "1")),
    "submit": Benchmark("officina submit: a dry run, and what its scripts add to the start of a run on Slurm", "3",
                        ("--repeats", "1")),
    "data_build": Benchmark("building shards against the tokenizer alone on the same texts", "3",
                            ("--megabytes", "2", "--repeats", "1")),
    "sealed": Benchmark("batches of a sealed data set against the same in the open", "1",
                        ("--tokens", "1000000", "--repeats", "1")),
    "loader": Benchmark("the data loader against litdata, streaming, datasets, grain and megatron-core, and its costs", "15",
                        ("--tokens", "1000000", "--repeats", "1", "--block", "0.2", "--alone")),
    "checkpoint": Benchmark("saving and loading against torch.save and torch.distributed.checkpoint", "2",
                            ("--gib", "0.1", "--repeats", "1")),
    "checkpoint_faults": Benchmark("damaged checkpoints: which are noticed, by officina and by others", "16",
                                   ("--kills", "4", "--corruptions", "40")),
    "kernels": Benchmark("every Triton kernel against its baselines and the card's ceilings, on a GPU", "30", ("--tiny",),
                         on_gpu=True),
}
"""`make gpu` runs those that train on a GPU (benchmarks/gpu.py), and the kernels' goals."""


def main(argv: Sequence[str]) -> int:
    """Run the named benchmarks one after the other; each writes its record. Returns the exit status."""
    parser = argparse.ArgumentParser(prog="officina bench", description="Measure, and write records.")
    parser.add_argument("names", nargs="*", metavar="NAME", help="benchmarks to run; `all`; `list` or none lists them")
    parser.add_argument("--out", type=Path, default=None, metavar="DIR",
                        help="folder for the records (default: benchmarks/results in a clone, else bench-results)")
    parser.add_argument("--quick", action="store_true", help="see that they run; the figures mean nothing, so --out is needed")
    args = parser.parse_args(list(argv))
    if not args.names or args.names == ["list"]:
        for name, benchmark in BENCHMARKS.items():
            print(f"{name:<18} {benchmark.about} (about {benchmark.minutes} min)")
        return EXIT_DONE
    names = args.names
    if names == ["all"]:
        names = [name for name, benchmark in BENCHMARKS.items() if args.quick or not benchmark.on_gpu]
    for name in names:
        if name not in BENCHMARKS:
            raise OfficinaError(f"there is no benchmark {name}; there are {', '.join(BENCHMARKS)}. Try: officina bench list")
    if args.quick and args.out is None:
        raise OfficinaError(f"--quick makes figures that mean nothing, which are not for the records in {_results()}. "
                            f"Try: officina bench {' '.join(names)} --quick --out quick-results")
    if missing := sorted({need for name in names for need in BENCHMARKS[name].needs if find_spec(need) is None}):
        raise OfficinaError(f"{' and '.join(missing)}: not installed here, and we are measured against it. "
                            "Try: pip install --constraint constraints.txt 'officina[test]'")
    return run(names, args.out or _results(), quick=args.quick)


def run(names: Sequence[str], out: Path, *, quick: bool = False) -> int:
    """Each benchmark in a process of its own: none inherits another's threads, memory or process group."""
    failed: dict[str, int] = {}
    for name in names:
        words = BENCHMARKS[name].quick if quick else ()
        print(f"-- {name}: {BENCHMARKS[name].about}", flush=True)
        done = subprocess.run([sys.executable, "-m", f"officina.benchmarks.{name}", *words,
                               "--out", str(out / f"{name}.json")], env=os.environ | {"PYTHONSAFEPATH": "1"})
        if done.returncode:
            failed[name] = done.returncode
    if failed:
        print(f"failed: {', '.join(failed)}", file=sys.stderr)
    if set(failed.values()) == {EXIT_USER}:  # they said what to do
        return EXIT_USER
    return EXIT_BUG if failed else EXIT_DONE


def _results() -> Path:
    """Where records are committed; in an installation, a folder here."""
    from officina.benchmarks.record import RESULTS

    return RESULTS if (RESULTS.parent.parent / "pyproject.toml").exists() else Path("bench-results")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
