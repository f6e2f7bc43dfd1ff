"""Fixtures of the tests that submit."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.launch.submit_cases import data_set


@pytest.fixture(scope="module")
def project(tmp_path_factory) -> Iterator[Path]:
    """A person's project with a small data set; this process stands in it."""
    folder = tmp_path_factory.mktemp("project")
    data_set(folder)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        yield folder
