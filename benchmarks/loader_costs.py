"""What the loader costs beside its speed: reading cold, opening a huge mixture, resuming, verifying, memory; and its shuffle.

A measurement that needs a fresh process calls this module with its own name: `... officina.benchmarks.loader_costs open DIR`.
"""

import json
import os
import random
import shutil
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import psutil

from officina.benchmarks.loader_anchors import BATCH, SEQ_LEN
from officina.benchmarks.loader_data import make_run
from officina.benchmarks.record import interleaved, summary
from officina.benchmarks.turns import median_interval
from officina.trainer.config import RunConfig, SourceConfig
from officina.trainer.data.loader import Loader
from officina.trainer.data.manifest import ShardEntry, write_manifest
from officina.trainer.data.order import extend_timeline, permute, permute_blocks, round_keys
from officina.trainer.data.shard_writer import ShardWriter, SplitWriter
from officina.trainer.data.storage import THREADS

COLD_TOKENS, COLD_SHARD_BYTES = 1 << 28, 256 << 20
"""1 GiB of data that are read from the disk, in files of 256 MiB."""
COLD_ROWS = 64
"""Of a step from the disk."""
IN_MEMORY = 0.01
"""Share of the pages that may still be in memory when a file counts as cold."""
VERIFICATIONS = 61
"""Least number of pairs of epochs: one takes a second, and two of them may differ by a quarter on a machine with others."""
GROWTH_BATCHES = 1_000_000
"""Of one row each."""
SOURCES, SHARDS_EACH = 400, 38
SHARD_TOKENS = 1_000_000_000
"""4 GB each; 400 x 38 of them hold 3.7e9 rows of 4,096."""


def measure(folder: Path, *, repeats: int) -> dict[str, Any]:
    """All of them, on the data set that the race used."""
    return {"cold": cold(folder / "cold", repeats), "verification": verification(folder, max(repeats, VERIFICATIONS)),
            "open": in_process("open", folder, repeats), "resume": in_process("resume", folder, repeats),
            "memory": in_process("memory", folder, 1)["last"],
            "shuffle": shuffle()}


def in_process(name: str, folder: Path, repeats: int) -> dict[str, Any]:
    """Numbers that a fresh process says, each summed up."""
    if name in _WRITERS:
        _WRITERS[name](folder)
    said = [fresh(name, folder) for _ in range(repeats)]
    return {"last": said[-1]} | {key: summary([each[key] for each in said]) for key in said[-1]}


def fresh(name: str, folder: Path, *words: str) -> dict[str, float]:
    """Numbers that a process of its own says, which ends with all that it holds. Raises CalledProcessError."""
    done = subprocess.run([sys.executable, "-m", "officina.benchmarks.loader_costs", name, str(folder), *words], check=True,
                          text=True, stdout=subprocess.PIPE, env=os.environ | {"PYTHONSAFEPATH": "1"})
    return json.loads(done.stdout.splitlines()[-1])


# ---- cold ------------------------------------------------------------------------------------------------------------
def cold(folder: Path, repeats: int) -> dict[str, Any]:
    """Bytes per second from files that are not in memory: shuffled by blocks of rows and by rows, and as plain readers do.

    The plain readers: the files from first byte to last, 8 MiB a read; and rows of 16 KiB in a random order, by as many threads
    as the loader has, each row once. Shares are of what such a reader did next before. Batches are of tokens and labels; once
    also with positions and documents, seven times the bytes that are read, where the processor is slower than the disk.
    """
    if not folder.exists():
        write_cold(folder)
    words = {"in order": ["in order"], "rows at random": ["at random"]}
    words |= {f"shuffle_block={block}, {read}": [str(block), read] for block in (256, 1) for read in ("mmap", "pread")}
    words["shuffle_block=256, mmap, with documents"] = ["256", "mmap", "documents"]
    found = interleaved({name: lambda say=say: fresh("cold", folder, *say)["bytes_per_s"] for name, say in words.items()},
                        repeats, warmup=0)
    return {name: {"bytes_per_s": summary(values), "share": _share(values, found["in order"]),
                   "share_of_random": _share(values, found["rows at random"])} for name, values in found.items()}


def _share(values: list[float], of: list[float]) -> dict[str, Any]:
    shares = [a / b for a, b in zip(values, of, strict=True)]
    low, high = median_interval(shares)
    return summary(shares) | {"low": low, "high": high}


def write_cold(folder: Path) -> None:
    """A data set of documents of a million random tokens."""
    document = np.random.default_rng(0).integers(1, 50_000, 1 << 20, dtype=np.uint32)
    with SplitWriter(folder, "train", dtype="u32", shard_bytes=COLD_SHARD_BYTES) as writer:
        for number in range(COLD_TOKENS // len(document)):
            writer.add(np.roll(document, number))
        entries = writer.close()
    write_manifest(folder, entries, {}, kind="tokens", dtype="u32", name="cold")


def forget(files: list[Path]) -> None:
    """Drop the files from the page cache. Raises RuntimeError if they stay in it."""
    page = bytearray(4096)
    for path in files:
        descriptor = os.open(path, os.O_RDONLY)
        os.fsync(descriptor)
        places = range(0, path.stat().st_size - len(page), 1 << 20)
        for _ in range(10):  # what a process that has ended asked for may still be on its way
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
            kept = sum(_is_in_memory(descriptor, page, place) for place in places)
            if kept <= len(places) * IN_MEMORY:
                break
            time.sleep(0.2)
        os.close(descriptor)
        if kept > len(places) * IN_MEMORY:
            raise RuntimeError(f"{path}: {kept} of {len(places)} pages stay in memory: another process holds them, or the file "
                               "system keeps none on a disk. Name a folder on a disk by TMPDIR.")


def _is_in_memory(descriptor: int, page: bytearray, place: int) -> bool:
    try:
        return os.preadv(descriptor, [page], place, os.RWF_NOWAIT) > 0
    except BlockingIOError:
        return False


def _cold(folder: Path, how: str, read: str = "", documents: str = "") -> dict[str, float]:
    files = sorted((folder / "shards").iterdir())
    forget(files)
    if how in ("in order", "at random"):
        begun = time.perf_counter()
        n_bytes = _read_in_order(files) if how == "in order" else _read_at_random(files)
        return {"bytes_per_s": n_bytes / (time.perf_counter() - begun)}
    loader_run = make_run({"cold": folder}, rows=COLD_ROWS, shuffle_block=int(how), read=read, mask_documents=bool(documents))
    begun = time.perf_counter()
    with Loader(loader_run, rank=0, world_size=1, position=0) as loader:
        steps = loader._reader.rows["cold"] // COLD_ROWS
        for _ in range(steps):
            loader.next_step()
    return {"bytes_per_s": steps * COLD_ROWS * SEQ_LEN * 4 / (time.perf_counter() - begun)}


def _read_in_order(files: list[Path]) -> int:
    buffer, n = bytearray(8 << 20), 0
    for path in files:
        with open(path, "rb", buffering=0) as file:
            while read := file.readinto(buffer):
                n += read
    return n


def _read_at_random(files: list[Path]) -> int:
    row_bytes = SEQ_LEN * 4
    descriptors = [os.open(path, os.O_RDONLY) for path in files]
    rows = [(file, place) for file, path in zip(descriptors, files, strict=True)
            for place in range(0, path.stat().st_size - row_bytes, row_bytes)]
    for file in descriptors:
        os.posix_fadvise(file, 0, 0, os.POSIX_FADV_RANDOM)  # a row, and nothing around it
    random.Random(0).shuffle(rows)

    def read(part: list[tuple[int, int]]) -> None:
        buffer = bytearray(row_bytes)
        for file, place in part:
            os.preadv(file, [buffer], place)

    with ThreadPoolExecutor(THREADS) as pool:
        list(pool.map(read, [rows[first::THREADS] for first in range(THREADS)]))
    return len(rows) * row_bytes


# ---- verification ----------------------------------------------------------------------------------------------------
def verification(folder: Path, repeats: int) -> dict[str, Any]:
    """Seconds, and CPU seconds of all threads, of an epoch in memory in which each block is verified on first touch, and of
    one in which all are known. Prefetch is on; nobody computes beside it."""
    loader_run = make_run({"bench": folder / "officina"})
    found: dict[bool, list[tuple[float, float]]] = {False: [], True: []}
    for turn in range(1 + repeats):
        for known in (False, True) if turn % 2 else (True, False):
            with Loader(loader_run, rank=0, world_size=1, position=0) as loader:
                stream = loader._reader.streams["bench"]
                for number in range(len(stream.entries)):
                    stream.shard(number)._checked[:] = known
                for blocks in loader._ahead._blocks:
                    blocks._met[:] = known
                begun, cpu = time.perf_counter(), time.process_time()
                for _ in range(loader._reader.rows["bench"] // BATCH):
                    loader.next_step()
                if turn:
                    found[known].append((time.perf_counter() - begun, time.process_time() - cpu))
    (time_s, cpu_s), (known_s, known_cpu_s) = (zip(*found[known], strict=True) for known in (False, True))
    slower = {}
    for name, first, later in (("of_time", time_s, known_s), ("slower", cpu_s, known_cpu_s)):
        share = _share(list(first), list(later))
        slower[name] = {key: value - 1 for key, value in share.items() if key != "values"}
    return {"first epoch": {"time_s": summary(list(time_s)), "cpu_s": summary(list(cpu_s))},
            "verified before": {"time_s": summary(list(known_s)), "cpu_s": summary(list(known_cpu_s))}} | slower


# ---- open, resume, memory: in a process of their own ------------------------------------------------------------------
def write_huge(data: Path) -> None:
    """400 data sets of 38 shards of 4 GB. The shards are one sparse file under many names: no disk holds 61 TB here."""
    folder = data / "huge"
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
        rows, state = sum(loader._reader.rows.values()), loader.state()
    return {"time_s": taken, "grown_bytes": psutil.Process().memory_info().rss - before, "rows": rows,
            "state_bytes": len(json.dumps(state))}


def write_resume(folder: Path) -> None:
    """Eight data sets, the same tokens under eight names, and the state that rank 0 of 3 saved on them."""
    for number in range(8):
        shutil.copytree(folder / "officina", folder / "resume" / f"source{number}", copy_function=os.link)
    with Loader(_resumed(folder), rank=0, world_size=3, position=80_000) as loader:
        (folder / "resume" / "state.json").write_text(json.dumps(loader.state()))


def _resumed(folder: Path) -> RunConfig:
    """A run over them whose mixture changed before the position that it goes on from."""
    names = {f"s{n}": folder / "resume" / f"source{n}" for n in range(8)}
    sources = {name: SourceConfig(path=str(path), weight=1.0 + i) for i, (name, path) in enumerate(names.items())}
    run = make_run(names)
    return replace(run, data=extend_timeline(run.data, 40_000, sources))


def _resume(folder: Path) -> dict[str, float]:
    changed, state = _resumed(folder), json.loads((folder / "resume" / "state.json").read_text())
    begun = time.perf_counter()
    with Loader(changed, rank=1, world_size=2, position=80_000) as loader:
        loader.check_state(state)
        loader.next_step()
        taken = time.perf_counter() - begun
        begun = time.perf_counter()
        saved = json.dumps(loader.state())
        return {"time_s": taken, "state_s": time.perf_counter() - begun, "state_bytes": len(saved)}


def _memory(folder: Path) -> dict[str, float]:
    small = make_run({"bench": folder / "officina"}, rows=1)
    with Loader(small, rank=0, world_size=1, position=0) as loader:
        for _ in range(4 * loader._reader.rows["bench"]):
            loader.next_step()  # every page of the map is there
        before = psutil.Process().memory_info().rss
        for _ in range(GROWTH_BATCHES):
            loader.next_step()
        return {"batches": GROWTH_BATCHES, "grown_bytes": psutil.Process().memory_info().rss - before}


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


_WRITERS = {"open": write_huge, "resume": write_resume}

if __name__ == "__main__":
    import torch

    torch.set_num_threads(1)
    name, folder, *words = sys.argv[1:]
    print(json.dumps({"open": _open, "resume": _resume, "memory": _memory, "cold": _cold}[name](Path(folder), *words)))
