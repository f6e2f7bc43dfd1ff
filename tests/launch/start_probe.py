"""`officina train` reduced to its start: `start_probe.py look|meet RUN [DEED [RANK]]` calls `start`.

look: each rank says what it takes itself for, and is done: no torch, so cheap. meet: ranks are whole, but for their
training loop, which is a few lines here. Ranks that `start` starts run this file instead of `-m officina.trainer`.
"""

import json
import os
import sys
import time
import types
from pathlib import Path

from officina.launch import local
from officina.trainer import __main__ as trainer
from officina.trainer import rank_log
from officina.trainer.errors import EXIT_CONTINUE, EXIT_DONE, LaunchError, NoProgressError
from officina.trainer.rank_env import LONE, RankEnv, read_rank_env
from officina.trainer.run_dir import load_config
from officina.trainer.signals import StopRequest

MODE, RUN, DEED = sys.argv[1], Path(sys.argv[2]), sys.argv[3:]


def tell(env: RankEnv, **more: object) -> None:
    said = {name: getattr(env, name) for name in ("launcher", "rank", "world_size", "local_rank", "local_world_size")}
    said |= {"node": os.environ.get("SLURMD_NODENAME", ""), "pty_port": os.environ.get("SLURM_PTY_PORT", "")}
    partial = RUN / f"probe-{env.rank}.partial"
    partial.write_text(json.dumps(said | more))
    partial.rename(RUN / f"probe-{env.rank}.json")


def look(run_dir: Path) -> int:
    tell(read_rank_env(os.environ) or LONE)
    assert "torch" not in sys.modules, "to decide where ranks run needs no torch"
    rank_log.tell_parent(EXIT_DONE)
    return end(EXIT_DONE)


def end(status: int) -> int:
    """Record the end as rank 0 does: without it a step's status counts for nothing."""
    with open(RUN / "metrics.jsonl", "a") as file:
        file.write(json.dumps({"event": "stop", "step": 0, "reason": "test", "exit_status": status}) + "\n")
    return status


def train(run_dir: Path, ranks) -> int:
    with StopRequest() as stop:
        tell(ranks.env, sum=ranks.sum([1, ranks.rank]))
        print(f"stdout of rank {ranks.rank}", flush=True)
        if DEED[:1] == ["no-progress"] and ranks.rank == int(DEED[1]):
            raise NoProgressError("step 7 again")
        while DEED:
            if ranks.sum([stop.wanted])[0]:
                deadline = time.monotonic() + 10  # it may reach this rank a little later than the one that told
                while not stop.wanted and time.monotonic() < deadline:
                    time.sleep(0.02)
                (run_dir / f"stopped-{ranks.rank}").write_text(str(stop.reason))
                return end(EXIT_CONTINUE)
            time.sleep(0.02)
    return end(EXIT_DONE)


def run() -> int:
    """As a rank train; else start ranks, which come back here."""
    if MODE == "look":
        trainer.main = look
    loop = types.ModuleType("officina.trainer.loop")
    loop.train = train
    sys.modules["officina.trainer.loop"] = loop
    if os.environ.get("PROBE_IS_RANK"):
        return trainer.main(RUN)
    os.environ["PROBE_IS_RANK"] = "1"
    local.trainer_program = lambda run_dir: [sys.executable, *sys.argv]
    try:
        return local.start(RUN, load_config(RUN), os.environ)
    except LaunchError as error:
        print(f"officina: {error}", file=sys.stderr)
        return error.exit_status


if __name__ == "__main__":
    status = run()
    sys.stdout.flush()
    os._exit(status)
