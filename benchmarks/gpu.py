"""The benchmarks that need one GPU, in the time that is given, the most telling ones first; called by gpu.sh.

    python -m officina.benchmarks.gpu --out DIR [--seconds 400] [--only STAGE ...] [--tiny]

Two named experiments, each beside a plain PyTorch loop with SDPA on the same GPU: `h200_1b8` (1.82B, the shape and
batch of the published JUPITER figures) and `h200_8b` (Llama-3 8B, that of KempnerForge's); then fine-tuning of the 8B,
`h200_8b_lora` (NeMo Automodel's published setting) and `h200_8b_sft` (in full, bf16 states); last, if time is left,
`h200_8b_qlora`. Rows are synthetic tokens from shards made on the spot. The record is written anew after every stage, so
that what was measured outlives a kill.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch

from officina.benchmarks.entrants import hf_trainer, officina, plain
from officina.benchmarks.record import record, summary, write_record
from officina.benchmarks.turns import Block, Entrant, compare, race
from officina.benchmarks.workload import synthetic_dataset, write_run
from officina.trainer.metrics import read_metrics
from officina.trainer.model.flops import flops_per_token, parameter_count
from officina.trainer.model.peaks import peak_bf16_flops
from officina.trainer.run_dir import load_config

OURS, PLAIN, HF = "officina", "plain PyTorch", "HF Trainer"
VOCABULARIES = {"h200_1b8": 50_304, "h200_8b": 128_256, "h200_8b_lora": 128_256, "h200_8b_sft": 128_256,
                "h200_8b_qlora": 128_256}
PUBLISHED = {"h200_1b8": {"tokens_per_s": 37_500, "on": "one of 4 GH200, DDP", "source": "OpenEuroLLM oellm-autoexp"},
             "h200_8b": {"tokens_per_s": 10_471, "on": "H200", "source": "KempnerForge mfu_scaling.md, 2026-04-05"},
             "h200_8b_lora": {"tokens_per_s": 12_473, "on": "H100", "source": "NeMo Automodel performance-summary, 2025-10-02"}}
TINY = ["device=cpu", "model.n_layers=2", "model.d_model=128", "model.n_heads=8", "model.d_ff=128",
        "model.vocab_size=512", "batch.seq_len=64", "batch.global_tokens=512", "engine.compile=false", "threads=1"]
"""Shapes that a processor runs in seconds: to find mistakes in this file, never for a figure."""
REPEATS = 3


class NoTime(Exception):
    """Too little of the budget is left for a stage."""


@dataclass
class Session:
    """What all stages share."""

    scratch: Path
    out: Path
    deadline: float
    tiny: bool
    only: list[str] = field(default_factory=list)
    """Stages to do; none: all."""
    ceiling: float = 0.0
    """FLOP/s of the best matrix product measured here."""
    results: dict[str, Any] = field(default_factory=dict)
    failed: list[str] = field(default_factory=list)

    @property
    def left_s(self) -> float:
        return self.deadline - time.monotonic()

    def stage(self, name: str, need_s: float, work: Callable[[], dict[str, Any]]) -> None:
        """Do `work` if about `need_s` seconds are left; keep its result, or why there is none."""
        if self.only and name not in self.only:
            return
        began = time.monotonic()
        try:
            if not (self.tiny or self.only) and self.left_s < need_s:
                raise NoTime(f"{self.left_s:.0f} s left, it needs about {need_s:.0f}")
            self.results[name] = work()
        except NoTime as reason:
            self.results[name] = {"left_out": str(reason)}
        except Exception:
            self.failed.append(name)
            self.results[name] = {"failed": traceback.format_exc().splitlines()[-30:]}
            traceback.print_exc()
        spent = time.monotonic() - began
        print(f"-- {name}: {spent:.0f} s, {self.left_s:.0f} s left", flush=True)
        self.write()

    def write(self) -> None:
        found = record("gpu", self.results, repeats=REPEATS, settings={
            "tiny": self.tiny, "published": PUBLISHED, "gpu": nvidia_smi(), "triton_cache": "empty at the start"})
        write_record(found, self.out / "gpu.json")

    def run_dir(self, experiment: str, *words: str) -> Path:
        """A run of the experiment on synthetic shards."""
        vocab = 512 if self.tiny else VOCABULARIES.get(experiment, 2048)
        data = self.scratch / f"vocab_{vocab}"
        if not (data / "dataset.json").exists():
            synthetic_dataset(data, vocab_size=vocab, tokens=200_000 if self.tiny else 20_000_000)
        shrink = [word for word in TINY if not word.startswith(tuple(w.split("=")[0] + "=" for w in words))]
        return write_run([f"experiment={experiment}", "steps=100000", f"data.sources.tokens.path={data}",
                          f"name={experiment}-{len(list(self.scratch.glob('runs/*')))}",
                          *(shrink if self.tiny else ["device=cuda"]), *words], self.scratch / "runs")

    def race(self, entrants: dict[str, Entrant], *, steps: int, lead: int, alternate: bool) -> dict[str, list[Block]]:
        return race(entrants, blocks=REPEATS, steps=steps, lead=lead, alternate=alternate, timeout_s=self.left_s)

    def figures(self, run_dir: Path, blocks: list[Block], steps: int) -> dict[str, Any]:
        """Speed, both MFU conventions, share of the measured ceiling, and memory of one entrant."""
        run = load_config(run_dir)
        T = run.batch.seq_len
        speed = summary([run.batch.rows * T * steps / b.seconds for b in blocks])
        name = torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"
        peak, found = peak_bf16_flops(name), {"tokens_per_s": speed, "parameters": parameter_count(run.model).total}
        for convention, causal in (("causal", True), ("full", False)):
            rate = flops_per_token(run.model, T, causal=causal, adapter=run.adapter) * speed["median"]
            found[f"flops_per_s_{convention}"] = rate
            found[f"mfu_{convention}"] = rate / peak if peak else None
            found[f"of_ceiling_{convention}"] = rate / self.ceiling if self.ceiling else None
        found["peak_memory_bytes"] = max((b.facts.get("peak_bytes", 0) for b in blocks), default=0)
        return found


# ---- stages --------------------------------------------------------------------------------------------------------
def matmul_ceiling(session: Session) -> dict[str, Any]:
    """Best bf16 matrix product on random data, of a few shapes, each timed three times over 20 products."""
    device = "cpu" if session.tiny else "cuda"
    shapes = [(64, 64, 64)] if session.tiny else [(8192, 8192, 8192), (16384, 8192, 4096), (16384, 14336, 4096)]
    found = {}
    for m, n, k in shapes:
        a, b = (torch.randn(*shape, device=device).to(torch.bfloat16) for shape in ((m, k), (k, n)))
        rates = []
        for turn in range(1 + REPEATS):
            began = _now()
            for _ in range(20):
                a @ b
            seconds = _now() - began
            if turn:
                rates.append(20 * 2 * m * n * k / seconds)
        found[f"{m} x {n} x {k}"] = summary(rates)
        del a, b
    session.ceiling = max(rate["median"] for rate in found.values())
    if not session.tiny:
        torch.cuda.empty_cache()
    return {"flops_per_s": session.ceiling, "shapes": found}


def against_plain(session: Session, experiment: str, *, steps: int) -> dict[str, Any]:
    """Both live on the GPU at once and take turns."""
    run_dir = session.run_dir(experiment)
    entrants = {OURS: Entrant(partial(officina, run_dir=run_dir)), PLAIN: Entrant(partial(plain, run_dir=run_dir))}
    found = session.race(entrants, steps=steps, lead=2, alternate=True)
    return {name: session.figures(run_dir, blocks, steps) for name, blocks in found.items()} | {
        f"speed against {PLAIN}": compare(found, OURS, PLAIN), "steps_per_block": steps}


def against_memory(session: Session, *, steps: int) -> dict[str, Any]:
    """officina with its loader and without, on a sixth of the 1.8B model's layers: more tokens a second than an 8B takes."""
    run_dir = session.run_dir("h200_1b8", *([] if session.tiny else ["model.n_layers=4", "data=packed"]))
    memory = f"{OURS}, data in memory"
    entrants = {OURS: Entrant(partial(officina, run_dir=run_dir)),
                memory: Entrant(partial(officina, run_dir=run_dir, in_memory=True))}
    found = session.race(entrants, steps=steps, lead=2, alternate=True)
    return {name: session.figures(run_dir, blocks, steps) for name, blocks in found.items()} | {
        f"speed against {memory}": compare(found, OURS, memory), "steps_per_block": steps}


def alone(session: Session, experiment: str, who: str, *words: str, steps: int) -> dict[str, Any]:
    """One entrant with the whole GPU to itself."""
    run_dir = session.run_dir(experiment, *words)
    work = {OURS: partial(officina, run_dir=run_dir), PLAIN: partial(plain, run_dir=run_dir),
            HF: partial(hf_trainer, run_dir=run_dir, scratch=session.scratch / "hf")}[who]
    found = session.race({who: Entrant(work)}, steps=steps, lead=1, alternate=False)
    return {who: session.figures(run_dir, found[who], steps), "steps_per_block": steps, "words": list(words)}


def saving(session: Session) -> dict[str, Any]:
    """`officina train` that saves from the GPU every 20 steps, waiting and in the background; 0.5B parameters."""
    found = {}
    for name, asynchronous in (("waiting", "false"), ("in the background", "true")):
        small = ["model.n_layers=6"] if not session.tiny else []
        run_dir = session.run_dir("h200_1b8", *small, "steps=60", "checkpoint.every_steps=20", "engine.compile=false",
                                  f"checkpoint.asynchronous={asynchronous}", "checkpoint.keep_last=1")
        _trainer(run_dir, session.left_s)
        saves = [save for save in read_metrics(run_dir).saves if save.problem is None]
        found[name] = {"bytes": saves[-1].bytes, "stall_s": summary([save.stall_s for save in saves]),
                       "durable_s": summary([save.durable_s for save in saves])}
    return found


def start(session: Session) -> dict[str, Any]:
    """Seconds from the command to the first step: the tiny model, so that what is not the model is seen."""
    from officina.benchmarks.start import WORDS, plain_start

    data = session.run_dir("h200_1b8").parent.parent / f"vocab_{512 if session.tiny else 50_304}"
    words = [*WORDS, "model.vocab_size=50304", f"data.sources.tokens.path={data}"]
    words += ["threads=1", "batch.global_tokens=2048"] if session.tiny else ["device=cuda"]
    return {"total_s": summary([plain_start(words, session.scratch) for _ in range(REPEATS)])}


def kernels(session: Session) -> dict[str, Any]:
    """The kernels at the shapes that have goals: kernels.json and kernels.html beside our record; here what was found."""
    words = ["--tiny"] if session.tiny else ["--goals", "--seconds", f"{min(70.0, session.left_s - 20):.0f}"]
    path = session.out / "kernels.json"
    done = subprocess.run([sys.executable, "-m", "officina.benchmarks.kernels", *words, "--out", str(path)],
                          stdin=subprocess.DEVNULL, timeout=max(60.0, session.left_s))
    if done.returncode:
        raise RuntimeError(f"officina.benchmarks.kernels ended with status {done.returncode}")
    results = json.loads(path.read_text())["results"]
    return {"goals": {f"{goal['kernel']}, {goal['shape']}, {goal['phase']}, {goal['measure']}": goal["found"]
                      for goal in results["goals"]}, "left_out_cases": results["left_out"]}


def _trainer(run_dir: Path, timeout_s: float) -> None:
    done = subprocess.run([sys.executable, "-m", "officina.trainer", str(run_dir)], stdin=subprocess.DEVNULL,
                          capture_output=True, text=True, timeout=timeout_s)
    if done.returncode:
        raise RuntimeError(f"the run ended with status {done.returncode}:\n{done.stdout[-2000:]}{done.stderr[-4000:]}")


def _now() -> float:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()


def nvidia_smi() -> dict[str, str]:
    """Name, driver and clocks of the GPU as it is found; empty where there is none."""
    keys = ("name", "driver_version", "clocks.sm", "clocks.mem", "power.limit", "temperature.gpu")
    try:
        done = subprocess.run(["nvidia-smi", f"--query-gpu={','.join(keys)}", "--format=csv,noheader"],
                              capture_output=True, text=True, timeout=20)
    except (OSError, subprocess.TimeoutExpired):
        return {}
    return dict(zip(keys, done.stdout.strip().split(", "), strict=False)) if done.returncode == 0 else {}


def main(argv: list[str] | None = None) -> int:
    """Measure stage by stage; returns 0, 1 if a stage failed, 2 where there is no GPU."""
    parser = argparse.ArgumentParser(prog="python -m officina.benchmarks.gpu", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder for gpu.json")
    parser.add_argument("--seconds", type=float, default=400.0, help="time for all of it (default: %(default)s)")
    parser.add_argument("--only", nargs="+", default=[], metavar="STAGE", help="such as matmul 'h200_8b plain'; however "
                        "little time is left")
    parser.add_argument("--tiny", action="store_true", help="tiny shapes on the CPU, to try this program out; the "
                        "record says so and is no measurement")
    args = parser.parse_args(argv)
    if not args.tiny and not torch.cuda.is_available():
        print("officina: torch sees no GPU here. To try the program out: --tiny", file=sys.stderr)
        return 2
    args.out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="officina-gpu-") as scratch:
        session = Session(Path(scratch), args.out, time.monotonic() + args.seconds, args.tiny, args.only)
        few = 1 if args.tiny else None
        session.stage("matmul", 10, lambda: matmul_ceiling(session))
        session.stage("h200_1b8", 130, lambda: against_plain(session, "h200_1b8", steps=few or 8))
        session.stage("kernels", 90, lambda: kernels(session))
        session.stage("h200_8b", 100, lambda: alone(session, "h200_8b", OURS, steps=few or 3))
        session.stage("h200_8b plain", 80, lambda: alone(session, "h200_8b", PLAIN, steps=few or 3))
        session.stage("h200_8b nothing recomputed", 90, lambda: alone(
            session, "h200_8b", OURS, "engine.recompute=none", "batch.micro_rows=2", steps=few or 3))
        for name in ("h200_8b_lora", "h200_8b_sft"):
            session.stage(name, 90, partial(alone, session, name, OURS, steps=1))
        session.stage("h200_1b8 alone", 60, lambda: alone(session, "h200_1b8", OURS, steps=few or 6))
        session.stage("h200_1b8 plain", 60, lambda: alone(session, "h200_1b8", PLAIN, steps=few or 6))
        session.stage("h200_1b8 packed", 50, lambda: alone(session, "h200_1b8", OURS, "data=packed", steps=few or 6))
        session.stage("data", 50, lambda: against_memory(session, steps=few or 20))
        session.stage("start", 25, lambda: start(session))
        session.stage("saving", 40, lambda: saving(session))
        session.stage("h200_1b8 HF Trainer", 50, lambda: alone(
            session, "h200_1b8", HF, "batch.micro_rows=4", "engine.compile=false", steps=few or 4))
    print(json.dumps({name: _short(result) for name, result in session.results.items()}, indent=1))
    return 1 if session.failed else 0


def _short(result: dict[str, Any]) -> Any:
    """The heart of a stage's result, for the terminal."""
    if "failed" in result or "left_out" in result:
        return result
    out = {}
    for name, value in result.items():
        if isinstance(value, dict) and "tokens_per_s" in value:
            out[name] = {"tokens_per_s": round(value["tokens_per_s"]["median"]), "mfu_causal": value["mfu_causal"],
                         "mfu_full": value["mfu_full"], "GiB": round(value["peak_memory_bytes"] / 2**30, 1)}
        elif isinstance(value, dict) and "median" in value:
            out[name] = value["median"]
    return out or result


if __name__ == "__main__":
    sys.exit(main())
