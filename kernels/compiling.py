"""Compile a kernel for an architecture that need not be there, and read what it costs from the binary.

Needs triton and the tools in its wheel, no GPU and no driver. For tests, the table in docs/kernels.md and tuning.
"""

import re
import subprocess
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from officina.kernels.dispatch import triton
from officina.kernels.tables import Config, is_amd

ARCHS = ("sm_80", "sm_90", "gfx90a", "gfx942")
"""A100 (Leonardo), H100, GH200, H200 (MareNostrum 5, JUPITER), MI250X (LUMI), MI300X."""


@dataclass(frozen=True, slots=True)
class Usage:
    """What a compiled kernel takes."""

    registers: int
    """32-bit vector registers of a thread; on CDNA accumulation registers are among them."""
    spill_bytes: int
    """Memory a thread keeps registers in that did not fit; 0 on every shipped configuration."""
    shared_bytes: int
    """Shared memory (LDS) of a program."""
    assembly: str = field(repr=False)
    """PTX or amdgcn text."""


def compile_for(kernel: Any, arguments: Mapping[str, Any], config: Config, arch: str) -> Usage:
    """Compile a @triton.jit or @gluon.jit function for `arch`, one of ARCHS or like them.

    Args:
        arguments: by parameter name: a value for constexpr parameters and for those Triton specialises on (None, 1); else
            the type as text: `*bf16`, `*i64`, `fp32`, `i32`; pointers are 16-byte aligned, `i32:16` is a multiple of 16.
    Raises ValueError where names do not fit the kernel; triton's own errors where it does not compile.
    """
    if triton is None:
        raise ValueError("compile_for needs triton: pip install 'officina[kernels]'")
    if set(kernel.arg_names) != set(arguments):
        raise ValueError(f"compile_for: {kernel.__name__} takes {', '.join(kernel.arg_names)}; missing or unknown: "
                         f"{', '.join(sorted(set(kernel.arg_names) ^ set(arguments)))}")
    signature, constants, attributes = {}, {}, {}
    for place, parameter in enumerate(kernel.params):
        value = arguments[parameter.name]
        if parameter.is_constexpr or not isinstance(value, str):
            signature[parameter.name], constants[(place,)] = "constexpr", value
            continue
        signature[parameter.name] = value.removesuffix(":16")
        if value.startswith("*") or value.endswith(":16"):
            attributes[(place,)] = [["tt.divisibility", 16]]
    source = _source_type(kernel)(kernel, signature, constants, attributes)
    compiled = triton.compile(source, target=_target(arch), options=config.options(arch))
    if is_amd(arch):
        return _amd_usage(compiled.asm["amdgcn"], compiled.metadata.shared)
    return _nvidia_usage(compiled.asm["cubin"], compiled.asm["ptx"], compiled.metadata.shared)


def _source_type(kernel: Any) -> Any:
    if not kernel.is_gluon():
        return triton.compiler.ASTSource
    from triton.experimental.gluon._runtime import GluonASTSource  # what a Gluon kernel takes itself at a launch

    return GluonASTSource


def _target(arch: str) -> Any:
    if is_amd(arch):
        return triton.backends.compiler.GPUTarget("hip", arch, 64)
    return triton.backends.compiler.GPUTarget("cuda", int(arch.removeprefix("sm_")), 32)


def _nvidia_usage(cubin: bytes, ptx: str, shared_bytes: int) -> Usage:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.cubin"
        path.write_bytes(cubin)
        text = subprocess.run([triton.knobs.nvidia.cuobjdump.path, "-res-usage", path], check=True, capture_output=True,
                              text=True).stdout
    found = re.search(r"REG:(\d+) STACK:(\d+)", text)
    # Triton makes no arrays in local memory, so the stack frame is what was spilled.
    return Usage(int(found[1]), int(found[2]), shared_bytes, ptx)


def _amd_usage(amdgcn: str, shared_bytes: int) -> Usage:
    def count(name: str) -> int:
        return int(re.search(rf"^\s*\.{name}:\s*(\d+)", amdgcn, re.MULTILINE)[1])

    return Usage(count("vgpr_count"), max(count("private_segment_fixed_size"), 4 * count("vgpr_spill_count")), shared_bytes,
                 amdgcn)
