"""The data loader against others on the same tokens, and what it costs to open, resume, verify and read cold.

    python -m officina.benchmarks.loader [--tokens N] [--block S] [--repeats N]

Each loader lives in processes of its own, and only one of them runs at a time: it delivers shuffled batches for a second and
waits while the others have their turn, in one order and then in the other. The others' environments are made in a temporary
folder, over the packages that are installed here, so that all use the same torch and numpy.
"""

import argparse
import os
import statistics
import subprocess
import sys
import sysconfig
import tempfile
import time
import venv
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from officina.benchmarks import loader_costs
from officina.benchmarks.loader_anchors import BATCH, SEQ_LEN, WORKERS, serve
from officina.benchmarks.loader_data import make_run, write_tokens
from officina.benchmarks.record import record, summary, write_record
from officina.benchmarks.turns import median_interval

ENVIRONMENTS = {
    "numpy": "",
    "litdata": "litdata lightning-utilities obstore boto3 botocore s3transfer jmespath tifffile",
    "mosaicml-streaming": "mosaicml-streaming zstd Brotli python-snappy cramjam boto3 botocore s3transfer jmespath catalogue "
                          "paramiko oci azure-storage-blob azure-core azure-identity azure-storage-file-datalake",
    "datasets": "",
    "megatron-core": "megatron-core",
    "grain": "grain array-record portpicker",
}
"""What is installed for each, without its dependencies: the heavy ones are here, and none may bring another torch."""
HOLDS = {
    "officina, rows": "u32 rows, with a digest", "officina": "i64 tokens, labels and positions, i32 documents",
    "officina, no documents": "i64 tokens and labels", "numpy": "u32 rows, by np.take from a map", "litdata": "i32 rows",
    "mosaicml-streaming": "u32 rows", "datasets": "i32 rows", "grain": "u32 rows",
    "grain, documents": "i64 tokens, labels and positions, i32 documents",
    "megatron-core": "i64 tokens, labels and positions, f32 loss mask",
    "megatron-core, documents": "the same, by documents"}
IN_PROCESS_ONLY = ("officina, rows", "numpy")
SCRIPT = Path(__file__).with_name("loader_anchors.py")
QUIET = {"PYTHONSAFEPATH": "1", "HF_HUB_OFFLINE": "1", "PYTHONWARNINGS": "ignore"}
STAND_IN = "class VisionDataset:\n    def __init__(self, *args, **kwargs):\n        pass\n"
"""mosaicml-streaming imports torchvision, which has no build for every torch, for this class alone, and not for tokens."""


# ---- ours, served as the others are ----------------------------------------------------------------------------------
def _ours(kind: str, folder: Path, workers: int) -> Iterator[int]:
    from officina.trainer.data.loader import Loader
    from officina.trainer.data.plan import plan_steps

    run = make_run({"bench": folder / "officina"}, mask_documents=kind == "officina")
    loader = Loader(run, rank=0, world_size=1, position=0)
    position = 0
    while kind == "officina, rows":
        for step in plan_steps(loader._reader, position, BATCH, range(BATCH)):
            yield loader._reader.read(step.own, step.places).tokens.shape[0] * SEQ_LEN
            position = step.first + BATCH
    while True:
        step = loader.next_step() if workers else loader._read_step(position)
        position = step.stop_sample
        yield sum(micro.fields["tokens"].numel() for micro in step.micros)


# ---- environments ----------------------------------------------------------------------------------------------------
def make_environment(name: str, folder: Path) -> Path:
    """The Python of an environment with the named loader over what is installed here. Raises CalledProcessError."""
    if not ENVIRONMENTS[name]:
        return Path(sys.executable)
    venv.create(folder, with_pip=True)
    python = folder / "bin" / "python"
    own = Path(subprocess.run([python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"], check=True, text=True,
                              capture_output=True).stdout.strip())
    (own / "installed_here.pth").write_text(sysconfig.get_path("purelib") + "\n")
    subprocess.run([python, "-m", "pip", "install", "--quiet", "--no-deps", *ENVIRONMENTS[name].split()], check=True,
                   capture_output=True, text=True)
    if name == "mosaicml-streaming":
        (own / "torchvision" / "datasets").mkdir(parents=True, exist_ok=True)
        (own / "torchvision" / "__init__.py").write_text("from torchvision import datasets, transforms\n")
        (own / "torchvision" / "datasets" / "__init__.py").write_text(STAND_IN)
        (own / "torchvision" / "transforms").mkdir(exist_ok=True)
        (own / "torchvision" / "transforms" / "__init__.py").write_text("")
        (own / "torchvision" / "transforms" / "functional.py").write_text("to_tensor = None\n")
    return python


def version_in(python: Path, name: str) -> str:
    """Version of the package."""
    words = [python, "-c", f"import importlib.metadata as m; print(m.version({name.partition(',')[0]!r}))"]
    return subprocess.run(words, check=True, text=True, capture_output=True).stdout.strip()


# ---- the race --------------------------------------------------------------------------------------------------------
class Served:
    """A loader's process."""

    def __init__(self, words: list[str]) -> None:
        self._process = subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL,
                                         text=True, env=os.environ | QUIET)
        self._answer("ready")

    def block(self, seconds: float) -> tuple[float, float]:
        """Tokens per second, and per second of the process's CPU, over so long."""
        self._process.stdin.write(f"{seconds}\n")
        self._process.stdin.flush()
        tokens, took, cpu = map(float, self._answer("block"))
        return tokens / took, tokens / cpu

    def _answer(self, word: str) -> list[str]:
        for line in self._process.stdout:
            if line.startswith(word):  # some print more than they are asked
                return line.split()[1:]
        raise RuntimeError(f"{self._process.args} ended with status {self._process.wait()}")

    def end(self) -> None:
        """Close it, workers included."""
        self._process.stdin.close()
        try:
            self._process.wait(10)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()


def race(folder: Path, pythons: dict[str, Path], *, repeats: int, block_s: float) -> tuple[dict[str, Any], dict[str, str]]:
    """Tokens per second of each loader, in process and with prefetch; and which could not take part, with why."""
    entrants: dict[str, list[str]] = {}
    for name in HOLDS:
        for mode, workers in (("in process", 0), ("prefetch", WORKERS)):
            if name.startswith("officina"):
                words = [sys.executable, "-m", __spec__.name, "--serve", name, str(folder), str(workers)]
            elif (python := pythons.get(name.partition(",")[0])) is not None:
                words = [str(python), str(SCRIPT), name, "serve", str(folder), str(workers)]
            else:
                continue
            if mode == "in process" or name not in IN_PROCESS_ONLY:
                entrants[f"{name} | {mode}"] = words
    running: dict[str, Served] = {}
    left_out: dict[str, str] = {}
    try:
        for name, words in entrants.items():
            try:
                running[name] = Served(words)
            except RuntimeError as exc:
                left_out[name] = f"does not run: {exc}"
        found: dict[str, list[tuple[float, float]]] = {name: [] for name in running}
        for turn in range(1 + repeats):
            for name in list(running)[::-1 if turn % 2 else 1]:
                speed = running[name].block(block_s)
                if turn:
                    found[name].append(speed)
    finally:
        for each in running.values():
            each.end()
    results: dict[str, Any] = {}
    for name, speeds in found.items():
        of_time, of_cpu = (summary(list(each)) for each in zip(*speeds, strict=True))
        results[name] = {"holds": HOLDS[name.partition(" | ")[0]], "tokens_per_s": of_time}
        if "in process" in name:  # worker processes would not be counted
            results[name]["tokens_per_cpu_s"] = of_cpu
    return results, left_out


def ratio(found: dict[str, Any], ours: str, others: list[str]) -> dict[str, Any] | None:
    """Speed of `ours` against the best of `others`, turn by neighbouring turn."""
    known = [name for name in others if name in found]
    if not known:
        return None
    best = max(known, key=lambda name: found[name]["tokens_per_s"]["median"])
    pairs = zip(found[ours]["tokens_per_s"]["values"], found[best]["tokens_per_s"]["values"], strict=True)
    values = [a / b for a, b in pairs]
    low, high = median_interval(values)
    result = {"against": best, "median": statistics.median(values), "low": low, "high": high, "values": values}
    if "tokens_per_cpu_s" in found[ours]:
        result["by_cpu_time"] = found[ours]["tokens_per_cpu_s"]["median"] / found[best]["tokens_per_cpu_s"]["median"]
    return result


def ratios(found: dict[str, Any]) -> dict[str, Any]:
    """Ours against the best of the others on the same work, or on less where none does the same."""
    rows = [f"{name} | in process" for name in ("litdata", "mosaicml-streaming", "datasets", "grain")]
    every = [name for name in found if not name.startswith("officina")]
    pairs = {
        "rows, in process": ("officina, rows | in process", rows),
        "rows, in process, against np.take": ("officina, rows | in process", ["numpy | in process"]),
        "batches with documents, in process": ("officina | in process", ["megatron-core, documents | in process"]),
        "batches, in process": ("officina, no documents | in process", ["megatron-core | in process"]),
        "batches with documents, prefetch": (
            "officina | prefetch", ["grain, documents | prefetch", "megatron-core, documents | prefetch"]),
        "batches with documents, prefetch, against the best of all": (
            "officina | prefetch", [name for name in every if "prefetch" in name]),
        "batches, prefetch, against the best of all": (
            "officina, no documents | prefetch", [name for name in every if "prefetch" in name])}
    return {name: value for name, (ours, others) in pairs.items() if (value := ratio(found, ours, others))}


def run(*, tokens: int, repeats: int, block_s: float, environments: Path | None = None,
        alone: bool = False) -> dict[str, Any]:
    """Measure all; returns the record. environments: folder that keeps them for another time; alone: without the others."""
    with tempfile.TemporaryDirectory(prefix="officina-bench-") as scratch:
        folder = Path(scratch)
        kept = environments or folder / "environments"
        n = write_tokens(folder, tokens)
        pythons, versions, left_out = {}, {}, {}
        for name in ENVIRONMENTS if not alone else ():
            try:
                python = kept / name / "bin" / "python"
                python = python if python.exists() else make_environment(name, kept / name)
                versions[name] = version_in(python, name)
                subprocess.run([python, SCRIPT, name, "prepare", folder], check=True,
                               capture_output=True, text=True, env=os.environ | QUIET)
                pythons[name] = python
            except (OSError, subprocess.CalledProcessError) as exc:
                said = (getattr(exc, "stderr", "") or str(exc)).strip().splitlines()
                left_out[name] = f"cannot be installed or prepared: {said[-1][:200] if said else exc}"
        load_before = os.getloadavg()[0]
        found, failed = race(folder, pythons, repeats=repeats, block_s=block_s)
        load_after = os.getloadavg()[0]
        costs = loader_costs.measure(folder, repeats=repeats)
    results = {"speed": found, "ratios": ratios(found), "left_out": left_out | failed,
               "load_average": [load_before, load_after], **costs}
    return record("loader", results, repeats=repeats, settings={
        "tokens": n, "seq_len": SEQ_LEN, "batch_rows": BATCH, "prefetch_workers": WORKERS, "block_s": block_s,
        "others": versions})


def main(argv: list[str] | None = None) -> None:
    """Measure and write the record."""
    parser = argparse.ArgumentParser(prog="python -m officina.benchmarks.loader", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=50_000_000)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--block", type=float, default=1.0, help="seconds of a turn")
    parser.add_argument("--environments", type=Path, metavar="DIR", help="make the others' environments there and keep them")
    parser.add_argument("--alone", action="store_true", help="without the others, whose environments need a package index")
    parser.add_argument("--out", type=Path, help="where the record goes (default: benchmarks/results/loader.json)")
    args = parser.parse_args(argv)
    begun = time.perf_counter()
    found = run(tokens=args.tokens, repeats=args.repeats, block_s=args.block, environments=args.environments,
                alone=args.alone)
    print(write_record(found, args.out))
    for name, result in found["results"]["speed"].items():
        print(f"{name:<40} {result['tokens_per_s']['median'] / 1e6:>8.1f} M tokens/s")
    for name, value in found["results"]["ratios"].items():
        print(f"{name}: {value['median']:.2f} times {value['against']}")
    for name, why in found["results"]["left_out"].items():
        print(f"left out: {name}, {why}")
    print(f"{time.perf_counter() - begun:.0f} s")


if __name__ == "__main__":
    if sys.argv[1:2] == ["--serve"]:
        import torch

        torch.set_num_threads(1)
        serve(_ours(sys.argv[2], Path(sys.argv[3]), int(sys.argv[4])))
        os._exit(0)
    main()
