"""What is done per block of the model, under every engine: finding the blocks, recomputation, compilation.

Each is done to the block in place, without a wrapper, so that names stay those of the model.
"""

from functools import partial
from types import MethodType

import torch
from torch import nn
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from officina.kernels.flash_attention import OPERATOR
from officina.trainer.config import CustomModelConfig, RunConfig
from officina.trainer.errors import ConfigError, OfficinaError, Problem

_ATEN = torch.ops.aten
_KEPT = {
    getattr(_ATEN, name).default
    for name in ("mm", "addmm", "bmm", "baddbmm", "convolution", "_scaled_dot_product_flash_attention",
                 "_scaled_dot_product_efficient_attention", "_scaled_dot_product_cudnn_attention",
                 "_scaled_dot_product_flash_attention_for_cpu", "_scaled_dot_product_fused_attention_overrideable")
    if hasattr(_ATEN, name)
} | {torch.ops.higher_order.flex_attention, OPERATOR}
"""Products, whose recomputation costs most of a forward pass; all else is cheap per byte it would keep."""


def find_blocks(module: nn.Module, run: RunConfig) -> nn.ModuleList:
    """The repeated blocks, each once: the unit of sharding, recomputation and compilation.

    Raises ConfigError if there are none.
    """
    path = run.model.blocks if isinstance(run.model, CustomModelConfig) else "blocks"
    try:
        found = module.get_submodule(path)
    except AttributeError:
        found = None
    if not isinstance(found, nn.ModuleList) or not len(found):
        lists = [name for name, child in module.named_modules() if isinstance(child, nn.ModuleList) and len(child)]
        raise ConfigError([Problem("model.blocks", path, "names no filled nn.ModuleList of the model",
                                   f"model.blocks={lists[0]}" if lists else "keep the repeated layers in an nn.ModuleList")])
    return nn.ModuleList(dict.fromkeys(found))


def check_shardable(module: nn.Module, blocks: nn.ModuleList, run: RunConfig, *, by_block: bool) -> None:
    """Raise OfficinaError for parameters that cannot be sharded: without dimensions, or by block and in two blocks at once."""
    engine = run.engine.kind
    for name, parameter in module.named_parameters():
        if parameter.ndim == 0:
            raise OfficinaError(f"{name} has no dimension, and engine={engine} shards the first one. Give it shape (1,), or "
                                "use engine=ddp")
    if not by_block:
        return
    inside = {id(child) for block in blocks for child in block.modules()}
    outside = (child for child in module.modules() if id(child) not in inside)
    units = [("outside of the blocks", outside), *((f"in block {i}", block.modules()) for i, block in enumerate(blocks))]
    places: dict[int, str] = {}
    names = {id(parameter): name for name, parameter in module.named_parameters()}
    for place, children in units:
        for parameter in {id(p) for child in children for p in child.parameters(recurse=False)}:
            if parameter in places:
                raise OfficinaError(f"{names[parameter]} is used {places[parameter]} and {place}, and engine={engine} shards "
                                    "each block by itself. Share it within one block or outside of all, or use engine=ddp")
            places[parameter] = place


def prepare_blocks(blocks: nn.ModuleList, run: RunConfig) -> None:
    """Recomputation and compilation as the configuration asks. Before sharding: its hooks then stay around both."""
    if run.engine.recompute != "none":
        # But for an adapter's dropout the decoder draws no random numbers, so nothing of the generator has to be kept for it.
        keep_rng = isinstance(run.model, CustomModelConfig) or getattr(run.adapter, "dropout", 0) > 0
        # One function for all blocks: torch.compile then compiles one block, not each of them.
        recompute = _recomputing(run.engine.recompute, keep_rng)
        for block in blocks:
            block.forward = MethodType(recompute, block)
    if run.engine.compile:
        for block in blocks:
            block.compile()


def _keep_products(_context, operator, *_args, **_kwargs) -> CheckpointPolicy:
    return CheckpointPolicy.MUST_SAVE if operator in _KEPT else CheckpointPolicy.PREFER_RECOMPUTE


def _recomputing(kind: str, keep_rng: bool):
    """A `forward` for a block that recomputes what its class's `forward` computes."""
    options = {"use_reentrant": False, "preserve_rng_state": keep_rng}
    if kind == "selective":
        options["context_fn"] = partial(create_selective_checkpoint_contexts, _keep_products)

    def forward(block: nn.Module, *args, **kwargs):
        return checkpoint(partial(type(block).forward, block), *args, **options, **kwargs)

    return forward
