"""Bytes that the model's blocks and loss keep for the backward pass, without a GPU: fake tensors through the Triton operators.

Run with TRITON_INTERPRET=1, which lets the operators take tensors of the CPU; fp16 stands for bf16, which has as many bytes.
"""

import json
import sys

import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from officina.launch.memory_plan import plan_memory
from officina.trainer.config import BatchConfig, DecoderConfig, FSDP2Config, RunConfig
from officina.trainer.model.transformer import Transformer
from officina.trainer.parallel.blocks import prepare_blocks

ROWS, T, V = 2, 1024, 1024


def compare(recompute: str, **switches) -> tuple[int, int]:
    """(kept, estimated) bytes. Of recomputed blocks only what stays between them shows; one block is left out of the plan."""
    model = DecoderConfig(**{"vocab_size": V, "n_layers": 4, "d_model": 512, "n_heads": 8, "n_kv_heads": 2, "d_ff": 1536,
                             "kernels": "triton", "attention_impl": "triton", **switches})
    run = RunConfig(model=model, engine=FSDP2Config(recompute=recompute),
                    batch=BatchConfig(seq_len=T, global_tokens=ROWS * T, micro_rows=ROWS))
    kept, alive = {}, []
    with FakeTensorMode(allow_non_fake_inputs=True):
        torch.set_default_dtype(torch.float16)
        module = Transformer(model)
        torch.set_default_dtype(torch.float32)
        module.compute_dtype = torch.float16
        prepare_blocks(module.blocks, run)
        tokens = torch.zeros(ROWS, T, dtype=torch.int64)
        own = {parameter.untyped_storage()._cdata for parameter in module.parameters()}

        def pack(tensor):
            storage = tensor.untyped_storage()
            if storage._cdata not in own:
                kept[storage._cdata] = storage.nbytes()
                alive.append(tensor)
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            module(tokens, labels_BT=tokens)
    plan = plan_memory(run, 1)
    chunk = ROWS * T * V * 2  # the logits are gone when the forward pass ends
    estimated = plan.activations + plan.logits - chunk
    if recompute == "full":
        estimated = model.n_layers * ROWS * T * 512 * 2 + plan.logits - chunk
    return sum(kept.values()), estimated


if __name__ == "__main__":
    cases = {"plain": {}, "heads": {"n_kv_heads": 8}, "qk": {"qk_norm": "head"}, "sandwich": {"norm_placement": "sandwich"},
             "post": {"norm_placement": "post"}, "xielu": {"mlp": "xielu"}}
    found = {name: compare("none", **switches) for name, switches in cases.items()} | {"recomputed": compare("full")}
    json.dump(found, sys.stdout)
