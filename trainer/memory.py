"""Out of memory: what the memory was used for, and the keys that would help."""

from __future__ import annotations

import gc
import re
import resource
import sys
from dataclasses import dataclass
from types import FrameType
from typing import TYPE_CHECKING

from officina.trainer.config import RunConfig
from officina.trainer.errors import OfficinaError
from officina.trainer.rank_log import text_of

if TYPE_CHECKING:
    import torch

_OOM_TEXT = re.compile(r"out of memory|DefaultCPUAllocator: (can't|not enough)|Cannot allocate memory|bad_alloc|"
                       r"CUBLAS_STATUS_ALLOC_FAILED|CUDNN_STATUS_ALLOC_FAILED", re.IGNORECASE)
_PHASES = {
    "import_state": "reading weights and moments into the engine",
    "export_state": "saving",
    "save": "saving",
    "forward_backward": "forward and backward",
    "evaluate": "evaluation",
    "step": "optimizer step",
    "build": "building the engine",
    "assemble": "building the run",
    "start_ranks": "starting the ranks",
}
"""Functions of `officina.trainer` by which a traceback tells what the run was doing; the innermost counts."""


class OutOfMemory(OfficinaError):
    """A rank needed more memory than it could have; the message says for what, and which keys would help."""


@dataclass(frozen=True, slots=True)
class MemoryParts:
    """Bytes this rank holds, by part."""

    parameters: int
    gradients: int
    moments: int
    """State of the optimizers."""
    other_tensors: int
    """Live tensors that are none of these: activations, gathered parameters, batches."""


def is_out_of_memory(error: BaseException) -> bool:
    """Is `error` a failed allocation, on the device or on the host?"""
    return isinstance(error, MemoryError) or (isinstance(error, RuntimeError) and bool(_OOM_TEXT.search(text_of(error))))


def phase_of(error: BaseException) -> str:
    """What the run was doing when `error` was raised, told from its traceback."""
    phase, trace = "starting", error.__traceback__
    while trace is not None:
        if _is_ours(trace.tb_frame) and trace.tb_frame.f_code.co_name in _PHASES:
            phase = _PHASES[trace.tb_frame.f_code.co_name]
        trace = trace.tb_next
    return phase


def _is_ours(frame: FrameType) -> bool:
    return str(frame.f_globals.get("__name__", "")).startswith("officina.trainer")


def measure_parts() -> MemoryParts:
    """Bytes of all live tensors of this process by part, from the objects themselves: true for every engine.

    Sharded tensors count with their local shard; a storage that several tensors share counts once, in the first part.
    """
    import torch

    from officina.trainer.optim import Optimizer

    tensors, moments, parameters = [], [], []
    for thing in gc.get_objects():
        kind = type(thing)  # isinstance would call __class__ of strange objects
        if issubclass(kind, torch.Tensor):
            # A sharded parameter is a DTensor that says so, of no subclass.
            is_parameter = issubclass(kind, torch.nn.Parameter) or getattr(thing, "_is_param", False)
            (parameters if is_parameter else tensors).append(thing)
        elif issubclass(kind, Optimizer):
            moments += thing.moments()
        elif issubclass(kind, torch.optim.Optimizer):
            moments += [value for state in thing.state.values() if isinstance(state, dict)
                        for value in state.values() if isinstance(value, torch.Tensor)]
    seen: set[tuple[str, int]] = set()
    return MemoryParts(parameters=_storage_bytes(parameters, seen),
                       gradients=_storage_bytes([p.grad for p in parameters if p.grad is not None], seen),
                       moments=_storage_bytes(moments, seen), other_tensors=_storage_bytes(tensors, seen))


def _storage_bytes(tensors: list[torch.Tensor], seen: set[tuple[str, int]]) -> int:
    """Bytes of the storages behind `tensors` that are not yet in `seen`."""
    from torch._subclasses.fake_tensor import FakeTensor

    total = 0
    for tensor in tensors:
        local = getattr(tensor, "_local_tensor", tensor)  # a DTensor's shard
        if isinstance(local, FakeTensor) or local.is_meta or local.layout != _strided():
            continue
        storage = local.untyped_storage()
        try:
            key = (str(local.device), storage.data_ptr())
        except RuntimeError:  # what torch.compile leaves of its tracing has no memory
            continue
        if key not in seen:
            seen.add(key)
            total += storage.nbytes()
    return total


def _strided() -> torch.layout:
    import torch

    return torch.strided


def explain_oom(error: BaseException, *, rank: int, world_size: int, run: RunConfig, device: torch.device) -> str:
    """The message of an out-of-memory error: rank, phase, memory by part, and the keys that would help."""
    phase = phase_of(error)
    first_line = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
    lines = [f"rank {rank} of {world_size} ran out of memory on {device} during: {phase}.",
             f"  The allocation that failed: {_shorten(first_line)}"]
    try:
        parts = measure_parts()
        lines.append(f"  This rank holds: parameters {_gib(parts.parameters)}, gradients {_gib(parts.gradients)}, moments "
                     f"{_gib(parts.moments)}, other live tensors (activations, gathered weights) {_gib(parts.other_tensors)}.")
        lines.append(f"  {_device_totals(device)}")
    except MemoryError:  # not even room to look around
        lines.append("  No memory was left to measure what holds it.")
    lines.append(f"  What helps, best first: {'; '.join(remedies(run, world_size, phase))}.")
    return "\n".join(lines)


def _device_totals(device: torch.device) -> str:
    if device.type == "cuda":
        import torch

        free, total = torch.cuda.mem_get_info(device)
        reserved, used = torch.cuda.memory_reserved(device), torch.cuda.memory_allocated(device)
        return (f"Device: {_gib(total)} in all, {_gib(free)} free; this process has {_gib(used)} in tensors (peak "
                f"{_gib(torch.cuda.max_memory_allocated(device))}) and {_gib(reserved - used)} cached by the allocator.")
    import psutil

    memory, rss = psutil.virtual_memory(), psutil.Process().memory_info().rss
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    limit = resource.getrlimit(resource.RLIMIT_AS)[0]
    limited = "" if limit == resource.RLIM_INFINITY else f"; its address space is limited to {_gib(limit)} (ulimit -v)"
    return (f"Host: {_gib(memory.total)} in all, {_gib(memory.available)} available; this process has {_gib(rss)} "
            f"(peak {_gib(peak)}){limited}.")


def remedies(run: RunConfig, world_size: int, phase: str) -> list[str]:
    """Settings that would lower the memory of this run in this phase, the cheapest first. Results stay the same."""
    kind, found = run.engine.kind, []
    if phase in ("forward and backward", "evaluation"):
        if run.batch.micro_rows > 1:
            found.append(f"batch.micro_rows={max(run.batch.micro_rows // 2, 1)}")
        if run.engine.recompute != "full":
            found.append("engine.recompute=full")
    if kind in ("single", "ddp"):
        found.append("engine=fsdp2" if world_size > 1 else "more ranks with engine=fsdp2")
    elif kind == "zero" and run.engine.stage < 3:
        found.append("engine=zero3")
    elif kind == "hsdp" and world_size > run.engine.shard_size:
        found.append("engine=fsdp2 (shards over all ranks)")
    if kind in ("fsdp2", "hsdp") and not run.engine.reshard_after_forward:
        found.append("engine.reshard_after_forward=true")
    if device_offload := _offload_key(run):
        found.append(device_offload)
    if run.checkpoint.asynchronous and phase == "saving":
        found.insert(0, "checkpoint.asynchronous=false")
    if world_size > 1 and kind not in ("single", "ddp"):
        found.append(f"more than {world_size} ranks")
    found.append("a smaller model or batch.seq_len (another run)")
    return found


def _offload_key(run: RunConfig) -> str:
    if run.device == "cpu":
        return ""
    if run.engine.kind in ("fsdp2", "hsdp"):
        return "" if run.engine.cpu_offload else "engine.cpu_offload=true"
    if run.engine.kind == "zero" and not run.engine.offload_optimizer:
        return "engine.offload_optimizer=true"
    return ""


def _shorten(text: str) -> str:
    return text if len(text) <= 300 else text[:300] + " ..."


def _gib(n_bytes: int) -> str:
    return f"{n_bytes / 2**30:.2f} GiB" if n_bytes >= 2**27 else f"{n_bytes / 2**20:.1f} MiB"
