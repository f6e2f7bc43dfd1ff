"""Time from the command to the end of the first step of `officina train`, with the shards in place.

    python -m officina.benchmarks.start

Each start is a new process tree, as a person starts it. The total is from a start that nothing watches; its parts are
from further starts in which the same code says when it enters them.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any
from unittest import mock

CASES = {"1 rank, single": ["engine=single", "ranks=1"], "2 ranks, FSDP2": ["engine=fsdp2", "ranks=2"]}
WORDS = ["model=tiny", "data=joined", "steps=1", "device=cpu", "batch.seq_len=256", "batch.micro_rows=8",
         "batch.global_tokens=8192", "lr_schedule.warmup_steps=0"]
PARTS = ("command line", "Python and imports", "group", "model and engine", "data and records", "first step")
"""Parsing and checking up to the rank's process; importing torch; meeting the other ranks; building and filling the
model; opening shards and files; the step itself."""
TIMEOUT_S = 120.0


def run(*, repeats: int = 5, words: list[str] | None = None) -> dict[str, Any]:
    """Measure every case; returns the record."""
    from officina.benchmarks.record import interleaved, record, summary
    from officina.benchmarks.workload import synthetic_dataset

    parts: dict[str, list[dict[str, float]]] = {name: [] for name in CASES}
    with tempfile.TemporaryDirectory(prefix="officina-bench-") as scratch:
        data = synthetic_dataset(Path(scratch) / "data", vocab_size=2048, tokens=1_000_000)
        words = [*WORDS, f"data.sources.synthetic.path={data}", *(words or [])]

        def one(name: str) -> float:
            parts[name].append(watched_start([*words, *CASES[name]], Path(scratch)))
            return plain_start([*words, *CASES[name]], Path(scratch))

        totals = interleaved({name: lambda name=name: one(name) for name in CASES}, repeats)
    results = {name: {"total_s": summary(totals[name]),
                      "parts_s": {part: summary([p[part] for p in parts[name][-repeats:]]) for part in PARTS}}
               for name in CASES}
    return record("start", results, settings={"words": words, "cases": CASES}, repeats=repeats)


def plain_start(words: list[str], scratch: Path) -> float:
    """Seconds from `officina train` to the line of step 1 in metrics.jsonl."""
    return _start([sys.executable, "-m", "officina.launch.cli"], words, scratch)[0]


def watched_start(words: list[str], scratch: Path) -> dict[str, float]:
    """Seconds of each part; they add up to the time to the first step."""
    stamps = scratch / "stamps.json"
    stamps.unlink(missing_ok=True)
    _, began, first_step = _start([sys.executable, "-m", __spec__.name, "parent", str(stamps)], words, scratch)
    times = [began, *json.loads(stamps.read_text()), first_step]
    return {part: b - a for part, a, b in zip(PARTS, times[:-1], times[1:], strict=True)}


def _start(program: list[str], words: list[str], scratch: Path) -> tuple[float, float, float]:
    """Run it to its end; (seconds to the first step, Unix time of the start, Unix time of the first step)."""
    runs = Path(tempfile.mkdtemp(dir=scratch))
    began = time.time()
    done = subprocess.run([*program, "train", *words, "name=start", "--runs-dir", str(runs)], stdin=subprocess.DEVNULL,
                          capture_output=True, text=True, timeout=TIMEOUT_S, env=os.environ | {"PYTHONSAFEPATH": "1"})
    if done.returncode:
        raise RuntimeError(f"officina train ended with status {done.returncode}:\n{done.stdout}{done.stderr}")
    lines = [json.loads(line) for line in (runs / "start" / "metrics.jsonl").read_text().splitlines()]
    first_step = next(line["time"] for line in lines if "event" not in line)
    return first_step - began, began, first_step


# ---- inside a watched start ----------------------------------------------------------------------------------------
def _parent(stamps: str, words: list[str]) -> int:
    """`officina WORDS`, whose ranks are watched."""
    from officina.launch import cli, local

    def program(run_dir: Path) -> list[str]:
        return [sys.executable, "-m", __spec__.name, "rank", stamps, str(time.time()), str(run_dir)]

    with mock.patch.object(local, "trainer_program", program):
        return cli.main(words)


def _rank(stamps: str, began: str, run_dir: str) -> int:
    """`python -m officina.trainer RUN` that notes when each part ends."""
    times = [float(began)]
    from officina.trainer import __main__ as trainer
    from officina.trainer import assemble, loop, ranks

    times.append(time.time())

    def noted(function, *, before: bool):
        def call(*args, **kwargs):
            if before:
                times.append(time.time())
            result = function(*args, **kwargs)
            if not before:
                times.append(time.time())
            return result
        return call

    def first_step(*args, **kwargs):
        times.append(time.time())
        if os.environ["OFFICINA_RANK"] == "0":
            Path(stamps).write_text(json.dumps(times))
        return train_step(*args, **kwargs)

    train_step = loop.train_step
    with (mock.patch.object(ranks, "start_ranks", noted(ranks.start_ranks, before=False)),
          mock.patch.object(assemble, "Loader", noted(assemble.Loader, before=True)),
          mock.patch.object(loop, "train_step", first_step)):
        return trainer.main(Path(run_dir))


def main(argv: list[str] | None = None) -> None:
    """Measure and write the record."""
    parser = argparse.ArgumentParser(prog="python -m officina.benchmarks.start", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--out", type=Path, help="where the record goes (default: benchmarks/results/start.json)")
    parser.add_argument("words", nargs="*", metavar="WORD", help="further words of the runs")
    args = parser.parse_args(argv)
    found = run(repeats=args.repeats, words=args.words)
    from officina.benchmarks.record import write_record

    print(write_record(found, args.out))
    for name, result in found["results"].items():
        shares = ", ".join(f"{part} {value['median']:.2f}" for part, value in result["parts_s"].items())
        print(f"{name}: {result['total_s']['median']:.2f} s ({shares})")


if __name__ == "__main__":
    if sys.argv[1:2] == ["parent"]:
        sys.exit(_parent(sys.argv[2], sys.argv[3:]))
    if sys.argv[1:2] == ["rank"]:
        sys.exit(_rank(*sys.argv[2:]))
    main()
