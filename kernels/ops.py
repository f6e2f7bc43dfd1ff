"""Kernels as torch operators of the namespace `officina`: opaque to torch.compile, known to autograd and fake tensors.

Defined, implemented and differentiated one by one, which costs the CPU half of what `torch.library.custom_op` costs a call.
"""

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from officina.kernels.dispatch import tl


def define_op(schema: str, implementation: Callable[..., Any], fake: Callable[..., Any],
              backward: Callable[..., Any] | None = None, save: Callable[..., None] | None = None) -> None:
    """Register `officina::<schema>`.

    Args:
        implementation: called with the operator's arguments, the current device being that of the tensors; may not return its
            inputs. What the schema says it writes to counts as a new version, as after torch's own operators.
        fake: the same with tensors without values; returns empty outputs.
        backward: (ctx, *gradients of the outputs) -> a gradient or None for each argument; calls operators only. Without one
            a derivative raises: torch would take it for zero.
        save: (ctx, inputs, output), as for `torch.library.register_autograd`.
    """
    name = f"officina::{schema.partition('(')[0]}"
    torch.library.define(name, schema[schema.index("("):])
    written = [place for place, argument in enumerate(schema.split(", ")) if "!" in argument]
    torch.library.impl(name, ("cpu", "cuda"), functools.partial(_call, implementation, written))
    torch.library.register_fake(name, fake)
    if "!" not in schema:  # torch takes no derivatives of what writes to its inputs
        torch.library.register_autograd(name, backward or functools.partial(_refuse, name), setup_context=save)


def _call(implementation: Callable[..., Any], written: list[int], *arguments: Any) -> Any:
    with torch.cuda.device_of(next(argument for argument in arguments if isinstance(argument, Tensor))):
        result = implementation(*arguments)
    for place in written:
        torch.autograd.graph.increment_version(arguments[place])
    return result


def _refuse(name: str, ctx: Any, *_: Any, instead: str = "impl=reference") -> None:
    raise RuntimeError(f"{name} has no derivative: kernels are differentiable once; for second derivatives use {instead}")


class _Refusing(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, name: str, instead: str, gradient: Tensor, *_: Tensor) -> Tensor:
        ctx.name, ctx.instead = name, instead
        return gradient.view_as(gradient)

    @staticmethod
    def backward(ctx: Any, _: Tensor) -> None:
        _refuse(ctx.name, ctx, instead=ctx.instead)


def differentiable_once(name: str, instead: str, sources: tuple[Tensor, ...],
                        *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
    """The gradients that an autograd function's backward returns; where a graph is made of them, they refuse to be
    differentiated: torch would take their derivatives for zero.

    sources: an output of the function, as saved by it, which leads to all its inputs, and the gradient that came in.
    """
    if not torch.is_grad_enabled() or torch.compiler.is_compiling():  # compiled functions refuse by themselves
        return gradients
    return tuple(None if g is None else _Refusing.apply(name, instead, g, *sources) for g in gradients)


def rows_of(x: Tensor) -> Tensor:
    """x (..., D) as a matrix (N, D); unlike reshape(-1, D) also where there is nothing in it."""
    return x.flatten(0, -2) if x.dim() > 1 else x[None]


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
