"""A model whose parts all run as Triton kernels, in the interpreter, trains as one in plain torch does; under engines too."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from officina.trainer.config import AdamWConfig, DecoderConfig, RunConfig
from officina.trainer.model.build import build_model
from officina.trainer.muon import Split
from officina.trainer.optim import Optimizer, group_parameters
from officina.trainer.state import PARAM
from tests.distributed import RankPool
from tests.kernels.interpreter import ENVIRONMENT
from tests.trainer.parallel.cases import MODEL, Case, Trace, distance, join, reference

KERNELS = {"kernels": "triton", "attention_impl": "triton"}
PLAIN = {"kernels": "reference", "attention_impl": "reference"}
TINY = DecoderConfig(vocab_size=31, n_layers=1, d_model=16, n_heads=2, n_kv_heads=1, head_dim=16, d_ff=24, qk_norm="head")
OTHER = replace(MODEL, n_layers=2, mlp="xielu", qk_norm="full", norm_placement="sandwich", norm_weight="zero_centred",
                norm_cast="after", window=8, window_pattern=[True, False], logit_softcap=20.0)


def train(model: DecoderConfig, steps: int) -> Trace:
    """On packed random documents. Runs in the interpreter's process."""
    run = RunConfig(model=model, optim=AdamWConfig(lr=3e-3, eps=1e-6))
    built = build_model(run)
    module = built.module.to_empty(device="cpu")
    for name, parameter in module.named_parameters():
        parameter.data.copy_(built.source.read(name, PARAM, 0, parameter.numel()).view(parameter.shape))
    optimizer = Optimizer(run.optim, group_parameters(module, module.blocks, run.optim), dict(module.named_parameters()),
                          Split(), model.kernels)
    generator = torch.Generator().manual_seed(0)
    positions = torch.tensor([[0, 1, 2, 0, 1, 2, 3]])
    losses, norms = [], []
    for _ in range(steps):
        tokens = torch.randint(0, 9, (1, 8), generator=generator).cumsum(1) % 31
        module.zero_grad()
        loss = module(tokens[:, :-1], labels_BT=tokens[:, 1:], documents_BT=(positions == 0).cumsum(1).int(),
                      positions_BT=positions) / 7
        loss.backward()
        losses.append(loss.item())
        norms.append(torch.nn.utils.clip_grad_norm_(module.parameters(), 1.0).item())
        optimizer.step(1.0)
    state = {(name, PARAM): p.detach().double().numpy().reshape(-1) for name, p in module.named_parameters()}
    return Trace(losses, norms, [True] * steps, state, steps)


def test_fifty_steps_with_kernels_are_fifty_steps_in_plain_torch(interpreter):
    here = "tests.kernels.test_model_with_kernels:train"
    plain, kernels = (interpreter.run(here, replace(TINY, **choice), 50) for choice in (PLAIN, KERNELS))
    away = distance(plain, kernels)
    assert away.within(), away
    assert np.mean(plain.losses[-10:]) < np.mean(plain.losses[:10])  # something was learned


@pytest.fixture(scope="module")
def interpreted_ranks():
    ranks = RankPool(2, ENVIRONMENT)
    yield ranks
    ranks.close()


SMALL = replace(TINY, vocab_size=259)


@pytest.mark.parametrize("engine,model,steps,seq_len", [
    ("fsdp2", SMALL, 10, 8), ("ddp", SMALL, 3, 8), ("zero2", SMALL, 3, 8), ("zero3", SMALL, 3, 8),
    *(pytest.param(engine, model, steps, seq_len, marks=pytest.mark.slow) for engine in ("ddp", "fsdp2", "zero2", "zero3")
      for model, steps, seq_len in ((SMALL, 50, 8), (MODEL, 20, 32), (OTHER, 20, 32)))])
def test_two_ranks_with_kernels_are_one_process_in_plain_torch(interpreted_ranks, engine, model, steps, seq_len):
    case = Case(engine, model=replace(model, **KERNELS), steps=steps, rows=2, splits=1, seq_len=seq_len)
    found = join(interpreted_ranks.run(2, "tests.trainer.parallel.cases:train", case, timeout_s=3600))
    away = distance(reference(replace(case, engine="single", model=replace(model, **PLAIN))), found)
    assert away.within(), away


@pytest.mark.parametrize("recompute", ["selective", pytest.param("full", marks=pytest.mark.slow)])
def test_recomputed_blocks_give_the_same(interpreted_ranks, recompute):
    case = Case("single", model=replace(MODEL, n_layers=1, **KERNELS), steps=1, rows=1, splits=1)
    plain, again = (join(interpreted_ranks.run(1, "tests.trainer.parallel.cases:train", replace(case, recompute=kind)))
                    for kind in ("none", recompute))
    assert plain.norms == again.norms and plain.losses == again.losses
