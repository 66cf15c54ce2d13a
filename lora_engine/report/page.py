"""report.html: one self-contained page about a run, made from the files in its folder."""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any, Literal

from lora_engine.data.account import finding_lines, learned_line
from lora_engine.errors import UserError
from lora_engine.evaluation.samples import differing_parts
from lora_engine.files import write_text
from lora_engine.objectives.base import NATS_PER_TARGET
from lora_engine.report.charts import Chart, Point, Series, line_chart, smoothed
from lora_engine.report.completions import Shown, shown_completions
from lora_engine.report.template import rendered
from lora_engine.text import bytes_text, duration_text
from lora_engine.training.metrics import StepMetrics
from lora_engine.training.run.folder import RunFolder

Row = Mapping[str, Any]
Change = Literal["relative", "points", "difference"]


@dataclass(frozen=True)
class Comparison:
    """One measure before and after training. better: the change is in the right direction; None
    where there is none, or where neither direction is."""

    name: str
    before: str
    after: str
    change: str
    better: bool | None


def write_report(run: RunFolder) -> Path:
    """Write the run's report from its summary and its metrics; returns the report's path.

    Raises UserError if the run is not finished.
    """
    try:
        summary = json.loads(run.summary.read_text(encoding="utf-8"))
        lines = run.metrics.read_text(encoding="utf-8").split("\n")
    except FileNotFoundError as error:
        raise UserError(f"{run.path}: is not a finished run, it has no {error.filename}") from error
    metrics = [json.loads(line) for line in lines if line.strip()]
    write_text(run.report, render_report(summary, metrics, shown_completions(run.completions)))
    return run.report


def render_report(summary: Row, metrics: Sequence[Row], completions: Sequence[Shown] = ()) -> str:
    """The page as a string.

    summary: what summary.json holds. metrics: the lines of metrics.jsonl; of a step that was
    run twice (after a resume) the last line counts. completions: of an online run.
    """
    return rendered(
        "report.html.j2",
        summary=summary,
        headline=headline(summary),
        comparisons=comparisons(summary),
        charts=[
            asdict(chart)
            for chart in charts(metrics, summary["loss_unit"], summary.get("accuracy_of"))
        ],
        peeks=differing_parts([sample["prompt"] for sample in summary["samples"]]),
        completions=completions,
        accounts=[
            {**about, "learned": learned_line(about), "lines": finding_lines(about)}
            for about in summary.get("data_accounts", ())
        ],
        config=config_sections(summary["config"]),
    )


def headline(summary: Row) -> list[tuple[str, str, str]]:
    """The tiles at the top: label, value, and a line of explanation."""
    seconds = summary["train_seconds"]
    where = "of the whole process" if summary["device"] == "cpu" else "on the GPU"
    tokens = f"{summary['train_tokens']:,} tokens"
    return [
        ("Throughput", f"{summary['tokens_per_second']:,.0f}", "tokens per second"),
        ("Training time", duration_text(seconds), f"{summary['steps']:,} steps, {tokens}"),
        ("Peak memory", bytes_text(summary["peak_memory_bytes"]), where),
        (
            "Trained weights",
            count_text(summary["trainable_parameters"]),
            f"of {count_text(summary['parameters'])}, "
            f"{summary['trainable_parameters'] / summary['parameters']:.2%}",
        ),
    ]


def comparisons(summary: Row) -> list[Comparison]:
    """Held-out loss, its perplexity where it has one, accuracy, and the objective's metrics, before
    and after."""
    losses = (summary["heldout_loss_before"], summary["heldout_loss_after"])
    accuracies = (summary["heldout_accuracy_before"], summary["heldout_accuracy_after"])
    if None in losses:
        return []
    rows = []
    name = _accuracy(summary.get("accuracy_of"))
    before, after = (summary.get(f"heldout_metrics_{when}", {}) for when in ("before", "after"))
    if None not in accuracies:  # else rewards are measured, and the loss is minus the reward
        rows.append(_comparison("Held-out loss", losses, "{:.3f}", lower_is_better=True))
        if summary["loss_unit"] == NATS_PER_TARGET:
            perplexities = tuple(map(perplexity, losses))
            rows.append(_comparison("Perplexity", perplexities, "{:,.2f}", lower_is_better=True))
        row = _comparison(name, accuracies, "{:.1%}", lower_is_better=False, change="points")
        if "rewards/rejected" in before and name == "Token accuracy":
            # Tokens of answers that are to become unlikely count too.
            row = replace(row, name="Token accuracy, all answers", better=None)
        rows.append(row)
    rewards = {key: True for key in before if key.startswith("rewards/") and key.endswith("/mean")}
    for metric, better in {**_BETTER, **rewards}.items():
        if metric in before and metric in after and metric != _COUNTED.get(name):
            share = metric.endswith("accuracies")
            form = "{:.1%}" if share else "{:.3f}"
            values = before[metric], after[metric]
            kind: Change = "points" if share else "difference"
            title = metric if "/" in metric else metric.replace("_", " ").capitalize()
            rows.append(_comparison(title, values, form, lower_is_better=not better, change=kind))
    probe = tuple(x for x in (summary.get(f"probe_loss_{w}") for w in ("before", "after")) if x)
    if len(probe) == 2:
        rows.append(_comparison("Loss on the probe", probe, "{:.3f}", lower_is_better=True))
    return rows


# Metrics that are told before and after, and whether more is better.
_BETTER = {
    "reward": True,
    "rewards/accuracies": True,
    "rewards/margins": True,
    "divergence": False,
}


def more_is_better(metric: str) -> bool | None:
    """Of an objective's metric; None where neither is."""
    if metric.startswith("rewards/") and metric.endswith("/mean"):
        return True
    return _BETTER.get(metric)


# What an accuracy counts that is a metric too.
_COUNTED = {"Pair accuracy": "rewards/accuracies"}


def _accuracy(of: str | None) -> str:
    """What is right or wrong, as the run's summary says it."""
    return {"tokens": "Token accuracy", "pairs": "Pair accuracy"}.get(of or "", "Accuracy")


def perplexity(loss: float) -> float:
    """exp(loss), loss in nats per token; infinite where that overflows."""
    return math.exp(loss) if loss < 700 else math.inf


def charts(metrics: Sequence[Row], loss_unit: str, accuracy_of: str | None) -> list[Chart]:
    """Loss, the objective's metrics, learning rate, gradient norm, throughput and memory over the
    steps.

    loss_unit: what the objective counts the loss in, "" for a bare number. accuracy_of: as
    `Reads` has it.
    """
    loss = points_of(metrics, "loss")
    heldout = points_of(metrics, "heldout_loss")
    if not any("heldout_accuracy" in row for row in metrics):
        heldout = []  # it is minus the reward, which has a chart of its own
    accuracy = [(x, 100 * y) for x, y in points_of(metrics, "heldout_accuracy")]
    memory = [(x, y / 1e9) for x, y in points_of(metrics, "peak_memory_bytes")]
    last = max((float(row["step"]) for row in metrics), default=0.0)

    def single(
        title: str, points: list[Point], note: str, style: str = "plain", **options: Any
    ) -> Chart | None:
        series = [Series(title.lower(), points, style)]
        options = {"from_zero": True, "label": lambda y: f"{y:,g}", **options}
        return line_chart(title, series, note=note, last_step=last, **options)

    drawn = [
        line_chart(
            "Loss",
            [
                Series("each step", loss, "raw"),
                Series("training, smoothed", smoothed(loss), "smooth"),
                Series("held-out", heldout, "heldout"),
            ],
            note=loss_unit,
            last_step=last,
            label=loss_label,
        ),
        _probe_chart(metrics, last),
        single(_accuracy(accuracy_of), accuracy, "held-out, %", "heldout", from_zero=False),
        *_metric_charts(metrics, _COUNTED.get(_accuracy(accuracy_of)), last),
        single("Learning rate", points_of(metrics, "learning_rate"), "", label=scientific),
        single("Gradient norm", points_of(metrics, "grad_norm"), "before clipping"),
        single("Throughput", points_of(metrics, "tokens_per_second"), "tokens per second"),
        single("Peak memory", memory, "GB"),
    ]
    return [chart for chart in drawn if chart is not None]


def _probe_chart(metrics: Sequence[Row], last: float) -> Chart | None:
    """The loss on the probe, beside what it was before training."""
    points = points_of(metrics, "probe_loss")
    before = [(x, points[0][1]) for x in (points[0][0], points[-1][0])] if points else []
    return line_chart(
        "Forgetting",
        [Series("before training", before, "before"), Series("probe", points, "probe")],
        note="nats per token",
        last_step=last,
        label=loss_label,
    )


def metric_names(metrics: Sequence[Row]) -> list[str]:
    """The objective's metrics, in the order in which they come up."""
    known = {part.name for part in fields(StepMetrics)}
    known |= {"heldout_loss", "heldout_accuracy", "probe_loss", "probe_accuracy"}
    names = (name for row in metrics for name in row if name not in known)
    return list(dict.fromkeys(name.removeprefix("heldout_") for name in names))


def _metric_charts(metrics: Sequence[Row], shown: str | None, last: float) -> list[Chart | None]:
    """A chart of each of the objective's metrics; two sides of pairs share one. shown: a metric
    that another chart has."""
    names = metric_names(metrics)
    drawn = []
    for name in (name for name in names if name != shown):
        stem, _, side = name.rpartition("/")
        if side == "rejected" and f"{stem}/chosen" in names:
            continue
        if side == "chosen" and (rejected := f"{stem}/rejected") in names:
            series = [
                Series("chosen", smoothed(points_of(metrics, name)), "smooth"),
                Series("rejected", smoothed(points_of(metrics, rejected)), "other"),
            ]
            drawn.append(line_chart(stem, series, note="smoothed", last_step=last))
            continue
        points = points_of(metrics, name)
        series = [
            Series("each step", points, "raw"),
            Series("training, smoothed", smoothed(points), "smooth"),
            Series("held-out", points_of(metrics, f"heldout_{name}"), "heldout"),
        ]
        drawn.append(line_chart(name, series, last_step=last, label=loss_label))
    return drawn


def config_sections(config: Row) -> list[tuple[str, list[tuple[str, str]]]]:
    """The configuration as (section, [(key, value)]); single keys come in a section "run"."""
    sections = [
        (name, [(key, value_text(value)) for key, value in section.items()])
        for name, section in config.items()
        if isinstance(section, Mapping)
    ]
    single = [(k, value_text(v)) for k, v in config.items() if not isinstance(v, Mapping)]
    return [*sections, ("run", single)] if single else sections


def points_of(metrics: Sequence[Row], key: str) -> list[Point]:
    by_step = {row["step"]: row[key] for row in metrics if row.get(key) is not None}
    return sorted(by_step.items())


def _comparison(
    name: str,
    values: tuple[float, ...],
    form: str,
    *,
    lower_is_better: bool,
    change: Change = "relative",
) -> Comparison:
    """change: how it is told; that of a share in percentage points, of a number that may be 0 or
    have either sign as a difference."""
    before, after = values
    told = ""
    if change == "points":
        told = f"{100 * (after - before):+.1f} points"
    elif change == "difference":
        told = f"{after - before:+.3f}"
    elif before and math.isfinite(before) and math.isfinite(after):
        share = (after - before) / before
        told = f"{share:+.0%}" if abs(share) >= 0.01 else f"{share:+.1%}"
    equal = form.format(before) == form.format(after)
    return Comparison(
        name=name,
        before=form.format(before),
        after=form.format(after),
        change=told.replace("-", "\u2212"),
        better=None if equal else (after < before) == lower_is_better,
    )


def loss_label(value: float) -> str:
    return f"{value:.4g}"


def scientific(value: float) -> str:
    if value == 0:
        return "0"
    mantissa, exponent = f"{value:.2e}".split("e")
    return f"{float(mantissa):g}e{int(exponent)}"


def count_text(count: int) -> str:
    for unit, size in (("B", 1e9), ("M", 1e6), ("k", 1e3)):
        if count >= size:
            return f"{count / size:.3g} {unit}"
    return str(count)


def value_text(value: Any) -> str:
    if value is None:
        return "\u2013"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, list):
        return ", ".join(map(str, value))
    return f"{value:g}" if isinstance(value, float) else str(value)
