"""Saving and loading one state: officina against torch.save and torch.distributed.checkpoint (DCP), same disk.

    python -m officina.benchmarks.checkpoint --gib 1 --ranks 2 --repeats 5

Every case is durable: it ends when the bytes are synced. Times are the slowest rank's. `stall` is how long an
asynchronous save keeps the loop from going on, its settling included; the ranks compute between.
"""

import argparse
import datetime
import multiprocessing
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.tensor import DTensor, Shard, init_device_mesh

from officina.benchmarks.record import interleaved, record, summary, write_record
from officina.trainer.checkpoint.content import verify_loaded
from officina.trainer.checkpoint.layout import TrainState
from officina.trainer.checkpoint.read import open_checkpoint
from officina.trainer.checkpoint.write import Saver
from officina.trainer.config import CheckpointConfig
from officina.trainer.ranks import RankEnv, Ranks
from officina.trainer.state import EXP_AVG, EXP_AVG_SQ, PARAM, Piece

SLOTS = (PARAM, EXP_AVG, EXP_AVG_SQ)


class State:
    """Matrices of 4 Mi elements and their moments, cut by rows over the ranks as FSDP2 cuts them."""

    def __init__(self, total_bytes: int, rank: int, world_size: int) -> None:
        count = max(1, round(total_bytes / (len(SLOTS) * 4 * (4 << 20))))
        rows = 2048 // world_size
        self.rank, self.world_size = rank, world_size
        self.local = {(f"blocks.{i}.w", slot): torch.randn(rows, 2048) for i in range(count) for slot in SLOTS}

    @property
    def bytes_per_rank(self) -> int:
        return sum(t.nbytes for t in self.local.values())

    def pieces(self) -> Iterator[Piece]:
        """As an engine exports it."""
        for (name, slot), t in self.local.items():
            shape = (t.shape[0] * self.world_size, t.shape[1])
            start = self.rank * t.numel()
            yield Piece(name, slot, shape, start, start + t.numel(), t.reshape(-1))

    def sharded(self, mesh) -> dict[str, DTensor]:
        """As DCP wants it."""
        return {f"{n}/{s}": DTensor.from_local(t, mesh, [Shard(0)]) for (n, s), t in self.local.items()}


class Bench:
    """The cases of one rank."""

    def __init__(self, folder: Path, total_bytes: int, ranks: Ranks) -> None:
        self.folder, self.ranks = folder, ranks
        self.state = State(total_bytes, ranks.rank, ranks.world_size)
        self.mesh = init_device_mesh("cpu", (ranks.world_size,))
        self.saver: Saver | None = None
        self.second_group = dist.new_group(backend="gloo")
        """dcp.async_save talks in its thread, so it needs a group of its own."""

    def timed(self, work: Callable[[], Any]) -> float:
        """Seconds until the slowest rank is through."""
        if self.ranks.rank == 0:
            os.sync()
        self.ranks.barrier()
        started = time.perf_counter()
        work()
        self.ranks.barrier()
        return time.perf_counter() - started

    def fresh(self, name: str) -> Path:
        """An empty folder for a case."""
        path = self.folder / name
        if self.ranks.rank == 0:
            shutil.rmtree(path, ignore_errors=True)
            path.mkdir()
        self.ranks.barrier()
        return path

    # ---- saving
    def save_officina(self) -> float:
        path = self.fresh("officina")
        self.saver = self.saver or Saver(path, self.ranks, CheckpointConfig(), "bench")
        outcome = []
        seconds = self.timed(lambda: outcome.append(self.saver.save(1, self.state.pieces(), TrainState(step=1))))
        assert outcome[0].status == "saved", outcome[0].problem
        return seconds

    def save_torch(self) -> float:
        path = self.fresh("torch")

        def work() -> None:
            with open(path / f"{self.ranks.rank}.pt", "wb") as file:
                torch.save({f"{n}/{s}": t for (n, s), t in self.state.local.items()}, file)
                file.flush()
                os.fsync(file.fileno())

        return self.timed(work)

    def save_dcp(self) -> float:
        path = self.fresh("dcp")
        writer = dcp.FileSystemWriter(path)  # sync_files is on by default
        return self.timed(lambda: dcp.save(self.state.sharded(self.mesh), storage_writer=writer))

    # ---- loading
    def load_officina(self) -> float:
        def work() -> None:
            with open_checkpoint(self.folder / "officina", ranks=self.ranks) as opened:
                for p in self.state.pieces():
                    self.state.local[p.name, p.slot].view(-1).copy_(opened.read(p.name, p.slot, p.start, p.stop))

        return self.timed(work)

    def load_torch(self) -> float:
        def work() -> None:
            found = torch.load(self.folder / "torch" / f"{self.ranks.rank}.pt", weights_only=True)
            for (n, s), t in self.state.local.items():
                t.copy_(found[f"{n}/{s}"])

        return self.timed(work)

    def load_dcp(self) -> float:
        return self.timed(lambda: dcp.load(self.state.sharded(self.mesh),
                                           storage_reader=dcp.FileSystemReader(self.folder / "dcp")))

    def check_officina(self) -> float:
        with open_checkpoint(self.folder / "officina", ranks=self.ranks) as opened:
            return self.timed(lambda: verify_loaded(self.state.pieces, opened, self.ranks))

    def cold(self, name: str, load: Callable[[], float]) -> Callable[[], float]:
        """The same load with this case's files dropped from the page cache."""
        def measure() -> float:
            if self.ranks.rank == 0:
                for file in (p for p in (self.folder / name).rglob("*") if p.is_file()):
                    fd = os.open(file, os.O_RDONLY)
                    os.fsync(fd)
                    os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
                    os.close(fd)
            return load()

        return measure

    # ---- asynchronous saving
    def compute(self) -> None:
        """One training step's stand-in, 10 to 20 ms."""
        a = torch.ones(512, 512)
        for _ in range(4):
            a = (a @ a).clamp(0, 1)

    def train_a_little(self) -> None:
        """Steps between saves."""
        for _ in range(40):
            self.compute()
            self.ranks.sum([0.0])

    def async_officina(self, saves: int) -> list[tuple[float, float]]:
        """(stall, durable) seconds of each of some saves in one process; the first one makes its buffers."""
        path = self.fresh("officina-async")
        saver = Saver(path, self.ranks, CheckpointConfig(asynchronous=True, keep_last=1), "bench")
        saver.prepare(self.state.pieces())
        for _ in range(3):  # buffers are made in the background of the first steps
            self.train_a_little()
        found = []
        for step in range(1, saves + 1):
            self.train_a_little()
            outcome = saver.save(step, self.state.pieces(), TrainState(step=step))
            assert outcome.status == "pending", outcome
            while True:
                self.compute()
                outcome = saver.settle(self.ranks.sum([saver.pending_vote()])[0])
                if outcome:
                    break
            assert outcome.status == "saved", outcome.problem
            found.append((self.slowest(outcome.stall_s), self.slowest(outcome.durable_s)))
        saver.wait()
        return found

    def async_dcp(self, saves: int) -> list[tuple[float, float]]:
        """The same with dcp.async_save (a thread)."""
        found = []
        for _ in range(saves):
            path = self.fresh("dcp-async")
            self.train_a_little()
            started = time.perf_counter()
            future = dcp.async_save(self.state.sharded(self.mesh), storage_writer=dcp.FileSystemWriter(path),
                                    process_group=self.second_group)
            stall = time.perf_counter() - started
            while self.ranks.sum([float(future.done())])[0] < self.ranks.world_size:
                self.compute()
            future.result()
            found.append((self.slowest(stall), self.slowest(time.perf_counter() - started)))
        return found

    def slowest(self, seconds: float) -> float:
        """The largest of all ranks' values."""
        table = [0.0] * self.ranks.world_size
        table[self.ranks.rank] = seconds
        return max(self.ranks.sum(table))


def _rank(rank: int, world_size: int, folder: str, total_bytes: int, repeats: int, out: Any) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=world_size,
                            timeout=datetime.timedelta(minutes=10))
    ranks = Ranks(RankEnv(rank, rank, world_size, world_size, "officina"), torch.device("cpu"))
    bench = Bench(Path(folder), total_bytes, ranks)
    # Memory that a virtual machine has never touched is slow for whoever comes first; touch it for nobody's benefit.
    ballast = torch.zeros(bench.state.bytes_per_rank * 2, dtype=torch.uint8)
    del ballast
    times = interleaved({"save officina": bench.save_officina, "save torch.save": bench.save_torch,
                         "save dcp": bench.save_dcp}, repeats)
    times |= interleaved({"load warm officina": bench.load_officina, "load warm torch.load": bench.load_torch,
                          "load warm dcp": bench.load_dcp, "self-check officina": bench.check_officina}, repeats)
    times |= interleaved({"load cold officina": bench.cold("officina", bench.load_officina),
                          "load cold torch.load": bench.cold("torch", bench.load_torch),
                          "load cold dcp": bench.cold("dcp", bench.load_dcp)}, repeats)
    ours, theirs = bench.async_officina(1 + repeats), bench.async_dcp(1 + repeats)
    if rank == 0:
        out.put((bench.state.bytes_per_rank * world_size, times, {"officina": ours, "dcp": theirs}))
    ranks.barrier()
    dist.destroy_process_group()


def run(gib: float, world_size: int, repeats: int, folder: Path | None = None) -> dict[str, Any]:
    """Measure all cases; returns the record."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__])
    with tempfile.TemporaryDirectory(dir=folder, prefix="officina-bench-") as scratch:
        out = context.SimpleQueue()
        processes = [context.Process(target=_rank, args=(r, world_size, scratch, int(gib * 2**30), repeats, out))
                     for r in range(world_size)]
        for p in processes:
            p.start()
        while out.empty():
            if any(p.exitcode for p in processes):
                for p in processes:
                    p.kill()
                raise RuntimeError("a rank of the benchmark failed; its traceback is above")
            time.sleep(0.1)
        total, times, stalls = out.get()
        for p in processes:
            p.join()
    results: dict[str, Any] = {"state_bytes": total}
    for case, seconds in times.items():
        results[case] = {"seconds": summary(seconds), "bytes_per_s": total / summary(seconds)["median"]}
    for name, found in stalls.items():
        results[f"async {name}"] = {"first_stall_s": found[0][0], "later_stall_s": summary([s for s, _ in found[1:]]),
                                    "durable_s": summary([d for _, d in found[1:]])}
    settings = {"gib": gib, "ranks": world_size, "threads_per_rank": 1, "durable": "fsync in every case"}
    return record("checkpoint", results, settings=settings, repeats=repeats)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gib", type=float, default=1.0, help="size of the state over all ranks")
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--folder", type=Path, help="where to write; its file system is what is measured")
    parser.add_argument("--out", type=Path, help="record file (default: benchmarks/results/checkpoint.json)")
    args = parser.parse_args()
    found = run(args.gib, args.ranks, args.repeats, args.folder)
    for case, r in found["results"].items():
        if isinstance(r, dict) and "seconds" in r:
            print(f"{case:24} {r['seconds']['median']:7.3f} s  {r['bytes_per_s'] / 1e9:6.2f} GB/s")
        elif isinstance(r, dict):
            print(f"{case:24} stall first {r['first_stall_s']:.3f} s, later {r['later_stall_s']['median']:.3f} s; "
                  f"durable {r['durable_s']['median']:.3f} s")
    print("record:", write_record(found, args.out))


if __name__ == "__main__":
    main()
