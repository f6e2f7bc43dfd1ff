"""The facts of a run report, read from the files of the run directory. No torch, and nothing is guessed."""

import json
import math
import statistics
from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from officina.launch.report_facts import (
    ACCURACIES,
    FINAL_STEPS,
    MAX_SAMPLE_CHARACTERS,
    SAMPLE_FILE,
    Checkpoint,
    Facts,
    HeldOut,
    Life,
    Source,
)
from officina.trainer.config import DecoderConfig, RunConfig
from officina.trainer.environment import ENVIRONMENT_FILE
from officina.trainer.errors import EXIT_CONTINUE, EXIT_DONE, DataError, OfficinaError
from officina.trainer.metrics import Generation, RunMetrics, StepMetrics, bits_per_byte, perplexity, read_metrics
from officina.trainer.model.flops import parameter_count
from officina.trainer.run_dir import LEDGER, committed_steps, load_config, read_history
from officina.trainer.schema import dump_run

if TYPE_CHECKING:
    from officina.trainer.data.policy import Policy


def gather(run_dir: Path) -> tuple[Facts, RunMetrics]:
    """All facts of the run, and its metrics for the curves. Raises OfficinaError if run_dir is no run directory."""
    run_dir = Path(run_dir)
    run, missing = load_config(run_dir), []
    metrics, history = read_metrics(run_dir), read_history(run_dir)
    environment = _json_file(run_dir / ENVIRONMENT_FILE, missing)
    lives = _lives(metrics.generations, history)
    last = lives[-1] if lives else None
    steps_done = metrics.steps[-1].step if metrics.steps else (last.from_step if last else 0)
    of_last_life = [s for s in metrics.steps if last is None or s.step > last.from_step] or metrics.steps
    wall_s = sum(life.wall_s for life in lives)
    items = "records" if not isinstance(run.model, DecoderConfig) else "pairs" if run.objective.kind == "dpo" else "tokens"
    text = items == "tokens"
    held_out, best = _held_out(metrics, run, text)
    final = _final_loss(metrics.steps)
    sources = _sources(run, run_dir, missing)
    step_time_s = math.fsum(s.step_time_s for s in metrics.steps)
    return Facts(
        officina=environment.get("officina"), name=run.name,
        run_id=next((str(start["run_id"]) for start in history if start.get("run_id")), None),
        status=_status(metrics.generations, steps_done, run.steps), steps_planned=run.steps, steps_done=steps_done,
        model=_model(run, metrics.generations), final_loss_nats=final, final_perplexity=perplexity(final) if text else None,
        held_out=held_out, best_held_out=best, useful_tokens=metrics.tokens, wall_s=wall_s,
        items=items,
        tokens_per_s=_median(s.tokens_per_s for s in of_last_life),
        filled_tokens_per_s=_median(s.filled_tokens_per_s for s in of_last_life),
        tokens_per_wall_s=metrics.tokens / wall_s if wall_s > 0 else None,
        data_wait_share=math.fsum(s.data_wait_s for s in metrics.steps) / step_time_s if step_time_s > 0 else None,
        mfu_causal=_median(s.mfu_causal for s in of_last_life), mfu_full=_median(s.mfu_full for s in of_last_life),
        peak_memory_bytes=max((s.peak_memory_bytes for s in metrics.steps if s.peak_memory_bytes), default=None),
        lives=lives, checkpoints=_checkpoints(run_dir, metrics),
        left_out=[_event(s) for s in metrics.steps if not s.applied],
        spikes=[_event(s) for s in metrics.steps if s.spike],
        repeated_steps=metrics.repeated_steps, damaged_lines=metrics.damaged_lines,
        skipped_samples=[list(pair) for pair in run.data.skip], damaged_blocks=_damaged(run_dir / LEDGER),
        sources=sources,
        config=dump_run(run), overrides=_overrides(lives), environment=environment,
        sample=_sample(run_dir, sources, missing), missing=missing,
    ), metrics


def _lives(generations: Sequence[Generation], history: Sequence[Mapping[str, Any]]) -> list[Life]:
    """Each start of the ranks with what was typed since the one before.

    A typed start may have several lives (Slurm requeues, a supervisor starts ranks again) or none (nothing was
    free); its changes belong to the next life.
    """
    lives, waiting = [], sorted(history, key=lambda asked: _unix(asked.get("time")))
    for generation in generations:
        start, stop = generation.start, generation.stop
        asked = [line for line in waiting if _unix(line.get("time")) <= start.time + 1]
        waiting = waiting[len(asked):]
        lives.append(Life(
            action=start.action, time=start.time, from_step=start.step, to_step=generation.last_step,
            engine=start.engine, world_size=start.world_size, device=start.device, precision=start.precision,
            wall_s=max(0.0, generation.last_time - start.time),
            ended="no stop recorded" if stop is None else stop.reason, undone_steps=generation.undone_steps,
            words=[str(word) for line in asked for word in line.get("words") or ()],
            changes=[dict(change) for line in asked for change in line.get("changes") or ()],
            checkpoint_problems=list(start.problems)))
    return lives


def _unix(time: object) -> float:
    """Seconds of an ISO 8601 time; a line without a readable one belongs to the first start that asks."""
    try:
        return datetime.fromisoformat(str(time)).timestamp()
    except ValueError:
        return 0.0


def _status(generations: Sequence[Generation], done: int, planned: int) -> str:
    if not generations:
        return "not started"
    stop = generations[-1].stop
    if stop is None:
        return "no stop recorded"
    if stop.exit_status == EXIT_DONE and done >= planned:
        return "done"
    return "to be continued" if stop.exit_status in (EXIT_CONTINUE, EXIT_DONE) else "stopped"


def _model(run: RunConfig, generations: Sequence[Generation]) -> dict[str, Any]:
    model, found = run.model, {"kind": run.model.kind, "parameters": None, "trained_parameters": None, "summary": ""}
    if isinstance(model, DecoderConfig):
        found["parameters"] = parameter_count(model).total
        heads = f"{model.n_heads} heads" + (
            f" ({model.kv_heads} for keys and values)" if model.kv_heads != model.n_heads else "")
        found["summary"] = (f"decoder, {model.n_layers} layers, width {model.d_model}, {heads}, "
                            f"vocabulary {model.vocab_size:,}, rows of {run.batch.seq_len:,} tokens")
    else:
        found["summary"] = f"{model.factory}"
    if generations:
        start = generations[-1].start
        found["parameters"] = start.parameters or found["parameters"]
        found["trained_parameters"] = start.trained_parameters
        found["flops_per_token_causal"] = start.flops_per_token_causal
        found["flops_per_token_full"] = start.flops_per_token_full
    return found


def _final_loss(steps: Sequence[StepMetrics]) -> float | None:
    last = [s for s in steps if s.applied and math.isfinite(s.loss_nats)][-FINAL_STEPS:]
    tokens = sum(s.tokens for s in last)
    return math.fsum(s.loss_nats * s.tokens for s in last) / tokens if tokens else None


def pooled(metrics: RunMetrics, sources: Collection[str], *, text: bool) -> list[HeldOut]:
    """Held-out loss of these sources together at each step where all of them were evaluated that ever were."""
    by_step: dict[int, list] = {}
    for e in metrics.evals:
        if e.source in sources and e.tokens:  # where all its documents were removed there are none
            by_step.setdefault(e.step, []).append(e)
    most = max((len(found) for found in by_step.values()), default=0)
    return [HeldOut(
        source="all", step=step, loss_nats=loss, perplexity=perplexity(loss) if text else None, tokens=tokens,
        bits_per_byte=bits_per_byte(loss, tokens, sum(e.text_bytes or math.nan for e in found)) if text_known else None)
        for step, found in by_step.items() if len(found) == most
        for tokens in [sum(e.tokens for e in found)] if tokens
        for text_known in [all(e.text_bytes for e in found)]
        for loss in [math.fsum(e.loss_nats * e.tokens for e in found) / tokens]]


def _held_out(metrics: RunMetrics, run: RunConfig, text: bool) -> tuple[list[HeldOut], HeldOut | None]:
    """Of the sources that the run still reads: those that left its mixture are evaluated no more."""
    from officina.trainer.data.order import sources_in_use  # brings numpy

    sources = set(sources_in_use(run.data))
    if not any(e.source in sources for e in metrics.evals):
        sources = {e.source for e in metrics.evals}
    together = pooled(metrics, sources, text=text)
    if not together:
        return [], None
    each = [HeldOut(source=e.source, step=e.step, loss_nats=e.loss_nats, tokens=e.tokens,
                    perplexity=perplexity(e.loss_nats) if text else None, bits_per_byte=e.bits_per_byte, languages=e.languages,
                    accuracies={name: value for name in ACCURACIES if (value := getattr(e, name)) is not None})
            for e in metrics.evals if e.step == together[-1].step and e.source in sources]
    finite = [h for h in together if math.isfinite(h.loss_nats)]
    best = min(finite, key=lambda h: h.loss_nats) if finite else None
    return (together[-1:] if len(each) > 1 else []) + each, best


def _checkpoints(run_dir: Path, metrics: RunMetrics) -> list[Checkpoint]:
    """The last save of each step; whether it is still there is asked of the directory."""
    there = set(committed_steps(run_dir))
    found = {save.step: save for save in metrics.saves}
    return [Checkpoint(
        step=step, path=save.path, bytes=save.bytes, stall_s=save.stall_s, durable_s=save.durable_s,
        state="kept" if step in there else "failed" if save.problem else "removed", problem=save.problem)
        for step, save in sorted(found.items())]


def _sources(run: RunConfig, run_dir: Path, missing: list[str]) -> list[Source]:
    rows = _ledger_rows(run_dir / LEDGER)
    if rows is None and run.data.sources:
        missing.append(f"{LEDGER}: not there, so rows read are not known")
    found = []
    for name, source in run.data.sources.items():
        manifest = _json_file(Path(source.path) / "dataset.json", missing, f"data set of {name}: dataset.json")
        read = None if rows is None else rows.get(name, 0)
        split = manifest.get("splits", {}).get(run.data.split, {})
        policy = _policy(source.path, f"data set of {name}", missing) if manifest else None
        packed = run.data.packing == "best_fit" or (run.data.packing == "auto" and bool(manifest.get("samples")))
        found.append(Source(
            name=name, weight=source.weight, rows=read, packed=packed,
            tokens=None if read is None else read * run.batch.seq_len,
            dataset=f"{manifest['name']} {manifest.get('version', '')}".strip() if "name" in manifest else None,
            licence=(policy.licences if policy else manifest.get("licence")) or None, fingerprint=manifest.get("fingerprint"),
            available_tokens=split.get("tokens"), shows_text=policy.shows_text if policy else None))
    return found


def _policy(folder: str, shown: str, missing: list[str]) -> "Policy | None":
    """The conditions of use of a data set; None if they cannot be read."""
    from officina.trainer.data.manifest import open_dataset  # brings pydantic
    from officina.trainer.data.policy import policy_of

    try:
        return policy_of(open_dataset(folder))
    except (DataError, OSError) as error:
        missing.append(f"{shown}: conditions of use cannot be read ({type(error).__name__}): officina data verify {folder}")
    return None


def _ledger_rows(file: Path) -> dict[str, int] | None:
    """Rows that each source gave."""
    entries = _ledger(file)
    if entries is None:
        return None
    total: Counter[str] = Counter()
    for entry in entries:
        total.update(entry["source_rows"])
    return dict(total)


def _damaged(file: Path) -> dict[str, dict[str, list[int]]]:
    from officina.trainer.data.shards import merge_lost  # brings numpy

    return merge_lost(*(entry["lost"] for entry in _ledger(file) or ()))


def _ledger(file: Path) -> list[dict[str, Any]] | None:
    """The steps that stand; a start takes back the steps after it, which were done again."""
    if not file.exists():
        return None
    by_step: dict[Any, dict[str, Any]] = {}
    for line in file.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            entry = json.loads(line)
            if "start" in entry:
                by_step = {step: kept for step, kept in by_step.items() if step <= entry["start"]}
            else:
                by_step[entry["step"]] = {"source_rows": entry["source_rows"], "lost": entry.get("lost", {})}
        except (ValueError, KeyError, TypeError):
            continue
    return list(by_step.values())


def _overrides(lives: Iterable[Life]) -> dict[str, list[str]]:
    found: dict[str, list[str]] = {}
    for life in lives:
        for word in life.words:
            key, equals, _ = word.partition("=")
            if equals:
                found.setdefault(key.lstrip("+~"), []).append(word)
    return found


def _sample(run_dir: Path, sources: Sequence[Source], missing: list[str]) -> str | None:
    """Generated text may repeat training data, so it is shown only where every source allows text."""
    file = run_dir / SAMPLE_FILE
    if not file.exists():
        return None
    if not sources or not all(source.shows_text for source in sources):
        missing.append(f"{SAMPLE_FILE}: not shown, since not every data set is known to allow that its text is shown")
        return None
    text = file.read_text(encoding="utf-8", errors="replace").strip("\n")
    return text if len(text) <= MAX_SAMPLE_CHARACTERS else text[:MAX_SAMPLE_CHARACTERS] + "\n[...]"


def _event(step: StepMetrics) -> dict[str, Any]:
    return {"step": step.step, "loss_nats": finite(step.loss_nats), "grad_norm": finite(step.grad_norm)}


def finite(value: float) -> float | str:
    """The number, or its name where JSON has none."""
    return value if math.isfinite(value) else str(value)


def _json_file(file: Path, missing: list[str], shown: str | None = None) -> dict[str, Any]:
    shown = shown or file.name
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        missing.append(f"{shown}: not there")
    except (OSError, ValueError) as error:
        missing.append(f"{shown}: cannot be read ({type(error).__name__})")
    else:
        if isinstance(found, dict):
            return found
        missing.append(f"{shown}: holds no JSON object")
    return {}


def _median(values: Iterable[float | None]) -> float | None:
    known = [v for v in values if v is not None and math.isfinite(v)]
    return statistics.median(known) if known else None


__all__ = ["Facts", "OfficinaError", "finite", "gather", "pooled"]
