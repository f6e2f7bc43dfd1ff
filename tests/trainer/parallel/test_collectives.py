"""What an engine sends in one step: a collective more for each micro-batch changes no number that other tests look at."""

from collections import Counter

import pytest
from torch.utils._python_dispatch import TorchDispatchMode

from officina.trainer.model.build import build_model
from officina.trainer.parallel.engine import Parts, build_engine
from tests.trainer.parallel.cases import MODEL, Case, global_batch, items_of, micro_batches

UNITS = MODEL.n_layers + 1
"""Blocks, and what is outside of them: each is gathered and scattered by itself."""
GATHER, SCATTER, REDUCE = "_allgather_base_", "_reduce_scatter_base_", "allreduce_"


class Collectives(TorchDispatchMode):
    """Counts those that torch's process groups are asked for, by name."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: Counter[str] = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "c10d":
            self.seen[func._schema.name.partition("::")[2]] += 1
        return func(*args, **(kwargs or {}))


def sent(ranks, case: Case) -> Counter[str]:
    """Collectives of the second step of `case` on this rank."""
    built = build_model(case.run)
    engine = build_engine(Parts(case.run, ranks, built.module, built.loss_fn, case.precision))
    engine.import_state(built.source, optimizer_steps=None)
    for step in range(2):
        fields = global_batch(step, case)
        mine = range(ranks.rank * case.rows // ranks.world_size, (ranks.rank + 1) * case.rows // ranks.world_size)
        micros = micro_batches(fields, mine, case.splits)
        with Collectives() as mode:
            for micro in micros:
                engine.forward_backward(micro, step_tokens=items_of(fields), last=micro is micros[-1])
            engine.step(1.0)
    engine.close()
    return mode.seen


@pytest.mark.parametrize(("engine", "ranks", "a_micro", "a_step"), [
    ("ddp", 2, {}, {REDUCE: 1}),  # all gradients fit into one bucket
    ("fsdp2", 2, {GATHER: 2 * UNITS, SCATTER: UNITS}, {REDUCE: 1}),  # forward and backward; the norm
    ("fsdp2_fast", 2, {}, {GATHER: UNITS, SCATTER: UNITS, REDUCE: 1}),
    ("hsdp", 4, {GATHER: 2 * UNITS, SCATTER: UNITS}, {REDUCE: UNITS + 1}),  # the sum over replicas
    ("hsdp_fast", 4, {}, {GATHER: UNITS, SCATTER: UNITS, REDUCE: UNITS + 1}),
    # DeepSpeed's buckets hold this whole model, each group of AdamW's by itself; the norm, and whether it is finite
    ("zero1", 2, {}, {REDUCE: 1 + 2, GATHER: 2}),
    ("zero2", 2, {REDUCE: 1}, {REDUCE: 2, GATHER: 2}),
    ("zero3", 2, {GATHER: 1, SCATTER: 1}, {REDUCE: 2})])
def test_a_step_sends_what_it_must(pool, engine, ranks, a_micro, a_step):
    case = Case(engine, splits=3)
    wanted = Counter({name: case.splits * times for name, times in a_micro.items()}) + Counter(a_step)
    assert pool.run(ranks, "tests.trainer.parallel.test_collectives:sent", case) == [wanted] * ranks
