"""A rank of the real trainer that comes to a standstill at step 6: `stalled_rank.py RUN DEED`.

DEED is `data`: rank 1's files answer no more; `stopped`: nothing of rank 1 runs any more; `suspended`: both ranks are stopped
for 5 s, and need 2 s more; or `none`.
"""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

from officina.trainer import __main__ as trainer
from officina.trainer import stall

RUN, DEED = Path(sys.argv[1]), sys.argv[2]
stall._OTHERS_S = stall._LEAVE_WITHIN_S = 3.0
stall._SUSPENDED_S = 2.5
stall._TIMES = 1  # so that a busy machine does not lengthen what a step may last


def hang() -> None:
    time.sleep(3600)


def stall_within(loop, loader) -> None:
    train_step, read_step, begun = loop.train_step, loader.Loader._read_step, [0]

    def step(*args, **kwargs):
        begun[0] += 1
        if begun[0] == 6 and DEED == "stopped" and os.environ["RANK"] == "1":
            os.kill(os.getpid(), signal.SIGSTOP)
        if begun[0] == 6 and DEED == "suspended":
            subprocess.Popen(["bash", "-c", f"sleep 5; kill -CONT {os.getpid()}"])
            os.kill(os.getpid(), signal.SIGSTOP)
            time.sleep(2)
        return train_step(*args, **kwargs)

    def read(self, position):
        if DEED == "data" and self._rank == 1 and position == 6 * self._run.batch.rows:
            hang()
        return read_step(self, position)

    loop.train_step, loader.Loader._read_step = step, read


if __name__ == "__main__":
    start = trainer._run

    def run(*args):
        from officina.trainer import loop
        from officina.trainer.data import loader

        stall_within(loop, loader)
        return start(*args)

    trainer._run = run
    status = trainer.main(RUN)
    sys.stdout.flush()
    os._exit(status)
