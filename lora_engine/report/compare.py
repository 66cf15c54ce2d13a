"""Runs beside each other: what was set otherwise, what came of it, curves and samples."""

import json
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationError

from lora_engine.errors import UserError, reason
from lora_engine.evaluation.samples import differing_parts
from lora_engine.files import user_path
from lora_engine.objectives.base import NATS_PER_TARGET
from lora_engine.report.charts import Chart, Series, line_chart, smoothed
from lora_engine.report.page import (
    Row,
    count_text,
    loss_label,
    metric_names,
    more_is_better,
    perplexity,
    points_of,
    scientific,
    value_text,
)
from lora_engine.report.template import COMPARISON, rendered
from lora_engine.text import bytes_text, duration_text, visible
from lora_engine.training.metrics import is_measurement
from lora_engine.training.run.folder import RunFolder

COLOURS = 8  # of runs, in report.css; those of more runs are dashed
# Settings of `data` that change neither what is held out nor how it is read.
_NOT_HELD_OUT = {"replay", "processes", "cache", "stream", "stream_buffer"}
_OF_TRAINING_DATA = {"train", "split", "eval_fraction", "seed"}


class _Sample(BaseModel):
    model_config = ConfigDict(strict=True, allow_inf_nan=False)

    prompt: str
    reference: str
    after: str
    origin: str = ""


class _Summary(BaseModel):
    """Of summary.json what is read here."""

    model_config = ConfigDict(strict=True, allow_inf_nan=False)

    model: str
    method: str
    data: str
    finished: str
    heldout_loss_before: float | None = None
    heldout_loss_after: float | None = None
    heldout_accuracy_after: float | None = None
    heldout_metrics_after: dict[str, float] | None = None
    probe_loss_before: float | None = None
    probe_loss_after: float | None = None
    best_step: int | None = None
    train_tokens: int | None = None
    train_seconds: float | None = None
    tokens_per_second: float | None = None
    peak_memory_bytes: float | None = None
    trainable_parameters: int | None = None
    loss_unit: str = ""
    samples: list[_Sample] | None = None


@dataclass(frozen=True)
class Run:
    """A run as its folder has it. summary: None before it is finished."""

    name: str
    path: Path
    config: Row
    metrics: Sequence[Row]
    summary: Row | None


@dataclass(frozen=True)
class Figure:
    """A measure of every run. values: as numbers, None where a run has none. best: numbers of the
    runs that are best, none where that is not to be said."""

    name: str
    texts: list[str]
    values: list[float | None]
    best: frozenset[int]


def read_runs(paths: Sequence[str]) -> list[Run]:
    """The runs in these folders. Raises UserError for one that holds none, or a damaged file."""
    folders = []
    for text in paths:
        try:
            folders.append(user_path(text))
        except ValueError as error:
            raise UserError(f"RUN {text!r}: {error}") from error
    return [_read(path, name) for path, name in zip(folders, _names(folders), strict=True)]


def _names(folders: Sequence[Path]) -> list[str]:
    """The folders' own names, or, where two are the same, as much as tells them apart."""
    whole = [folder.resolve() for folder in folders]
    if len(set(whole)) < len(whole):
        twice = next(path for path in whole if whole.count(path) > 1)
        raise UserError(f"{twice}: is given twice; give each run once")
    names = [path.name for path in whole]
    if len(set(names)) == len(names):
        return names
    common = os.path.commonpath(whole)
    return [os.path.relpath(path, common) for path in whole]


def _read(path: Path, name: str) -> Run:
    run = RunFolder(path)
    if not path.is_dir():
        raise UserError(f"{path}: no such folder; give the folder of a run")
    if not run.config.is_file():
        raise UserError(f"{path}: holds no run, it has no {run.config.name}; give a run's folder")
    summary = _summary(run.summary) if run.summary.is_file() else None
    metrics = _metrics(run.metrics) if run.metrics.is_file() else []
    return Run(
        name=visible(name), path=path, config=_config(run.config), metrics=metrics, summary=summary
    )


def _metrics(path: Path) -> list[Row]:
    # What follows the last line's end is what a run that goes on has not written to its end.
    *lines, _ = _text(path).split("\n")
    metrics = []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        if not is_measurement(f"{line}\n".encode()):
            raise UserError(f"{path}:{number}: is no line of metrics; mend or remove it")
        metrics.append(json.loads(line))
    return metrics


def _summary(path: Path) -> Row:
    try:
        summary = json.loads(_text(path))
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: is no JSON; mend or remove it") from error
    try:
        known = _Summary.model_validate(summary)
    except ValidationError as error:
        place = ".".join(map(str, error.errors()[0]["loc"]))
        raise UserError(
            f"{path}: {place or 'it'} is not as a run writes it; mend or remove the file"
        ) from error
    return known.model_dump()


def _config(path: Path) -> Row:
    import yaml

    try:
        config = yaml.safe_load(_text(path))
    except yaml.YAMLError as error:
        raise UserError(f"{path}: is not YAML: {reason(error)}; mend or remove it") from error
    is_one = isinstance(config, dict)
    if not is_one or any(not isinstance(config.get(n) or {}, dict) for n in ("model", "data")):
        raise UserError(f"{path}: is no configuration; mend or remove it")
    return config


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: cannot be read: {reason(error)}; mend or remove it") from error


def differing_settings(runs: Sequence[Run]) -> list[tuple[str, list[str]]]:
    """(key, each run's value as text) of settings that are not the same in all runs."""
    flat = [dict(_flat(run.config)) for run in runs]
    keys = dict.fromkeys(key for one in flat for key in one)
    differing = []
    for key in keys:
        values = [one.get(key, "") for one in flat]
        if key != "train.output_dir" and any(value != values[0] for value in values):
            differing.append((key, [value_text(value) for value in values]))
    return differing


def _flat(section: Row, prefix: str = "") -> list[tuple[str, Any]]:
    found: list[tuple[str, Any]] = []
    for key, value in section.items():
        nested = isinstance(value, Mapping) and value
        found += _flat(value, f"{prefix}{key}.") if nested else [(f"{prefix}{key}", value)]
    return found


def measured_alike(runs: Sequence[Run]) -> bool:
    """Whether the losses are of the same held-out data, in tokens of the same model."""
    first, *others = (_held_out(run.config) for run in runs)
    return all(other == first for other in others)


def _held_out(config: Row) -> list[object]:
    data = dict(config.get("data") or {})
    left_out = _NOT_HELD_OUT | (_OF_TRAINING_DATA if data.get("eval") else set())
    model = (config.get("model") or {}).get("path")
    return [model, config.get("objective"), {k: v for k, v in data.items() if k not in left_out}]


def figures(runs: Sequence[Run]) -> list[Figure]:
    """What came of each run; a measure that none has is left out."""
    ranked = measured_alike(runs)
    made = []

    def add(
        name: str,
        of: Callable[[Run], float | None],
        text: Callable[[float], str],
        better: str = "",
    ) -> None:
        values = [of(run) for run in runs]
        there = [value for value in values if value is not None]
        if not there:
            return
        texts = ["–" if value is None else text(value) for value in values]
        best: set[int] = set()
        if ranked and better and len(set(map(text, there))) > 1:
            most = min(there) if better == "lower" else max(there)
            best = {i for i, shown in enumerate(texts) if shown == text(most)}
        made.append(Figure(name=name, texts=texts, values=values, best=frozenset(best)))

    def of(key: str) -> Callable[[Run], float | None]:
        return lambda run: None if run.summary is None else run.summary.get(key)

    def metric(name: str) -> Callable[[Run], float | None]:
        return lambda run: ((run.summary or {}).get("heldout_metrics_after") or {}).get(name)

    add("Held-out loss before", of("heldout_loss_before"), _decimals)
    add("Held-out loss after", of("heldout_loss_after"), _decimals, "lower")
    add("Lowest held-out loss", _lowest("heldout_loss"), _decimals, "lower")
    add("Perplexity after", _perplexity_after, lambda x: f"{x:,.4g}", "lower")
    add("Accuracy after", of("heldout_accuracy_after"), lambda x: f"{x:.1%}", "higher")
    metrics = dict.fromkeys(
        name for run in runs for name in (run.summary or {}).get("heldout_metrics_after") or {}
    )
    for name in metrics:
        better = {True: "higher", False: "lower", None: ""}[more_is_better(name)]
        add(f"{name} after", metric(name), _decimals, better)
    add("Loss on the probe before", of("probe_loss_before"), _decimals)
    add("Loss on the probe after", of("probe_loss_after"), _decimals, "lower")
    add("Training loss at the end", _last_loss, _decimals)
    add("Best step", of("best_step"), lambda x: f"{x:,}")
    add("Steps", _steps, lambda x: f"{x:,}")
    add("Tokens", of("train_tokens"), lambda x: f"{x:,}")
    add("Training time", of("train_seconds"), duration_text)
    add("Tokens per second", of("tokens_per_second"), lambda x: f"{x:,.0f}")
    add("Peak memory", of("peak_memory_bytes"), bytes_text)
    add("Trained weights", of("trainable_parameters"), lambda x: count_text(int(x)))
    return made


def _perplexity_after(run: Run) -> float | None:
    if run.summary is None or run.summary.get("loss_unit") != NATS_PER_TARGET:
        return None
    loss = run.summary["heldout_loss_after"]
    return None if loss is None else perplexity(loss)


def _lowest(key: str) -> Callable[[Run], float | None]:
    return lambda run: min((y for _, y in points_of(run.metrics, key)), default=None)


def _decimals(value: float) -> str:
    return f"{value:,.4f}"


def _last_loss(run: Run) -> float | None:
    loss = smoothed(points_of(run.metrics, "loss"))
    return loss[-1][1] if loss else None


def _steps(run: Run) -> float | None:
    return max((row["step"] for row in run.metrics), default=None)


def charts(runs: Sequence[Run]) -> list[Chart]:
    """A chart of each curve, a line for each run."""
    last = max((float(_steps(run) or 0) for run in runs), default=0.0)
    smooth = "smoothed"
    drawn = [
        _chart("Training loss", runs, "loss", last, smooth=True, note=smooth),
        _chart("Held-out loss", runs, "heldout_loss", last, dots=True),
        _chart("Held-out accuracy", runs, "heldout_accuracy", last, dots=True),
        _chart("Forgetting", runs, "probe_loss", last, dots=True, note="loss on the probe"),
        *_metric_charts(runs, last),
        _chart("Learning rate", runs, "learning_rate", last, label=scientific),
        _chart("Gradient norm", runs, "grad_norm", last, smooth=True, note=smooth),
        _chart("Tokens per second", runs, "tokens_per_second", last, smooth=True, note=smooth),
    ]
    return [chart for chart in drawn if chart is not None]


def _metric_charts(runs: Sequence[Run], last: float) -> list[Chart | None]:
    """A chart of each metric of the objectives that two runs or more have, on held-out records
    where it is measured on them."""
    known = [set(metric_names(run.metrics)) for run in runs]
    names = dict.fromkeys(name for run in runs for name in metric_names(run.metrics))
    drawn = []
    for name in names:
        if sum(name in one for one in known) < 2:
            continue
        heldout = f"heldout_{name}"
        if any(points_of(run.metrics, heldout) for run in runs):
            drawn.append(_chart(name, runs, heldout, last, dots=True, note="held-out"))
        else:
            drawn.append(_chart(name, runs, name, last, smooth=True, note="smoothed"))
    return drawn


def _chart(
    title: str,
    runs: Sequence[Run],
    key: str,
    last: float,
    *,
    smooth: bool = False,
    dots: bool = False,
    note: str = "",
    label: Callable[[float], str] = loss_label,
) -> Chart | None:
    lines = [points_of(run.metrics, key) for run in runs]
    if smooth:  # all alike, so that runs that are the same so far have one line
        longest = max(map(len, lines))
        lines = [smoothed(points, longest) for points in lines]
    more = " heldout" if dots else ""
    series = [
        Series(run.name, points, run_style(number) + more)
        for number, (run, points) in enumerate(zip(runs, lines, strict=True))
    ]
    return line_chart(title, series, note=note, last_step=last, label=label)


def run_style(number: int) -> str:
    """The CSS classes of a run's lines."""
    return f"run{number % COLOURS}" + (" dashed" if number >= COLOURS else "")


def samples(runs: Sequence[Run]) -> list[dict[str, Any]]:
    """Prompts that two runs or more answered, their reference, and each run's answer or None."""
    by_prompt: dict[str, dict[str, Any]] = {}
    for number, run in enumerate(runs):
        for sample in (run.summary or {}).get("samples") or ():
            start = {"prompt": sample["prompt"], "origin": sample.get("origin", "")}
            start |= {"reference": sample["reference"], "answers": [None] * len(runs)}
            shown = by_prompt.setdefault(sample["prompt"], start)
            shown["answers"][number] = sample["after"]
    return [one for one in by_prompt.values() if sum(a is not None for a in one["answers"]) > 1]


def comparison_json(runs: Sequence[Run]) -> dict[str, Any]:
    """All of it but the curves, for programs."""
    return {
        "runs": [
            {"name": run.name, "path": str(run.path), "finished": run.summary is not None}
            for run in runs
        ],
        "settings": dict(differing_settings(runs)),
        "measured_alike": measured_alike(runs),
        "figures": {
            figure.name: {"values": figure.values, "best": sorted(figure.best)}
            for figure in figures(runs)
        },
        "samples": samples(runs),
    }


def comparison_page(runs: Sequence[Run]) -> str:
    """The page as a string."""
    shown = samples(runs)
    return rendered(
        "compare.html.j2",
        mark=COMPARISON,
        runs=runs,
        styles=[run_style(number) for number in range(len(runs))],
        settings=differing_settings(runs),
        figures=figures(runs),
        alike=measured_alike(runs),
        charts=[asdict(chart) for chart in charts(runs)],
        samples=shown,
        peeks=differing_parts([sample["prompt"] for sample in shown]),
    )
