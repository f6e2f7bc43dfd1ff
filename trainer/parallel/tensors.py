"""What every engine does with a module's tensors: make them real, name them, deal them out, fill the buffers."""

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from officina.trainer.errors import OfficinaError
from officina.trainer.state import PARAM, Piece, Source


@dataclass(frozen=True, slots=True)
class Held:
    """The part of one named tensor that this rank holds: elements [start, stop) in row-major order."""

    name: str
    shape: tuple[int, ...]
    start: int
    stop: int

    def piece(self, slot: str, values: Tensor) -> Piece:
        """The piece with these values, of any shape."""
        return Piece(self.name, slot, self.shape, self.start, self.stop, values.detach().reshape(-1))

    def fill(self, into: Tensor, source: Source, slot: str) -> None:
        """Copy the range from `source` into `into`, a contiguous tensor of that many elements, cast to its dtype."""
        if self.stop > self.start:
            into.detach().view(-1).copy_(source.read(self.name, slot, self.start, self.stop))


def materialize(module: nn.Module, device: torch.device, *, dtype: torch.dtype | None = None,
                frozen_dtype: torch.dtype | None = None, parameter_device: torch.device | None = None) -> None:
    """Give the meta tensors of the module uninitialised memory in place, and move the real ones; ties stay ties.

    dtype: that of the floating-point parameters (buffers keep theirs). frozen_dtype: that of those without a gradient, if it
    is another. parameter_device: where parameters go, if not to `device`.
    Raises OfficinaError for a non-persistent buffer without values: no checkpoint holds it and nothing could fill it.
    """
    made: dict[int, Tensor] = {}
    for path, child in module.named_modules():
        for name, parameter in child._parameters.items():
            if parameter is None:
                continue
            if id(parameter) not in made:
                to = dtype if parameter.requires_grad else frozen_dtype or dtype
                made[id(parameter)] = _real_parameter(parameter, parameter_device or device, to)
            child._parameters[name] = made[id(parameter)]
        for name, buffer in child._buffers.items():
            if buffer is None:
                continue
            if buffer.is_meta and name in child._non_persistent_buffers_set:
                raise OfficinaError(f"the buffer {path}.{name} is not persistent and was built on the meta device, so "
                                    "nothing can fill it. Register it with persistent=True, or compute it in forward")
            if id(buffer) not in made:
                made[id(buffer)] = torch.empty_like(buffer, device=device) if buffer.is_meta else buffer.to(device)
            child._buffers[name] = made[id(buffer)]


def _real_parameter(parameter: nn.Parameter, device: torch.device, dtype: torch.dtype | None) -> nn.Parameter:
    data = parameter.detach()
    to = dtype if dtype and data.is_floating_point() else data.dtype
    if data.device == device and data.dtype == to and data.is_contiguous():
        return parameter  # the same object: DeepSpeed keeps its knowledge of a parameter on it
    if data.is_meta:
        # empty_like keeps a DTensor a DTensor; a contiguous layout, because state is read and written as flat ranges.
        real = torch.empty_like(data, device=device, dtype=to, memory_format=torch.contiguous_format)
    else:
        real = data.to(device=device, dtype=to).contiguous()
    return nn.Parameter(real, requires_grad=parameter.requires_grad)


def persistent_buffers(module: nn.Module) -> dict[str, Tensor]:
    """Buffers that belong to the state, by name; a shared one once. To be asked each time: a forward may replace them."""
    transient = {f"{path}.{name}" if path else name
                 for path, child in module.named_modules() for name in child._non_persistent_buffers_set}
    return {name: buffer for name, buffer in module.named_buffers() if name not in transient}


def fill_buffers(buffers: Mapping[str, Tensor], source: Source) -> None:
    """Fill every buffer, whole on every rank."""
    for name, buffer in buffers.items():
        values = source.read(name, PARAM, 0, buffer.numel())
        buffer.copy_(values.view(buffer.shape))


def buffer_pieces(buffers: Mapping[str, Tensor]) -> Iterator[Piece]:
    """The buffers as pieces: replicated everywhere, so for one rank to yield."""
    for name, buffer in buffers.items():
        yield Held(name, tuple(buffer.shape), 0, buffer.numel()).piece(PARAM, buffer)


@contextmanager
def evaluating(module: nn.Module) -> Iterator[None]:
    """Within it the module is in evaluation mode; afterwards each part is as it was: a user may keep one in that mode."""
    modes = [(child, child.training) for child in module.modules()]
    module.eval()
    try:
        yield
    finally:
        module.train(modes[0][1])  # for what a module's own `train` does
        for child, mode in modes:
            child.training = mode


class KeptBuffers:
    """A module's persistent buffers as they were before a step: one that is left out changes nothing."""

    def __init__(self, module: nn.Module) -> None:
        self._module = module if persistent_buffers(module) else None
        self._before: dict[str, Tensor] = {}

    def keep(self) -> None:
        """Before each micro-batch: the first of a step counts."""
        if self._module and not self._before:
            self._before = {name: buffer.clone() for name, buffer in persistent_buffers(self._module).items()}

    def settle(self, applied: bool) -> None:
        """After the step."""
        if self._before and not applied:
            for name, buffer in persistent_buffers(self._module).items():
                buffer.copy_(self._before[name])
        self._before = {}


def refuse_unreached(names: Iterable[str]) -> None:
    """Raise OfficinaError if there are trainable parameters without a gradient: what becomes of them is each engine's own."""
    if names := list(names):
        more = f" (and {len(names) - 1} more)" if len(names) > 1 else ""
        raise OfficinaError(f"{names[0]}{more} is trainable, but the loss of this step does not depend on it, and engines "
                            "differ in what they would make of it. Freeze it with requires_grad_(False), leave it out of the "
                            "module, or let every forward pass use it")


def leaves_of(loss: Tensor) -> set[int]:
    """ids of the tensors that the loss is differentiated with respect to."""
    seen, found, todo = set(), set(), [loss.grad_fn]
    while todo:
        node = todo.pop()
        if node is not None and node not in seen:
            seen.add(node)
            todo += [following for following, _ in node.next_functions]
            if hasattr(node, "variable"):
                found.add(id(node.variable))
    return found


def deal(sizes: Mapping[str, int], ranks: int) -> dict[str, int]:
    """Name -> rank, largest first to the rank that has least: the same everywhere, nearly even."""
    loads, owners = [0] * ranks, {}
    for name, size in sorted(sizes.items(), key=lambda item: (-item[1], item[0])):
        owners[name] = loads.index(min(loads))
        loads[owners[name]] += size
    return owners
