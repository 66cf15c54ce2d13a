"""Charts as SVG files in the colours of a run's report, light or dark as the reader's system is.

Text is text, and no size depends on a font that may be missing. Needs nothing but Python and
lora_engine's report, whose colours and round tick values are used.
"""

import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import TypeAlias

import lora_engine
from lora_engine.report.charts import nice_ticks

WIDTH, HEIGHT = 760, 440
LEFT, RIGHT, TOP, BOTTOM = 66, 24, 84, 48
Point = tuple[float, float]
# Ours first; the others in the order in which they come.
COLOURS = ("train", "heldout", "good", "bad", "violet", "teal", "soft")


@dataclass(frozen=True)
class Line:
    """A named line of points, or its points alone. colour: of COLOURS. dashed: a limit."""

    name: str
    points: Sequence[Point]
    colour: str
    dots: bool = True
    joined: bool = True
    dashed: bool = False
    labels: Sequence[str] = ()


def colour_of(names: Sequence[str]) -> dict[str, str]:
    """A colour for each contender: ours has the report's blue."""
    others = [name for name in dict.fromkeys(names) if name != "ours"]
    found = {"ours": COLOURS[0]}
    return found | {n: COLOURS[1 + i % (len(COLOURS) - 1)] for i, n in enumerate(others)}


def lines(
    title: str,
    found: Sequence[Line],
    *,
    x_label: str,
    y_label: str,
    log: bool = False,
    even: bool = False,
    x_text: Callable[[float], str] = lambda x: f"{x:g}",
    y_text: Callable[[float], str] = lambda y: f"{y:g}",
    x_values: Sequence[float] = (),
) -> str:
    """Lines or points on common axes; log: both axes by powers, else y from 0 and x by powers of 2;
    even: both from 0, in even steps.

    x_values: where the x axis has its ticks; else round values.
    """
    points = [p for line in found for p in line.points]
    xs, ys = [x for x, _ in points], [y for _, y in points]
    round_values = nice_ticks(0.0, max(xs), 6) if even else _powers(min(xs), max(xs))
    x_ticks = list(x_values) or round_values
    y_ticks = _powers(min(ys), max(ys)) if log else nice_ticks(0.0, max(ys), 6)
    x_scale = float if even else math.log
    x_low, x_high = x_scale(min(*xs, *x_ticks)), x_scale(max(*xs, *x_ticks))
    scale = math.log if log else float
    y_low, y_high = scale(y_ticks[0]), scale(y_ticks[-1])

    def place(point: Point) -> Point:
        across = (x_scale(point[0]) - x_low) / max(x_high - x_low, 1e-9)
        up = (scale(point[1]) - y_low) / max(y_high - y_low, 1e-9)
        return (
            LEFT + across * (WIDTH - LEFT - RIGHT),
            HEIGHT - BOTTOM - up * (HEIGHT - TOP - BOTTOM),
        )

    body = []
    for y in y_ticks:
        _, at = place((x_ticks[0], y))
        body.append(f'<path class="grid" d="M{LEFT},{at:.1f}H{WIDTH - RIGHT}"/>')
        body.append(_text(LEFT - 8, at + 4, y_text(y), "tick end"))
    for x in x_ticks:
        at, _ = place((x, y_ticks[0]))
        body.append(_text(at, HEIGHT - BOTTOM + 18, x_text(x), "tick middle"))
    body.append(_text((LEFT + WIDTH - RIGHT) / 2, HEIGHT - 8, x_label, "tick middle"))
    body.append(_text(16, TOP - 12, y_label, "tick"))
    for line in found:
        body += _line(line, [place(p) for p in line.points])
    return _document(title, HEIGHT, [*_legend(found), *body])


def _line(line: Line, placed: Sequence[Point]) -> list[str]:
    """What draws a line, its points told by its labels."""
    body = []
    if line.joined:
        path = " ".join(f"{'L' if i else 'M'}{x:.1f},{y:.1f}" for i, (x, y) in enumerate(placed))
        dash = " dashed" if line.dashed else ""
        body.append(f'<path class="line {line.colour}{dash}" d="{path}"/>')
    if line.dots:
        labels = line.labels or [line.name] * len(placed)
        for (x, y), label in zip(placed, labels, strict=True):
            where = f'class="{line.colour}" cx="{x:.1f}" cy="{y:.1f}" r="4.5"'
            body.append(f"<circle {where}><title>{escape(label)}</title></circle>")
    return body


# What is compared, and each contender's name, value, and text at the end of its bar.
Group: TypeAlias = tuple[str, Sequence[tuple[str, float, str]]]


def bars(title: str, groups: Sequence[Group], *, x_label: str, marked: float | None = None) -> str:
    """Horizontal bars, a group for each thing compared. marked: a value with a line at it."""
    colours = colour_of([name for _, own in groups for name, _, _ in own])
    most = max(value for _, own in groups for _, value, _ in own)
    most = max(most, marked or 0.0)
    longest = max(len(what) for what, _ in groups)
    left, bar, gap, top = min(280, 30 + 7 * longest), 15, 12, 64
    room = WIDTH - left - 90
    body, at = [], float(top)
    for what, own in groups:
        height = bar * len(own)
        body.append(_text(left - 12, at + height / 2 + 4, what, "name end"))
        for name, value, text in own:
            wide = max(1.0, room * value / most)
            where = f'x="{left}" y="{at:.1f}" width="{wide:.1f}" height="{bar - 3}" rx="2"'
            label = f"<title>{escape(f'{what}, {name}: {text}')}</title>"
            body.append(f'<rect class="{colours[name]}" {where}>{label}</rect>')
            body.append(_text(left + wide + 6, at + bar - 5, text, "tick"))
            at += bar
        at += gap
    if marked is not None:
        x = left + room * marked / most
        body.append(f'<path class="line soft dashed" d="M{x:.1f},{top - 6}V{at - gap + 4:.1f}"/>')
    body.append(_text(left, at + 12, x_label, "tick"))
    shown = [name for name in colours if any(name == x for _, own in groups for x, _, _ in own)]
    legend = _legend([Line(name, (), colours[name]) for name in shown])
    return _document(title, at + 24, [*legend, *body])


def _powers(low: float, high: float) -> list[float]:
    """Powers of ten that enclose the range; 1, 2 and 5 times them where there are few."""
    first, last = math.floor(math.log10(low)), math.ceil(math.log10(high))
    last = max(last, first + 1)
    if last - first <= 2:
        every = [m * 10.0**e for e in range(first, last + 1) for m in (1, 2, 5)]
        inner = [x for x in every if low / 2.5 <= x <= high * 2.5]
        if len(inner) > 1 and inner[0] <= low and inner[-1] >= high:
            return inner
    return [10.0**e for e in range(first, last + 1)]


def _legend(found: Sequence[Line]) -> list[str]:
    """Names with their colours below the title, in a row."""
    body, x = [], 16.0
    for line in found:
        if line.dashed:
            body.append(f'<path class="line {line.colour} dashed" d="M{x:.0f},44h16"/>')
        else:
            body.append(
                f'<rect class="{line.colour}" x="{x:.0f}" y="38" width="12" height="12" rx="3"/>'
            )
        body.append(_text(x + 20, 48, line.name, "tick"))
        x += 34 + 6.1 * len(line.name)
    return body


def _text(x: float, y: float, text: str, style: str) -> str:
    return f'<text class="{style}" x="{x:.1f}" y="{y:.1f}">{escape(text)}</text>'


def _document(title: str, height: float, body: Sequence[str]) -> str:
    size = f'viewBox="0 0 {WIDTH} {height:.0f}" width="{WIDTH}" height="{height:.0f}"'
    head = (
        f'<svg xmlns="http://www.w3.org/2000/svg" {size} role="img" aria-label="{escape(title)}">'
    )
    back = (
        f'<rect class="card" x=".5" y=".5" width="{WIDTH - 1}" height="{height - 1:.0f}" rx="12"/>'
    )
    name = _text(16, 26, title, "title")
    return "\n".join([head, f"<style>{style()}</style>", back, name, *body, "</svg>"]) + "\n"


def style() -> str:
    """The report's colours, light and dark, and what is drawn with them."""
    light, dark = _palettes()
    rules = [
        f"svg {{ {light} --violet: #7a4fc2; --teal: #0f7f8a; }}",
        "@media (prefers-color-scheme: dark) {",
        f"svg {{ {dark} --violet: #bfa0ff; --teal: #5fcad6; }} }}",
        "text { font: 12px system-ui, -apple-system, Roboto, sans-serif; fill: var(--soft); }",
        "text.title { font-size: 15px; font-weight: 650; fill: var(--text); }",
        "text.name { fill: var(--text); }",
        ".end { text-anchor: end; } .middle { text-anchor: middle; }",
        ".card { fill: var(--card); stroke: var(--line); }",
        ".grid { stroke: var(--line); fill: none; }",
        ".line { fill: none; stroke-width: 2; stroke-linejoin: round; }",
        ".dashed { stroke-dasharray: 5 4; }",
    ]
    for name in COLOURS:
        rules.append(f"path.{name} {{ stroke: var(--{name}); }}")
        rules.append(f"rect.{name}, circle.{name} {{ fill: var(--{name}); }}")
    return "\n".join(rules)


def _palettes() -> tuple[str, str]:
    """The custom properties of report.css, for light and for dark."""
    assert lora_engine.__file__ is not None
    css = Path(lora_engine.__file__).parent / "report" / "templates" / "report.css"
    light, dark = re.findall(r":root \{([^}]*)\}", css.read_text(encoding="utf-8"))[:2]
    return " ".join(light.split()), " ".join(dark.split())
