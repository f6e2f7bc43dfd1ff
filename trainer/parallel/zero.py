"""DeepSpeed ZeRO, stages 1 to 3, with AdamW of ours as its inner optimizer, so that all engines step alike.

DeepSpeed's own counting of micro-batches, averaging and learning-rate schedules are switched off: the loop owns them.
"""

import gc
import logging
import math
import os
import sys
import warnings
from collections.abc import Collection, Iterator
from contextlib import redirect_stdout

import torch
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes

from officina.trainer.batch import Batch, LossFn, loss_of
from officina.trainer.config import MuonConfig, RunConfig, ZeroConfig
from officina.trainer.environment import lacking
from officina.trainer.errors import ConfigError, OfficinaError, Problem
from officina.trainer.optim import group_parameters, new_adamw
from officina.trainer.parallel.blocks import check_shardable, find_blocks, prepare_blocks
from officina.trainer.parallel.engine import Parts, StepOutcome
from officina.trainer.parallel.precision import set_precision
from officina.trainer.parallel.tensors import (
    KeptBuffers,
    buffer_pieces,
    evaluating,
    fill_buffers,
    leaves_of,
    materialize,
    persistent_buffers,
    refuse_unreached,
)
from officina.trainer.parallel.zero_state import ZeroState
from officina.trainer.state import Piece, Source

NO_MUON = ("engine=zero hands an optimizer flat slices of the gradient, "
           "and its norm and clipping see Muon's update instead of the gradient")


def build(parts: Parts) -> "ZeroEngine":
    """The ZeRO engine.

    Stages 1 and 2 build the whole module on every rank's device, as ZeRO does; stage 3 makes one block real at a time and
    shards it before the next. Raises ConfigError for Muon, OfficinaError for what cannot be sharded and where DeepSpeed is not
    installed.
    """
    if isinstance(parts.run.optim, MuonConfig):
        raise ConfigError([Problem("optim", "muon", NO_MUON, "optim=adamw, or engine=fsdp2")])
    blocks = find_blocks(parts.module, parts.run)
    check_shardable(parts.module, blocks, parts.run, by_block=parts.run.engine.stage == 3)
    parts.ranks.ensure_group()
    return ZeroEngine(parts)


class ZeroEngine:
    """Wraps a DeepSpeedEngine; `self.module` is that one."""

    def __init__(self, parts: Parts) -> None:
        self._ranks, self._loss_fn = parts.ranks, parts.loss_fn
        self.optimizer_steps = 0
        run, module = parts.run, parts.module
        deepspeed = load_deepspeed(parts.ranks.device, parts.ranks.env.local_rank)
        settings = deepspeed_settings(run, parts.precision, parts.ranks.device)
        blocks = find_blocks(module, run)
        groups = group_parameters(module, blocks, run.optim)
        names = list(dict(module.named_parameters()))
        compute = torch.float32 if parts.precision == "fp32" else torch.bfloat16
        if run.engine.stage == 3:
            for part in (*blocks, module):  # the module last: what is outside the blocks
                materialize(part, parts.ranks.device, dtype=compute)
                deepspeed.zero.Init(module=part, config_dict_or_path=settings, dtype=compute)
        else:
            materialize(module, parts.ranks.device, dtype=compute)
        prepare_blocks(blocks, run)
        self._autocast = set_precision(module, blocks, parts.precision, parts.ranks.device, bf16_weights=True)
        self._bare, self._kept, self._reached = module, KeptBuffers(module), False
        optimizer = new_adamw(run.optim, groups, dict(module.named_parameters()))
        self._lr = run.optim.lr
        with redirect_stdout(sys.stderr):  # it prints its memory, where the run's progress is shown
            self.module, *_ = deepspeed.initialize(
                model=module, optimizer=optimizer, config=settings, dist_init_required=False)
        if run.engine.stage == 3 and run.engine.recompute == "selective":
            _hide_gathering(self.module.optimizer.parameter_offload)
        self._state = ZeroState(self.module, names, run.engine.stage)
        self._guard = NormGuard(self.module.optimizer)

    def forward_backward(self, batch: Batch, *, step_tokens: int, last: bool) -> Tensor:
        self._kept.keep()
        with self._autocast():
            loss = self._loss_fn(self.module, batch.fields)
        if not self._reached:  # DeepSpeed hides the gradients: ask the graph, of the first micro-batch
            leaves = leaves_of(loss)
            refuse_unreached(name for name, p in self._bare.named_parameters() if p.requires_grad and id(p) not in leaves)
            self._reached = True
        # ZeRO averages over the ranks.
        self.module.backward(loss_of(loss) * (self._ranks.world_size / step_tokens), scale_wrt_gas=False)
        return loss.detach().float()

    def step(self, lr_factor: float, *, max_norm: float = math.inf) -> StepOutcome:
        for group in self.module.optimizer.param_groups:
            group["lr"] = self._lr * lr_factor
        with self._guard.bound(max_norm) as seen:
            self.module.step()
        norm = seen.norm if seen.norm is not None else self.module.get_global_grad_norm()
        applied = self.module.was_step_applied()
        self.optimizer_steps += applied
        if not applied:  # DeepSpeed took small parameters apart, and only after an update puts them together again
            self._state.gather_small()
        self._kept.settle(applied)
        return StepOutcome(float(norm), applied)

    def evaluate(self, batch: Batch) -> Tensor:
        return self.infer(self._loss_fn, batch)

    @torch.no_grad()
    def infer(self, compute: LossFn, batch: Batch) -> Tensor:
        with evaluating(self.module), self._autocast():
            return compute(self.module, batch.fields).float()

    @torch.no_grad()
    def import_state(self, source: Source, *, optimizer_steps: int | None) -> None:
        self._state.fill(source, optimizer_steps)
        self.optimizer_steps = optimizer_steps or 0
        fill_buffers(persistent_buffers(self._bare), source)

    def export_state(self, without: Collection[str] = ()) -> Iterator[Piece]:
        yield from self._state.pieces(without)
        if self._ranks.rank == 0:
            yield from buffer_pieces(persistent_buffers(self._bare))

    def close(self) -> None:
        self.module.destroy()
        self._guard = self._state = self.module = self._bare = self._kept = self._loss_fn = None
        forget_deepspeed()


def _hide_gathering(offload) -> None:
    """Keep what stage 3 does around each layer out of sight of selective recomputation.

    That counts the operators of both passes and refuses when they differ, as they do where a parameter is gathered already.
    """
    def unseen(act):
        def hidden(sub_module):
            with _disable_current_modes():
                act(sub_module)

        return hidden

    for name in ("pre_sub_module_forward_function", "post_sub_module_forward_function"):
        setattr(offload, name, unseen(getattr(offload, name)))


class NormGuard:
    """Makes DeepSpeed leave out a step whose gradient norm is above a bound, by its own way for overflows.

    Nothing in its interface does that: between the last backward and the update nobody else sees the norm. So the method
    that computes it is wrapped on this one optimizer and reports infinity.
    """

    def __init__(self, optimizer) -> None:
        self.limit, self.norm = math.inf, None
        if hasattr(optimizer, "_get_norm_groups"):  # stage 3
            self._wrap(optimizer, "_get_norm_groups", lambda groups: torch.stack(list(groups)).norm(), lambda big: [big])
        elif hasattr(optimizer, "scaled_global_norm"):  # stages 1 and 2
            self._wrap(optimizer, "scaled_global_norm", lambda norm: norm, lambda big: big)
        else:  # BF16_Optimizer: stage 1 in bf16
            self._wrap_bf16(optimizer)

    def bound(self, limit: float) -> "NormGuard":
        """Use as a context around DeepSpeed's step; afterwards `norm` is the true norm if it was above the limit."""
        self.limit, self.norm = limit, None
        return self

    def __enter__(self) -> "NormGuard":
        return self

    def __exit__(self, *_exception) -> None:
        self.limit = math.inf

    def _wrap(self, optimizer, method: str, to_norm, from_norm) -> None:
        original = getattr(optimizer, method)

        def guarded(*args, **kwargs):
            result = original(*args, **kwargs)
            if self.limit == math.inf:
                return result
            norm = to_norm(result)
            if math.isfinite(norm) and norm > self.limit:
                self.norm = float(norm)
                return from_norm(torch.full_like(norm, math.inf))
            return result

        setattr(optimizer, method, guarded)

    def _wrap_bf16(self, optimizer) -> None:
        from deepspeed.runtime.utils import get_global_norm_of_tensors

        original = optimizer.get_grads_for_norm

        def guarded(for_clipping: bool = False):
            gradients = original(for_clipping)
            if for_clipping or self.limit == math.inf:
                return gradients
            norm = get_global_norm_of_tensors(input_tensors=gradients[0])
            if math.isfinite(norm) and norm > self.limit:
                self.norm = float(norm)
                return [torch.full((), math.inf, device=gradients[0][0].device)], gradients[1]
            return gradients

        optimizer.get_grads_for_norm = guarded


def deepspeed_settings(run: RunConfig, precision: str, device: torch.device) -> dict:
    """DeepSpeed's configuration."""
    engine: ZeroConfig = run.engine
    zero = {
        "stage": engine.stage,
        "overlap_comm": engine.stage > 1 and device.type == "cuda",
        # Replacing torch.nn.functional.linear in the whole process is not ours to do.
        "memory_efficient_linear": False,
    }
    pinned = device.type == "cuda"
    if engine.offload_optimizer:
        zero["offload_optimizer"] = {"device": "cpu", "pin_memory": pinned}
    if engine.stage == 3:
        zero["stage3_param_persistence_threshold"] = engine.persistence_threshold
        if engine.offload_params:
            zero["offload_param"] = {"device": "cpu", "pin_memory": pinned}
    settings = {
        "train_micro_batch_size_per_gpu": 1, "gradient_accumulation_steps": 1, "managed_gradient_accumulation": False,
        "gradient_clipping": run.optim.clip_norm, "steps_per_print": None, "wall_clock_breakdown": False,
        "zero_allow_untested_optimizer": True, "zero_force_ds_cpu_optimizer": False, "zero_optimization": zero,
    }
    if precision == "bf16":
        settings |= {"bf16": {"enabled": True, "check_grad_overflow": True}, "communication_data_type": "fp32",
                     "data_types": {"grad_accum_dtype": "fp32"}}
    elif precision == "bf16_pure":
        settings |= {"bf16": {"enabled": True, "check_grad_overflow": True, "bf16_master_weights_and_grads": True,
                              "bf16_optimizer_states": True},
                     "communication_data_type": "bf16", "data_types": {"grad_accum_dtype": "bf16"}}
    return settings


def load_deepspeed(device: torch.device, local_rank: int):
    """Import DeepSpeed for this device and let it take over the process group there is. Returns the package."""
    if device.type == "cpu":
        os.environ |= {"DS_ACCELERATOR": "cpu", "LOCAL_SIZE": "1"}  # else stage 3 starts numactl in every micro-batch
    os.environ["LOCAL_RANK"] = str(local_rank if device.index is None else device.index)
    if lack := lacking("deepspeed"):  # earlier ones sum micro-batches wrongly or apply what is left out
        raise OfficinaError(f"engine=zero {lack}. Try: pip install 'officina[deepspeed]', or engine=fsdp2")
    import deepspeed
    from deepspeed.utils import logger

    logger.setLevel(logging.WARNING)
    # torch 2.13's new names for what DeepSpeed calls at every step: a line per call and rank otherwise.
    warnings.filterwarnings("ignore", r".*torch\.distributed\..* is deprecated", FutureWarning)
    # Otherwise a C++ extension is built at first use: half a minute, a compiler, and shared memory that a kill leaves.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    deepspeed.init_distributed(dist_backend=torch.distributed.get_backend(), auto_mpi_discovery=False, verbose=False)
    return deepspeed


def forget_deepspeed() -> None:
    """Undo what DeepSpeed keeps in module globals, so that another engine may follow in this process, also among other ranks.

    Its numbering of parameters and modules must start anew: ranks that built different numbers of engines would hang.
    """
    import deepspeed
    from deepspeed.runtime.zero.parameter_offload import DeepSpeedZeRoOffload
    from deepspeed.runtime.zero.partition_parameters import Init
    from deepspeed.utils import groups

    gc.collect()
    Init.param_id = 0
    counter = DeepSpeedZeRoOffload._register_deepspeed_module
    getattr(counter, "__wrapped__", counter).__defaults__[0][0] = 0
    groups._WORLD_GROUP = groups._ZERO_PARAM_INTRA_PARALLEL_GROUP = groups.mesh_device = None
    deepspeed.comm.comm.cdb = None
