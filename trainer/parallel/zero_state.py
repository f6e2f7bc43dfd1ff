"""Where DeepSpeed ZeRO keeps master weights and moments, as named flat ranges.

Each optimizer group (a sub-group in stage 3) is one flat tensor a rank, in which parts of parameters lie end to end: in
stages 1 and 2 the group is cut anywhere, in stage 3 each parameter is cut in equal, padded slices.
"""

from collections.abc import Collection, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from officina.trainer.optim import new_adamw_state
from officina.trainer.parallel.tensors import Held
from officina.trainer.state import EXP_AVG, EXP_AVG_SQ, PARAM, Piece, Source


@dataclass(frozen=True, slots=True)
class Fragment:
    """`held` of a parameter lies in the flat master tensor number `flat`, from `offset` on."""

    held: Held
    flat: int
    offset: int

    def of(self, flat: Tensor) -> Tensor:
        """The fragment's elements of a flat tensor."""
        return flat.detach()[self.offset:self.offset + self.held.stop - self.held.start]


class ZeroState:
    """Reads and fills the state of a DeepSpeedEngine. Moments exist from the beginning."""

    def __init__(self, engine, names: list[str], stage: int) -> None:
        """names: of all parameters, in the order of the module. Frozen ones are kept in the module and not here."""
        self._optimizer, self._stage = engine.optimizer, stage
        named = dict(zip(names, engine.module.parameters(), strict=True))
        self._frozen = {name: p for name, p in named.items() if not p.requires_grad}
        trained = {name: p for name, p in named.items() if p.requires_grad}
        find = self._stage3 if stage == 3 else self._stage12
        self._fragments = [fragment for name, p in trained.items() for fragment in find(name, p)]
        self._reset_moments(0)

    def fill(self, source: Source, steps: int | None) -> None:
        """Fill masters, moments (as after `steps` steps; None: zero) and the weights that the forward uses."""
        self._reset_moments(steps or 0)
        flats, states = self._flats(), self._optimizer.optimizer.state
        for fragment in self._fragments:
            flat = flats[fragment.flat]
            fragment.held.fill(fragment.of(flat), source, PARAM)
            if steps is not None:
                for slot in (EXP_AVG, EXP_AVG_SQ):
                    fragment.held.fill(fragment.of(states[flat][slot]), source, slot)
        for name, parameter in self._frozen.items():
            held, values = self._frozen_part(name, parameter)
            held.fill(values, source, PARAM)
        self._refresh()

    def pieces(self, without: Collection[str] = ()) -> Iterator[Piece]:
        """This rank's parts, but for the frozen ones named: ZeRO holds each element once, but for frozen parameters in stages 1
        and 2."""
        flats, states = self._flats(), self._optimizer.optimizer.state
        for fragment in self._fragments:
            flat = flats[fragment.flat]
            yield fragment.held.piece(PARAM, fragment.of(flat).float())
            for slot in (EXP_AVG, EXP_AVG_SQ):
                yield fragment.held.piece(slot, fragment.of(states[flat][slot]).float())
        for name, parameter in self._frozen.items():
            if name in without:
                continue
            held, values = self._frozen_part(name, parameter)
            if self._stage == 3 or torch.distributed.get_rank() == 0:
                yield held.piece(PARAM, values.float())

    def _flats(self) -> list[Tensor]:
        """The flat master tensors, by the name that the optimizer of this stage and precision has for them."""
        for name in ("fp32_partitioned_groups_flat", "single_partition_of_fp32_groups", "fp32_groups_flat_partition"):
            if hasattr(self._optimizer, name):
                return list(getattr(self._optimizer, name))
        raise RuntimeError(f"unknown DeepSpeed optimizer {type(self._optimizer).__name__}")

    def _stage12(self, name: str, parameter) -> Iterator[Fragment]:
        mapping = parameter._hp_mapping
        if mapping is not None:
            part = mapping.lp_fragment_address
            held = Held(name, tuple(parameter.shape), part.start, part.start + part.numel)
            yield Fragment(held, mapping.param_group_index, mapping.hp_fragment_address.start)

    def _stage3(self, name: str, parameter) -> Iterator[Fragment]:
        held = self._slice(name, parameter)
        if held.stop > held.start:
            flat, offset, _ = self._optimizer.grad_position[self._optimizer.get_param_id(parameter)]
            yield Fragment(held, flat, offset)

    def _slice(self, name: str, parameter) -> Held:
        length, rank = parameter.ds_tensor.ds_numel, torch.distributed.get_rank()
        start = min(parameter.ds_numel, rank * length)
        return Held(name, tuple(parameter.ds_shape), start, min(parameter.ds_numel, start + length))

    def _frozen_part(self, name: str, parameter) -> tuple[Held, Tensor]:
        if self._stage != 3:
            return Held(name, tuple(parameter.shape), 0, parameter.numel()), parameter.detach().view(-1)
        held = self._slice(name, parameter)
        return held, parameter.ds_tensor.detach()[:held.stop - held.start]

    def _reset_moments(self, steps: int) -> None:
        # DeepSpeed links its view of the moments when the first group steps, and misses those of the other groups unless
        # all are there before.
        for flat in self._flats():
            self._optimizer.optimizer.state[flat] = new_adamw_state(flat.detach(), steps)
        if self._stage != 3:
            self._optimizer._hp_optimizer_states_linked = False
            self._optimizer._lazy_init_hp_params_optimizer_state()

    def _refresh(self) -> None:
        """Copy the masters to the weights that the forward uses; nothing does it by itself, in fp32 stage 3 neither."""
        z = self._optimizer
        if self._stage != 3:
            z.update_lp_params()
            return
        z._partition_all_parameters()  # as DeepSpeed's step does: a gather leaves out what is gathered already
        for group in range(len(z.fp16_groups)):
            z._reassign_or_swap_out_partitioned_parameters(group)
        self.gather_small()

    def gather_small(self) -> None:
        """Make the weights whole that stage 3 keeps gathered."""
        if self._stage == 3 and self._optimizer.persistent_parameters:
            self._optimizer.persistent_parameters[0].all_gather(self._optimizer.persistent_parameters)
