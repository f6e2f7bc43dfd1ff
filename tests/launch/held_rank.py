"""A rank of the real trainer that a test can hold at a step: `held_rank.py RUN`, told what to do by the variable HELD.

HELD is a list of ATTEMPT:STEP[:DEED], separated by commas. In that attempt, after that step was recorded and before the ranks
agree on the next, the rank writes RUN/held-ATTEMPT-RANK with its pid and then, by DEED: waits for a stop signal (the default),
raises (`raise`), or from that step on takes 4 s for each (`slow`).
"""

import os
import signal
import sys
import time
from pathlib import Path

from officina.trainer import __main__ as trainer

RUN = Path(sys.argv[1])
ATTEMPT = os.environ["OFFICINA_ATTEMPT"].rpartition(".")[2]
DEEDS = {int(words[1]): words[2] if len(words) > 2 else "wait"
         for words in (text.split(":") for text in os.environ.get("HELD", "").split(",") if text) if words[0] == ATTEMPT}


def hold_within(loop) -> None:
    """Let `loop._record` hold this rank."""
    record = loop._record

    def held(job, *args, **kwargs) -> None:
        record(job, *args, **kwargs)
        deed = DEEDS.get(job.step, "slow" if "slow" in DEEDS.values() and job.step > min(DEEDS) else "")
        if deed:
            place = RUN / f"held-{ATTEMPT}-{job.ranks.rank}"
            place.with_suffix(".partial").write_text(f"{os.getpid()} {os.environ.get('SLURMD_NODENAME', '')} {job.step}")
            place.with_suffix(".partial").rename(place)
        if deed == "raise":
            raise ZeroDivisionError(f"held at step {job.step} by pid {os.getpid()}")
        if deed == "slow":
            time.sleep(4)
        request = getattr(signal.getsignal(signal.SIGTERM), "__self__", None)
        while deed == "wait" and not request.wanted:
            time.sleep(0.01)

    loop._record = held


if __name__ == "__main__":
    start = trainer._run

    def run(*args):
        from officina.trainer import loop

        hold_within(loop)
        return start(*args)

    trainer._run = run
    status = trainer.main(RUN)
    sys.stdout.flush()
    os._exit(status)
