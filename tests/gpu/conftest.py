"""Tests on a GPU: `make gpu`, or `pytest -m gpu tests/gpu` where there is one.

OFFICINA_GPU_TESTS_ON=cpu runs them on the processor instead, to find mistakes in the tests themselves; what only a
GPU can do is skipped then.
"""

import os

import pytest
import torch

from officina.trainer.rank_env import LONE
from officina.trainer.ranks import Ranks

ON = os.environ.get("OFFICINA_GPU_TESTS_ON", "cuda")


@pytest.fixture(scope="session")
def device() -> torch.device:
    if ON == "cuda" and not torch.cuda.is_available():
        pytest.skip("no GPU here")
    return torch.device(ON, 0) if ON == "cuda" else torch.device(ON)


@pytest.fixture(scope="session")
def cuda(device) -> torch.device:
    """For what no processor can stand in for."""
    if device.type != "cuda":
        pytest.skip("only a GPU can do this")
    return device


@pytest.fixture
def ranks(device) -> Ranks:
    return Ranks(LONE, device, threads=1)


@pytest.fixture
def deterministic():
    """Operators with a fixed order of sums. CUBLAS_WORKSPACE_CONFIG is set by benchmarks/gpu.sh, before CUDA starts."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)
