"""`officina plan`: what a run will take, on a site or, without one, on a number of ranks, and which sites it fits."""

import argparse
import sys
from dataclasses import fields, replace
from pathlib import Path

from officina.configs.job import read_job, split_words
from officina.configs.sites import find_site, site_ids
from officina.launch.job_plan import mesh_words, plan_lines, size_words
from officina.launch.memory_plan import MemoryPlan, checkpoint_bytes, plan_memory
from officina.launch.start import describe_run, plan_train
from officina.launch.submit import prepare
from officina.trainer.config import FSDP2Config, RunConfig
from officina.trainer.errors import EXIT_DONE, ConfigError, OfficinaError


def plan(args: argparse.Namespace) -> int:
    """Print the plan. With a site: as `officina submit` would, without its script."""
    job, problems, _ = read_job(split_words(args.words)[0])
    if job.site:
        prepared = prepare(args.words, Path(args.runs_dir), dry_run=True)
        if prepared.problems:
            raise ConfigError(prepared.problems, "the job")
        _print(plan_lines(prepared.planned))
        for note in prepared.notes:
            print(f"note: {note}", file=sys.stderr)
        return EXIT_DONE
    if args.ranks is not None and args.ranks < 1:
        raise OfficinaError(f"--ranks {args.ranks}: a run has at least 1 rank. Try: --ranks 1")
    found = plan_train(split_words(args.words)[1], Path(args.runs_dir), world_size=args.ranks)
    run, world_size = found.run, args.ranks or found.run.ranks or 1
    unseen = [p for p in found.problems if p.key.startswith("data.sources")]  # a plan needs no data
    if faults := problems + [p for p in found.problems if p not in unseen]:
        raise ConfigError(faults)
    lines = [line for line in describe_run(run, world_size) if line[0] in ("model", "batch", "length")]
    memory = plan_memory(run, world_size)
    lines.insert(1, ("mesh", mesh_words(run, world_size)))
    if memory is None:
        lines.append(("memory", "not estimated: only its code knows the size of a user's own model"))
        _print(lines)
        return EXIT_DONE
    lines += [("memory", f"about {size_words(memory.total)} a rank (estimate)")]
    lines += [("", f"  {part.name:<12} {size_words(getattr(memory, part.name)):>9}") for part in fields(memory)]
    lines.append(("saves", f"checkpoints of {size_words(checkpoint_bytes(run))}"))
    _print(lines)
    _print_sites(run)
    return EXIT_DONE


def _print(lines: list[tuple[str, str]]) -> None:
    for name, text in lines:
        print(f"{name:<7} {text}")


def _print_sites(run: RunConfig) -> None:
    """On how few whole nodes of each site the estimate fits."""
    print("\nwhere it fits, by the same estimate, on whole nodes:")
    for site in site_ids():
        gpu = find_site(site).profile.gpu
        if gpu.per_node and gpu.memory_gb:
            fewest = _fewest(run, gpu.per_node, gpu.memory_gb * 1e9)
            print(f"  {site:<18} {gpu.per_node} x {gpu.memory_gb:g} GB a node: {fewest}")


def _fewest(run: RunConfig, per_node: int, limit: float) -> str:
    sharded = FSDP2Config(recompute=run.engine.recompute)
    for engine, words in ((run.engine, ""), (sharded, "engine=fsdp2 "),
                          (replace(sharded, recompute="full"), "engine=fsdp2 engine.recompute=full ")):
        for nodes in (1, 2, 4, 8, 16, 32, 64, 128):
            memory = _on(replace(run, engine=engine), nodes * per_node)
            if memory.total <= limit:
                return f"{words}from {nodes} node{'s' * (nodes > 1)} ({size_words(memory.total)} a GPU)"
    return "not on 128 nodes, with engine=fsdp2 and engine.recompute=full either; fewer batch.micro_rows may help"


def _on(run: RunConfig, world_size: int) -> MemoryPlan:
    """The estimate for another number of ranks; the global batch grows where it would not reach them all."""
    least = world_size * run.batch.seq_len
    if run.batch.global_tokens < least:
        run = replace(run, batch=replace(run.batch, global_tokens=least))
    return plan_memory(run, world_size)
