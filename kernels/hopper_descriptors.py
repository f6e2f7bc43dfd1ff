"""What TMA needs to know of a tensor to copy tiles of it between global and shared memory, for the Hopper kernels in Gluon.

Sources: CUDA driver API, cuTensorMapEncodeTiled (alignment, strides); tutorials 04 and 05 of Gluon (layouts).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

try:
    from triton.experimental.gluon import language as gl
    from triton.experimental.gluon.nvidia.hopper import TensorDescriptor
except ImportError:  # no triton, or one without Gluon: nobody asks for descriptors then
    pass

STRIDE_ELEMENTS, STRIDE_LIMIT_BYTES = 8, 2**40
"""TMA takes strides that are multiples of 16 bytes, less than this."""


def loadable(x: Tensor) -> Tensor:
    """x itself, or a copy where TMA could not walk it."""
    steps = [stride for size, stride in zip(x.shape[:-1], x.stride()[:-1], strict=True) if size > 1]
    fits = all(0 < s < STRIDE_LIMIT_BYTES // x.element_size() and s % STRIDE_ELEMENTS == 0 for s in steps)
    return x if fits and x.stride(-1) == 1 and x.data_ptr() % 16 == 0 else x.clone(memory_format=torch.contiguous_format)


def descriptor(x_BHTD: Tensor, rows: int, width: int) -> Any:
    """For copies of tiles (rows, width) of one head. What lies outside the tensor is read as 0 and not written."""
    # The stride of an axis of one is never used, but must be a legal one.
    strides = [stride if size > 1 else x_BHTD.shape[-1] for size, stride in zip(x_BHTD.shape, x_BHTD.stride(), strict=True)]
    shape = [1, 1, rows, width]
    return TensorDescriptor(x_BHTD, list(x_BHTD.shape), [*strides[:-1], 1], shape, _layout(shape))


def descriptor_type(dtype: str, rows: int, width: int) -> str:
    """Triton's name of the type of such a descriptor, for compiling without one; `bf16` or `fp16`."""
    shape = [1, 1, rows, width]
    return f"tensordesc<{dtype}{shape},{_layout(shape)!r}>"


def _layout(shape: list[int]) -> Any:
    """Of 16-bit elements in shared memory: swizzled as TMA and wgmma both know it."""
    return gl.NVMMASharedLayout.get_default_for(shape, gl.float16)


def numbers_descriptor(x: Tensor, rows: int) -> Any:
    """For copies of `rows` fp32 numbers of a contiguous tensor, taken as one row. What lies beyond its end is read as 0."""
    return TensorDescriptor(x.view(-1), [x.numel()], [1], [rows], _numbers_layout(rows))


def numbers_type(rows: int) -> str:
    """Triton's name of the type of such a descriptor, for compiling without one."""
    return f"tensordesc<fp32[{rows}],{_numbers_layout(rows)!r}>"


def _numbers_layout(rows: int) -> Any:
    return gl.NVMMASharedLayout.get_default_for([rows], gl.float32)
