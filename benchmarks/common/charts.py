"""The charts of a result: roofline, bars against peers, curves over the length and over M."""

import re
from collections.abc import Mapping, Sequence
from typing import Any

from benchmarks.common import svg
from benchmarks.common.document import Plot
from benchmarks.common.results import Row
from benchmarks.common.svg import Group, Line

GIB = 2**30
OVER_M = re.compile(r"-m(\d+)$")
MOST_BARS = 60  # of one chart


def of_kernels(run: Mapping[str, Any]) -> list[Plot]:
    """Roofline, times of peers over ours, and time against M, of those there are results for."""
    rows = [row for row in run["rows"] if not OVER_M.search(row["size"])]
    swept = [row for row in run["rows"] if OVER_M.search(row["size"])]
    found = [_roofline(run, rows), _times(rows)]
    for dtype in dict.fromkeys(row["dtype"] for row in swept):
        for what in dict.fromkeys(row["pass"] for row in swept):
            own = [r for r in swept if (r["dtype"], r["pass"]) == (dtype, what)]
            found.append(_over_m(own, what, dtype))
    return [plot for plot in found if plot is not None]


def _roofline(run: Mapping[str, Any], rows: Sequence[Row]) -> Plot | None:
    """Operations a second against operations for each byte, below what the machine can do."""
    points: dict[str, list[tuple[float, float, str]]] = {}
    for row in rows:
        intensity = row.get("operations_per_byte")
        if not intensity:
            continue
        rate = row["rate"] if row["unit"] == "GFLOP/s" else row["rate"] * intensity
        label = f"{row['case']}, {row['pass']}: {row['share_of_ceiling']:.0%} of the ceiling"
        points.setdefault(row["implementation"], []).append((intensity, rate / 1e9, label))
    if not points or not run.get("limits"):
        return None
    bandwidth, products = run["limits"]["copy"] / 1e9, run["limits"]["products"]
    most = max(x for own in points.values() for x, _, _ in own)
    least = min(x for own in points.values() for x, _, _ in own)
    found = []
    for dtype in dict.fromkeys(row["dtype"] for row in rows):
        peak = products[dtype] / 1e9
        knee = peak / bandwidth
        roof = [(least, bandwidth * least), (knee, peak), (max(most, 4 * knee), peak)]
        found.append(Line(f"this machine, {dtype}", roof, "soft", dots=False, dashed=True))
    colours = svg.colour_of(list(points))
    for name in sorted(points, key=lambda name: name == "ours"):
        own = points[name]
        labels = [label for _, _, label in own]
        where = [(x, y) for x, y, _ in own]
        found.append(Line(name, where, colours[name], joined=False, labels=labels))
    title = "Kernels below this machine's roofline"
    axes = {"x_label": "operations for each byte that has to be moved", "y_label": "GFLOP/s"}
    return Plot("roofline", title, svg.lines(title, found, log=True, **axes))


def _times(rows: Sequence[Row]) -> Plot | None:
    """Each peer's time over ours, of the passes with gradients where there are any."""
    groups: list[Group] = []
    last = {row["case"]: row["pass"] for row in rows}  # forward+backward comes after forward
    for case, what in last.items():
        sizes = dict.fromkeys((r["size"], r["dtype"]) for r in rows if r["case"] == case)
        for size, dtype in sizes:
            key = (case, size, dtype, what)
            own = [r for r in rows if (r["case"], r["size"], r["dtype"], r["pass"]) == key]
            ours = next((r for r in own if r["implementation"] == "ours"), None)
            if ours is None or len(own) < 2:
                continue
            base = ours["seconds"]["median"]
            times = {r["implementation"]: r["seconds"]["median"] / base for r in own if r != ours}
            name = case if len(sizes) == 1 else f"{case}, {size} {dtype}"
            groups.append((name, [(peer, ratio, f"{ratio:.1f}") for peer, ratio in times.items()]))
    while groups and sum(len(own) for _, own in groups) > MOST_BARS:
        groups.pop()
    if not groups:
        return None
    title = "Time of others over ours, backward pass included"
    drawn = svg.bars(title, groups, x_label="times as long as ours", marked=1.0)
    return Plot("times", title, drawn)


def _over_m(rows: Sequence[Row], what: str, dtype: str) -> Plot | None:
    found = []
    names = list(dict.fromkeys(row["implementation"] for row in rows))
    colours = svg.colour_of(names)
    for name in names:
        points = [
            (int(match[1]), row["seconds"]["median"] * 1e3)
            for row in rows
            if row["implementation"] == name and (match := OVER_M.search(row["size"]))
        ]
        labels = [f"{name}, M = {m}: {ms:.3g} ms" for m, ms in points]
        found.append(Line(name, sorted(points), colours[name], labels=labels))
    values = sorted({x for line in found for x, _ in line.points})
    if len(values) < 2:
        return None
    title = f"{rows[0]['case']}, {what}, {dtype}: time against M"
    axes = {"x_label": "M, rows of the batch", "y_label": "ms"}
    drawn = svg.lines(title, found, log=True, x_values=values, **axes)
    return Plot(f"m-{what.replace('+', '-')}-{dtype}", title, drawn)


def of_steps(rows: Sequence[Row]) -> list[Plot]:
    """Speed and memory of each whole step beside others, or curves where there is a length."""
    found = []
    for case in dict.fromkeys(row["case"] for row in rows):
        own = [row for row in rows if row["case"] == case]
        found += _curves(case, own) if "x" in own[0] else _bars(case, own)
    return found


def _bars(case: str, rows: Sequence[Row]) -> list[Plot]:
    several = len({row["dtype"] for row in rows}) > 1
    rates: list[Group] = []
    memory: list[Group] = []
    for row in rows:
        name = row["implementation"]
        what = f"{name}, {row['dtype']}" if several else name
        rates.append((what, [(name, row["rate"], f"{row['rate']:.0f}")]))
        peak = row["peak_bytes"] / GIB
        memory.append((what, [(name, peak, f"{peak:.2f}")]))
    speed = f"{case}: {rows[0]['unit']}"
    return [
        Plot(f"{case}-speed", speed, svg.bars(speed, rates, x_label=rows[0]["unit"])),
        Plot(
            f"{case}-memory",
            f"{case}: peak memory",
            svg.bars(f"{case}: peak memory", memory, x_label="GiB"),
        ),
    ]


def _curves(case: str, rows: Sequence[Row]) -> list[Plot]:
    names = list(dict.fromkeys(row["implementation"] for row in rows))
    colours = svg.colour_of(names)
    found = []
    for name in names:
        own = [row for row in rows if row["implementation"] == name]
        points = [(float(row["x"]), row["peak_bytes"] / GIB) for row in own]
        labels = [f"{name}, {x:.0f} tokens: {y:.2f} GiB" for x, y in points]
        found.append(Line(name, points, colours[name], labels=labels))
    values = sorted({x for line in found for x, _ in line.points})
    title = "Peak memory of a training step against the length of its sequence"
    drawn = svg.lines(title, found, x_label="tokens", y_label="GiB", x_values=values)
    return [Plot(f"{case}-memory", title, drawn)]
