"""From the start of a batch job to the end of its first training step: our supervisor and srun against plain srun torchrun.

    python -m officina.benchmarks.job_start [--repeats 5]        on a Slurm with 2 free nodes of 2 CPUs each

Both jobs train the same run of 4 CPU ranks on 2 nodes with the same trainer; they differ in how its ranks are started. The
clock begins with the first line of the batch script, so what the queue takes counts for neither.
"""

import argparse
import json
import os
import shlex
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from officina.launch import supervise
from officina.launch.job_queue import ask
from officina.trainer.errors import LaunchError

NODES, PER_NODE = 2, 2
SRUN = ["srun", "--mpi=none", "--kill-on-bad-exit=1", "--wait=60", f"--nodes={NODES}"]
CASES = ("supervisor, srun", "plain srun torchrun")


def body(case: str, run_dir: Path) -> str:
    """The batch script's last line: what starts the ranks."""
    trainer = ["-m", "officina.trainer", str(run_dir)]
    if case == CASES[0]:
        return "exec " + shlex.join([sys.executable, supervise.__file__, str(run_dir), "--", *SRUN,
                                     f"--ntasks={NODES * PER_NODE}", sys.executable, *trainer])
    torchrun = [sys.executable, "-m", "torch.distributed.run", f"--nnodes={NODES}", f"--nproc-per-node={PER_NODE}",
                "--rdzv-backend=c10d", "--rdzv-id=1"]
    return (f"{shlex.join([*SRUN, f'--ntasks={NODES}', '--ntasks-per-node=1', *torchrun])} "
            f'--rdzv-endpoint="$MASTER:$((20000 + SLURM_JOB_ID % 10000))" {shlex.join(trainer)}')


def measure(case: str, words: list[str], scratch: Path, master: str) -> float:
    """Seconds from the script's first line to the end of step 1 of one job."""
    from officina.launch.start import plan_train, write_start

    folder = Path(tempfile.mkdtemp(dir=scratch))
    plan = plan_train([*words, "name=run"], folder, world_size=NODES * PER_NODE).checked()
    write_start(plan, NODES * PER_NODE)
    script, began = folder / "job.sh", folder / "began"
    script.write_text("\n".join(["#!/bin/bash", f"date +%s.%N >{began}", f"export MASTER={master} OMP_NUM_THREADS=1",
                                 body(case, plan.run_dir), ""]))
    done = ask_long("sbatch", "--wait", f"--nodes={NODES}", f"--ntasks-per-node={PER_NODE}", f"--output={folder}/job.out",
                    str(script))
    if done.returncode:
        said = (folder / "job.out").read_text() if (folder / "job.out").exists() else ""
        raise LaunchError(f"{case}: the job failed: {done.stderr.strip()}\n{said}")
    lines = [json.loads(line) for line in (plan.run_dir / "metrics.jsonl").read_text().splitlines()]
    return next(line["time"] for line in lines if "event" not in line) - float(began.read_text())


def ask_long(*words: str) -> subprocess.CompletedProcess[str]:
    """A client command that waits for a job."""
    return subprocess.run(words, capture_output=True, text=True, timeout=600, check=False,
                          env=os.environ | {"PYTHONSAFEPATH": "1"})


def run(*, repeats: int = 5, master: str = "127.0.0.1") -> dict[str, Any]:
    """Measure both in turn; returns the record."""
    from officina.benchmarks.record import interleaved, record, summary
    from officina.benchmarks.workload import synthetic_dataset

    ask("scontrol", "ping")
    with tempfile.TemporaryDirectory(prefix="officina-bench-") as scratch:
        data = synthetic_dataset(Path(scratch) / "data", vocab_size=2048, tokens=1_000_000)
        words = ["model=tiny", "data=joined", "engine=fsdp2", "steps=1", "device=cpu", "threads=1", "batch.seq_len=256",
                 "batch.micro_rows=8", "batch.global_tokens=8192", "lr_schedule.warmup_steps=0",
                 f"data.sources.synthetic.path={data}"]
        before = os.getloadavg()[0]
        times = interleaved({case: lambda case=case: measure(case, words, Path(scratch), master) for case in CASES}, repeats)
    results = {case: {"first_step_s": summary(found)} for case, found in times.items()}
    ratio = results[CASES[0]]["first_step_s"]["median"] / results[CASES[1]]["first_step_s"]["median"]
    settings = {"words": words[:-1], "nodes": NODES, "ranks": NODES * PER_NODE, "load_before": round(before, 2)}
    return record("job_start", results | {"ratio": ratio}, settings=settings, repeats=repeats)


def main(argv: list[str] | None = None) -> None:
    """Measure and write the record."""
    parser = argparse.ArgumentParser(prog="python -m officina.benchmarks.job_start", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--master", default="127.0.0.1", metavar="HOST",
                        help="first node for torchrun's rendezvous (default: all nodes are on this host)")
    parser.add_argument("--out", type=Path, help="where the record goes (default: benchmarks/results/job_start.json)")
    args = parser.parse_args(argv)
    found = run(repeats=args.repeats, master=args.master)
    from officina.benchmarks.record import write_record

    print(write_record(found, args.out))
    for case in CASES:
        times = found["results"][case]["first_step_s"]
        print(f"{case}: {times['median']:.2f} s ({times['min']:.2f} to {times['max']:.2f})")
    print(f"ratio {found['results']['ratio']:.3f}; load before: {found['settings']['load_before']}")


if __name__ == "__main__":
    main()
