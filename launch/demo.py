"""`officina demo`: the whole way of a run, as the commands a person would type."""

import importlib.util
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

from rich.console import Console

from officina.trainer.errors import EXIT_CONTINUE, EXIT_DONE, LaunchError
from officina.trainer.metrics import read_metrics
from officina.trainer.run_dir import METRICS, claim, read_run_id

FOLDER = Path("demo")
RUN = FOLDER / "first-run"
PROMPT = "def read_lines(path):"
MADE = FOLDER / ".first-run"
"""Holds the id of the run that the demo made."""
STOP_AFTER_STEPS = 320
"""Half of the experiment's steps."""


def main() -> int:
    """Build shards from the standard library's sources, train on 2 ranks, resume on others, generate, report."""
    console, started = Console(highlight=False), time.monotonic()
    data, run = FOLDER / "data", RUN

    def step(title: str, *words: str, stop_after: int = 0) -> None:
        run_step(console, title, run, *words, stop_after=stop_after)

    make_way(run)
    zero = importlib.util.find_spec("deepspeed") is not None
    if not zero:
        console.print("DeepSpeed is not installed (pip install 'officina[deepspeed]'): step 3 takes DDP instead.",
                      markup=False)

    if (data / "dataset.json").exists():
        console.print(f"{data} is there already: not built again.")
    else:
        step("1. Shards from the Python standard library's own sources", "data", "build", str(data), "--vocab-size", "2048")
    step("2. Train with 2 ranks under FSDP2; a signal stops it halfway, as Slurm would",
         "train", "experiment=demo", "name=first-run", "--runs-dir", str(FOLDER), stop_after=STOP_AFTER_STEPS)
    step("3. Resume with 3 ranks under " + ("DeepSpeed ZeRO-2" if zero else "DDP"), "resume", str(run), "ranks=3",
         "engine=zero2" if zero else "engine=ddp")
    step("4. Each sample once and in order? Ask the ledger", "data", "audit", str(run))
    step("5. Let it write Python", "generate", str(run), PROMPT, "--max-new-tokens", "200", "--temperature", "0.6", "--keep")
    step("6. The report", "report", str(run))
    console.print(f"\nDone in {time.monotonic() - started:.0f} s. Open {run / 'report.html'}")
    return EXIT_DONE


def make_way(run: Path) -> None:
    """Remove the run of an earlier demo. LaunchError where it is somebody's own, or still trains."""
    if not run.exists():
        return
    if not MADE.exists() or MADE.read_text() != read_run_id(run):
        raise LaunchError(f"{run} is there already and not known to be of an earlier demo; this one begins anew. Look at it: "
                          f"officina report {run}. Or, if you want to, remove it: rm -r {run}")
    with claim(run):
        shutil.rmtree(run)


def run_step(console: Console, title: str, run: Path, *words: str, stop_after: int = 0) -> None:
    """Show and run `officina WORDS`, a command about `run`; LaunchError if it does not end as it should."""
    console.rule(f"[bold]{title}", align="left")
    console.print(f"$ officina {shlex.join(words)}", style="dim", markup=False, soft_wrap=True)  # to be pasted
    with subprocess.Popen([sys.executable, "-m", "officina.launch.cli", *words]) as command:
        if stop_after:
            _stop_after(stop_after, run, command)
    status, expect = command.returncode, EXIT_CONTINUE if stop_after else EXIT_DONE
    if status != expect:
        raise LaunchError(f"the demo's command `officina {words[0]}` ended with status {status}, expected {expect}; "
                          f"its log is under {run}/logs")


def _stop_after(steps: int, run_dir: Path, command: subprocess.Popen) -> None:
    """SIGTERM to the command once its run has done so many steps."""
    while command.poll() is None:
        if (run_dir / METRICS).exists():
            MADE.write_text(read_run_id(run_dir) or "")
            if (done := read_metrics(run_dir).steps) and done[-1].step >= steps:
                command.send_signal(signal.SIGTERM)
                return
        time.sleep(0.2)
