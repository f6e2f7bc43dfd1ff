"""Whether a call runs as a Triton kernel or as its plain-torch reference, and the guarded import of triton.

Kernel files begin with

    from __future__ import annotations                      # annotations such as tl.constexpr stay text
    from officina.kernels.dispatch import jit, tl, triton

so that importing them needs no triton. `TRITON_INTERPRET=1` in the environment, set before the first import, makes every
kernel run on CPU tensors, slowly, for tests.
"""

import functools
import logging
from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import Tensor
from torch.autograd import forward_ad

try:
    import triton
    import triton.language as tl
except ImportError:  # macOS has no triton
    triton = tl = None

Impl = Literal["auto", "triton", "reference"]

INTERPRETED = triton is not None and bool(triton.knobs.runtime.interpret)
"""Whether kernels run in Triton's interpreter, on the CPU; settled when triton is imported."""

_log = logging.getLogger(__name__)


def jit(function: Callable[..., Any]) -> Any:
    """triton.jit; without triton the function as it is, which nobody then calls."""
    return function if triton is None else triton.jit(function)


def why_not_triton_on(device: torch.device) -> str | None:
    """Why kernels cannot run on the device, or None if they can."""
    if triton is None:
        return "triton is not installed (pip install 'officina[kernels]')"
    if device.type != "cuda" and not INTERPRETED:
        return f"the tensors are on the {device.type}, kernels need a GPU"
    return None


def why_not_triton(*tensors: Tensor | None) -> str | None:
    """Why kernels cannot take these tensors, or None if they can; None among the tensors is skipped."""
    for tensor in tensors:
        if tensor is None:
            continue
        if why := why_not_triton_on(tensor.device):
            return why
        if INTERPRETED and tensor.dtype == torch.bfloat16:
            # Triton's interpreter adds and multiplies the raw bits of bf16, without an error.
            return "Triton's interpreter computes bf16 wrongly; use fp32 or fp16"
    return why_no_tangents(*tensors)


def why_no_tangents(*tensors: Tensor | None) -> str | None:
    """Why kernels cannot take these tensors where they carry tangents of forward-mode differentiation, or None."""
    if forward_ad._current_level < 0:  # outside of it nothing is looked at
        return None
    if any(tensor is not None and forward_ad.unpack_dual(tensor).tangent is not None for tensor in tensors):
        return "kernels have no forward-mode derivative: their tangents would come out as zeros"
    return None


def choose_impl(op: str, impl: Impl, reason: str | None) -> Literal["triton", "reference"]:
    """`auto` takes the kernel, or the reference for `reason`, which it logs once; ValueError where `triton` cannot be."""
    if impl not in ("auto", "triton", "reference"):
        raise ValueError(f"{op}: impl={impl!r} is none of auto, triton, reference")
    if impl == "reference" or reason is None:
        return "reference" if impl == "reference" else "triton"
    if impl == "triton":
        raise ValueError(f"{op}: impl=triton cannot run: {reason}. Use impl=auto or impl=reference")
    log_once(f"{op}: auto takes the reference: {reason}")
    return "reference"


def log_once(message: str) -> None:
    """Log at INFO, each text once in the life of the process; nothing while torch.compile traces."""
    if not torch.compiler.is_compiling():
        _log_new(message)


@functools.cache
def _log_new(message: str) -> None:
    _log.info(message)
