"""Injects faults into checkpoints: kill -9 around saves, and corruption of what was written; ours and three others.

    python -m officina.benchmarks.checkpoint_faults                 # 200 kills, 1,000 corruptions of each format
    python -m officina.benchmarks.checkpoint_faults --kills 30 --corruptions 150

Exit status 1 if one kill left no whole checkpoint or one corruption of ours went unnoticed. The tests run a sample.
"""

import argparse
import contextlib
import datetime
import multiprocessing
import os
import random
import shutil
import signal
import sys
import tempfile
import threading
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from safetensors.torch import load_file, save_file

from officina.benchmarks.record import record, write_record
from officina.trainer.checkpoint.content import verify_loaded
from officina.trainer.checkpoint.layout import COMMIT, TrainState, checkpoints_dir, step_dir
from officina.trainer.checkpoint.read import OpenCheckpoint, list_checkpoints, open_checkpoint
from officina.trainer.checkpoint.write import Saver
from officina.trainer.config import CheckpointConfig
from officina.trainer.errors import CheckpointError
from officina.trainer.ranks import RankEnv, Ranks
from officina.trainer.state import EXP_AVG, PARAM, Piece

Tensors = dict[tuple[str, str], torch.Tensor]


# ---- a state that can be recomputed, and ranks that are threads ------------------------------------------------------
def state_at(step: int, elements: int = 1 << 20) -> Tensors:
    """The whole state after `step` steps: every element depends on its place and on the step."""
    found = {}
    for i, (name, n) in enumerate((("embed", elements // 2), ("w", elements // 3), ("norm", 257))):
        for j, slot in enumerate((PARAM, EXP_AVG)):
            index = torch.arange(n, dtype=torch.int64)
            found[name, slot] = ((index * 2654435761 + (step * 31 + i) * 7919 + j) % 1000003).to(torch.float32)
    return found


def cut(state: Tensors, rank: int, world_size: int) -> Iterator[Piece]:
    """This rank's share: each tensor cut evenly."""
    for (name, slot), t in state.items():
        a, b = rank * t.numel() // world_size, (rank + 1) * t.numel() // world_size
        yield Piece(name, slot, tuple(t.shape), a, b, t.reshape(-1)[a:b])


def holds(opened: OpenCheckpoint, state: Tensors) -> bool:
    """Does the checkpoint hold exactly this state?"""
    return all(torch.equal(opened.read(n, s, 0, t.numel()), t.reshape(-1)) for (n, s), t in state.items())


class ThreadRanks:
    """Ranks as threads of one process: real agreement, no process group."""

    def __init__(self, rank: int, world_size: int, barrier: threading.Barrier, table: list) -> None:
        self.rank, self.world_size = rank, world_size
        self._barrier, self._table = barrier, table

    def sum(self, numbers: Sequence[float]) -> list[float]:
        self._table[self.rank] = list(numbers)
        self._barrier.wait(60)
        total = [sum(column) for column in zip(*self._table, strict=True)]
        self._barrier.wait(60)
        return total


def on_ranks(world_size: int, work: Callable[[ThreadRanks], Any]) -> list[Any]:
    """work(ranks) on each of `world_size` threads; their results by rank. The first exception is raised here."""
    barrier, table = threading.Barrier(world_size), [None] * world_size
    results: list[Any] = [None] * world_size
    errors: list[BaseException] = []

    def body(rank: int) -> None:
        try:
            results[rank] = work(ThreadRanks(rank, world_size, barrier, table))
        except BaseException as e:
            if not isinstance(e, threading.BrokenBarrierError):
                errors.append(e)
            barrier.abort()

    threads = [threading.Thread(target=body, args=(r,)) for r in range(world_size)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    if errors:
        raise errors[0]
    return results


def save_step(run_dir: Path, step: int, *, world_size: int = 2, run_id: str = "run-a", state: Tensors | None = None) -> None:
    """Save `state_at(step)` from that many ranks, keeping all earlier checkpoints."""
    state = state or state_at(step)

    def work(ranks: ThreadRanks) -> None:
        saver = Saver(run_dir, ranks, CheckpointConfig(keep_last=1000), run_id)
        outcome = saver.save(step, cut(state, ranks.rank, world_size), TrainState(step=step, tokens=step * 100))
        assert outcome.status == "saved", outcome.problem

    on_ranks(world_size, work)


# ---- kills -----------------------------------------------------------------------------------------------------------
def _train(run_dir: str, store: str, rank: int, world_size: int, asynchronous: bool) -> None:
    """A rank that saves every second step until it is killed."""
    sys.stderr = open(os.devnull, "w")
    os.dup2(sys.stderr.fileno(), 2)
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=world_size,
                            timeout=datetime.timedelta(seconds=30))
    ranks = Ranks(RankEnv(rank, rank, world_size, world_size, "officina"), torch.device("cpu"))
    saver = Saver(Path(run_dir), ranks, CheckpointConfig(asynchronous=asynchronous), "run-a")
    try:
        for step in range(2, 10**6):
            time.sleep(0.002)
            saver.settle(ranks.sum([saver.pending_vote()])[0])
            if step % 2 == 0:
                saver.save(step, cut(state_at(step), rank, world_size), TrainState(step=step, tokens=step * 100))
    finally:
        os._exit(1)  # another rank is gone


@dataclass(frozen=True, slots=True)
class KillOutcome:
    """What one kill left."""

    whole: bool
    """A whole checkpoint of the step it names was loaded, and a further save on another number of ranks worked."""
    in_save: bool
    """The kill left a directory without COMMIT: it hit a save."""
    detail: str = ""


def _wait_for_a_save(run_dir: Path) -> None:
    """Until one is under way, or for a few seconds: on a busy machine saves are a small part of the time."""
    for _ in range(5_000):
        if any(not (folder / COMMIT).exists() for folder in checkpoints_dir(run_dir).iterdir()):
            return
        time.sleep(0.0005)


def kill_trial(folder: Path, rng: random.Random, context, *, asynchronous: bool, world_size: int = 2) -> KillOutcome | None:
    """Start ranks, kill one or all with SIGKILL at a random moment after the first commit, half of the times in the next save,
    and look at what is left.

    None if the ranks ended or came to no first commit (a machine that is paused or overloaded): nobody was killed.
    """
    run_dir = folder / "run"
    processes = [context.Process(target=_train, args=(str(run_dir), str(folder / "store"), r, world_size, asynchronous))
                 for r in range(world_size)]
    for p in processes:
        p.start()
    looks = 0
    while not (run_dir.exists() and any(checkpoints_dir(run_dir).glob(f"*/{COMMIT}"))):
        looks += 1
        if looks > 20_000 or any(p.exitcode is not None for p in processes):
            for p in processes:
                p.kill()
                p.join()
            return None
        time.sleep(0.002)
    time.sleep(rng.uniform(0, 0.3))
    if rng.random() < 0.5:
        _wait_for_a_save(run_dir)
    for p in processes if rng.random() < 0.5 else [rng.choice(processes)]:
        with contextlib.suppress(ProcessLookupError):
            os.kill(p.pid, signal.SIGKILL)
    for p in processes:  # a survivor meets a broken collective and ends by itself
        p.join(20)
        if p.is_alive():
            p.kill()
            p.join()
    infos = list_checkpoints(run_dir)
    in_save = any(i.status == "incomplete" for i in infos)
    wrong = [i for i in infos if i.status == "damaged"]
    if wrong:
        return KillOutcome(False, in_save, f"damaged: {wrong[0]}")
    try:
        with open_checkpoint(run_dir, run_id="run-a") as opened:
            newest = max(i.step for i in infos if i.status == "complete")
            if opened.step != newest or not holds(opened, state_at(opened.step)):
                return KillOutcome(False, in_save, f"step {opened.step} does not hold its state")
            step = opened.step + 1
        others = rng.choice((1, 3))
        save_step(run_dir, step, world_size=others)
        with open_checkpoint(run_dir) as opened:
            verify_loaded(lambda: cut(state_at(step), 0, 1), opened)
            good = opened.step == step and opened.world_size == others
        return KillOutcome(good, in_save, "" if good else f"took step {opened.step} after saving {step}")
    except (CheckpointError, AssertionError) as e:
        return KillOutcome(False, in_save, str(e))


def kills(count: int, *, seed: int = 0, folder: Path | None = None) -> dict[str, Any]:
    """`count` kills, half of them with asynchronous saves; figures for the record."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__])
    rng = random.Random(seed)
    found: dict[str, Any] = {}
    for mode in ("synchronous", "asynchronous"):
        outcomes: list[KillOutcome] = []
        not_started = 0
        wanted = count // 2 if mode == "synchronous" else count - count // 2
        while len(outcomes) < wanted:
            with tempfile.TemporaryDirectory(dir=folder, prefix="officina-kill-") as scratch:
                outcome = kill_trial(Path(scratch), rng, context, asynchronous=mode == "asynchronous")
            if outcome is not None:
                outcomes.append(outcome)
                if len(outcomes) % 25 == 0:
                    print(f"{mode}: {len(outcomes)} of {wanted} kills", file=sys.stderr, flush=True)
            elif (not_started := not_started + 1) > max(5, wanted // 4):
                raise RuntimeError(f"in {not_started} trials the ranks never committed a first checkpoint")
        found[mode] = {"kills": len(outcomes), "trials_without_a_kill": not_started,
                       "kills_during_a_save": sum(o.in_save for o in outcomes),
                       "whole_checkpoint_loaded": sum(o.whole for o in outcomes),
                       "failures": [o.detail for o in outcomes if not o.whole]}
    return found


# ---- corruption ------------------------------------------------------------------------------------------------------
KINDS = {"bit flip": 0.5, "zeroed page": 0.15, "truncated": 0.1, "deleted": 0.05, "shard of another step": 0.08,
         "stale metadata": 0.07, "another run's": 0.05}
"""Kind of fault -> share of the trials."""


def _flip(path: Path, rng: random.Random) -> None:
    data = bytearray(path.read_bytes())
    data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
    path.write_bytes(data)


def _zero(path: Path, rng: random.Random) -> None:
    data = bytearray(path.read_bytes())
    at = 4096 * rng.randrange(-(-len(data) // 4096))
    data[at:at + 4096] = bytes(len(data[at:at + 4096]))
    path.write_bytes(data)


def _truncate(path: Path, rng: random.Random) -> None:
    os.truncate(path, rng.randrange(path.stat().st_size))


DAMAGES = {"bit flip": _flip, "zeroed page": _zero, "truncated": _truncate, "deleted": lambda p, _: p.unlink()}


@contextlib.contextmanager
def restored(files: Sequence[Path]) -> Iterator[None]:
    """Put these files back afterwards."""
    before = {f: f.read_bytes() for f in files}
    try:
        yield
    finally:
        for f, data in before.items():
            f.write_bytes(data)


class OurCheckpoints:
    """Two steps of a run, and the same steps of another run."""

    def __init__(self, folder: Path) -> None:
        self.run, self.other = folder / "run", folder / "other"
        for run, run_id in ((self.run, "run-a"), (self.other, "run-b")):
            for step in (1, 2):
                state = {k: torch.rand_like(v) for k, v in state_at(step).items()}
                save_step(run, step, run_id=run_id, state=state)
                if run == self.run and step == 1:
                    self.state = state
        self.target = step_dir(self.run, 2)

    def trial(self, kind: str, rng: random.Random) -> str:
        """`detected and named`, or what went wrong, for one fault in step 2."""
        rank = rng.randrange(2)
        data, manifest, commit = f"rank-{rank:05d}.bin", f"rank-{rank:05d}.json", COMMIT
        source = step_dir(self.other, 2) if kind == "another run's" else step_dir(self.run, 1)
        choices = {"shard of another step": ([data], [data, manifest]),
                   "stale metadata": ([manifest], [commit], [manifest, commit]),
                   "another run's": ([data], [data, manifest], [manifest], [commit],
                                     sorted(p.name for p in source.iterdir()))}
        names = [rng.choices((data, manifest, commit), (6, 3, 1))[0]] if kind in DAMAGES else rng.choice(choices[kind])
        with restored([self.target / name for name in names]):
            if kind in DAMAGES:
                DAMAGES[kind](self.target / names[0], rng)
            else:
                for name in names:
                    shutil.copyfile(source / name, self.target / name)
            try:
                with open_checkpoint(self.run, run_id="run-a") as opened:
                    if opened.step == 2:
                        return "SILENT"
                    if opened.step != 1 or not holds(opened, self.state):
                        return "did not take the previous good one"
                    told = " ".join(opened.passed_over)
            except CheckpointError as e:
                return f"took none: {e}"
        named = self.target.name in told and any(n in told for n in names)
        return "detected and named" if named else f"not named: {names} {told}"


class _Other:
    """A format of others, with as much data: files of two steps in folder/1 and folder/2."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        for step in (1, 2):
            (folder / str(step)).mkdir(parents=True)
            self.state = {f"{n}/{s}": torch.rand_like(t) for (n, s), t in state_at(step).items()}
            self.save(folder / str(step))
        self.target = folder / "2"

    def trial(self, kind: str, rng: random.Random) -> str | None:
        """`raised`, `SILENT` (loaded, other values than saved), `harmless` (loaded, equal); None: not possible here."""
        files = sorted(p for p in self.target.iterdir() if p.is_file())
        with restored(files):
            if kind in DAMAGES:
                chosen = rng.choices(files, [f.stat().st_size for f in files])[0]
                DAMAGES[kind](chosen, rng)
            else:
                names = self.exchangeable.get(kind)
                if not names:
                    return None
                for name in names:
                    shutil.copyfile(self.folder / "1" / name, self.target / name)
            try:
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore")
                    found = self.load(self.target)
            except BaseException as e:
                if isinstance(e, KeyboardInterrupt):
                    raise
                return "raised"
        equal = all(k in found and torch.equal(found[k], v) for k, v in self.state.items())
        return "harmless" if equal else "SILENT"


class TorchSave(_Other):
    exchangeable: ClassVar[dict[str, list[str]]] = {}

    def save(self, path: Path) -> None:
        torch.save(self.state, path / "state.pt")

    def load(self, path: Path) -> dict[str, torch.Tensor]:
        return torch.load(path / "state.pt", weights_only=True)


class Safetensors(_Other):
    exchangeable: ClassVar[dict[str, list[str]]] = {}

    def save(self, path: Path) -> None:
        save_file(self.state, path / "state.safetensors")

    def load(self, path: Path) -> dict[str, torch.Tensor]:
        return {k: v.clone() for k, v in load_file(path / "state.safetensors").items()}


class DCP(_Other):
    exchangeable: ClassVar[dict[str, list[str]]] = {
        "shard of another step": ["__0_0.distcp"], "stale metadata": [".metadata"]}

    def save(self, path: Path) -> None:
        dcp.save(self.state, storage_writer=dcp.FileSystemWriter(path, single_file_per_rank=True), no_dist=True)

    def load(self, path: Path) -> dict[str, torch.Tensor]:
        found = {k: torch.zeros_like(v) for k, v in self.state.items()}
        dcp.load(found, storage_reader=dcp.FileSystemReader(path), no_dist=True)
        return found


OTHERS = {"torch.distributed.checkpoint": DCP, "torch.save": TorchSave, "safetensors": Safetensors}


def corruptions(count: int, *, seed: int = 0, folder: Path | None = None, others: bool = True) -> dict[str, Any]:
    """`count` corruptions of each format; kind -> outcome -> trials, and totals."""
    with tempfile.TemporaryDirectory(dir=folder, prefix="officina-corrupt-") as scratch, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        subjects = {"officina": OurCheckpoints(Path(scratch) / "ours")}
        subjects |= {name: make(Path(scratch) / name) for name, make in OTHERS.items()} if others else {}
        found = {}
        for name, subject in subjects.items():
            rng = random.Random(seed)
            by_kind: dict[str, Counter[str]] = {k: Counter() for k in KINDS}
            done = 0
            while done < count:
                kind = rng.choices(list(KINDS), list(KINDS.values()))[0]
                outcome = subject.trial(kind, rng)
                if outcome is not None:
                    by_kind[kind][outcome] += 1
                    done += 1
            total = sum(by_kind.values(), Counter())
            found[name] = {"trials": done, "total": dict(total),
                           "by_kind": {k: dict(c) for k, c in by_kind.items() if c}}
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--corruptions", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--folder", type=Path, help="where to write")
    parser.add_argument("--out", type=Path, help="record file (default: benchmarks/results/checkpoint_faults.json)")
    args = parser.parse_args()
    torch.set_num_threads(1)
    results = {"corruptions": corruptions(args.corruptions, seed=args.seed, folder=args.folder)}
    for name, r in results["corruptions"].items():
        print(f"{name:30} {r['trials']} corruptions: {r['total']}", flush=True)
    results["kills"] = kills(args.kills, seed=args.seed, folder=args.folder)
    for mode, r in results["kills"].items():
        print(f"{mode:30} {r['kills']} kills, {r['kills_during_a_save']} during a save; whole afterwards: "
              f"{r['whole_checkpoint_loaded']}")
    settings = {"seed": args.seed, "kills": args.kills, "corruptions": args.corruptions, "state_bytes": sum(
        t.nbytes for t in state_at(0).values()), "ranks": 2}
    print("record:", write_record(record("checkpoint_faults", results, settings=settings), args.out))
    ours = results["corruptions"]["officina"]
    good = ours["total"] == {"detected and named": ours["trials"]} and not any(
        r["failures"] for r in results["kills"].values())
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
