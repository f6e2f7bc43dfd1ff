"""Kernels as torch operators of the namespace `officina`: opaque to torch.compile, known to autograd and fake tensors.

Defined, implemented and differentiated one by one, which costs the CPU half of what `torch.library.custom_op` costs a call.
"""

import functools
from collections.abc import Callable
from typing import Any

import torch

from officina.kernels.dispatch import tl


def define_op(schema: str, implementation: Callable[..., Any], fake: Callable[..., Any],
              backward: Callable[..., Any] | None = None, save: Callable[..., None] | None = None) -> None:
    """Register `officina::<schema>`.

    Args:
        implementation: called with the operator's arguments; may not return its inputs.
        fake: the same with tensors without values; returns empty outputs.
        backward: (ctx, *gradients of the outputs) -> a gradient or None for each argument; calls operators only. Without one
            a derivative raises: torch would take it for zero.
        save: (ctx, inputs, output), as for `torch.library.register_autograd`.
    """
    name = f"officina::{schema.partition('(')[0]}"
    torch.library.define(name, schema[schema.index("("):])
    torch.library.impl(name, ("cpu", "cuda"), implementation)
    torch.library.register_fake(name, fake)
    if "!" not in schema:  # torch takes no derivatives of what writes to its inputs
        torch.library.register_autograd(name, backward or functools.partial(_refuse, name), setup_context=save)


def _refuse(name: str, ctx: Any, *_: Any) -> None:
    raise RuntimeError(f"{name} has no derivative: kernels are differentiable once; for second derivatives use impl=reference")


def wide_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype kernels compute in: fp32, or fp64 for fp64."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def wide_type(dtype: torch.dtype) -> Any:
    """`wide_dtype` as triton names it."""
    return tl.float64 if dtype == torch.float64 else tl.float32


def multiprocessors(device: torch.device) -> int:
    """Multiprocessors (compute units) of the device; 2 for the interpreter, so that partial sums exist there too."""
    if device.type != "cuda":
        return 2
    return _multiprocessors_of_index(torch.cuda.current_device() if device.index is None else device.index)


@functools.cache
def _multiprocessors_of_index(index: int) -> int:
    return torch.cuda.get_device_properties(index).multi_processor_count
