"""Held-out loss by source and language, in nats per token and bits per byte; in the loop and by `officina eval`."""

import json
import math
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace

import numpy as np
from torch import Tensor

from officina.trainer.batch import IGNORE
from officina.trainer.config import RunConfig
from officina.trainer.data.heldout import LabelFacts
from officina.trainer.data.integrity import mend
from officina.trainer.data.loader import validation_batches
from officina.trainer.data.reader import validation_streams
from officina.trainer.data.shards import Lost, merge_lost
from officina.trainer.data.stream import Stream
from officina.trainer.metrics import EvalMetrics
from officina.trainer.objective import REWARDS, measured, token_scores
from officina.trainer.parallel.engine import Engine
from officina.trainer.ranks import Ranks


def held_out(engine: Engine, run: RunConfig, ranks: Ranks, step: int,
             say: Callable[[str], None] = lambda text: None,
             references: Mapping[str, np.ndarray] | None = None) -> Iterator[EvalMetrics]:
    """Loss of each source that has a validation split, over its first `eval.max_rows` rows: the same on any ranks and engine.

    A collective. say: gets what became of damaged blocks, on every rank alike. references: of preference pairs by source, the
    reference's log-probabilities: then it is the loss of the pairs.
    """
    mended: list[str] = []
    streams = validation_streams(run, on_damage=lambda *block: mended.append(mend(*block).told()))
    for source, stream in streams.items():
        began_s = time.perf_counter()
        if references and source in references:
            stream.reference = references[source]
            found, lost = _pairs(engine, run, ranks, step, source, stream)
            lost = _agreed(lost, mended, bool(*ranks.sum([bool(mended or lost)])), ranks, say)
            yield replace(found, lost_blocks=sum(map(len, lost.values())))
            continue
        names, sums, answers, lost = _sums(engine, run, ranks, stream)
        total = np.asarray(ranks.sum([*sums.ravel(), *answers, bool(mended or lost)]))
        lost = _agreed(lost, mended, bool(total[-1]), ranks, say)
        nats, tokens, sizes = total[:sums.size].reshape(3, -1)
        known = sizes.sum() > 0
        by_language = {name: {"tokens": int(tokens[i]), "loss_nats": _finite(nats[i] / tokens[i]),
                              "text_bytes": float(sizes[i]) if known else None}
                       for i, name in enumerate(names) if tokens[i]}
        yield EvalMetrics(
            step=step, source=source, loss_nats=_mean(nats.sum(), tokens.sum()), tokens=int(tokens.sum()),
            text_bytes=float(sizes.sum()) if known else None, languages=by_language if len(names) > 1 else {},
            lost_blocks=sum(map(len, lost.values())), eval_time_s=time.perf_counter() - began_s,
            **_answers(total[sums.size:-1], tokens.sum()))


def _agreed(lost: Lost, mended: list[str], met: bool, ranks: Ranks, say: Callable[[str], None]) -> Lost:
    """The lost blocks of all ranks, what became of damaged ones said once; met: has a rank met any? Empties `mended`."""
    if not met:
        return {}
    told = [json.loads(text) for text in ranks.gather_text(json.dumps([lost, mended]))]
    for text in dict.fromkeys(text for _, texts in told for text in texts):
        say(text)
    mended.clear()
    return merge_lost(*({"": found} for found, _ in told)).get("", {})


def _pairs(engine: Engine, run: RunConfig, ranks: Ranks, step: int, source: str, stream: Stream) -> tuple[EvalMetrics, Lost]:
    """Of all ranks, and the lost blocks under the rows of this one."""
    began_s, sums, pairs, lost = time.perf_counter(), np.zeros(1 + len(REWARDS)), 0, {}
    for batch, _, damaged in validation_batches(run, stream, ranks.rank, ranks.world_size, ranks.device):
        lost = merge_lost({"": lost}, {"": damaged}).get("", {})
        sums += engine.evaluate(batch.to(ranks.device)).double().cpu().numpy()
        pairs += batch.loss_tokens
    loss, *rewards, count = ranks.sum([*sums, pairs])
    return EvalMetrics(step=step, source=source, loss_nats=_mean(loss, count), tokens=int(count),
                       eval_time_s=time.perf_counter() - began_s, **measured(REWARDS, rewards, count)), lost


def _answers(sums: np.ndarray, tokens: float) -> dict[str, float]:
    """How good the answers are; nothing for custom models."""
    right, samples, exact, means = sums.tolist()
    if not samples:
        return {}
    return {"token_accuracy": right / tokens, "samples": int(samples), "sample_accuracy": exact / samples,
            "sample_loss_nats": _finite(means / samples)}


def _mean(total: float, count: float) -> float:
    """NaN of nothing, as where all held-out documents were removed."""
    return float(total / count) if count else math.nan


def _finite(value: float) -> float | None:
    """JSON has no other numbers."""
    return float(value) if math.isfinite(value) else None


def _sums(engine: Engine, run: RunConfig, ranks: Ranks,
          stream: Stream) -> tuple[list[str], np.ndarray, np.ndarray, dict[str, list[int]]]:
    """This rank's nats, tokens and bytes by language, (3, languages); right tokens, documents with labels, those all right and
    the sum of their mean losses, (4,); and lost blocks under its rows."""
    text = run.model.kind != "custom"
    facts = LabelFacts(stream) if text else None
    names = facts.languages if facts else [""]
    sums, answers, lost = np.zeros((3, len(names))), np.zeros(4), {}
    for batch, rows, damaged in validation_batches(run, stream, ranks.rank, ranks.world_size, ranks.device):
        lost = merge_lost({"": lost}, {"": damaged}).get("", {})
        on_device = batch.to(ranks.device)
        if facts is None:
            sums[:, 0] += engine.evaluate(on_device).item(), batch.loss_tokens, 0
            continue
        nats, right = engine.infer(token_scores, on_device).double().cpu().numpy()[:, :len(rows)]
        labels = batch.fields["labels"].numpy()[:len(rows)]
        counted, (languages, sizes) = labels != IGNORE, facts.of_labels(rows, labels)
        for i, weights in enumerate((nats, np.ones_like(nats), sizes)):
            sums[i] += np.bincount(languages[counted], weights[counted], minlength=len(names))
        answers += _by_sample(nats, right, counted, batch.fields.get("documents"))
    return names, sums, answers, lost


def _by_sample(nats: np.ndarray, right: np.ndarray, counted: np.ndarray, documents: Tensor | None) -> np.ndarray:
    """(4,) as `_sums` gives them, of some rows; all arguments (B, T). A document that lies in two rows counts as two."""
    row, column = np.nonzero(counted)
    number = row if documents is None else row * counted.shape[1] + documents.numpy()[row, column]
    n = np.bincount(number)
    there, good, loss = n > 0, np.bincount(number, right[counted]), np.bincount(number, nats[counted])
    return np.asarray([right[counted].sum(), there.sum(), (good[there] == n[there]).sum(), (loss[there] / n[there]).sum()])
