"""Fixtures of the kernel tests."""

import pytest

from tests.kernels.interpreter import Interpreter


@pytest.fixture(scope="session")
def interpreter():
    """A process where kernels run in Triton's interpreter, kept for the whole session."""
    process = Interpreter()
    yield process
    process.close()
