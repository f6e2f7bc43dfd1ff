"""What a module computes in, whatever its weights are stored in."""

from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

Compute = Callable[[], torch.autocast]
"""Makes the context that every forward pass runs in."""


def storage_dtype(precision: str) -> torch.dtype:
    """What parameters, gradients and moments are stored in; of `bf16`, the masters."""
    return torch.bfloat16 if precision == "bf16_pure" else torch.float32


def frozen_dtype(module: nn.Module, precision: str) -> torch.dtype:
    """What weights that never change are stored in: no master is needed where the model casts each weight at its use."""
    casts = hasattr(module, "compute_dtype")
    return torch.bfloat16 if casts and precision != "fp32" else storage_dtype(precision)


def set_precision(module: nn.Module, blocks: Iterable[nn.Module], precision: str, device: torch.device, *,
                  bf16_weights: bool) -> Compute:
    """Make the module compute in bf16 unless precision is fp32.

    A model with an attribute `compute_dtype` (the decoder) is told, and casts each weight where it is used. Any other runs
    under torch.autocast. bf16_weights: its forward sees bf16 weights; then what enters it and its blocks is cast too, as
    FSDP2's policy does, because a norm on the CPU takes no fp32 input with bf16 weights, autocast or not.
    """
    low = precision != "fp32"
    if hasattr(module, "compute_dtype"):
        module.compute_dtype = torch.bfloat16 if low else None
        low = False
    elif low and bf16_weights:
        for part in (module, *blocks):
            part.register_forward_pre_hook(_cast_inputs, with_kwargs=True)
    return lambda: torch.autocast(device.type, dtype=torch.bfloat16, enabled=low)


def _cast_inputs(_module: nn.Module, args, kwargs):
    return tree_map(_to_bf16, args), tree_map(_to_bf16, kwargs)


def _to_bf16(value):
    return value.to(torch.bfloat16) if isinstance(value, Tensor) and value.is_floating_point() else value
