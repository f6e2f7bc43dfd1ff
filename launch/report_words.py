"""How numbers read in the report and its summary."""

import math
from collections.abc import Mapping
from datetime import UTC, datetime
from typing import Any

from officina.trainer.progress import duration


def number(value: float | str | None) -> str:
    """Four digits; text stays."""
    if value is None:
        return "–"
    if isinstance(value, str) or not math.isfinite(value):
        return str(value)
    if value == 0 or 1e-3 <= abs(value) < 1e6:
        return f"{value:.4g}" if abs(value) < 10 else f"{value:.3g}" if abs(value) < 999.5 else f"{value:,.0f}"
    return f"{value:.2e}"


def loss(value: float | str | None) -> str:
    """Three decimals: what differs between two good runs."""
    return f"{value:.3f}" if isinstance(value, float) and math.isfinite(value) else number(value)


def count(value: float | None) -> str:
    """`8.2 M`."""
    if value is None or not math.isfinite(value):
        return "–"
    for factor, unit in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= 0.9995 * factor:
            return f"{value / factor:.3g} {unit}"
    return f"{value:.3g}"


def shares(values: Mapping[str, float], names: Mapping[str, str]) -> list[str]:
    """`12.3% of tokens right`, for those above 0."""
    return [f"{values[name]:.1%} {of}" for name, of in names.items() if values.get(name)]


def size(value: float) -> str:
    """`1.5 GiB`."""
    for factor, unit in ((2**40, "TiB"), (2**30, "GiB"), (2**20, "MiB"), (2**10, "KiB")):
        if value >= factor:
            return f"{value / factor:.{3 if value < 999.5 * factor else 4}g} {unit}"
    return f"{value:.0f} B"


def seconds(value: float) -> str:
    """`120 ms`, `3.2 s`."""
    if not math.isfinite(value):
        return "–"
    if value == 0:
        return "0"
    return f"{value * 1e3:.3g} ms" if value < 0.9995 else f"{value:.3g} s" if value < 600 else clock(value)


def clock(value: float) -> str:
    """`42 s`, `3:07`, `2:05:09`, `4 d 03 h`."""
    return duration(value) if math.isfinite(value) else "–"


def date(unix_s: float) -> str:
    """`2026-11-23 20:15`, UTC."""
    return datetime.fromtimestamp(unix_s, UTC).strftime("%Y-%m-%d %H:%M")


def shown(value: Any) -> str:
    """A value of the configuration as it is typed."""
    if value is None:
        return "none"
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, float):
        return f"{value:g}"
    if isinstance(value, list):
        return "[" + ", ".join(shown(v) for v in value) + "]"
    return str(value)
