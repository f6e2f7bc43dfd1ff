"""How many GPUs this process may use, without torch: from the environment and the kernel's device files."""

import os
import re
from collections.abc import Mapping
from pathlib import Path


def visible_devices(environ: Mapping[str, str], root: Path = Path("/")) -> int:
    """Number of GPUs (or GCDs) a rank started with `environ` would see. `root`: where /dev and /sys are, for tests.

    An upper bound: a GPU whose driver fails is counted. The ranks themselves say so when they start.
    """
    n_nvidia = sum(bool(re.fullmatch(r"nvidia[0-9]+", name)) for name in _names(root / "dev"))
    if n_nvidia:
        return _count(environ, ("CUDA_VISIBLE_DEVICES",), n_nvidia)
    n_amd = _amd_devices(root)
    visible = _count(environ, ("ROCR_VISIBLE_DEVICES",), n_amd)
    return _count(environ, ("HIP_VISIBLE_DEVICES", "CUDA_VISIBLE_DEVICES"), visible)


def _names(folder: Path) -> list[str]:
    try:
        return os.listdir(folder)
    except OSError:
        return []


def _amd_devices(root: Path) -> int:
    """Compute nodes of the KFD driver that are GPUs: CPUs stand there too, with no SIMDs."""
    if not (root / "dev/kfd").exists():
        return 0
    nodes = root / "sys/class/kfd/kfd/topology/nodes"
    n_gpus = 0
    for name in _names(nodes):
        try:
            found = re.search(r"^simd_count ([0-9]+)", (nodes / name / "properties").read_text(), re.MULTILINE)
        except OSError:
            continue  # a GPU that the job's cgroup hides
        n_gpus += bool(found and int(found[1]))
    return n_gpus


def _count(environ: Mapping[str, str], names: tuple[str, ...], n_present: int) -> int:
    """How many of `n_present` the first variable that is set leaves visible."""
    for name in names:
        value = environ.get(name)
        if value is None:
            continue
        n_visible = 0
        for item in (part.strip() for part in value.split(",")):
            if not item or item == "NoDevFiles" or (item.lstrip("-").isdigit() and not 0 <= int(item) < n_present):
                break  # CUDA and HIP ignore everything from the first entry that is none
            n_visible += 1
        return min(n_visible, n_present)
    return n_present
