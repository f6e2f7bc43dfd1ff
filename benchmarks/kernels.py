"""Every kernel against its baselines and against what the card can do, forward, backward and both: record and page.

    officina bench kernels                                          # all shapes, on a GPU
    python -m officina.benchmarks.kernels --goals --seconds 90      # only shapes that a goal is set for, in the time given
    python -m officina.benchmarks.kernels --goals --compiled        # the same, also against FlexAttention and torch.compile
    python -m officina.benchmarks.kernels --page kernels.json       # draw the page of a record again

Floors are bytes that must be read and written over the speed of a large copy, or operations over the speed of a large
bf16 matrix product, whichever takes longer; both speeds are measured here, on the same card.
"""

import argparse
import functools
import gc
import json
import os
import sys
import time
from contextlib import suppress
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from officina.benchmarks.kernel_cases import COPY, OURS, PLAIN, SLOW_STARTERS, Case, Floor, cases
from officina.benchmarks.kernel_goals import goal_phases, judged
from officina.benchmarks.kernel_page import write_page
from officina.benchmarks.kernel_timing import (
    ROUNDS,
    Timing,
    Work,
    compile_ahead,
    copy_ceiling,
    failure,
    matmul_ceiling,
    measure,
)
from officina.benchmarks.record import RESULTS, record, write_record
from officina.trainer.errors import EXIT_DONE, EXIT_USER

PRODUCTS = [(8192, 8192, 8192), (16_384, 8192, 4096), (16_384, 14_336, 4096)]
"""Matrix products of which the fastest is the ceiling."""

COPY_BYTES = 2**33
"""A copy beside a kernel that moves fewer bytes; of more it would tell what the ceiling tells."""


def run(device: torch.device, chosen: list[Case], *, kernels: bool, without: set[str], seconds: float,
        tiny: bool) -> dict[str, Any]:
    """Measure case by case until the time is over. kernels false: references stand for the kernels. Returns the record."""
    deadline = time.monotonic() + seconds
    torch.manual_seed(0)
    ceilings = {"copy_bytes_per_s": copy_ceiling(device, 2**14 if tiny else 2**29),
                "matmul_flops_per_s": matmul_ceiling(device, [(64, 64, 64)] if tiny else PRODUCTS)}
    done, left_out = [], []
    for case in sorted(chosen, key=lambda case: not case.goal):  # those with goals first
        if time.monotonic() > deadline:
            left_out.append(f"{case.kernel}, {case.shape}")
            continue
        phases = {}
        for phase, floor in case.floors.items():
            phases[phase] = _phase(case, phase, floor, ceilings, device, kernels, without, 0.002 if tiny else 0.03)
            if device.type == "cuda":
                gc.collect()
                torch.cuda.empty_cache()
        if not SLOW_STARTERS <= without:  # a compiled function gives up after eight shapes, silently: forget them
            torch.compiler.reset()
        done.append({"kernel": case.kernel, "shape": case.shape, "facts": dict(case.facts), "phases": phases})
        print(f"{case.kernel}, {case.shape}: {_line(phases)}", flush=True)
    places = {(case.kernel, case.shape): place for place, case in enumerate(chosen)}
    done.sort(key=lambda found: places[found["kernel"], found["shape"]])
    results = {"ceilings": ceilings, "cases": done, "left_out": left_out, "goals": judged(done), "without": sorted(without)}
    return record("kernels", results, repeats=ROUNDS, settings={
        "tiny": tiny, "dtype": "bfloat16", "caches": "L2 emptied before every call"})


def _compile(device: torch.device, kernel: str, shape: str, phase: str, without: set[str]) -> None:
    """Run the entrants of a phase once, in a process of its own, so that what Triton makes of them is in its cache."""
    [case] = [case for case in cases(tiny=False) if (case.kernel, case.shape) == (kernel, shape)]
    for name, work in case.build(device, phase, True).items():
        if name not in {PLAIN, *SLOW_STARTERS, *without}:
            with suppress(Exception):  # it fails again where it is measured
                if work.before:
                    work.before()
                work.run()
    torch.cuda.synchronize()


def _phase(case: Case, phase: str, floor: Floor, ceilings: dict[str, float], device: torch.device, kernels: bool,
           without: set[str], round_s: float) -> dict[str, Any]:
    floor_s = max(floor.bytes / ceilings["copy_bytes_per_s"], floor.flops / ceilings["matmul_flops_per_s"])
    found: dict[str, Any] = {"floor_s": floor_s, "floor_bytes": floor.bytes, "floor_flops": floor.flops, "entrants": {}}
    try:
        entrants = {name: work for name, work in case.build(device, phase, kernels).items() if name not in without}
    except Exception as error:  # the inputs alone do not fit
        return found | {"failed": failure(error)}
    if not floor.flops and floor.bytes < COPY_BYTES:  # how fast this card moves as many bytes with nothing to compute
        source, target = (torch.empty(int(floor.bytes) // 4, device=device, dtype=torch.bfloat16).normal_() for _ in range(2))
        entrants[COPY] = Work(lambda: target.copy_(source))
    for name, timing in measure(entrants, device, round_s=round_s).items():
        found["entrants"][name] = {"failed": timing} if isinstance(timing, str) else _figures(timing, floor, floor_s)
    if phase in ("forward", "backward"):
        found["difference"] = _difference(entrants, found["entrants"])
    return found


def _figures(timing: Timing, floor: Floor, floor_s: float) -> dict[str, Any]:
    return asdict(timing) | {"bytes_per_s": floor.bytes / timing.median_s, "flops_per_s": floor.flops / timing.median_s,
                             "of_floor": floor_s / timing.median_s}


def _difference(entrants: dict[str, Work], found: dict[str, Any]) -> dict[str, Any] | None:
    """|ours - theirs| / |theirs| of outputs or gradients, theirs being eager torch's if it ran: speed proves nothing right."""
    others = [name for name in (PLAIN, *entrants)
              if name != COPY and not name.startswith(OURS) and "median_s" in found.get(name, {})]
    if not others or "median_s" not in found.get(OURS, {}):
        return None
    with torch.no_grad():
        ours, theirs = (_flat(entrants[name].run()) for name in (OURS, others[0]))
    return {"from": others[0], "relative": ((ours - theirs).norm() / theirs.norm()).item()}


def _flat(outputs: Any) -> Tensor:
    tensors = [outputs] if isinstance(outputs, Tensor) else outputs
    return torch.cat([tensor.detach().flatten().float() for tensor in tensors])


def _line(phases: dict[str, Any]) -> str:
    """The median of each phase for the terminal, and its share of the floor."""
    found = {phase: value["entrants"].get(OURS, {}) for phase, value in phases.items()}
    return ", ".join(f"{phase} {value['median_s'] * 1e3:.3f} ms ({value['of_floor']:.0%} of the ceiling)" if "median_s" in value
                     else f"{phase} failed: {value.get('failed', phases[phase].get('failed'))}"
                     for phase, value in found.items())


def main(argv: list[str] | None = None) -> int:
    """Measure, write record and page. Returns 0, or 2 where there is no GPU."""
    parser = argparse.ArgumentParser(prog="python -m officina.benchmarks.kernels", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--goals", action="store_true", help="only the shapes that a goal is set for, without baselines that "
                        "compile for long")
    parser.add_argument("--compiled", action="store_true", help="with --goals: these baselines too (without it always)")
    parser.add_argument("--only", nargs="+", metavar="KERNEL", help="only these kernels, such as attention")
    parser.add_argument("--without", nargs="+", default=[], metavar="ENTRANT", help="leave out, such as 'officina, portable'")
    parser.add_argument("--processes", type=int, default=max(1, (os.cpu_count() or 2) - 2), help="that compile at once, with "
                        "up to 8 GB of the GPU's memory each (default: %(default)s)")
    parser.add_argument("--seconds", type=float, default=1e9, help="begin no case after this time (default: all)")
    parser.add_argument("--tiny", action="store_true", help="references at tiny shapes on the CPU, to try this program out; "
                        "the record says so and is no measurement")
    parser.add_argument("--out", type=Path, help="where the record goes, the page beside it (default: "
                        "benchmarks/results/kernels.json)")
    parser.add_argument("--page", type=Path, metavar="RECORD", help="measure nothing, draw this record's page again")
    args = parser.parse_args(argv)
    if args.page:
        print(write_page(json.loads(args.page.read_text()), args.page.with_suffix(".html")))
        return EXIT_DONE
    if not args.tiny and not torch.cuda.is_available():
        print("officina: torch sees no GPU here. To try the program out: officina bench kernels --quick --out quick-results",
              file=sys.stderr)
        return EXIT_USER
    chosen = [case for case in cases(args.tiny) if case.goal or not args.goals]
    if args.goals and not args.tiny:
        chosen = [replace(case, floors={phase: floor for phase, floor in case.floors.items()
                                        if phase in goal_phases(case.kernel, case.shape)}) for case in chosen]
    known = list(dict.fromkeys(case.kernel for case in chosen))
    if args.only and (wrong := set(args.only) - set(known)):
        print(f"officina: there is no kernel {', '.join(sorted(wrong))}; there are {', '.join(known)}", file=sys.stderr)
        return EXIT_USER
    device = torch.device("cpu") if args.tiny else torch.device("cuda", torch.cuda.current_device())
    without = {*args.without, *(SLOW_STARTERS if args.tiny or (args.goals and not args.compiled) else ())}
    chosen = [case for case in chosen if not args.only or case.kernel in args.only]
    began = time.monotonic()
    if not args.tiny:
        compile_ahead([functools.partial(_compile, device, case.kernel, case.shape, phase, without)
                       for case in chosen for phase in case.floors], args.processes)
    found = run(device, chosen, kernels=not args.tiny, without=without, seconds=args.seconds - (time.monotonic() - began),
                tiny=args.tiny)
    path = write_record(found, args.out or RESULTS / "kernels.json")
    for goal in found["results"]["goals"]:
        if goal["found"] is not None:
            print(f"{'met   ' if goal['met'] else 'missed'} {goal['kernel']}, {goal['shape']}, {goal['phase']}: "
                  f"{goal['found']:.3g} {goal['measure']} (goal {goal['must']})")
    print(path, write_page(found, path.with_suffix(".html")), sep="\n")
    return EXIT_DONE


if __name__ == "__main__":
    sys.exit(main())
