"""The commands behind the console script. Each takes the parsed arguments and returns the exit status."""

import argparse
import contextlib
import os
import socket
import sys
from collections.abc import Callable
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path

from officina.launch.allocation import find_place
from officina.launch.devices import visible_devices
from officina.launch.start import (
    Plan,
    describe_run,
    plan_resume,
    plan_train,
    refuse_existing,
    refuse_foreign,
    wait_for_start,
    write_start,
)
from officina.trainer.errors import EXIT_DONE, ConfigError, DataError, LaunchError, OfficinaError
from officina.trainer.rank_env import read_rank_env
from officina.trainer.run_dir import METRICS, claim, config_text
from officina.trainer.validate import missing_packages, problems

_RANK_0_ALSO_S = 10.0
"""By then rank 0 has met what another rank met, or begun without it."""


def train(args: argparse.Namespace) -> int:
    """A new run, or a branch of one."""
    runs_dir = Path(args.runs_dir)
    return _start(lambda world_size, devices: plan_train(
        args.words, runs_dir, world_size=world_size, devices=devices, force=args.force))


def resume(args: argparse.Namespace) -> int:
    """Go on with a run."""
    return _start(lambda world_size, devices: plan_resume(
        Path(args.run), args.words, world_size=world_size, devices=devices, force=args.force))


def _start(make_plan: Callable[[int | None, int], Plan]) -> int:
    """Plan, check, write the run directory, train; `make_plan(world_size, devices)`.

    Where a launcher started this process as one rank of several, rank 0 writes, and the others wait until what
    they composed themselves stands in config.yaml.
    """
    devices = visible_devices(os.environ)
    env = read_rank_env(os.environ)
    rank = env.rank if env else 0
    plan, waited = None, False
    try:
        plan = make_plan(env.world_size if env and env.world_size > 1 else None, devices)
        if plan.nothing_to_do:
            if not rank:
                print(f"{plan.run_dir} is done: {plan.run.steps:,} of {plan.run.steps:,} steps. To go on: "
                      f"officina resume {plan.run_dir} steps={2 * plan.run.steps}")
            return EXIT_DONE
        plan.checked()
        world_size = find_place(plan.run, os.environ).world_size
        if found := problems(plan.run, world_size, read_data=False) + missing_packages(plan.run):
            raise ConfigError(found)  # with the ranks that will be, and the packages that are here
        if rank == 0:
            refuse_foreign(plan)  # before anything of ours lies there, the claim too
            for line in plan.notes():
                print(f"note: {line}")
        with contextlib.nullcontext() if rank else claim(plan.run_dir):
            if rank == 0 or plan.action == "start":  # a branch's checkpoint may be there before rank 1 looks
                refuse_existing(plan)
            if rank == 0:
                write_start(plan, world_size)
            else:
                waited = True
                wait_for_start(plan)
            status = import_module("officina.launch.local").start(plan.run_dir, plan.run, os.environ)
    except OfficinaError as error:
        if not rank:
            raise
        if waited or (plan and _rank_0_began(plan)):  # else rank 0 meets the same and says it
            print(f"officina: rank {rank} on {socket.gethostname()}: {error}", file=sys.stderr, flush=True)
        return error.exit_status
    if rank == 0 and (plan.run_dir / METRICS).exists():
        try:
            print(f"Report: {import_module('officina.launch.report').write_report(plan.run_dir)}")
        except Exception as error:  # how the run ended counts, and a report can be made at any time
            print(f"officina: no report ({type(error).__name__}: {error}). The run is as it was left; make the report anew: "
                  f"officina report {plan.run_dir}", file=sys.stderr)
    return status


def _rank_0_began(plan: Plan) -> bool:
    """Has rank 0 begun what this rank refuses, as where the data are on the other's node alone?"""
    try:
        wait_for_start(plan, wait_s=_RANK_0_ALSO_S)
    except LaunchError:
        return False
    return True


def check(args: argparse.Namespace) -> int:
    """Every problem at once, else a summary."""
    devices = visible_devices(os.environ)
    world_size = args.ranks
    if world_size is not None and world_size < 1:
        raise OfficinaError(f"--ranks {world_size}: a run has at least 1 rank. Try: --ranks 1")
    plan = plan_train(args.words, Path(args.runs_dir), world_size=world_size,
                      devices=None if world_size else devices, force=args.force)
    if args.explain:
        _explain(plan)
    if plan.problems:
        raise ConfigError(plan.problems)
    refuse_foreign(plan)
    if args.yaml:
        print(config_text(plan.run), end="")
        return EXIT_DONE
    lines = describe_run(
        plan.run, world_size or plan.run.ranks or (1 if plan.run.device == "cpu" else devices) or 1,
        plan.origin.position if plan.origin else 0)
    if plan.origin:
        lines.insert(1, ("from", f"{plan.origin.run_dir} at step {plan.origin.step:,}"))
    width = max(len(name) for name, _ in lines)
    for name, text in lines:
        print(f"{name:<{width}}  {text}")
    for change in plan.changes:
        print(f"{'changed':<{width}}  {change.key}: {change.old} -> {change.new}")
    for line in plan.notes():
        print(f"{'note':<{width}}  {line}")
    for word, origin in plan.defaults:
        print(f"{'default':<{width}}  {word}  (from {origin})")
    missing = missing_packages(plan.run)
    for problem in missing:
        print(f"{'missing':<{width}}  {problem}")
    unless = ", if the ranks find what is missing here" if missing else ""
    print(f"No problems{unless}. It would run in {plan.run_dir}")
    return EXIT_DONE


def _explain(plan: Plan) -> None:
    """The conditions of use, kept or not; what cannot be opened is among the plan's problems."""
    gate = import_module("officina.trainer.data.gate")
    with contextlib.suppress(DataError):
        findings = gate.judge_run(plan.run, plan.going())
        print("\n".join(["conditions of use:", *gate.explained(findings)]) if findings else "conditions of use: none")


def data(args: argparse.Namespace) -> int:
    """`args.run` is the function that the chosen data command set."""
    status: int = args.run(args)
    return status


def report(args: argparse.Namespace) -> int:
    """report.html and report.json."""
    return import_module("officina.launch.report").main(Path(args.run))


def demo(args: argparse.Namespace) -> int:
    """`make demo` without the installation."""
    return import_module("officina.launch.demo_finetune" if args.finetune else "officina.launch.demo").main()


def bench(args: argparse.Namespace) -> int:
    """The suite in the folder benchmarks."""
    if find_spec("officina.benchmarks.suite") is None:
        raise LaunchError("the benchmark suite is not installed. Run it from a clone of officina: make bench")
    options = [*(["--out", args.out] if args.out else []), *(["--quick"] if args.quick else [])]
    return import_module("officina.benchmarks.suite").main([*args.words, *options])
