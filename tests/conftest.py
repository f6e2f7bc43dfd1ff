"""Fixtures that many tests share, and the order of files."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
for folder in (ROOT, ROOT / "tests"):  # helpers are imported as `tests.name` (so in the ranks too) or as `name`
    if str(folder) not in sys.path:
        sys.path.append(str(folder))

from tests.distributed import RankPool  # noqa: E402

pytest_plugins = ["slurm"]

LONGEST = ("trainer/parallel/test_conformance.py", "launch/test_job_life.py", "trainer/parallel/test_resume.py", "test_life.py",
           "trainer/parallel/test_adapters.py", "launch/test_site_doubles.py", "kernels/test_model_with_kernels.py",
           "kernels/test_flash_attention_compiled.py")
"""Files that take minutes, longest first: two processes take files whole, and the last should be short."""


def pytest_collection_modifyitems(items):
    places = {str(ROOT / "tests" / name): place for place, name in enumerate(LONGEST)}
    items.sort(key=lambda item: places.get(str(item.path), len(places)))


def pytest_configure():
    if "PYTEST_XDIST_WORKER" in os.environ:  # one of as many as there are cores: two threads each would wait for each other
        import torch

        torch.set_num_threads(1)


@pytest.fixture(scope="session")
def pool():
    """Up to four rank processes, kept for the whole session."""
    ranks = RankPool(4)
    yield ranks
    ranks.close()


@pytest.fixture
def mount(tmp_path):
    """mount(options) -> a small file system of its own; mount(options, again=True) changes it."""
    path = tmp_path / "disk"
    path.mkdir()
    mounted = []

    def make(options, again=False):
        options = f"remount,{options}" if again else options
        done = subprocess.run(["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(path)], capture_output=True, text=True)
        if done.returncode:
            reason = f"needs root to mount a small tmpfs: {done.stderr.strip()}"
            (pytest.fail if os.environ.get("CI") else pytest.skip)(reason)
        mounted[:] = [path]
        return path

    yield make
    for p in mounted:
        subprocess.run(["umount", str(p)], check=True)
