"""`officina demo`: the whole way of a run, as the commands a person would type."""

import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

from rich.console import Console

from officina.trainer.environment import lacking
from officina.trainer.errors import EXIT_CONTINUE, EXIT_DONE, LaunchError
from officina.trainer.metrics import read_metrics
from officina.trainer.run_dir import METRICS, claim, read_run_id

FOLDER = Path("demo")
RUN = FOLDER / "first-run"
PROMPT = "def read_lines(path):"
STOP_AFTER_STEPS = 320
"""Half of the experiment's steps."""


def main() -> int:
    """Build shards from the standard library's sources, train on 2 ranks, resume on others, generate, report."""
    console, started = Console(highlight=False), time.monotonic()
    data, run = FOLDER / "data", RUN

    def step(title: str, *words: str, stop_after: int = 0) -> None:
        run_step(console, title, run, *words, stop_after=stop_after)

    make_way(run)
    zero = not (lack := lacking("deepspeed"))
    if not zero:
        console.print(f"ZeRO-2 {lack} (pip install 'officina[deepspeed]'): step 3 takes DDP instead.", markup=False)

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


def made(run: Path) -> Path:
    """The file that holds the id of the run if a demo made it."""
    return run.with_name(f".{run.name}")


def make_way(run: Path) -> None:
    """Remove the run of an earlier demo. LaunchError where it is somebody's own, or still trains."""
    if not run.exists():
        return
    if not made(run).exists() or made(run).read_text() != read_run_id(run):
        raise LaunchError(f"{run} is there already and not known to be of an earlier demo; this one begins anew. Look at it: "
                          f"officina report {run}. Or, if you want to, remove it: rm -r {run}")
    with claim(run):
        shutil.rmtree(run)


def run_step(console: Console, title: str, run: Path, *words: str, stop_after: int = 0) -> None:
    """Show and run `officina WORDS`, a command about `run`; LaunchError if it does not end as it should."""
    console.rule(f"[bold]{title}", align="left")
    console.print(f"$ officina {shlex.join(words)}", style="dim", markup=False, soft_wrap=True)  # to be pasted
    with subprocess.Popen([sys.executable, "-m", "officina.launch.cli", *words]) as command:
        if words[0] == "train":
            _watch(run, command, stop_after)
    status, expect = command.returncode, EXIT_CONTINUE if stop_after else EXIT_DONE
    if status != expect:
        raise LaunchError(f"the demo's command `officina {words[0]}` ended with status {status}, expected {expect}; "
                          f"its log is under {run}/logs")


def _watch(run: Path, command: subprocess.Popen, stop_after: int) -> None:
    """Note the run as the demo's once it is there; SIGTERM to the command once it has done so many steps, if any."""
    while command.poll() is None:
        if (run / METRICS).exists():
            made(run).write_text(read_run_id(run) or "")
            if not stop_after:
                return
            if (done := read_metrics(run).steps) and done[-1].step >= stop_after:
                command.send_signal(signal.SIGTERM)
                return
        time.sleep(0.2)
