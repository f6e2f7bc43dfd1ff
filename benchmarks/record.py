"""What every benchmark record says besides its figures: when, on what, with which code; and repeats that are fair."""

import json
import os
import platform
import statistics
import subprocess
from collections.abc import Callable, Mapping
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

PACKAGES = ("officina", "torch", "numpy", "xxhash", "safetensors", "deepspeed", "triton", "liger-kernel", "transformers",
            "accelerate")
RESULTS = Path(__file__).parent / "results"
"""Where committed records lie."""


def record(name: str, results: Mapping[str, Any], *, settings: Mapping[str, Any] | None = None,
           repeats: int | None = None) -> dict[str, Any]:
    """A record as a JSON-ready dict. It names no host, user or path.

    name: the benchmark, which is also the file's name. results: figures with units in their names. settings: what they
    depend on. repeats: how often each case was measured, interleaved.
    """
    return {"name": name, "date": datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ"), "commit": commit(),
            "device": device(), "versions": versions(), "settings": dict(settings or {}), "repeats": repeats,
            "results": dict(results)}


def write_record(record: Mapping[str, Any], path: Path | None = None) -> Path:
    """Write it to `path`, or to benchmarks/results/NAME.json."""
    path = path or RESULTS / f"{record['name']}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(record, indent=1) + "\n")
    return path


def interleaved(cases: Mapping[str, Callable[[], float]], repeats: int, *, warmup: int = 1) -> dict[str, list[float]]:
    """Measure each case `repeats` times, in turn, so that a slow minute of the machine meets all of them alike.

    A case returns its own measurement. The first `warmup` rounds are not counted.
    """
    found: dict[str, list[float]] = {name: [] for name in cases}
    for i in range(warmup + repeats):
        for name, measure in cases.items():
            value = measure()
            if i >= warmup:
                found[name].append(value)
    return found


def summary(values: list[float]) -> dict[str, Any]:
    """Median, extremes and all values of one case."""
    return {"median": statistics.median(values), "min": min(values), "max": max(values), "values": values}


def commit() -> dict[str, Any]:
    """The commit of the code that ran and whether it was changed since; None outside a repository."""
    root = Path(__file__).parent

    def git(*words: str) -> str | None:
        try:
            done = subprocess.run(["git", *words], cwd=root, capture_output=True, text=True, timeout=30)
        except (OSError, subprocess.TimeoutExpired):
            return None
        return done.stdout.strip() if done.returncode == 0 else None

    changed = git("status", "--porcelain", "--untracked-files=no")
    return {"hash": git("rev-parse", "HEAD"), "changed": None if changed is None else bool(changed)}


def device() -> dict[str, Any]:
    """Processor, memory, accelerators and kernel of this machine."""
    found: dict[str, Any] = {"cpu": _cpu_model(), "cores": os.cpu_count(), "system": platform.system(),
                             "kernel": platform.release(), "accelerators": []}
    if hasattr(os, "sysconf"):
        found["memory_bytes"] = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    import torch

    if torch.cuda.is_available():
        found["accelerators"] = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    return found


def versions() -> dict[str, str]:
    """Versions of Python and of those of our packages that are installed."""
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return found


def _cpu_model() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()
