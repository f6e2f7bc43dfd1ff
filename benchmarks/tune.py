"""Find the fastest launch configurations on the GPU at hand, for the tables that are shipped. Never called while training.

    python -m officina.benchmarks.tune cross_entropy --out tune-results       # one kernel
    python -m officina.benchmarks.tune all --seconds 500 --out tune-results

Each configuration of a sweep stands in the kernel's table for as long as it is measured, one after the other and in turn; the
present one is among them. tune.json holds every figure, tables.txt the entries to write into the table where a faster one was
found. Then: run tests/kernels (no configuration may spill), write a line into kernels/NOTES.md, commit both.
"""

import argparse
import functools
import itertools
import os
import sys
import time
from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from officina.benchmarks.kernel_cases import (
    DETERMINISTIC,
    OURS,
    PORTABLE,
    build_adamw,
    build_attention,
    build_norm,
    build_rope,
    build_swiglu,
    build_symmetric,
)
from officina.benchmarks.kernel_timing import Timing, Work, compile_ahead, measure
from officina.benchmarks.record import record, write_record
from officina.kernels import activations, adamw, cross_entropy, flash_attention_tables, rms_norm, rope, symmetric
from officina.kernels.flash_attention_launch import adds_atomically
from officina.kernels.tables import Config, arch_of, is_amd, look_up
from officina.trainer.errors import EXIT_DONE, EXIT_USER

GAIN = 0.02
"""A configuration that is faster by less than this does not displace the present one: that is noise."""
_PART = 4
"""Configurations that a process compiles at a time."""


@dataclass(frozen=True, slots=True)
class Sweep:
    """One entry of a table, and what to try there."""

    kernel: str
    table_name: str
    """As it stands in the source, `CONFIGS`."""
    table: dict[str, dict[Hashable, Config]]
    key: Hashable
    candidates: Sequence[Config]
    build: Callable[[torch.device], Work]
    """What the kernel does while it is measured."""


def sweeps(arch: str) -> list[Sweep]:
    """All of them, for shapes of training."""
    return [*_attention(arch), *_cross_entropy(arch, 8192, 131_072, torch.bfloat16), *_norm(arch), *_elementwise(),
            *_symmetric(arch)]


def _compile(device: torch.device, kernel: str, table_name: str, key: Hashable, first: int) -> None:
    """Run _PART candidates of a sweep once, from the `first` on: so they are compiled for what the launch passes."""
    arch = arch_of(device)
    [sweep] = [s for s in sweeps(arch) if (s.kernel, s.table_name, s.key) == (kernel, table_name, key)]
    work = sweep.build(device)
    for config in sweep.candidates[first:first + _PART]:
        with _stands(sweep.table, arch, sweep.key, config), suppress(Exception):
            if work.before:
                work.before()
            work.run()
            torch.cuda.synchronize()


def tune(sweep: Sweep, device: torch.device, *, round_s: float = 0.03) -> dict[str, Any]:
    """Measure every candidate; the best, if it is better than the present one by GAIN."""
    arch = arch_of(device)
    present = look_up(sweep.kernel, sweep.table, arch, sweep.key)
    work = sweep.build(device)

    def configured(config: Config) -> Work:
        def run() -> Any:
            with _stands(sweep.table, arch, sweep.key, config):
                return work.run()
        return Work(run, work.before)

    configs = list(dict.fromkeys([present, *sweep.candidates]))
    found = measure({str(i): configured(config) for i, config in enumerate(configs)}, device, round_s=round_s)
    timed = {int(i): timing for i, timing in found.items() if isinstance(timing, Timing)}
    if not timed:
        raise RuntimeError(f"{sweep.kernel}, {sweep.key}: no configuration ran: {found['0']}")
    best = min(timed, key=lambda i: timed[i].median_s)
    if 0 in timed and timed[best].median_s > (1 - GAIN) * timed[0].median_s:
        best = 0
    return {"kernel": sweep.kernel, "table": sweep.table_name, "key": repr(sweep.key), "arch": arch,
            "present": _text(present), "best": _text(configs[best]),
            "gain": timed[0].median_s / timed[best].median_s if 0 in timed else None,
            "entry": f"{sweep.table_name}[{arch!r}][{sweep.key!r}] = {_text(configs[best])}",
            "measured": {_text(config): asdict(timed[i]) if i in timed else {"failed": found[str(i)]}
                         for i, config in enumerate(configs)}}


@contextmanager
def _stands(table: dict[str, dict[Hashable, Config]], arch: str, key: Hashable, config: Config) -> Iterator[None]:
    """The table with another configuration, for a while."""
    before = table.get(arch)
    table[arch] = {**(before or {}), key: config}
    try:
        yield
    finally:
        if before is None:
            del table[arch]
        else:
            table[arch] = before


def _text(config: Config) -> str:
    extra = f", {dict(config.extra)!r}" if config.extra else ""
    return f"Config({config.block_m}, {config.block_n}, {config.num_warps}, {config.num_stages}{extra})"


# ---- what is tried -------------------------------------------------------------------------------------------------
def _attention(arch: str) -> Iterator[Sweep]:
    extras = [{"waves_per_eu": n} for n in (1, 2, 3)] if is_amd(arch) else [{}]
    tables = (("FORWARD", "forward", PORTABLE), ("BACKWARD_FUSED", "backward", PORTABLE),
              ("BACKWARD_KEYS", "backward", DETERMINISTIC), ("BACKWARD_QUERIES", "backward", DETERMINISTIC))
    for (name, phase, entrant), D, causal in itertools.product(tables, (64, 128), (True, False)):
        if name == "BACKWARD_FUSED" and not adds_atomically(arch):
            continue
        stages = (1,) if is_amd(arch) else (2, 3, 4) if name == "FORWARD" else (1, 2, 3)  # AMD's compiler spills at two
        own, other = (64, 128), (32, 64, 128)  # rows that a program keeps, and those that it visits
        m, n = (other, own) if name in ("BACKWARD_FUSED", "BACKWARD_KEYS") else (own, other)
        tried = [Config(*values, extra) for *values, extra in itertools.product(m, n, (4, 8), stages, extras)]
        yield Sweep("attention", name, getattr(flash_attention_tables, name), (D, causal, 16), tried,
                    functools.partial(_attention_work, D, causal, phase, entrant))
    if arch not in flash_attention_tables.FORWARD_HOPPER:
        return
    tried = {"FORWARD_HOPPER": [Config(M, N, 4, n, {"ping_pong": turns}) for M, N, n, turns in (
                 (128, 128, 2, 1), (128, 128, 3, 1), (128, 128, 2, 0), (128, 64, 3, 1), (192, 128, 2, 1), (192, 64, 3, 1))],
             "BACKWARD_KEYS_HOPPER": [Config(M, 128, 4, n) for M, n in ((64, 2), (64, 3), (64, 4), (32, 3))],
             "BACKWARD_QUERIES_HOPPER": [Config(128, N, 4, n) for N, n in itertools.product((64, 128), (2, 3))]}
    for name, D, causal in itertools.product(tried, (64, 128), (True, False)):
        yield Sweep("attention_hopper", name, getattr(flash_attention_tables, name), (D, causal, 16), tried[name],
                    functools.partial(_attention_work, D, causal, name.split("_")[0].lower(), OURS))


def _attention_work(D: int, causal: bool, phase: str, entrant: str, device: torch.device) -> Work:
    return build_attention(2, 2048 // D, 8192, D, causal, device, phase, True, path="hopper")[entrant]


def _cross_entropy(arch: str, N: int, V: int, dtype: torch.dtype) -> Iterator[Sweep]:
    tiles = ((4096, 8), (4096, 16), (8192, 8), (8192, 16), (8192, 32), (16_384, 16), (16_384, 32), (32_768, 32))
    for name, programs, shapes in (("sums", (2, 4), tiles[:4]), ("gradient", (2, 4), tiles[:4]),
                                   ("loss_and_gradient", (1, 2), tiles)):
        tried = [Config(m, *shape, 1) for m, shape in itertools.product(programs, shapes)]
        yield Sweep("cross_entropy", "CONFIGS", cross_entropy.CONFIGS, name, tried,
                    functools.partial(_cross_entropy_work, N, V, dtype, name))


def _cross_entropy_work(N: int, V: int, dtype: torch.dtype, name: str, device: torch.device) -> Work:
    fresh, labels = (2 * torch.randn(N, V, device=device)).to(dtype), torch.randint(0, V, (N,), device=device)
    ops = torch.ops.officina
    if name == "loss_and_gradient":
        logits = fresh.clone()
        return Work(lambda: ops.cross_entropy_(logits, labels, 0.0, 0.0, 0.0), lambda: logits.copy_(fresh))
    if name == "sums":
        return Work(lambda: ops.cross_entropy_sums(fresh, labels, 0, 0.0))
    sums = ops.cross_entropy_sums(fresh, labels, 0, 0.0)
    return Work(lambda: ops.cross_entropy_gradient(fresh, labels, sums, sums, 0, 0.0))


def _norm(arch: str) -> Iterator[Sweep]:
    tried = {"FORWARD": [(m, warps, 1, {}) for m, warps in itertools.product((1, 2, 4), (4, 8, 16))],
             "BACKWARD": [(1, warps, 1, {}) for warps in (4, 8, 16)] if is_amd(arch) else [
                 (1, warps, stages, {"programs": n}) for warps, stages, n in (
                     *itertools.product((4, 8), (1, 2, 3), (2, 4)), *itertools.product((8, 16), (3, 4), (1,)))]}
    for width in (2048, 4096, 8192):
        for name, phase in (("FORWARD", "forward"), ("BACKWARD", "backward")):
            yield Sweep("rms_norm", name, getattr(rms_norm, name), width,
                        [Config(m, width, warps, stages, extra) for m, warps, stages, extra in tried[name]],
                        lambda device, width=width, phase=phase: build_norm(8192, width, device, phase, True)[OURS])


def _elementwise() -> Iterator[Sweep]:
    tried = [Config(1, n, warps, 1) for n, warps in itertools.product((512, 1024, 2048, 4096), (2, 4, 8))]
    yield Sweep("activations", "TABLE", activations.TABLE, "any", tried,
                lambda device: build_swiglu(8192, 14_336, device, "both", True)[OURS])
    yield Sweep("adamw", "TABLE", adamw.TABLE, "any", tried, lambda device: build_adamw(60, 4096, device, "step", True)[OURS])
    tried = [Config(m, 64, warps, 1) for m, warps in itertools.product((4, 8, 16, 32, 64), (2, 4, 8))]
    yield Sweep("rope", "TABLE", rope.TABLE, ("forward", 64), tried,
                lambda device: build_rope(8192, 32, 128, device, "both", True)[OURS])


def _symmetric(arch: str) -> Iterator[Sweep]:
    tried = [Config(*values) for values in (
        itertools.product((64, 128, 256), (32, 64, 128), (4, 8), (1,)) if is_amd(arch) else
        (*itertools.product((128,), (32, 64), (4, 8), (3, 4)), (128, 128, 8, 2), (256, 64, 8, 3)))]
    if arch == "sm_90":
        tried += [Config(*values, {"tma": 1}) for values in (
            *((128, 64, warps, stages) for warps, stages in itertools.product((4, 8), (3, 4))),
            (128, 128, 4, 2), (128, 128, 8, 3), (128, 32, 4, 4), (128, 32, 4, 5))]
    yield Sweep("symmetric", "TABLE", symmetric.TABLE, torch.bfloat16, tried,
                lambda device: build_symmetric(4096, 4096, device, "forward", True)[OURS])


def main(argv: list[str] | None = None) -> int:
    """Sweep, write tune.json and tables.txt. Returns 0, or 2 where there is no GPU or no such kernel."""
    parser = argparse.ArgumentParser(prog="python -m officina.benchmarks.tune", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("kernels", nargs="+", metavar="KERNEL", help="attention, attention_hopper, cross_entropy, rms_norm, "
                        "activations, adamw, rope, symmetric, or all")
    parser.add_argument("--processes", type=int, default=max(1, (os.cpu_count() or 2) - 2), help="that compile at once, with "
                        "up to 8 GB of the GPU's memory each (default: %(default)s)")
    parser.add_argument("--seconds", type=float, default=1e9, help="begin no sweep after this time (default: all)")
    parser.add_argument("--out", type=Path, default=Path("tune-results"), help="folder (default: %(default)s)")
    args = parser.parse_args(argv)
    if not torch.cuda.is_available():
        print("officina: tuning needs a GPU, and torch sees none here; the shipped tables stand in kernels/", file=sys.stderr)
        return EXIT_USER
    device = torch.device("cuda", torch.cuda.current_device())
    every = sweeps(arch_of(device))
    chosen = [sweep for sweep in every if {"all", sweep.kernel} & set(args.kernels)]
    if not chosen:
        print(f"officina: there is no table of {', '.join(args.kernels)}; there are "
              f"{', '.join(dict.fromkeys(s.kernel for s in every))}", file=sys.stderr)
        return EXIT_USER
    began = time.monotonic()
    compile_ahead([functools.partial(_compile, device, sweep.kernel, sweep.table_name, sweep.key, first)
                   for sweep in chosen for first in range(0, len(sweep.candidates), _PART)], args.processes)
    write(chosen, device, args.out, args.seconds - (time.monotonic() - began))
    return EXIT_DONE


def write(chosen: Sequence[Sweep], device: torch.device, out: Path, seconds: float, *, round_s: float = 0.03) -> None:
    """Do the sweeps; the files are written anew after each, so that what was measured outlives a kill."""
    deadline, done = time.monotonic() + seconds, []
    for sweep in chosen:
        if time.monotonic() > deadline:
            break
        found = tune(sweep, device, round_s=round_s)
        done.append(found)
        print(f"{found['kernel']}, {found['key']}: {found['present']} -> {found['best']}, {found['gain'] or 0:.3f} times as "
              "fast", flush=True)
        write_record(record("tune", {"sweeps": done}), out / "tune.json")
        faster = [result["entry"] for result in done if result["best"] != result["present"]]
        (out / "tables.txt").write_text("".join(f"{entry}\n" for entry in faster))


if __name__ == "__main__":
    sys.exit(main())
