"""GPUs counted without torch, on file systems as the drivers make them."""

from pathlib import Path

import pytest

from officina.launch.devices import visible_devices


@pytest.fixture
def nvidia(tmp_path: Path) -> Path:
    (tmp_path / "dev").mkdir()
    for name in ("nvidia0", "nvidia1", "nvidia2", "nvidia3", "nvidiactl", "nvidia-uvm", "null"):
        (tmp_path / "dev" / name).touch()
    return tmp_path


@pytest.fixture
def amd(tmp_path: Path) -> Path:
    """Two CPUs and eight GCDs, as on a LUMI-G node."""
    (tmp_path / "dev").mkdir()
    (tmp_path / "dev/kfd").touch()
    for node in range(10):
        folder = tmp_path / "sys/class/kfd/kfd/topology/nodes" / str(node)
        folder.mkdir(parents=True)
        cores, simds = (28, 0) if node < 2 else (0, 440)
        (folder / "properties").write_text(f"cpu_cores_count {cores}\nsimd_count {simds}\n")
    return tmp_path


@pytest.mark.parametrize(("environ", "n"), [
    ({}, 4), ({"CUDA_VISIBLE_DEVICES": "0,2"}, 2), ({"CUDA_VISIBLE_DEVICES": ""}, 0),
    ({"CUDA_VISIBLE_DEVICES": "-1"}, 0),
    ({"CUDA_VISIBLE_DEVICES": "1,9,2"}, 1), ({"CUDA_VISIBLE_DEVICES": "GPU-4a,GPU-5b"}, 2),
    ({"CUDA_VISIBLE_DEVICES": "NoDevFiles"}, 0), ({"ROCR_VISIBLE_DEVICES": "0"}, 4),
])
def test_nvidia(nvidia: Path, environ: dict, n: int):
    assert visible_devices(environ, nvidia) == n


@pytest.mark.parametrize(("environ", "n"), [
    ({}, 8), ({"ROCR_VISIBLE_DEVICES": "0,1,2"}, 3), ({"HIP_VISIBLE_DEVICES": "4"}, 1),
    ({"CUDA_VISIBLE_DEVICES": "0,1"}, 2),
    ({"ROCR_VISIBLE_DEVICES": "4,5,6,7", "HIP_VISIBLE_DEVICES": "0,1"}, 2),
])
def test_amd(amd: Path, environ: dict, n: int):
    assert visible_devices(environ, amd) == n


def test_none(tmp_path: Path):
    assert visible_devices({"CUDA_VISIBLE_DEVICES": "0"}, tmp_path) == 0


def test_amd_node_that_the_job_may_not_read(amd: Path):
    (amd / "sys/class/kfd/kfd/topology/nodes/9/properties").unlink()
    assert visible_devices({}, amd) == 7
