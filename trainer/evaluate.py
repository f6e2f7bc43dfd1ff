"""Held-out loss by source and language, in nats per token and bits per byte; in the loop and by `officina eval`."""

import json
import math
import time
from collections.abc import Callable, Iterator

import numpy as np

from officina.trainer.batch import IGNORE
from officina.trainer.config import RunConfig
from officina.trainer.data.heldout import LabelFacts
from officina.trainer.data.integrity import mend
from officina.trainer.data.loader import validation_batches
from officina.trainer.data.reader import Stream, validation_streams
from officina.trainer.data.shards import merge_lost
from officina.trainer.metrics import EvalMetrics
from officina.trainer.objective import token_scores
from officina.trainer.parallel.engine import Engine
from officina.trainer.ranks import Ranks


def held_out(engine: Engine, run: RunConfig, ranks: Ranks, step: int,
             say: Callable[[str], None] = lambda text: None) -> Iterator[EvalMetrics]:
    """Loss of each source that has a validation split, over its first `eval.max_rows` rows: the same on any ranks and engine.

    A collective. say: gets what became of damaged blocks, on every rank alike.
    """
    mended: list[str] = []
    streams = validation_streams(run, on_damage=lambda *block: mended.append(mend(*block).told()))
    for source, stream in streams.items():
        began_s = time.perf_counter()
        names, sums, lost = _sums(engine, run, ranks, stream)
        total = np.asarray(ranks.sum([*sums.ravel(), bool(mended or lost)]))
        if total[-1]:
            said = [json.loads(text) for text in ranks.gather_text(json.dumps([{source: lost} if lost else {}, mended]))]
            lost = merge_lost(*(found for found, _ in said)).get(source, {})
            for text in dict.fromkeys(text for _, texts in said for text in texts):
                say(text)
            mended.clear()
        nats, tokens, sizes = total[:-1].reshape(3, -1)
        known = sizes.sum() > 0
        by_language = {name: {"tokens": int(tokens[i]), "loss_nats": _finite(nats[i] / tokens[i]),
                              "text_bytes": float(sizes[i]) if known else None}
                       for i, name in enumerate(names) if tokens[i]}
        yield EvalMetrics(
            step=step, source=source, loss_nats=float(nats.sum() / max(tokens.sum(), 1)), tokens=int(tokens.sum()),
            text_bytes=float(sizes.sum()) if known else None, languages=by_language if len(names) > 1 else {},
            lost_blocks=sum(map(len, lost.values())), eval_time_s=time.perf_counter() - began_s)


def _finite(value: float) -> float | None:
    """JSON has no other numbers."""
    return float(value) if math.isfinite(value) else None


def _sums(engine: Engine, run: RunConfig, ranks: Ranks, stream: Stream) -> tuple[list[str], np.ndarray, dict[str, list[int]]]:
    """This rank's nats, tokens and bytes by language, (3, languages), and lost blocks under its rows."""
    text = run.model.kind != "custom"
    facts = LabelFacts(stream) if text else None
    names = facts.languages if facts else [""]
    sums, lost = np.zeros((3, len(names))), {}
    for batch, rows, damaged in validation_batches(run, stream, ranks.rank, ranks.world_size, ranks.device):
        lost = merge_lost({"": lost}, {"": damaged}).get("", {})
        on_device = batch.to(ranks.device)
        if facts is None:
            sums[:, 0] += engine.evaluate(on_device).item(), batch.loss_tokens, 0
            continue
        nats = engine.infer(token_scores, on_device)[0].double().cpu().numpy()[:len(rows)]
        labels = batch.fields["labels"].numpy()[:len(rows)]
        counted, (languages, sizes) = labels != IGNORE, facts.of_labels(rows, labels)
        for i, weights in enumerate((nats, np.ones_like(nats), sizes)):
            sums[i] += np.bincount(languages[counted], weights[counted], minlength=len(names))
    return names, sums, lost
