"""Rules that the tests of several kernels share."""

from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType

import torch
from torch import Tensor

FLOOR_ULP = 4.0


def assert_twice_as_good(kernel: Callable, reference: Callable, inputs: Sequence[Tensor], *, factor: float = 2.0,
                         loose: Mapping[int, float] = MappingProxyType({})) -> None:
    """Errors of the kernel, in outputs and all gradients, are at most twice those of plain torch in the same precision.

    Both are measured against plain torch in fp64 from the same inputs. Where plain torch happens to be nearly exact, as it may
    be in a few values or one sum, `FLOOR_ULP` units in the last place of the largest value are allowed. loose: other
    allowances, by place among outputs and then gradients, for values whose rounding their size does not show.
    Source of the rule: flash-attention's tests.
    """
    exact = _with_grads(reference, [x.double() if x.is_floating_point() else x for x in inputs], torch.float64)
    plain, ours = (_with_grads(f, inputs, None) for f in (reference, kernel))
    assert len(exact) == len(plain) == len(ours)
    for place, (want, near, got) in enumerate(zip(exact, plain, ours, strict=True)):
        assert got.dtype == near.dtype and got.shape == near.shape, f"value {place}: {got.dtype} {got.shape}"
        assert got.isfinite().all(), f"value {place} is not finite"
        if not want.numel():
            continue
        ulp = loose.get(place, FLOOR_ULP)
        bound = factor * (near.double() - want).abs().max() + ulp * torch.finfo(got.dtype).eps * want.abs().max()
        error = (got.double() - want).abs().max()
        assert error <= bound, f"value {place}: error {error:.3g}, plain torch with its allowance {bound:.3g}"


def assert_same_bits(function: Callable, inputs: Sequence[Tensor], times: int = 3) -> None:
    """Outputs and gradients are the same, bit by bit, every time."""
    first, *others = (_with_grads(function, inputs, None) for _ in range(times))
    for other in others:
        assert all(torch.equal(a, b) for a, b in zip(first, other, strict=True))


def _with_grads(function: Callable, inputs: Sequence[Tensor], _wide: torch.dtype | None) -> list[Tensor]:
    """Outputs, then gradients in all floating inputs of a fixed random weighting of the outputs."""
    leaves = [x.detach().clone().requires_grad_() if x.is_floating_point() else x for x in inputs]
    outputs = function(*leaves)
    outputs = [outputs] if isinstance(outputs, Tensor) else list(outputs)
    generator = torch.Generator(outputs[0].device).manual_seed(7)
    upper = [torch.randn(y.shape, generator=generator, device=y.device).to(inputs[0].dtype).to(y.dtype) for y in outputs]
    wanted = [x for x in leaves if x.is_floating_point()]
    return [y.detach() for y in outputs] + list(torch.autograd.grad(outputs, wanted, upper))
