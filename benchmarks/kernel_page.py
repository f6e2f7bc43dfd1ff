"""The page of a kernel record: the goals, a plot for each kernel and phase, and every figure in a table."""

import html
import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from officina.benchmarks.kernel_cases import (
    COMPILED,
    COPY,
    CUDNN,
    DETERMINISTIC,
    FLASH,
    FLEX,
    IN_PLACE,
    LIGER,
    OURS,
    PLAIN,
    PORTABLE,
    VARLEN,
)

_STYLE = """
body{font:15px/1.5 system-ui,sans-serif;max-width:72rem;margin:2rem auto;padding:0 1rem;color:#1c1c1c;background:#fff}
h1,h2,h3{line-height:1.2}h2{margin-top:3rem}table{border-collapse:collapse;margin:1rem 0;font-size:13px}
td,th{padding:.2rem .7rem;border-bottom:1px solid #ddd;text-align:right}td:first-child,th:first-child{text-align:left}
.plots{display:flex;flex-wrap:wrap;gap:1rem}.plots svg{width:22rem;height:auto}.met{color:#17643a}.missed{color:#a32020}
.tiny{background:#fff3cd;padding:.7rem 1rem}
"""
_COLOURS = {OURS: "#c2410c", IN_PLACE: "#f59e0b", DETERMINISTIC: "#f59e0b", PORTABLE: "#be185d", PLAIN: "#9ca3af",
            COMPILED: "#2563eb", COPY: "#6b7280",
            LIGER: "#7c3aed", FLEX: "#2563eb", FLASH: "#0f766e", CUDNN: "#15803d",
            VARLEN: "#0f766e"}


def write_page(record: Mapping[str, Any], path: Path) -> Path:
    """Write the page; it needs no other file."""
    results, device, versions, commit = (record[name] for name in ("results", "device", "versions", "commit"))
    ceilings = results["ceilings"]
    made = [record["date"][:10], f"torch {versions['torch']}", f"triton {versions.get('triton', 'not installed')}",
            f"commit {(commit['hash'] or 'none')[:9]}{' with changes' if commit['changed'] else ''}"]
    parts = [f"<h1>Kernels on {html.escape(', '.join(device['accelerators']) or device['cpu'])}</h1>", (
        f"<p>{', '.join(made)}. bf16, medians with 20th and 80th percentile, L2 emptied before every call. Measured ceilings: "
        f"copy {ceilings['copy_bytes_per_s'] / 1e12:.2f} TB/s, matrix product {ceilings['matmul_flops_per_s'] / 1e12:.0f} "
        "TFLOP/s.</p>")]
    if record["settings"].get("tiny"):
        parts.append("<p class=tiny>Tiny shapes on a CPU, references in the kernels' place: this is no measurement.</p>")
    parts += ["<h2>Goals for one H200</h2>", _goals(results["goals"])]
    if results["left_out"]:
        parts.append(f"<p>Left out for want of time: {html.escape('; '.join(results['left_out']))}.</p>")
    if results["without"]:
        parts.append(f"<p>Not measured: {html.escape(', '.join(results['without']))}.</p>")
    for kernel in dict.fromkeys(case["kernel"] for case in results["cases"]):
        found = [case for case in results["cases"] if case["kernel"] == kernel]
        parts += [f"<h2>{html.escape(kernel)}</h2>", f"<div class=plots>{_plots(found, ceilings)}</div>", _figures(found)]
    path.write_text("<!doctype html><html lang=en><meta charset=utf-8><meta name=viewport content='width=device-width'>"
                    f"<title>officina kernels</title><style>{_STYLE}</style>{''.join(parts)}</html>\n")
    return path


def _goals(goals: Sequence[Mapping[str, Any]]) -> str:
    rows = []
    for goal in goals:
        found = "not measured" if goal["found"] is None else f"{goal['found']:.3g}"
        state = "" if goal["met"] is None else f" class={'met' if goal['met'] else 'missed'}"
        cells = [f"{goal['kernel']}, {goal['shape']}, {goal['phase']}", goal["entrant"], goal["measure"],
                 f"{goal['must']:g}", "" if goal["stretch"] is None else f"{goal['stretch']:g}"]
        rows.append("".join(f"<td>{html.escape(cell)}</td>" for cell in cells) + f"<td{state}>{found}</td>")
    return _table(["kernel", "entrant", "measure", "goal", "hoped for", "found"], rows)


def _figures(cases: Sequence[Mapping[str, Any]]) -> str:
    rows = []
    for case in cases:
        for phase, found in case["phases"].items():
            for name, value in found["entrants"].items():
                label = f"{case['shape']}, {phase}, {name}"
                if "failed" in value:
                    rows.append(f"<td>{html.escape(label)}</td><td colspan=5>{html.escape(value['failed'])}</td>")
                    continue
                memory = "" if value["peak_bytes"] is None else f"{value['peak_bytes'] / 1e9:.2f}"
                rate = _rate(value, found)
                cells = [label, f"{value['median_s'] * 1e3:.3f}", f"{value['p20_s'] * 1e3:.3f} to {value['p80_s'] * 1e3:.3f}",
                         f"{rate[0]:.3g} {rate[1]}", f"{value['of_floor']:.0%}", memory]
                rows.append("".join(f"<td>{html.escape(cell)}</td>" for cell in cells))
    return _table(["case", "ms", "20 % to 80 %", "rate", "of the ceiling", "GB beyond its inputs"], rows)


def _rate(value: Mapping[str, Any], found: Mapping[str, Any]) -> tuple[float, str]:
    """Operations a second where the floor is one of operations, else bytes."""
    if found["floor_flops"]:
        return value["flops_per_s"] / 1e12, "TFLOP/s"
    return value["bytes_per_s"] / 1e12, "TB/s"


def _plots(cases: Sequence[Mapping[str, Any]], ceilings: Mapping[str, float]) -> str:
    """One plot a phase and family of shapes (what stands before the last comma of their names)."""
    families: dict[tuple[str, str], list[Mapping[str, Any]]] = {}
    for case in cases:
        family = case["shape"].rpartition(", ")[0]
        for phase in case["phases"]:
            families.setdefault((phase, family), []).append(case)
    return "".join(_plot(phase, family, found, ceilings) for (phase, family), found in families.items())


def _plot(phase: str, family: str, cases: Sequence[Mapping[str, Any]], ceilings: Mapping[str, float]) -> str:
    from matplotlib import rc_context
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    figure = Figure(figsize=(5.2, 3.6), layout="constrained")
    axes = figure.subplots()
    phases = [case["phases"][phase] for case in cases]
    names = dict.fromkeys(name for found in phases for name in found["entrants"])
    unit = "TFLOP/s" if phases[0]["floor_flops"] else "TB/s"
    for name in names:
        points = [(i, _rate(found["entrants"][name], found)[0]) for i, found in enumerate(phases)
                  if "median_s" in found["entrants"].get(name, {})]
        if points:
            axes.plot(*zip(*points, strict=True), marker="o", markersize=4, label=name, color=_COLOURS.get(name),
                      linewidth=2.2 if name == OURS else 1.2, zorder=3 if name == OURS else 2)
    ceiling = ceilings["matmul_flops_per_s" if unit == "TFLOP/s" else "copy_bytes_per_s"] / 1e12
    axes.axhline(ceiling, color="#777", linestyle="--", linewidth=1, label="measured ceiling")
    ticks = [case["shape"].rpartition(", ")[2] for case in cases]
    axes.set_xticks(range(len(cases)), ticks, rotation=30, ha="right", fontsize=7)
    axes.set_ylim(bottom=0)
    axes.set_ylabel(unit)
    axes.set_title(f"{phase}{f', {family}' if family else ''}", fontsize=10)
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(fontsize=6.5, frameon=False)
    text = io.StringIO()
    with rc_context({"svg.fonttype": "none", "svg.hashsalt": f"{cases[0]['kernel']} {phase} {family}"}):
        FigureCanvasSVG(figure).print_svg(text, metadata=dict.fromkeys(("Date", "Creator", "Format", "Type")))
    return text.getvalue()[text.getvalue().index("<svg"):]


def _table(head: Sequence[str], rows: Sequence[str]) -> str:
    return (f"<table><tr>{''.join(f'<th>{html.escape(name)}</th>' for name in head)}</tr>"
            f"{''.join(f'<tr>{row}</tr>' for row in rows)}</table>")
