"""Charts of the run report as inline SVG: drawn here, read out on hover by a few lines of script in the page.

A chart works without script, scales with the page and takes its colours from the page's CSS. However long the run, a
chart has at most COLUMNS points: a column's line is its mean, its band goes from its lowest to its highest value.
"""

import json
import math
import statistics
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from html import escape

COLUMNS = 600
TOP, RIGHT, BOTTOM, LEFT = 14, 14, 26, 52
"""Margins in px around the plotted area."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Series:
    """One line."""

    name: str
    x: Sequence[float]
    y: Sequence[float]
    """Not-finite values are gaps."""
    style: str = "a"
    """CSS colour class of the page: a, b, c, d or e."""
    smooth: int = 0
    """Also draw the running median over this many columns as the main line, the raw one faint behind it."""
    thin: bool = False
    dots: bool = False
    """Mark every point: for values that exist at some steps only."""
    fill: bool = False
    """Tint the area below the line."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Mark:
    """A vertical line at a step: a resume, say."""

    x: float
    label: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Span:
    """A stretch of the x axis with a name, drawn as a bar above the plot."""

    start: float
    stop: float
    label: str
    style: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Chart:
    """What is drawn."""

    label: str
    """For those who cannot see it."""
    series: Sequence[Series]
    number: Callable[[float], str]
    """How values read on hover."""
    tick: Callable[[float], str] | None = None
    """How they read at the axis; none = the same."""
    marks: Sequence[Mark] = ()
    spans: Sequence[Span] = ()
    ticks: Sequence[tuple[float, str]] = field(default_factory=tuple)
    """Small triangles at the foot: steps left out, spikes."""
    from_zero: bool = False
    y_log: bool = False
    x_log: bool = False
    settled: float = 0.0
    """Values before this share of the points may run out of the plot at its top: the fall of the first steps would
    flatten all that follows."""
    y_steps: Sequence[float] = (1, 2, 2.5, 5)
    """Distances between the values of the y axis that read well, times any power of `y_base`."""
    y_base: float = 10.0


def draw(chart: Chart, width: int, height: int) -> str:
    """The chart as an <svg> element with its hover data, `width` x `height` px. Empty if there is nothing to draw."""
    columns = [_columns(s) for s in chart.series]
    kept = [(s, c) for s, c in zip(chart.series, columns, strict=True) if c[0]]
    if not kept:
        return ""
    top = TOP + (22 if chart.spans else 0)
    x_low = min(c[0][0] for _, c in kept)
    x_high = max(c[0][-1] for _, c in kept)
    if chart.x_log:
        x_low, x_high = max(x_low, 1.0), max(x_high, 1.0)
    if x_high == x_low:
        x_low = x_high / 2 if chart.x_log else x_high - 1  # a single step lies where its start leads to
    low, high = _limits(kept, chart)
    to_x = _scale(x_low, x_high, LEFT, width - RIGHT, chart.x_log)
    to_y = _scale(low, high, height - BOTTOM, top, chart.y_log)
    clip = f"clip-{zlib.crc32(repr((chart.label, width, chart.x_log)).encode()):x}"
    parts = [f'<clipPath id="{clip}"><rect x="{LEFT - 5}" y="{top - 2}" width="{width - RIGHT - LEFT + 10}" '
             f'height="{height - BOTTOM - top + 4}"/></clipPath>']
    about = 5 if height > 250 else 4
    for value in _round_powers(low, high, about) if chart.y_log else _round_values(
            low, high, about, chart.y_steps, chart.y_base):
        y = to_y(value)
        parts.append(f'<line class="grid" x1="{LEFT}" x2="{width - RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>'
                     f'<text class="tick" x="{LEFT - 8}" y="{y + 3.5:.1f}" text-anchor="end">'
                     f'{escape((chart.tick or chart.number)(value))}</text>')
    about = max(3, width // 130)
    for value in _round_powers(x_low, x_high, about) if chart.x_log else _round_values(x_low, x_high, about):
        if value % 1:  # there is no half of a step
            continue
        parts.append(f'<text class="tick" x="{to_x(value):.1f}" y="{height - 7}" text-anchor="middle">{int(value):,}</text>')
    parts.append(f'<text class="tick" x="{LEFT - 8}" y="{height - 7}" text-anchor="end">step</text>')
    for span in chart.spans:
        a, b = to_x(max(span.start, x_low)), to_x(min(span.stop, x_high))
        parts.append(f'<rect class="span {span.style}" x="{a:.1f}" y="17" width="{max(b - a - 2, 2):.1f}" height="4" rx="2"/>')
        shown = span.label if 6.3 * len(span.label) < b - a else ""
        parts.append(f'<text class="span-label" x="{a:.1f}" y="11">{escape(shown)}</text>')
    for mark in chart.marks:
        x = to_x(max(mark.x, x_low))
        parts.append(f'<line class="mark" x1="{x:.1f}" x2="{x:.1f}" y1="{top}" y2="{height - BOTTOM}">'
                     f'<title>{escape(mark.label)}</title></line>')
    parts.append(f'<g clip-path="url(#{clip})">')
    hover, firsts = [], []
    for series, (xs, means, lows, highs) in kept:
        points = [(to_x(max(x, x_low)), to_y(y)) for x, y in zip(xs, means, strict=True)]
        shown = _smooth(means, series.smooth) if series.smooth else means
        firsts.append((next((y for x, y in zip(xs, shown, strict=True) if x >= x_low and math.isfinite(y)), low),
                       next((x for (x, _), y in zip(points, shown, strict=True) if y <= high), LEFT)))
        if series.smooth:
            parts.append(_band(xs, lows, highs, to_x, to_y, series.style) if lows is not highs else
                         f'<path class="raw {series.style}" d="{_path(points)}"/>')
            points = [(x, to_y(y)) for (x, _), y in zip(points, shown, strict=True)]
        if series.fill:
            parts.append(f'<path class="fill {series.style}" d="{_area(points, height - BOTTOM)}"/>')
        thin = " thin" * series.thin
        parts.append(f'<path class="line {series.style}{thin}" d="{_path(points)}"/>')
        parts += [f'<circle class="dot {series.style}{thin}" cx="{x:.1f}" cy="{y:.1f}" r="{2 if series.thin else 3}"/>'
                  for x, y in (points if series.dots else _alone(points)) if math.isfinite(y)]
        hover.append({"n": series.name, "c": series.style, "x": [_short(x) for x in xs],
                      "y": [_short(y) for y in means], "t": [chart.number(y) for y in means]})
    parts.append("</g>")
    first, enters = max(firsts)
    if first > high:
        parts.append(f'<text class="tick" x="{enters + 20:.1f}" y="{top + 9}">begins at {escape(chart.number(first))}</text>')
    for x, label in chart.ticks:
        at, y = to_x(max(x, x_low)), height - BOTTOM
        parts.append(f'<path class="event" d="M{at - 4.5:.1f} {y}h9l-4.5 -8z"><title>{escape(label)}</title></path>')
    data = {"w": width, "x": [x_low, x_high, LEFT, width - RIGHT, int(chart.x_log)],
            "y": [low, high, height - BOTTOM, top, int(chart.y_log)], "s": hover}
    return (f'<svg class="chart" viewBox="0 0 {width} {height}" role="img" aria-label="{escape(chart.label)}" '
            f"data-chart='{_attribute(data)}'>{''.join(parts)}</svg>")


def _attribute(data: object) -> str:
    """JSON for an attribute in single quotes: its many double quotes stay one character each."""
    text = json.dumps(data, separators=(",", ":"), allow_nan=False, ensure_ascii=False)
    return escape(text, quote=False).replace("'", "&#39;")


def _short(value: float) -> float | None:
    """Five digits are more than a pixel shows."""
    return float(f"{value:.5g}") if math.isfinite(value) else None


def _columns(series: Series) -> tuple[list[float], list[float], list[float], list[float]]:
    """x, mean, lowest and highest of at most COLUMNS columns of neighbouring points; a gap is nan."""
    n = len(series.x)
    each = -(-n // COLUMNS)  # the same for all, or the band would go by how many points a column has; the first has the rest
    if each <= 1:
        ys = [y if math.isfinite(y) else math.nan for y in series.y]
        return list(series.x), ys, ys, ys
    xs, means, lows, highs = [], [], [], []
    for b in range(n % each or each, n + 1, each):
        known = [y for y in series.y[max(b - each, 0):b] if math.isfinite(y)]
        xs.append(series.x[b - 1])
        means.append(math.fsum(known) / len(known) if known else math.nan)
        lows.append(min(known, default=math.nan))
        highs.append(max(known, default=math.nan))
    return xs, means, lows, highs


def _smooth(values: Sequence[float], window: int) -> list[float]:
    """Running median centred on each value, shorter at the ends; gaps are left out. A median because one wild
    step must show as itself and not as a plateau. At the end a quarter of the window stays: where a run has got to is
    not what its last step happened to be. Of few values no window takes in more than a quarter."""
    half, smoothed = min(window, len(values) // 4) // 2, []
    for i in range(len(values)):
        reach = min(half, i, max(half // 2, len(values) - 1 - i))  # symmetric, or the start of a falling curve would bend
        known = [v for v in values[i - reach:i + reach + 1] if math.isfinite(v)]
        smoothed.append(statistics.median(known) if known else math.nan)
    return smoothed


def _limits(kept: Sequence[tuple[Series, tuple]], chart: Chart) -> tuple[float, float]:
    """Lowest and highest y shown. The highest half per cent may be cut off: one slow first step must not flatten the rest."""
    log, from_zero = chart.y_log, chart.from_zero
    known = sorted(y for s, c in kept for y in (_smooth(c[1], s.smooth) if s.smooth else c[1])[
        0 if s.dots or chart.x_log else int(chart.settled * len(c[1])):] if math.isfinite(y) and (y > 0 or not log))
    if not known:
        return (1.0, 10.0) if log else (0.0, 1.0)
    low, high = known[0], known[-1]
    usual = known[int(0.995 * (len(known) - 1))]
    if high > 1.6 * abs(usual) and len(known) > 50:
        high = 1.15 * usual
    if log:
        return low / 1.2, high * 1.2
    low = min(0.0, low) if from_zero else low
    room = 0.06 * (high - low) or 0.5 * abs(high) or 1.0
    return (low if from_zero and low == 0 else low - room), high + room


def _scale(low: float, high: float, start: float, stop: float, log: bool) -> Callable[[float], float]:
    if log:
        a, b = math.log(low), math.log(high)
        return lambda v: start + (math.log(v) - a) / (b - a) * (stop - start) if v > 0 else math.nan
    return lambda v: start + (v - low) / (high - low) * (stop - start)


def _round_values(low: float, high: float, about: int, steps: Sequence[float] = (1, 2, 2.5, 5),
                  base: float = 10.0) -> list[float]:
    """About so many values that read well within [low, high], a step of `steps` times a power of `base` apart."""
    rough = (high - low) / about
    if rough <= 0:
        return [low]
    unit = base ** math.floor(math.log(rough, base))
    step = next((m * unit for m in (*steps, base * steps[0]) if m * unit >= rough * 0.9), base * steps[0] * unit)
    first = math.ceil(low / step - 1e-9)
    return [round(i * step, 12) for i in range(first, math.floor(high / step + 1e-9) + 1)]


def _round_powers(low: float, high: float, about: int) -> list[float]:
    """The same for a logarithmic axis."""
    powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    for digits in ((1, 2, 5), (1, 3), (1,)):
        found = [d * 10.0**p for p in powers for d in digits if low <= d * 10.0**p <= high]
        if len(found) <= about + 3:
            break
    return found[::max(1, -(-len(found) // (about + 3)))]


def _path(points: Sequence[tuple[float, float]]) -> str:
    """Move and line commands; a gap begins a new part."""
    words, pen_down = [], False
    for x, y in points:
        if not math.isfinite(y):
            pen_down = False
            continue
        words.append(f"{'L' if pen_down else 'M'}{x:.1f} {y:.1f}")
        pen_down = True
    return "".join(words)


def _alone(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """Those that no line leads to or from."""
    known = [False, *(math.isfinite(y) for _, y in points), False]
    return [point for i, point in enumerate(points) if not known[i] and not known[i + 2]]


def _area(points: Sequence[tuple[float, float]], foot: float) -> str:
    known = [(x, y) for x, y in points if math.isfinite(y)]
    return f"{_path(known)}L{known[-1][0]:.1f} {foot}L{known[0][0]:.1f} {foot}Z" if known else ""


def _band(xs: Sequence[float], lows: Sequence[float], highs: Sequence[float], to_x: Callable, to_y: Callable,
          style: str) -> str:
    known = [(to_x(x), to_y(a), to_y(b)) for x, a, b in zip(xs, lows, highs, strict=True) if math.isfinite(a)]
    if not known:
        return ""
    there = "".join(f"{'L' if i else 'M'}{x:.1f} {b:.1f}" for i, (x, _, b) in enumerate(known))
    back = "".join(f"L{x:.1f} {a:.1f}" for x, a, _ in reversed(known))
    return f'<path class="band {style}" d="{there}{back}Z"/>'
