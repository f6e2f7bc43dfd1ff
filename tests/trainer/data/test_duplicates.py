"""The first of each digest stays, whatever the parts, runs and ranges."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from officina.trainer.data import duplicates
from tests.lives import mend, spoil

FIXTURES = settings(deadline=None, max_examples=200, suppress_health_check=[HealthCheck.function_scoped_fixture])


@given(parts=st.lists(st.lists(st.integers(0, 12), max_size=20), min_size=1, max_size=5), run=st.integers(1, 7),
       at_once=st.integers(1, 9), wide=st.booleans())
@FIXTURES
def test_against_a_set(tmp_path: Path, parts: list[list[int]], run: int, at_once: int, wide: bool) -> None:
    """Digests that differ in the first byte alone, or in the last alone."""
    seen, wanted, runs = set(), [], []
    for part, values in enumerate(parts):
        digests = [bytes([v * 21]) + bytes(15) if wide else bytes(15) + bytes([v]) for v in values]
        wanted.append([i for i, d in enumerate(digests) if d in seen or d in digests[:i]])
        seen.update(digests)
        for first in range(0, len(digests) or 1, run):
            runs.append((part, tmp_path / f"{part}-{first}"))
            duplicates.write_run(runs[-1][1], b"".join(digests[first:first + run]), first)
    drops = [tmp_path / f"drops-{part}" for part in range(len(parts))]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(duplicates, "RANGE_DOCUMENTS", at_once)
        found = duplicates.find_duplicates(runs, drops)
    assert [np.fromfile(path, "<u8").tolist() for path in drops] == wanted and found == sum(map(len, wanted))


def test_a_full_disk_loses_no_duplicate_in_silence(mount: Callable[..., Path], tmp_path: Path) -> None:
    disk = mount("size=64k")
    duplicates.write_run(tmp_path / "run", bytes(16) * 9, 0)
    spoil(disk, "full disk")
    with pytest.raises(OSError, match="No space left on device"):
        duplicates.find_duplicates([(0, tmp_path / "run")], [disk / "drops"])
    mend(disk)
    assert duplicates.find_duplicates([(0, tmp_path / "run")], [disk / "drops"]) == 8
    assert np.fromfile(disk / "drops", "<u8").tolist() == list(range(1, 9))
