"""Fixtures that many tests share."""

import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
for folder in (ROOT, ROOT / "tests"):  # helpers are imported as `tests.name` (so in the ranks too) or as `name`
    if str(folder) not in sys.path:
        sys.path.append(str(folder))

from tests.distributed import RankPool  # noqa: E402

pytest_plugins = ["slurm"]


@pytest.fixture(scope="session")
def pool():
    """Up to four rank processes, kept for the whole session."""
    ranks = RankPool(4)
    yield ranks
    ranks.close()
