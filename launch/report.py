"""`officina report RUN`: report.html for people and report.json for machines, from the run's own files. No torch.

report.json holds the keys of `officina.launch.report_facts.Facts`, each described there; numbers that JSON does not
have (an infinite perplexity) are their names as text. It may be written while the run goes on.
"""

import json
import os
from dataclasses import asdict
from pathlib import Path
from typing import Any

from officina.launch.report_facts import ACCURACIES, Facts
from officina.launch.report_gather import finite, gather
from officina.launch.report_page import page, parameters, speed, where
from officina.launch.report_words import clock, count, loss, number, shares, size
from officina.trainer.errors import OfficinaError

HTML, JSON = "report.html", "report.json"


def write_report(run_dir: Path) -> Path:
    """Write RUN/report.html and RUN/report.json; returns the path of the page.

    Raises OfficinaError where run_dir is no run directory or does not take the files.
    """
    path, _ = _write(Path(run_dir))
    return path


def main(run_dir: Path) -> int:
    """The command: write both files, print a short summary and where the page is."""
    path, facts = _write(Path(run_dir))
    print(summary(facts))
    print(f"\n  {path}")
    return 0


def summary(f: Facts) -> str:
    """The run in a few lines of text."""
    planned = f" of {f.steps_planned:,}" if f.steps_planned else ""
    rows = [
        ("model", ", ".join(filter(None, [parameters(f), f.model["summary"]]))),
        ("ranks", " → ".join(dict.fromkeys(where(life) for life in f.lives)) or "never started"),
        ("steps", f"{f.steps_done:,}{planned}, {count(f.useful_tokens)} {f.items} that carried loss in {clock(f.wall_s)}"),
        ("loss", _loss(f.final_loss_nats, f.final_perplexity)),
    ]
    rows += [(f"held-out {h.source}", f"{_loss(h.loss_nats, h.perplexity)}{_bits(h.bits_per_byte)}, "
              + "".join(f"{text}, " for text in shares(h.accuracies, ACCURACIES)) + f"step {h.step:,}")
             for h in f.held_out]
    value, rate, beside = speed(f)
    rows.append(("speed", ", ".join(filter(None, [f"{value} {rate}", beside])) + (
        f", MFU {f.mfu_causal:.1%}" if f.mfu_causal is not None else "")))
    if f.peak_memory_bytes:
        rows.append(("memory", f"{size(f.peak_memory_bytes)} at most, mean over the ranks"))
    failed = sum(c.problem is not None for c in f.checkpoints)
    odd = [f"{n:,} {one if n == 1 else many}" for n, one, many in (
        (len(f.left_out), "step left out", "steps left out"), (len(f.spikes), "spike", "spikes"),
        (failed, "failed save", "failed saves"),
        (f.repeated_steps, "step done again or given up", "steps done again or given up")) if n]
    if odd:
        rows.append(("events", ", ".join(odd)))
    width = max(len(name) for name, _ in rows)
    return f"{f.name}: {f.status}\n" + "\n".join(f"  {name:<{width}}  {text}" for name, text in rows)


def _loss(value: float | None, perplexity: float | None) -> str:
    return loss(value) if perplexity is None else f"{loss(value)} nats, perplexity {number(perplexity)}"


def _bits(value: float | None) -> str:
    return "" if value is None else f", {value:.4f} bits per byte"


def _write(run_dir: Path) -> tuple[Path, Facts]:
    facts, metrics = gather(run_dir)
    try:
        strict = json.dumps(_strict(asdict(facts)), indent=1, ensure_ascii=False, allow_nan=False)
        _replace(run_dir / JSON, strict + "\n")
        _replace(run_dir / HTML, page(facts, metrics))
    except OSError as error:
        raise OfficinaError(f"{run_dir / HTML} cannot be written: {error.strerror}. "
                            "Free space in the run directory or ask its owner for write permission.") from error
    return run_dir / HTML, facts


def _strict(value: Any) -> Any:
    if isinstance(value, float):
        return finite(value)
    if isinstance(value, dict):
        return {key: _strict(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_strict(item) for item in value]
    return value


def _replace(path: Path, text: str) -> None:
    """Write a whole file or leave the old one."""
    partial = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        partial.write_text(text, encoding="utf-8")
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


__all__ = ["main", "summary", "write_report"]
