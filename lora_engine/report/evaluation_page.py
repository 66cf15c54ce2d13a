"""What `lora-engine evaluate` measured, as one self-contained page."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from lora_engine.data.account import told_of_records
from lora_engine.evaluation.samples import differing_parts
from lora_engine.report.template import EVALUATION, rendered

SIDES = ("model", "base", "adapter")

Report = Mapping[str, Any]


@dataclass(frozen=True)
class Cell:
    """A measured value: its text, its interval's, and where both lie on the row's scale, in %."""

    text: str
    interval: str
    place: float
    left: float
    right: float


@dataclass(frozen=True)
class MeasureRow:
    """A measure of one group of rows, or of all: a cell for each side, None where it has none."""

    name: str
    cells: list[Cell | None]


def evaluation_page(report: Report) -> str:
    """The page as a string; report: of `app.evaluate.evaluate`."""
    sides = [side for side in SIDES if side in report]
    groups = dict.fromkeys(name for side in sides for name in report[side].get("groups", {}))
    tables = [("All rows", _rows([report[side] for side in sides]))]
    for name in groups:
        parts = [report[side].get("groups", {}).get(name) for side in sides]
        tables.append((name or "(none)", _rows(parts)))
    prompts = [sample["prompt"] for sample in report["samples"]]
    return rendered(
        "evaluate.html.j2",
        mark=EVALUATION,
        report=report,
        sides=sides,
        counted=_counted(report[sides[0]]),
        difference=_difference(report),
        tables=tables,
        peeks=differing_parts(prompts),
        answers=report[sides[0]].get("answers"),
        records=told_of_records(report.get("findings", ())),
    )


def _counted(part: Report) -> str:
    if "questions" in part:
        return f"{part['questions']:,} questions"
    return f"{part['examples']:,} examples, {part['targets']:,} tokens"


def _difference(report: Report) -> tuple[str, bool] | None:
    """In words, and whether the interval leaves out 0; None without an adapter."""
    found = report.get("difference")
    if found is None:
        return None
    choices = "questions" in report["adapter"]
    form = "{:+.1%}" if choices else "{:+.4f}"
    value, low, high = (
        form.format(found[key]).replace("-", "\u2212") for key in ("value", "low", "high")
    )
    what = "accuracy" if choices else "loss"
    certain = not found["low"] <= 0 <= found["high"]
    return f"With the adapter the {what} is {value} ({low} to {high})", certain


_MEASURES = (
    ("loss", "Loss, nats per token", "{:.4f}"),
    ("perplexity", "Perplexity", "{:,.4g}"),
    ("accuracy", "Accuracy", "{:.1%}"),
    ("accuracy_per_byte", "Accuracy, by byte of the choice", "{:.1%}"),
)


def _rows(parts: Sequence[Report | None]) -> list[MeasureRow]:
    """parts: of each side."""
    rows = []
    for key, name, form in _MEASURES:
        found = [None if part is None else part.get(key) for part in parts]
        if any(value is not None for value in found):
            rows.append(_row(name, found, form))
    by_name = [{} if part is None else part.get("metrics", {}) for part in parts]
    for name in dict.fromkeys(name for metrics in by_name for name in metrics):
        rows.append(_row(name, [metrics.get(name) for metrics in by_name], "{:.4g}"))
    return rows


def _row(name: str, found: Sequence[Mapping[str, float] | None], form: str) -> MeasureRow:
    ends = [end for value in found if value is not None for end in value.values()]
    scale = min(ends), max(ends)
    return MeasureRow(name, [None if v is None else _cell(v, form, scale) for v in found])


def _cell(found: Mapping[str, float], form: str, scale: tuple[float, float]) -> Cell:
    width = scale[1] - scale[0]

    def place(value: float) -> float:
        return 50.0 if width == 0 else 4 + 92 * (value - scale[0]) / width

    value = found["value"]
    if "low" not in found:  # of a metric that is one number
        return Cell(
            text=form.format(value),
            interval="",
            place=place(value),
            left=place(value),
            right=place(value),
        )
    low, high = found["low"], found["high"]
    told = f"{form.format(low)} to {form.format(high)}"
    return Cell(
        text=form.format(value),
        interval=told,
        place=place(value),
        left=place(low),
        right=place(high),
    )
