"""Geometry of the report's line charts: numbers to percentages of the plot's width and height.

The template draws them as inline SVG stretched over the plot, with axis labels as HTML text, so
that lines reflow and text keeps its size on any screen.
"""

import math
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

MAX_POINTS = 800

Point = tuple[float, float]


@dataclass(frozen=True)
class Series:
    """A named line. style: a CSS class, "raw" | "smooth" | "heldout" | "plain" | "other" |
    "probe" | "before"."""

    name: str
    points: Sequence[Point]
    style: str
    path: str = ""
    dots: Sequence[Point] = ()


@dataclass(frozen=True)
class Tick:
    """A grid line. position: percent from the left, or from the top."""

    position: float
    label: str


@dataclass(frozen=True)
class Chart:
    """A line chart over training steps, ready to draw."""

    title: str
    note: str
    series: list[Series]
    x_ticks: list[Tick]
    y_ticks: list[Tick]
    x_range: tuple[float, float]
    readout: list[dict[str, object]] = field(default_factory=list)


def line_chart(
    title: str,
    series: Sequence[Series],
    *,
    note: str = "",
    last_step: float | None = None,
    from_zero: bool = False,
    label: Callable[[float], str] = lambda value: f"{value:g}",
) -> Chart | None:
    """Lay out `series` on common axes; None if there is no finite point to draw.

    The x axis runs from 0 to last_step (default: the last point). from_zero: so that the y axis
    starts at 0 too. label: text of a y value.
    """
    series = [s for s in map(_finite, series) if s.points]
    if not series:
        return None
    ys = [y for s in series for _, y in s.points]
    furthest = max(x for s in series for x, _ in s.points)
    x_low, x_high = 0.0, max(furthest, last_step or 0.0) or 1.0
    y_ticks = nice_ticks(0.0 if from_zero else min(ys), max(ys), 5)
    y_low, y_high = y_ticks[0], y_ticks[-1]

    def place(point: Point) -> Point:
        x, y = point
        across = (x - x_low) / (x_high - x_low)
        return 100 * across, 100 * (y_high - y) / (y_high - y_low)

    x_ticks = [x for x in nice_ticks(x_low, x_high, 6) if x_low <= x <= x_high and x == int(x)]
    return Chart(
        title=title,
        note=note,
        series=[_drawn(s, place) for s in series],
        x_ticks=[Tick(place((x, y_low))[0], f"{int(x):,}") for x in x_ticks],
        y_ticks=[Tick(place((x_low, y))[1], label(y)) for y in y_ticks],
        x_range=(x_low, x_high),
        readout=[
            {"name": s.name, "points": [(x, label(y)) for x, y in _thinned(s.points)]}
            for s in series
        ],
    )


def nice_ticks(low: float, high: float, count: int) -> list[float]:
    """About `count` round values (1, 2, 2.5 or 5 times a power of ten) that enclose the range."""
    low, high = _widened(low, high)
    rough = (high - low) / max(1, count - 1)
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(m * power for m in (1, 2, 2.5, 5, 10) if m * power >= rough * (1 - 1e-9))
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [round(i * step, 12) if step > 1e-9 else i * step for i in range(first, last + 1)]


def smoothed(points: Sequence[Point], length: int | None = None) -> list[Point]:
    """Exponential moving average over about a tenth of the run, corrected for its start.

    length: of the run, in points; None: it is these.
    """
    span = min(100.0, max(3.0, (length or len(points)) / 10))
    keep = 1 - 2 / (span + 1)
    total = weight = 0.0
    result = []
    for x, y in points:
        total = keep * total + (1 - keep) * y
        weight = keep * weight + (1 - keep)
        result.append((x, total / weight))
    return result


def _finite(series: Series) -> Series:
    points = [(x, y) for x, y in series.points if math.isfinite(y)]
    return Series(series.name, points, series.style)


def _drawn(series: Series, place: Callable[[Point], Point]) -> Series:
    points = [place(p) for p in _thinned(series.points)]
    path = " ".join(f"{'L' if i else 'M'}{x:.2f},{y:.2f}" for i, (x, y) in enumerate(points))
    few = series.style.split()[-1] in ("heldout", "probe") and len(points) <= 60
    dots = points if few or len(points) == 1 else ()
    return Series(name=series.name, points=series.points, style=series.style, path=path, dots=dots)


def _thinned(points: Sequence[Point]) -> Sequence[Point]:
    """At most MAX_POINTS points: of each bucket its lowest and highest, so that spikes stay."""
    if len(points) <= MAX_POINTS:
        return points
    size = math.ceil(len(points) / (MAX_POINTS / 2))
    kept: list[Point] = []
    for first in range(0, len(points), size):
        bucket = points[first : first + size]
        extremes = {min(bucket, key=lambda p: p[1]), max(bucket, key=lambda p: p[1])}
        kept += sorted(extremes)
    return kept


def _widened(low: float, high: float) -> tuple[float, float]:
    """A range that is not empty, nor so narrow that its ticks would be denormal numbers."""
    if high - low > sys.float_info.min * 1e3:
        return low, high
    margin = abs(low) * 0.1 or 1.0
    return low - margin, high + margin
