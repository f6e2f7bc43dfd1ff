"""`officina submit`: how soon a dry run answers, and what its scripts add to the start of a run on Slurm.

    python -m officina.benchmarks.submit

The start is counted from the first command of the batch script to the end of the first step of 4 CPU ranks on one node, with
the rendered script (supervisor, caches, srun with a task a rank) and with one by hand: `srun torchrun` of the same trainer.
On a login node the cluster there is used; in a clone one of four nodes is started on this host (as root, with slurm-wlm
and munge); elsewhere only the dry run is measured.
"""

import argparse
import contextlib
import importlib.util
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from officina.trainer.errors import OfficinaError

RANKS, TIMEOUT_S = 4, 300.0
WORDS = ["model=tiny", "data=joined", "steps=1", "device=cpu", "engine=fsdp2", "threads=1", "batch.seq_len=256",
         "batch.global_tokens=8192", "lr_schedule.warmup_steps=0", f"ranks={RANKS}"]
DRY_RUN = ["model=llama3_8b", "engine=fsdp2", "batch.seq_len=4096", "batch.global_tokens=4194304", "site=lumi", "nodes=64",
           "account=project_465000000", "time=12h", "batch.micro_rows=1"]
_BY_HAND = """\
#!/bin/bash
#SBATCH --ntasks-per-node=1 --cpus-per-task={ranks} --time=10:00 --output={run_dir}/by-hand.out
date +%s.%N >{run_dir}/began
srun --mpi=none --cpus-per-task={ranks} {python} -m torch.distributed.run --nproc-per-node={ranks} -m officina.trainer {run_dir}
"""


def run(*, repeats: int = 5) -> dict[str, Any]:
    """Measure; returns the record."""
    from officina.benchmarks.record import interleaved, record, summary
    from officina.benchmarks.workload import synthetic_dataset

    with tempfile.TemporaryDirectory(prefix="officina-bench-") as scratch, _cluster() as environ:
        data = synthetic_dataset(Path(scratch) / "data", vocab_size=2048, tokens=200_000)
        words = [*WORDS, f"data.sources.synthetic.path={data}"]
        starts = {"officina submit": lambda: _submitted(words, Path(scratch), environ),
                  "srun torchrun": lambda: _by_hand(words, Path(scratch), environ)} if environ else {}
        times = interleaved({**starts, "dry run": lambda: _dry_run([*DRY_RUN, f"data.sources.a.path={data}"])}, repeats)
    results = {"dry_run_s": summary(times["dry run"]), "start_s": {name: summary(times[name]) for name in starts}}
    if starts:
        results["ratio"] = summary([a / b for a, b in zip(*(times[name] for name in starts), strict=True)])
    return record("submit", results, settings={"words": WORDS, "dry_run": DRY_RUN, "ranks": RANKS}, repeats=repeats)


def _dry_run(words: list[str]) -> float:
    """Seconds of the whole command."""
    began = time.perf_counter()
    command = [sys.executable, "-m", "officina.launch.cli", "submit", *words, "--dry-run"]
    subprocess.run(command, check=True, capture_output=True)
    return time.perf_counter() - began


def _submitted(words: list[str], scratch: Path, environ: Mapping[str, str]) -> float:
    from officina.launch.start import write_start
    from officina.launch.submit import _supervisor, prepare

    runs = Path(tempfile.mkdtemp(dir=scratch))
    prepared = prepare([*words, "name=submitted", "site=slurm", "cpus=1", "time=10m"], runs)
    if prepared.problems:
        raise OfficinaError("\n".join(map(str, prepared.problems)))
    run_dir = prepared.plans[0].run_dir
    write_start(prepared.plans[0], RANKS)
    _supervisor(run_dir)
    (run_dir / "logs").mkdir()
    text = prepared.text.replace("\n\nstop()", f"\n\ndate +%s.%N >{run_dir}/began\nstop()", 1)
    return _first_step(text, run_dir, environ)


def _by_hand(words: list[str], scratch: Path, environ: Mapping[str, str]) -> float:
    from officina.benchmarks.workload import write_run

    run_dir = write_run([*words, "name=by-hand"], Path(tempfile.mkdtemp(dir=scratch)), RANKS)
    return _first_step(_BY_HAND.format(ranks=RANKS, run_dir=run_dir, python=sys.executable), run_dir, environ)


def _first_step(script: str, run_dir: Path, environ: Mapping[str, str]) -> float:
    """Run the script to the end of the job; seconds from its first command to the end of step 1."""
    path = run_dir / "measured.sbatch"
    path.write_text(script)
    done = subprocess.run(["sbatch", "--wait", os.fspath(path)], env=dict(environ), capture_output=True, text=True,
                          timeout=TIMEOUT_S, check=False)
    if done.returncode:
        logs = "".join(file.read_text()[-2000:] for file in [*run_dir.glob("*.out"), *run_dir.glob("logs/*.out")])
        raise RuntimeError(f"the job failed: {done.stderr}\n{logs}")
    lines = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    return next(line["time"] for line in lines if "event" not in line) - float((run_dir / "began").read_text())


@contextlib.contextmanager
def _cluster() -> Iterator[Mapping[str, str]]:
    """The environment that reaches a cluster: the one there is, else one that the tests' fixture starts; else empty."""
    from officina.launch.allocation import on_login_node

    ours = Path(__file__).parent.parent / "tests" / "slurm.py"
    if on_login_node(os.environ):
        yield os.environ | {"PYTHONSAFEPATH": "1"}
        return
    if not ours.is_file() or os.geteuid() or not shutil.which("sbatch"):
        print("No Slurm here, nor can one be started: only the dry run is measured.", file=sys.stderr)
        yield {}
        return
    spec = importlib.util.spec_from_file_location("officina_tests_slurm", ours)
    slurm = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = slurm
    spec.loader.exec_module(slurm)
    with slurm.start_cluster() as cluster:
        yield cluster.environ | {"PYTHONSAFEPATH": "1"}


def main(argv: list[str] | None = None) -> int:
    from officina.benchmarks.record import write_record

    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--out", type=Path, default=None)
    args = parser.parse_args(argv)
    try:
        found = run(repeats=args.repeats)
    except OfficinaError as error:
        print(error, file=sys.stderr)
        return error.exit_status
    results = found["results"]
    print(write_record(found, args.out))
    print(f"dry run {results['dry_run_s']['median']:.2f} s", *(
        [f"start {results['ratio']['median']:.2f} times that of srun torchrun"] if "ratio" in results else []), sep=", ")
    return 0


if __name__ == "__main__":
    sys.exit(main())
