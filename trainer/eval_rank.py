"""What one rank does for `officina eval`."""

import json
import math
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from officina.trainer.checkpoint.read import open_checkpoint
from officina.trainer.config import NoAdapterConfig
from officina.trainer.data.manifest import write_whole
from officina.trainer.errors import EXIT_DONE, OfficinaError
from officina.trainer.evaluate import held_out
from officina.trainer.evaluation import Results, read_request
from officina.trainer.initial import plain_weights
from officina.trainer.metrics import EvalMetrics
from officina.trainer.model.build import build_model
from officina.trainer.parallel.engine import Parts, build_engine, resolve_precision
from officina.trainer.ranks import Ranks
from officina.trainer.run_dir import RESULTS, load_config, read_run_id


def evaluate(folder: Path, ranks: Ranks) -> int:
    """Evaluate a checkpoint of the run two folders up on these ranks. Raises OfficinaError for what the user can mend."""
    run, request, run_dir = load_config(folder), read_request(folder), folder.parent.parent
    if request.tasks and run.model.kind != "decoder":
        raise OfficinaError("tasks: benchmarks ask a language model, and model.kind=custom is one of your own. "
                            f"Leave tasks out for the held-out loss: officina eval {run_dir}")
    run = replace(run, adapter=NoAdapterConfig())  # adapters are merged: the model that is handed out is the one that is judged
    built = build_model(run)
    shapes = {name: tuple(p.shape) for name, p in built.module.named_parameters()}
    engine = build_engine(Parts(run, ranks, built.module, built.loss_fn, resolve_precision(run.precision, ranks.device)))
    try:
        with open_checkpoint(run_dir, step=request.step, ranks=ranks, run_id=read_run_id(run_dir)) as opened:
            with plain_weights(run_dir, opened, ranks) as weights:
                if weights is opened:
                    opened.check_fits(shapes)
                engine.import_state(weights, optimizer_steps=None)
        found, scores = [], {}
        if request.tasks:
            from officina.trainer.harness import run_tasks

            scores = run_tasks(engine, run, ranks, run_dir, request)
        else:
            said = print if ranks.rank == 0 else lambda text: None
            found = [_told(each) for each in held_out(engine, run, ranks, request.step, said)]
        if ranks.rank == 0:
            results = Results(step=request.step, run_id=read_run_id(run_dir) or "", engine=run.engine_name,
                              world_size=ranks.world_size, held_out=found, tasks=scores)
            write_whole(folder / RESULTS, (json.dumps(asdict(results), indent=1) + "\n").encode())
    finally:
        engine.close()
    return EXIT_DONE


def _told(found: EvalMetrics) -> dict[str, Any]:
    values = asdict(found) | {"bits_per_byte": found.bits_per_byte}
    return {key: None if isinstance(value, float) and not math.isfinite(value) else value  # JSON has no other numbers
            for key, value in values.items() if key not in ("step", "time")}
