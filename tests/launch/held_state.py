"""In a rank: bytes that an engine holds after a step, by part, counted on its own tensors."""

import torch

from officina.trainer.batch import IGNORE
from officina.trainer.model.build import build_model
from officina.trainer.parallel.engine import Parts, build_engine
from tests.trainer.parallel.cases import Case, global_batch, micro_batches


def held(ranks, case: Case) -> dict[str, int]:
    """`parameters` (torch engines), `gradients` just before the step (torch engines) and `moments` of this rank."""
    run = case.run
    built = build_model(run)
    engine = build_engine(Parts(run, ranks, built.module, built.loss_fn, case.precision))
    try:
        engine.import_state(built.source, optimizer_steps=None)
        fields = global_batch(0, case)
        tokens = int((fields["labels"] != IGNORE).sum())
        mine = range(ranks.rank * case.rows // ranks.world_size, (ranks.rank + 1) * case.rows // ranks.world_size)
        for micro in micro_batches(fields, mine, 1):
            engine.forward_backward(micro, step_tokens=tokens, last=True)
        parameters = list(engine.module.parameters())
        found = {"parameters": _bytes(parameters), "gradients": _bytes([p.grad for p in parameters if p.grad is not None])}
        engine.step(1.0)
        optimizer = getattr(engine, "_optimizer", None)
        found["moments"] = _bytes(optimizer.moments()) if optimizer else _moments(engine.module.optimizer.optimizer)
        return found
    finally:
        engine.close()


def _moments(optimizer: torch.optim.Optimizer) -> int:
    """Of the optimizer that DeepSpeed drives."""
    return _bytes([value for state in optimizer.state.values() for value in state.values()
                   if isinstance(value, torch.Tensor) and value.numel() > 1])


def _bytes(tensors: list[torch.Tensor]) -> int:
    local = [getattr(tensor, "_local_tensor", tensor) for tensor in tensors]
    return sum(tensor.numel() * tensor.element_size() for tensor in local)
