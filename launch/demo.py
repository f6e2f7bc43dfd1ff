"""`officina demo`: the whole way of a run, as the commands a person would type."""

import importlib.util
import shutil
import subprocess
import sys
import time
from pathlib import Path

from rich.console import Console

from officina.trainer.errors import EXIT_CONTINUE, LaunchError

FOLDER = Path("demo")
PROMPT = "class Queue:\n    def __init__(self, maxsize=0):\n        "
FIRST_LEG_S = 75


def main() -> int:
    """Build shards from the standard library's sources, train on 2 ranks, resume on others, generate, report."""
    console, started = Console(highlight=False), time.monotonic()
    data, run = FOLDER / "data", FOLDER / "first-run"
    if run.exists():
        shutil.rmtree(run)  # the demo owns this folder; the data set is kept, since building it twice gives the same
    zero = importlib.util.find_spec("deepspeed") is not None
    if not zero:
        console.print("DeepSpeed is not installed (pip install 'officina[deepspeed]'): step 3 takes DDP instead.")

    def step(title: str, *words: str, expect: int = 0) -> None:
        console.rule(f"[bold]{title}", align="left")
        console.print(f"[dim]$ officina {' '.join(_quoted(w) for w in words)}")
        status = subprocess.run([sys.executable, "-m", "officina.launch.cli", *words]).returncode
        if status != expect:
            raise LaunchError(f"the demo's command `officina {words[0]}` ended with status {status}, expected {expect}; "
                              f"its log is under {run}/logs")

    if (data / "dataset.json").exists():
        console.print(f"{data} is there already: not built again.")
    else:
        step("1. Shards from the Python standard library's own sources",
             "data", "build", str(data), "--vocab-size", "2048")
    step("2. Train with 2 ranks under FSDP2, and be stopped by a time limit",
         "train", "experiment=demo", "name=first-run", f"time_limit={FIRST_LEG_S}s", "--runs-dir", str(FOLDER),
         expect=EXIT_CONTINUE)
    step("3. Resume with 3 ranks under " + ("DeepSpeed ZeRO-2" if zero else "DDP"), "resume", str(run), "ranks=3",
         "engine=zero2" if zero else "engine=ddp", "time_limit=none")
    step("4. Each sample once and in order? Ask the ledger", "data", "audit", str(run))
    step("5. Let it write Python", "generate", str(run), PROMPT, "--max-new-tokens", "200",
         "--temperature", "0.7", "--keep")
    step("6. The report", "report", str(run))
    console.print(f"\nDone in {time.monotonic() - started:.0f} s. Open {run / 'report.html'}")
    return 0


def _quoted(word: str) -> str:
    return word if word.replace("=", "").replace("-", "").replace("/", "").replace("_", "").isalnum() else repr(word)
