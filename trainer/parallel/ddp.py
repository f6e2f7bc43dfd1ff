"""Everything replicated, gradients summed by torch's DistributedDataParallel while the backward pass still runs."""

import warnings
from contextlib import nullcontext

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from officina.trainer.batch import Batch, loss_of
from officina.trainer.muon import Split
from officina.trainer.optim import Groups
from officina.trainer.parallel.engine import Parts
from officina.trainer.parallel.single import TorchEngine, prepare_whole
from officina.trainer.parallel.tensors import deal, refuse_unreached


def build(parts: Parts) -> TorchEngine:
    """The DDP engine; with one rank the single-process engine, which computes the same."""
    groups = prepare_whole(parts)
    return TorchEngine(parts, groups, Split()) if parts.ranks.world_size == 1 else DDPEngine(parts, groups)


class DDPEngine(TorchEngine):
    """Whole tensors on every rank. Export and Muon's work are dealt to the ranks tensor by tensor."""

    def __init__(self, parts: Parts, groups: Groups) -> None:
        sizes = {name: parameter.numel() for name, parameter in parts.module.named_parameters()}
        # Two dealings, so that each spreads evenly; a matrix of Muon is exported by the rank that has its momentum.
        self._owners = deal({name: size for name, size in sizes.items() if name not in groups.muon}, parts.ranks.world_size)
        self._owners |= deal({name: sizes[name] for name in groups.muon}, parts.ranks.world_size)
        super().__init__(parts, groups, Split("dealt", dist.group.WORLD, self._owners))
        if parts.run.engine.compile:
            # Blocks are compiled one by one; dynamo's own splitting for DDP refuses recomputation within them.
            torch._dynamo.config.optimize_ddp = False
        on_gpu = parts.ranks.device.type == "cuda"
        # No initial broadcast: import_state fills every rank from the same source. No buffer broadcasts: as in FSDP2.
        with warnings.catch_warnings():
            # torch 2.13 renames broadcast_buffers to a name that 2.9 does not know.
            warnings.simplefilter("ignore", FutureWarning)
            self._ddp = DistributedDataParallel(
                self.module, device_ids=[parts.ranks.device] if on_gpu else None, gradient_as_bucket_view=True,
                broadcast_buffers=False, init_sync=False)
        self._warm = False

    def forward_backward(self, batch: Batch, *, step_tokens: int, last: bool) -> Tensor:
        if not self._warm:
            self._settle_buckets(batch)
        self._kept.keep()
        with nullcontext() if last else self._ddp.no_sync():
            with self._autocast():
                loss = self._loss_fn(self._ddp, batch.fields)
            # DDP averages over the ranks.
            (loss_of(loss) * (self._ranks.world_size / step_tokens)).backward()
        return loss.detach().float()

    def close(self) -> None:
        self._ddp = None
        super().close()

    def _settle_buckets(self, batch: Batch) -> None:
        """Run one backward whose gradient is thrown away.

        DDP lays its buckets anew, in the order in which gradients became ready, at the forward after its first backward;
        from 3 ranks up that changes the order of sums. A resumed run would do so later than the run it continues, and
        differ in the last bits. So every run does it before its first step.
        """
        devices = [self._ranks.device] if self._ranks.device.type == "cuda" else []
        buffers = {name: buffer.clone() for name, buffer in self.module.named_buffers()}
        with torch.random.fork_rng(devices):
            with self._autocast():
                loss = self._loss_fn(self._ddp, batch.fields)
            loss_of(loss).backward()
        refuse_unreached(name for name, p in self._params.items() if p.requires_grad and p.grad is None)
        for parameter in self._params.values():
            parameter.grad = None
        for name, buffer in self.module.named_buffers():
            buffer.copy_(buffers[name])
        self._warm = True

    def _exports(self, name: str) -> bool:
        return self._owners[name] == self._ranks.rank
