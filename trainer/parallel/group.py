"""A process group also for a lone rank: FSDP2 and DeepSpeed want one even where there is nobody to talk to."""

import torch.distributed as dist

from officina.trainer.ranks import Ranks


def join_group(ranks: Ranks) -> bool:
    """See to it that there is a process group; True if one was made here, for `leave_group` to end.

    With several ranks it is there already (`ranks.start_ranks`).
    """
    if dist.is_initialized():
        return False
    if ranks.world_size != 1:
        raise RuntimeError(f"{ranks.world_size} ranks, but no process group was started for them")
    backend = "cpu:gloo,cuda:nccl" if ranks.device.type == "cuda" else "gloo"
    dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
    return True


def leave_group(made_here: bool) -> None:
    """End the group that `join_group` made."""
    if made_here and dist.is_initialized():
        dist.destroy_process_group()
