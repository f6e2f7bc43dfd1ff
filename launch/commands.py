"""The commands behind the console script. Each takes the parsed arguments and returns the exit status."""

import argparse
import os
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path

from officina.launch.devices import visible_devices
from officina.launch.start import (
    Plan,
    describe_run,
    plan_resume,
    plan_train,
    refuse_existing,
    wait_for_start,
    write_start,
)
from officina.trainer.config import RunConfig
from officina.trainer.errors import EXIT_DONE, EXIT_USER, ConfigError, LaunchError, OfficinaError
from officina.trainer.rank_env import RankEnv, read_rank_env
from officina.trainer.run_dir import config_text
from officina.trainer.validate import missing_packages


def train(args: argparse.Namespace) -> int:
    """A new run, or a branch of one."""
    env, devices = read_rank_env(os.environ), visible_devices(os.environ)
    runs_dir = Path(args.runs_dir)
    return _start(env, lambda: plan_train(args.words, runs_dir, world_size=env and env.world_size, devices=devices,
                                          force=args.force), runs_dir, devices)


def resume(args: argparse.Namespace) -> int:
    """Go on with a run."""
    env, devices = read_rank_env(os.environ), visible_devices(os.environ)
    run_dir = Path(args.run)
    return _start(env, lambda: plan_resume(run_dir, args.words, world_size=env and env.world_size, devices=devices,
                                           force=args.force), run_dir.parent, devices)


def _start(env: RankEnv | None, make_plan, runs_dir: Path, devices: int) -> int:
    try:
        plan = make_plan().checked()
        world_size = env.world_size if env else ranks_here(plan.run, devices)
        plan = _checked_here(plan, world_size)
        if env is None or env.rank == 0:
            refuse_existing(plan, runs_dir)
            write_start(plan, world_size)
        else:
            wait_for_start(plan)
    except OfficinaError as error:
        if env is not None and env.rank:  # rank 0 meets the same and says it
            return error.exit_status
        raise
    if env is not None:  # a launcher started this process as one rank: be it
        return import_module("officina.trainer.__main__").main(plan.run_dir)
    return import_module("officina.launch.local").run_ranks(plan.run_dir, plan.run)


def _checked_here(plan: Plan, world_size: int) -> Plan:
    """Judge once more with the number of ranks that will really be, and the packages that are really here."""
    from officina.trainer.validate import problems

    if found := problems(plan.run, world_size, read_data=False) + missing_packages(plan.run):
        raise ConfigError(found)
    return plan


def ranks_here(run: RunConfig, devices: int) -> int:
    """Ranks that `officina train` starts on this machine."""
    return run.ranks or (max(1, devices) if run.device != "cpu" else 1)


def check(args: argparse.Namespace) -> int:
    """Every problem at once, else a summary."""
    devices = visible_devices(os.environ)
    world_size = args.ranks
    if world_size is not None and world_size < 1:
        raise OfficinaError(f"--ranks {world_size}: a run has at least 1 rank. Try: --ranks 1")
    plan = plan_train(args.words, Path(args.runs_dir), world_size=world_size, devices=None if world_size else devices,
                      force=args.force)
    if plan.problems:
        raise ConfigError(plan.problems)
    if args.yaml:
        print(config_text(plan.run), end="")
        return EXIT_DONE
    shown = world_size or ranks_here(plan.run, devices)
    lines = describe_run(plan.run, shown)
    if plan.origin:
        lines.insert(1, ("from", f"{plan.origin.run_dir} at step {plan.origin.step:,}"))
    width = max(len(name) for name, _ in lines)
    for name, text in lines:
        print(f"{name:<{width}}  {text}")
    for change in plan.changes:
        print(f"{'changed':<{width}}  {change.key}: {change.old} -> {change.new}")
    for word, origin in plan.defaults:
        print(f"{'default':<{width}}  {word}  (from {origin})")
    for problem in missing_packages(plan.run):
        print(f"{'missing':<{width}}  {problem}")
    print(f"No problems. It would run in {plan.run_dir}")
    return EXIT_DONE


def generate(args: argparse.Namespace) -> int:
    """Text from a checkpoint. The one command here that computes, so it brings torch in."""
    return import_module("officina.trainer.generate").main(args)


def data(args: argparse.Namespace) -> int:
    """`args.run` is the function that the chosen data command set."""
    return args.run(args)


def report(args: argparse.Namespace) -> int:
    """report.html and report.json."""
    print(import_module("officina.launch.report").write_report(Path(args.run)))
    return EXIT_DONE


def demo(args: argparse.Namespace) -> int:
    """`make demo` without the installation."""
    return import_module("officina.launch.demo").main()


def bench(args: argparse.Namespace) -> int:
    """The suite in the folder benchmarks."""
    if find_spec("officina.benchmarks.suite") is None:
        raise LaunchError("the benchmark suite is not installed. Run it from a clone of officina: make bench")
    return import_module("officina.benchmarks.suite").main(args.words)
