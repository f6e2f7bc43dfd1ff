"""Out-of-memory messages, from allocations that really fail."""

import dataclasses
import json
import subprocess
import sys

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from officina.trainer import memory
from officina.trainer.config import (
    BatchConfig,
    CheckpointConfig,
    DDPConfig,
    FSDP2Config,
    HSDPConfig,
    RunConfig,
    SingleConfig,
    ZeroConfig,
)

FAILING = """
import json, resource, sys, types
from pathlib import Path
import numpy, torch
from officina.trainer import memory
from officina.trainer.config import RunConfig

model = torch.nn.Linear(1000, 2000, bias=False)  # 8 MB, and so are its gradient and each of the two moments
optimizer = torch.optim.AdamW(model.parameters())
model(torch.ones(1, 1000)).sum().backward()
optimizer.step()
activations = torch.ones(3_000_000)  # 12 MB
used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (used + 2**27, resource.RLIM_INFINITY))
engine = types.ModuleType("officina.trainer.parallel.fake")
exec("def forward_backward(allocate):\\n    return allocate()", engine.__dict__)
kinds = {"torch": lambda: torch.empty(2**40), "numpy": lambda: numpy.ones(2**40), "python": lambda: bytearray(2**40)}
found = {}
for kind, allocate in kinds.items():
    try:
        engine.forward_backward(allocate)
    except (MemoryError, RuntimeError) as error:
        assert memory.is_out_of_memory(error), error
        said = memory.explain_oom(error, rank=3, world_size=4, run=RunConfig(), device=torch.device("cpu"))
        found[kind] = [said, [getattr(memory.measure_parts(), p) for p in ("parameters", "gradients", "moments")]]
print(json.dumps(found))
"""


@pytest.fixture(scope="module")
def failed() -> dict[str, list]:
    done = subprocess.run([sys.executable, "-c", FAILING], capture_output=True, text=True, check=True)
    return json.loads(done.stdout)


@pytest.mark.parametrize("kind", ["torch", "numpy", "python"])
def test_failed_allocation_names_rank_phase_parts_and_keys(failed: dict[str, list], kind: str):
    said, parts = failed[kind]
    assert "rank 3 of 4 ran out of memory on cpu during: forward and backward." in said
    assert parts[:2] == [8_000_000, 8_000_000] and 16_000_000 <= parts[2] <= 16_000_100
    assert "parameters 7.6 MiB, gradients 7.6 MiB, moments 15.3 MiB, other live tensors" in said
    assert "its address space is limited to" in said and "(ulimit -v)" in said
    assert "batch.micro_rows=2; engine.recompute=full; engine=fsdp2" in said


def test_tensors_without_memory_count_nothing():
    """torch.compile leaves such from its tracing; without the exception an OOM's explanation broke off."""
    before = memory.measure_parts()
    with FakeTensorMode():
        fake = torch.nn.Parameter(torch.empty(1000, 1000))
    traced = torch._to_functional_tensor(torch.empty(0))
    real = torch.nn.Parameter(torch.empty(500))
    assert memory.measure_parts().parameters - before.parameters == real.numel() * 4
    del fake, traced


def test_other_errors_are_not_taken_for_it():
    assert memory.is_out_of_memory(torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"))
    assert memory.is_out_of_memory(RuntimeError("CUDA error: out of memory"))
    assert not memory.is_out_of_memory(RuntimeError("shape mismatch"))
    assert not memory.is_out_of_memory(ValueError("out of memory"))


def test_device_message(monkeypatch: pytest.MonkeyPatch):
    gib = 2**30
    for name, value in (("mem_get_info", (gib, 80 * gib)), ("memory_reserved", 78 * gib),
                        ("memory_allocated", 70 * gib), ("max_memory_allocated", 77 * gib)):
        monkeypatch.setattr(torch.cuda, name, lambda device, value=value: value)
    assert memory._device_totals(torch.device("cuda", 0)) == (
        "Device: 80.00 GiB in all, 1.00 GiB free; this process has 70.00 GiB in tensors (peak 77.00 GiB) and 8.00 GiB "
        "cached by the allocator.")


def test_remedies_fit_the_run():
    step = "forward and backward"

    def of(engine, world_size=4, phase=step, **more):
        return memory.remedies(dataclasses.replace(RunConfig(), engine=engine, **more), world_size, phase)

    full = {"recompute": "full"}
    assert of(SingleConfig(), 1)[:3] == ["batch.micro_rows=2", "engine.recompute=full", "more ranks with engine=fsdp2"]
    assert of(DDPConfig(**full), batch=BatchConfig(micro_rows=1))[0] == "engine=fsdp2"
    assert "engine.cpu_offload=true" in of(FSDP2Config())
    assert "engine.cpu_offload=true" not in of(FSDP2Config(), device="cpu")
    assert "engine.reshard_after_forward=true" in of(FSDP2Config(reshard_after_forward=False))
    assert "engine=fsdp2 (shards over all ranks)" in of(HSDPConfig(shard_size=2))
    assert of(ZeroConfig(stage=2), phase="optimizer step")[:2] == ["engine=zero3", "engine.offload_optimizer=true"]
    assert of(ZeroConfig(stage=3, offload_optimizer=True), phase="optimizer step")[0] == "more than 4 ranks"
    assert of(DDPConfig(), phase="saving", checkpoint=CheckpointConfig(asynchronous=True))[0] == \
        "checkpoint.asynchronous=false"
