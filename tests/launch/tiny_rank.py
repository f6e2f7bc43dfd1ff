"""A rank whose training loop is a few lines that do one thing, good or bad: `tiny_rank.py RUN DEED [RANK]`.

Everything around the loop is the real trainer: `officina.trainer.__main__`, process group, signals, logs, failures.
"""

import os
import resource
import signal
import sys
import time
import types
from pathlib import Path

from officina.trainer.__main__ import main
from officina.trainer.errors import EXIT_CONTINUE, EXIT_DONE, DataError, NoProgressError
from officina.trainer.signals import StopRequest

RUN, DEED = Path(sys.argv[1]), sys.argv[2]
CULPRIT = int(sys.argv[3]) if len(sys.argv) > 3 else -1


def train(run_dir: Path, ranks) -> int:
    print(f"stdout of rank {ranks.rank}", flush=True)
    print(f"stderr of rank {ranks.rank}", file=sys.stderr, flush=True)
    (run_dir / f"started-{ranks.rank}").write_text(f"{os.getpid()}\n{ranks.env}\n{ranks.threads}")
    mine = ranks.rank == CULPRIT
    with StopRequest() as stop:
        for step in range(100_000):
            if DEED == "done" and step == 3:
                return EXIT_DONE
            if step == 3 and mine and DEED == "raise":
                raise ValueError("this shard is not mine\nand a second line")
            if step == 3 and mine and DEED == "kill":
                os.kill(os.getpid(), signal.SIGKILL)
            if step == 3 and mine and DEED == "segv":
                os.kill(os.getpid(), signal.SIGSEGV)
            if step == 3 and mine and DEED == "exit":
                os._exit(3)
            if step == 3 and mine and DEED == "oom":
                allocate()
            if step == 3 and DEED == "user":
                raise DataError("data.sources.a.path=/nowhere: there is no dataset.json.\nTry: officina data build")
            if step == 3 and DEED == "no-progress":
                raise NoProgressError("5 steps in a row had no finite gradient")
            if mine and DEED == "stubborn":
                while True:
                    time.sleep(0.1)
            if ranks.sum([stop.wanted])[0]:
                (run_dir / f"stopped-{ranks.rank}").write_text(str(stop.reason))
                return EXIT_CONTINUE
            time.sleep(0.02)
    return EXIT_DONE


def allocate():
    import torch

    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + 2**28, resource.RLIM_INFINITY))
    torch.empty(2**40)


if DEED == "hang" and int(os.environ["OFFICINA_RANK"]) == CULPRIT:
    time.sleep(600)
loop = types.ModuleType("officina.trainer.loop")
loop.train = train
sys.modules["officina.trainer.loop"] = loop
status = main(RUN, start_timeout_s=6 if DEED == "hang" else 60)
sys.stdout.flush()
os._exit(status)
