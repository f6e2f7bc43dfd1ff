"""What the loader costs beside its speed: reading cold, opening a huge mixture, resuming, verifying, memory; and its shuffle.

A measurement that needs a fresh process calls this module with its own name: `... officina.benchmarks.loader_costs open DIR`.
"""

import json
import os
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import psutil

from officina.benchmarks.loader_anchors import BATCH, SEQ_LEN
from officina.benchmarks.loader_data import make_run
from officina.benchmarks.record import interleaved, summary
from officina.trainer.config import SourceConfig
from officina.trainer.data.loader import Loader
from officina.trainer.data.manifest import ShardEntry, write_manifest
from officina.trainer.data.order import extend_timeline, permute, permute_blocks, round_keys
from officina.trainer.data.shard_writer import ShardWriter

COLD_ROWS = 64
"""Of a step from the disk."""
SOURCES, SHARDS_EACH = 400, 38
SHARD_TOKENS = 1_000_000_000
"""4 GB each; 400 x 38 of them hold 3.7e9 rows of 4,096."""


def measure(folder: Path, *, repeats: int) -> dict[str, Any]:
    """All of them, on the data set that the race used."""
    return {"cold": cold(folder, repeats), "verification": verification(folder, repeats),
            "open": in_process("open", folder, repeats), "resume": in_process("resume", folder, repeats),
            "memory": in_process("memory", folder, 1)["last"],
            "shuffle": shuffle()}


def in_process(name: str, folder: Path, repeats: int) -> dict[str, Any]:
    """Numbers that a fresh process says, each summed up."""
    if name == "open":
        write_huge(folder / "huge")
    said = []
    for _ in range(repeats):
        done = subprocess.run([sys.executable, "-m", "officina.benchmarks.loader_costs", name, str(folder)], check=True,
                              text=True, capture_output=True, env=os.environ | {"PYTHONSAFEPATH": "1"})
        said.append(json.loads(done.stdout.splitlines()[-1]))
    return {"last": said[-1]} | {key: summary([each[key] for each in said]) for key in said[-1]}


# ---- cold ------------------------------------------------------------------------------------------------------------
def cold(folder: Path, repeats: int) -> dict[str, Any]:
    """Bytes per second from files that are not in memory: from first to last byte, and shuffled by blocks of rows."""
    files = sorted((folder / "officina" / "shards").iterdir())

    def forget() -> None:
        for path in files:
            descriptor = os.open(path, os.O_RDONLY)
            os.fsync(descriptor)
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
            os.close(descriptor)

    def in_order() -> float:
        forget()
        begun, n, buffer = time.perf_counter(), 0, bytearray(8 << 20)
        for path in files:
            with open(path, "rb", buffering=0) as file:
                while read := file.readinto(buffer):
                    n += read
        return n / (time.perf_counter() - begun)

    def shuffled(block: int, read: str) -> float:
        forget()
        loader_run = make_run({"bench": folder / "officina"}, rows=COLD_ROWS, shuffle_block=block, read=read)
        begun = time.perf_counter()
        with Loader(loader_run, rank=0, world_size=1, position=0) as loader:
            steps = loader._reader.rows["bench"] // COLD_ROWS
            for _ in range(steps):
                loader.next_step()
        return steps * COLD_ROWS * SEQ_LEN * 4 / (time.perf_counter() - begun)

    cases = {"in order": in_order} | {f"shuffle_block={block}, {read}": lambda block=block, read=read: shuffled(block, read)
                                      for block in (256, 1) for read in ("mmap", "pread")}
    found = interleaved(cases, repeats, warmup=0)
    return {name: {"bytes_per_s": summary(values), "share": summary(
        [a / b for a, b in zip(values, found["in order"], strict=True)])} for name, values in found.items()}


# ---- verification ----------------------------------------------------------------------------------------------------
def verification(folder: Path, repeats: int) -> dict[str, Any]:
    """CPU seconds of an epoch in memory, in which each block is verified on first touch, and of one in which all are known."""
    loader_run = make_run({"bench": folder / "officina"})

    def epoch(known: bool) -> float:
        with Loader(loader_run, rank=0, world_size=1, position=0) as loader:
            stream = loader._reader.streams["bench"]
            for number in range(len(stream.entries)):
                stream.shard(number)._checked[:] = known
            begun = time.process_time()
            for _ in range(loader._reader.rows["bench"] // BATCH):
                loader.next_step()
            return time.process_time() - begun

    found = interleaved({"first epoch": lambda: epoch(False), "verified before": lambda: epoch(True)}, repeats)
    slower = [a / b - 1 for a, b in zip(found["first epoch"], found["verified before"], strict=True)]
    return {name: {"cpu_s": summary(times)} for name, times in found.items()} | {"slower": summary(slower)}


# ---- open, resume, memory: in a process of their own ------------------------------------------------------------------
def write_huge(folder: Path) -> None:
    """400 data sets of 38 shards of 4 GB. The shards are one sparse file under many names: no disk holds 61 TB here."""
    folder.mkdir()
    writer = ShardWriter(folder / "shard.dli", dtype="u32", holds_tokens=False)
    document = np.zeros(1_000_000, np.uint32)
    for _ in range(SHARD_TOKENS // len(document)):
        writer.add(document)
    entry = writer.close(relative_to=folder, split="train")
    with open(folder / "shard.bin", "wb") as file:
        file.truncate(SHARD_TOKENS * 4)
    for number in range(SOURCES):
        shards = folder / f"source{number:03d}" / "shards"
        shards.mkdir(parents=True)
        entries = []
        for i in range(SHARDS_EACH):
            for suffix in (".bin", ".dli"):
                os.link(folder / f"shard{suffix}", shards / f"train-{i:05d}{suffix}")
            about = {"tokens": entry.tokens, "documents": entry.documents, "xxh3": entry.xxh3}
            entries.append(ShardEntry(path=f"shards/train-{i:05d}.bin", split="train", bytes=SHARD_TOKENS * 4, kind="megatron",
                                      sha256=f"{number * 100 + i:064x}", **about))
        write_manifest(shards.parent, entries, {}, kind="tokens", dtype="u32", name=f"source{number}")


def _open(folder: Path) -> dict[str, float]:
    before = psutil.Process().memory_info().rss
    begun = time.perf_counter()
    huge = make_run({f"s{n}": folder / "huge" / f"source{n:03d}" for n in range(SOURCES)})
    with Loader(huge, rank=0, world_size=1, position=123_456_789) as loader:
        loader.next_step()
        taken = time.perf_counter() - begun
        rows = sum(loader._reader.rows.values())
    return {"time_s": taken, "grown_bytes": psutil.Process().memory_info().rss - before, "rows": rows}


def _resume(folder: Path) -> dict[str, float]:
    names = {f"s{n}": folder / "officina" for n in range(8)}
    changed = make_run(names)
    sources = {name: SourceConfig(path=str(path), weight=1.0 + i) for i, (name, path) in enumerate(names.items())}
    changed = replace(changed, data=extend_timeline(changed.data, 40_000, sources))
    with Loader(changed, rank=0, world_size=3, position=80_000) as loader:
        state = loader.state()
    begun = time.perf_counter()
    with Loader(changed, rank=1, world_size=2, position=80_000) as loader:
        loader.check_state(state)
        loader.next_step()
        taken = time.perf_counter() - begun
    return {"time_s": taken, "state_bytes": len(json.dumps(state))}


def _memory(folder: Path) -> dict[str, float]:
    small = make_run({"bench": folder / "officina"})
    with Loader(small, rank=0, world_size=1, position=0) as loader:
        for _ in range(4 * (loader._reader.rows["bench"] // BATCH)):
            loader.next_step()  # every page of the map is there
        before, steps, begun = psutil.Process().memory_info().rss, 0, time.perf_counter()
        while time.perf_counter() - begun < 60 and steps < 1_000_000:
            loader.next_step()
            steps += 1
        return {"batches": steps, "grown_bytes": psutil.Process().memory_info().rss - before}


# ---- shuffle ---------------------------------------------------------------------------------------------------------
def shuffle(rows: int = 1_000_000, shards: int = 64) -> dict[str, Any]:
    """How evenly an epoch of a million rows spreads; a true permutation beside ours.

    same_shard: share of neighbouring samples from one of 64 shards (chance: 1/64). chi2: of the tenth of the epoch against the
    shard, 64 x 10 cells, divided by its degrees of freedom (chance: 1).
    """
    places, keys = np.arange(rows), round_keys(0, "shuffle", 0)
    orders = {"numpy permutation": np.random.default_rng(0).permutation(rows), "shuffle_block=1": permute(places, rows, keys)}
    orders |= {f"shuffle_block={block}": permute_blocks(places, rows, block, keys) for block in (64, 256, 1024)}
    found = {}
    for name, order in orders.items():
        shard = order * shards // rows
        cells = np.bincount(places * 10 // rows * shards + shard, minlength=10 * shards)
        expected = rows / (10 * shards)
        chi2 = float(((cells - expected) ** 2 / expected).sum()) / (9 * (shards - 1))
        found[name] = {"same_shard": float(np.mean(shard[1:] == shard[:-1])), "chi2_per_freedom": chi2}
    return found


if __name__ == "__main__":
    import torch

    torch.set_num_threads(1)
    name, folder = sys.argv[1], Path(sys.argv[2])
    print(json.dumps({"open": _open, "resume": _resume, "memory": _memory}[name](folder)))
