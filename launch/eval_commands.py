"""`officina eval`: held-out loss or benchmarks of a run's checkpoint, on any engine and number of ranks. No torch here."""

import argparse
import hashlib
import json
import os
import re
import time
from dataclasses import asdict
from importlib.util import find_spec
from pathlib import Path

from officina.configs.compose import recompose
from officina.launch.allocation import find_place
from officina.launch.data_terminal import console, table
from officina.launch.devices import visible_devices
from officina.launch.local import start
from officina.trainer.checkpoint.verify import list_checkpoints
from officina.trainer.config import RunConfig
from officina.trainer.data.register import Going
from officina.trainer.errors import EXIT_DONE, CheckpointError, ConfigError, LaunchError, OfficinaError
from officina.trainer.evaluation import Request, Results, read_request, read_results, write_request
from officina.trainer.keys import as_text
from officina.trainer.metrics import bits_per_byte, perplexity
from officina.trainer.rank_env import read_rank_env
from officina.trainer.resume import changes, ruled_out
from officina.trainer.run_dir import (
    CONFIG,
    EVALS,
    REQUEST,
    RESULTS,
    config_text,
    load_config,
    read_run_id,
    save_config,
    split_step,
    unwritable,
)
from officina.trainer.validate import missing_packages, problems

_WAIT_S = 120.0
_NUMBERS_STAY = ("ranks", "threads", "device", "engine.", "site.", "logging.", "model.kernels", "model.attention_impl")
"""Keys, or how they begin, that say where and how it is computed and not what."""


def evaluate(args: argparse.Namespace) -> int:
    """Make the evaluation's folder, start the ranks, show what came out."""
    run_dir, at = split_step(args.run)
    saved = load_config(run_dir)
    step, tasks, words = _sort(args.words)
    if at is not None and step not in ("", str(at)):
        raise OfficinaError(f"{args.run} step={step} names two steps. Try: officina eval {run_dir} step={step}")
    step = step or ("" if at is None else str(at))
    request = Request(step=_step(run_dir, step), tasks=tasks, tasks_dir=_folder(args.tasks_dir), shots=args.shots,
                      limit=args.limit)
    if tasks and find_spec("lm_eval") is None:
        raise OfficinaError("tasks: lm-evaluation-harness is not installed here. Try: pip install --constraint constraints.txt "
                            "'officina[eval]'")
    if not tasks and (args.shots is not None or args.limit is not None or args.tasks_dir):
        raise OfficinaError("--shots, --limit and --tasks-dir are of benchmarks, and no task is named. "
                            f"Try: officina eval {run_dir} tasks=NAME --limit 100, or eval.max_rows=100 for the held-out loss")
    composed = recompose(saved, words)
    run, world_size = composed.run, find_place(composed.run, os.environ).world_size
    devices = visible_devices(os.environ)
    # What the weights are of. How rows are cut and packed may differ: what is measured is another thing then, and is told.
    refused = [p for p in ruled_out(saved, run, force=True) if p.key.startswith(("model.", "adapter."))]
    going = Going(read_run_id(run_dir), run.steps)  # it plans no more use of the data than the run has made
    found = composed.problems + refused + missing_packages(run) + problems(
        run, world_size, devices=devices, read_data=not tasks, going=going)
    if found := [problem for problem in found if not (tasks and problem.key == "data.sources")]:  # benchmarks have their own
        raise ConfigError(found)
    folder = run_dir / EVALS / f"step-{request.step:08d}-{_digest(words, request)}"
    env = read_rank_env(os.environ)
    if env and env.rank:
        _wait_for(folder, run, request)
    else:
        _make_ready(folder, run, request)
    status = start(folder, run, os.environ)
    if status == EXIT_DONE and not (env and env.rank):
        results = read_results(folder)
        _tell(run_dir, results, run.batch_unit)
        for change in changes(saved, run):
            if not change.key.startswith(_NUMBERS_STAY):
                print(f"with {change.key}={as_text(change.new)}, which is {as_text(change.old)} in the run")
        print(f"Wrote {folder / RESULTS}")
    return status


def _sort(words: list[str]) -> tuple[str, list[str], list[str]]:
    """step, tasks, and the words of the configuration."""
    step, tasks, rest = "", [], []
    for word in words:
        if word.startswith("step="):
            step = word.removeprefix("step=")
        elif word.startswith("tasks="):
            tasks += [name for name in word.removeprefix("tasks=").split(",") if name]
        else:
            rest.append(word)
    return step, tasks, rest


def _step(run_dir: Path, text: str) -> int:
    """The step that is named, or the newest; what its checkpoint is worth is found when it is read."""
    there = sorted(info.step for info in list_checkpoints(run_dir) if info.status == "complete")
    if not there:
        raise CheckpointError(f"{run_dir} has no whole checkpoint to evaluate. Train it first: officina resume {run_dir}")
    if text and (not re.fullmatch("[0-9]+", text) or int(text) not in there):
        raise CheckpointError(f"step={text}: {run_dir} has checkpoints of steps {', '.join(map(str, there))}. "
                              f"Try: step={there[-1]}")
    return int(text) if text else there[-1]


def _folder(text: str) -> str:
    if text and not Path(text).is_dir():
        raise OfficinaError(f"--tasks-dir {text}: is no folder. Name the folder with your task files, NAME.yaml each.")
    return str(Path(text).resolve()) if text else ""


def _digest(words: list[str], request: Request) -> str:
    return hashlib.sha256(json.dumps([words, asdict(request)]).encode()).hexdigest()[:8]


def _make_ready(folder: Path, run: RunConfig, request: Request) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / RESULTS).unlink(missing_ok=True)  # no more: where this was asked before, other ranks may have begun
        save_config(run, folder)
        write_request(folder, request)
    except OSError as error:
        raise unwritable(folder, error) from error


def _wait_for(folder: Path, run: RunConfig, request: Request) -> None:
    """Until the run and the request that this rank came to itself are there."""
    deadline, config = time.monotonic() + _WAIT_S, folder / CONFIG
    while not ((folder / REQUEST).is_file() and config.is_file() and read_request(folder) == request
               and config.read_text(encoding="utf-8") == config_text(run)):
        if time.monotonic() > deadline:
            raise LaunchError(f"{folder / REQUEST} has not appeared after {_WAIT_S:.0f} s. All ranks must see the same run "
                              "directory: check that it is on a shared file system.")
        time.sleep(0.1)


# ---- telling -------------------------------------------------------------------------------------------------------
def _tell(run_dir: Path, results: Results, unit: str) -> None:
    screen = console()
    ranks = f"{results.world_size} rank{'s' * (results.world_size > 1)}"
    screen.print(f"{run_dir} at step {results.step:,}, {results.engine} on {ranks}")
    if results.held_out:
        text = unit == "tokens"  # a user's own loss is of records, in whatever unit
        shown = table("source", "language", "tokens", "nats/token", "bits/byte", "perplexity") if text else table(
            "source", unit, "loss")
        for found in results.held_out:
            shown.add_row(*(found["source"], "", *_numbers(found)) if text else (found["source"], *_numbers(found)[:2]))
            for name, of in sorted(found["languages"].items(), key=lambda item: -item[1]["tokens"]):
                shown.add_row("", name, *_numbers(of))
        screen.print(shown)
        for found in results.held_out:
            if found["lost_blocks"]:
                screen.print(f"{found['source']}: {found['lost_blocks']} damaged blocks were left out")
    if results.tasks:
        shown = table("source", "metric", "value", "standard error")
        shown.columns[0].header = "task"
        for task, metrics in results.tasks.items():
            for name, value in metrics.items():
                if isinstance(value, int | float) and "_stderr" not in name:
                    metric, _, kind = name.partition(",")
                    error = metrics.get(f"{metric}_stderr,{kind}")
                    shown.add_row(task, metric, f"{value:.4f}", f"{error:.4f}" if isinstance(error, float) else "–")
        screen.print(shown)
    if not results.held_out and not results.tasks:
        screen.print("no source of the run has a validation split: nothing to evaluate. Build one: "
                     "officina data build ... --validation 0.01")


def _numbers(found: dict) -> list[str]:
    loss = found["loss_nats"]
    bits = bits_per_byte(loss, found["tokens"], found.get("text_bytes")) if loss is not None else None
    return [f"{found['tokens']:,}", "–" if loss is None else f"{loss:.4f}", "–" if bits is None else f"{bits:.4f}",
            "–" if loss is None else f"{perplexity(loss):,.2f}"]
