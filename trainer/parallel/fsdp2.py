"""Parameters, gradients and moments sharded by rows: torch's `fully_shard`, over all ranks (fsdp2) or in groups (hsdp)."""

import warnings

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule, MixedPrecisionPolicy, OffloadPolicy, fully_shard

from officina.trainer.batch import Batch, LossFn
from officina.trainer.config import HSDPConfig
from officina.trainer.errors import OfficinaError
from officina.trainer.muon import Split
from officina.trainer.optim import group_parameters
from officina.trainer.parallel.blocks import check_shardable, find_blocks, prepare_blocks
from officina.trainer.parallel.engine import Parts
from officina.trainer.parallel.precision import frozen_dtype, storage_dtype
from officina.trainer.parallel.single import TorchEngine
from officina.trainer.parallel.tensors import Held, deal, materialize
from officina.trainer.state import Source

SHARD, REPLICATE = "dp_shard", "dp_replicate"


def build(parts: Parts) -> "FSDP2Engine":
    """The FSDP2 or HSDP engine. No rank ever holds the whole model: it is sharded while still on the meta device.

    Raises OfficinaError for what cannot be sharded, and where shard_size does not divide the number of ranks.
    """
    whole = [name for name, p in parts.module.named_parameters() if not p.is_floating_point()]
    if whole and torch.__version__ < (2, 12):
        raise OfficinaError(f"engine={parts.run.engine.kind}: PyTorch {torch.__version__} cannot shard {whole[0]}, which holds "
                            "whole numbers, as adapter.base=nf4 does; 2.12 and later can. Try: engine=ddp or adapter.base=full")
    check_shardable(parts.module, find_blocks(parts.module, parts.run), parts.run, by_block=True)
    parts.ranks.ensure_group()
    # torch 2.13, of the decoder's loss: nothing writes into it.
    warnings.filterwarnings("ignore", r"FSDP2-wrapped module \(FSDPTransformer\) returned a view", UserWarning)
    return FSDP2Engine(parts)


class FSDP2Engine(TorchEngine):
    """Each rank holds some rows of every parameter, a contiguous flat range."""

    def __init__(self, parts: Parts) -> None:
        self._config, run, module = parts.run.engine, parts.run, parts.module
        mesh = _mesh(parts)
        blocks = find_blocks(module, run)
        groups = group_parameters(module, blocks, run.optim)
        prepare_blocks(blocks, run)
        self._shard(module, blocks, mesh, parts)
        offload = torch.device("cpu") if self._config.cpu_offload else None
        materialize(module, parts.ranks.device, dtype=storage_dtype(parts.precision),
                    frozen_dtype=frozen_dtype(module, parts.precision), parameter_device=offload)
        self._shards = mesh[SHARD] if mesh.ndim > 1 else mesh
        self._replicas = mesh.size() // self._shards.size()
        self._replica = mesh.get_local_rank(REPLICATE) if mesh.ndim > 1 else 0
        self._owners = deal({name: p.numel() for name, p in module.named_parameters()}, self._replicas)
        super().__init__(parts, groups, Split("rows", self._shards.get_group(), local=self._local))

    def _shard(self, module: nn.Module, blocks: nn.ModuleList, mesh: DeviceMesh, parts: Parts) -> None:
        # bf16: weights are handed over in bf16, gradients come back and are summed in fp32.
        mixed = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
        on_gpu = parts.ranks.device.type == "cuda"
        policy = {
            "mesh": mesh, "reshard_after_forward": self._config.reshard_after_forward,
            "mp_policy": mixed if parts.precision == "bf16" else MixedPrecisionPolicy(),
            "offload_policy": CPUOffloadPolicy(pin_memory=on_gpu) if self._config.cpu_offload else OffloadPolicy(),
        }
        for block in blocks:
            fully_shard(block, **policy)
        fully_shard(module, **policy)
        for child in module.modules():
            if isinstance(child, FSDPModule):
                # Plain sums: we divide by the step's tokens ourselves. (gloo has no scaled sum either.)
                child.set_gradient_divide_factor(1.0)
                child.set_force_sum_reduction_for_comms(True)

    def forward_backward(self, batch: Batch, *, step_tokens: int, last: bool) -> Tensor:
        if self._config.reshard_after_forward:
            # Lean: gradients are sharded after every micro-batch; only the sum over replicas waits for the last.
            self.module.set_requires_all_reduce(last)
        else:
            # Fast: weights stay gathered and gradients whole until the last micro-batch.
            self.module.set_requires_gradient_sync(last)
            self.module.set_reshard_after_backward(last)
        return super().forward_backward(batch, step_tokens=step_tokens, last=last)

    def infer(self, compute: LossFn, batch: Batch) -> Tensor:
        found = super().infer(compute, batch)
        self._free_gathered()
        return found

    def import_state(self, source: Source, *, optimizer_steps: int | None) -> None:
        self._free_gathered()
        super().import_state(source, optimizer_steps=optimizer_steps)

    def close(self) -> None:
        super().close()
        self._shards = None

    def _free_gathered(self) -> None:
        """Free what stays gathered after a forward without backward: it costs memory, and is stale once shards change."""
        for child in self.module.modules():
            if isinstance(child, FSDPModule):
                child.reshard()

    def _squares(self, gradients: list[Tensor]) -> Tensor:
        # Over all ranks, the same number everywhere even where two replicas' sums could differ in the last bit.
        squares = super()._squares(gradients).to(self._ranks.device)
        dist.all_reduce(squares)
        return squares / self._replicas

    def _held(self, name: str, parameter: nn.Parameter) -> Held:
        shape = tuple(parameter.shape)
        rows, row = -(-shape[0] // self._shards.size()), parameter.numel() // max(1, shape[0])
        start = min(shape[0], rows * self._shards.get_local_rank())
        return Held(name, shape, start * row, min(shape[0], start + rows) * row)

    def _local(self, tensor: Tensor) -> Tensor:
        return tensor.to_local()

    def _exports(self, name: str) -> bool:
        return self._owners[name] == self._replica


def _mesh(parts: Parts) -> DeviceMesh:
    world, device = parts.ranks.world_size, parts.ranks.device.type
    if not isinstance(parts.run.engine, HSDPConfig):
        return init_device_mesh(device, (world,), mesh_dim_names=(SHARD,))
    size = parts.run.engine.shard_size
    if world % size:
        raise OfficinaError(f"engine.shard_size={size} does not divide the {world} ranks. Try: engine.shard_size="
                            f"{next(s for s in range(min(size, world), 0, -1) if world % s == 0)}, or engine=fsdp2")
    return init_device_mesh(device, (world // size, size), mesh_dim_names=(REPLICATE, SHARD))
