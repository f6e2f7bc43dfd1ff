"""The goals for one H200 in bf16, and whether a record meets them. They are worth nothing on another card."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from officina.benchmarks.kernel_cases import DETERMINISTIC, FLASH, IN_PLACE, LIGER, OURS, PLAIN, PORTABLE

Measure = Literal["TFLOP/s", "TB/s", "ms", "times the speed of", "times the rate of", "GB beyond the gradients"]
AT_MOST = ("ms", "GB beyond the gradients")
"""Measures of which less is better."""


@dataclass(frozen=True, slots=True)
class Goal:
    """`must` is the least that is accepted, `stretch` what is hoped for."""

    kernel: str
    shape: str
    phase: str
    measure: Measure
    must: float
    stretch: float | None = None
    entrant: str = OURS
    against: str = ""
    """times the speed of: another entrant. times the rate of: another shape, whose operations a second are compared."""


_DENSE, _PACKED = "head 128, causal, T 32768", "head 128, causal documents, T 32768"
_NORM, _MLP = "8192 x 4096", "8192 x 14336"
GOALS: tuple[Goal, ...] = (
    Goal("attention", "head 128, causal, T 4096", "forward", "TFLOP/s", 580),
    Goal("attention", "head 128, causal, T 16384", "forward", "TFLOP/s", 620),
    Goal("attention", "head 128, full, T 8192", "forward", "TFLOP/s", 460, 600),
    Goal("attention", "head 64, causal, T 8192", "forward", "TFLOP/s", 370, 430),
    Goal("attention", "head 128, full, T 8192", "backward", "TFLOP/s", 350, 500),
    Goal("attention", "head 128, causal, T 8192", "backward", "TFLOP/s", 310, 470),
    Goal("attention", "head 64, full, T 8192", "backward", "TFLOP/s", 315, 420),
    Goal("attention", "head 128, causal, T 4096", "forward", "TFLOP/s", 390, entrant=PORTABLE),
    Goal("attention", "head 128, causal, T 16384", "forward", "TFLOP/s", 425, entrant=PORTABLE),
    Goal("attention", "head 128, causal, T 4096", "forward", "times the speed of", 1.22, entrant=PORTABLE, against=FLASH),
    Goal("attention", "head 128, causal, T 16384", "forward", "times the speed of", 1.22, entrant=PORTABLE, against=FLASH),
    Goal("attention", "head 128, full, T 8192", "backward", "times the speed of", 0.7, 0.85, DETERMINISTIC, PORTABLE),
    Goal("attention", _PACKED, "forward", "times the rate of", 0.85, 0.95, against=_DENSE),
    *(Goal(kernel, _NORM, phase, "TB/s", *values) for kernel in ("RMSNorm", "add + RMSNorm")
      for phase, values in (("forward", (3.7, 4.0)), ("backward", (3.2, 3.7)))),
    Goal("RMSNorm", _NORM, "backward", "times the speed of", 3.0, against=LIGER),
    Goal("RoPE", "8192 x 32 heads", "forward", "TB/s", 3.7, 4.0),
    Goal("RoPE", "8192 x 32 heads", "backward", "TB/s", 3.2, 4.0),
    Goal("SwiGLU", _MLP, "forward", "TB/s", 3.7, 4.0),
    Goal("SwiGLU", _MLP, "backward", "TB/s", 3.2, 4.0),
    Goal("cross-entropy", "8192 x 131072", "both", "ms", 1.4, 1.15, IN_PLACE),
    Goal("linear cross-entropy", "8192 x 4096 x 131072", "both", "ms", 45, 40),
    Goal("linear cross-entropy", "8192 x 4096 x 131072", "both", "GB beyond the gradients", 1.2),
    Goal("X X^T", "4096 x 4096", "forward", "times the speed of", 1.4, 1.7, against=PLAIN),
    Goal("AdamW", "60 x 4096 x 4096", "step", "ms", 8, 7),
)


def goal_phases(kernel: str, shape: str) -> set[str]:
    """Phases that a goal is set for."""
    return {goal.phase for goal in GOALS if (goal.kernel, goal.shape) == (kernel, shape) or goal.against == shape}


def judged(cases: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Each goal with what the record's cases say of it: `found` and `met`, None where it was not measured."""
    out = []
    for goal in GOALS:
        found = _found(goal, cases)
        met = None if found is None else found <= goal.must if goal.measure in AT_MOST else found >= goal.must
        out.append({"kernel": goal.kernel, "shape": goal.shape, "phase": goal.phase, "entrant": goal.entrant,
                    "measure": f"{goal.measure} {goal.against}".strip(), "must": goal.must, "stretch": goal.stretch,
                    "found": found, "met": met})
    return out


def _found(goal: Goal, cases: Sequence[Mapping[str, Any]]) -> float | None:
    case, ours = _result(cases, goal, goal.shape, goal.entrant)
    if ours is None:
        return None
    if goal.measure == "TFLOP/s":
        return ours["flops_per_s"] / 1e12
    if goal.measure == "TB/s":
        return ours["bytes_per_s"] / 1e12
    if goal.measure == "ms":
        return ours["median_s"] * 1e3
    if goal.measure == "GB beyond the gradients":
        return None if ours["peak_bytes"] is None else (ours["peak_bytes"] - case["facts"]["gradient_bytes"]) / 1e9
    if goal.measure == "times the speed of":
        _, other = _result(cases, goal, goal.shape, goal.against)
        return None if other is None else other["median_s"] / ours["median_s"]
    _, other = _result(cases, goal, goal.against, goal.entrant)
    return None if other is None else ours["flops_per_s"] / other["flops_per_s"]


def _result(cases: Sequence[Mapping[str, Any]], goal: Goal, shape: str, entrant: str) -> tuple[Any, Any]:
    """The case and the entrant's figures, None where there are none."""
    for case in cases:
        if (case["kernel"], case["shape"]) == (goal.kernel, shape):
            value = case["phases"].get(goal.phase, {}).get("entrants", {}).get(entrant, {})
            return case, value if "median_s" in value else None
    return None, None
