"""`lora-engine evaluate`: a model, or its base beside the adapter, on held-out data."""

import importlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from lora_engine.app.trained import Tell, check_base, find_trained
from lora_engine.data import prepare
from lora_engine.data.readers import RowError
from lora_engine.data.sources import open_source
from lora_engine.errors import UserError, nearest
from lora_engine.evaluation.modes import without_adapters
from lora_engine.evaluation.samples import choose_prompts, generate
from lora_engine.evaluation.scores import (
    METRICS,
    by_group,
    difference,
    score_examples,
    summary,
)
from lora_engine.export.adapter import chosen_adapters
from lora_engine.models.load.load import load_model

Metric = Callable[[Sequence[str], Sequence[str]], float]


def evaluate(
    model: str,
    *,
    data: str,
    adapter: str | None = None,
    group: str | None = None,
    metrics: Sequence[str] = (),
    answers: int = 100,
    max_new_tokens: int = 64,
    limit: int | None = None,
    dtype: str = "auto",
    device: str = "auto",
    tell: Tell = lambda text: None,
) -> dict[str, Any]:
    """Loss, perplexity and accuracy on `data`, and metrics of what the model writes.

    model: as `load_model` takes it, or a run's folder, whose base and adapter are then meant.
    group: a column of the data. metrics: names of `scores.METRICS`, or "module:function" of a
    function of answers and references; each of the first `answers` prompts is answered for them.
    The report has a section "model", or with an adapter "base" and "adapter". Raises UserError for
    what cannot be read.
    """
    chosen = {name: _metric(name) for name in metrics}
    source, folder = _model_and_adapter(model, adapter)
    tell(f"loading {source}")
    loaded, tokenizer = load_model(source, dtype=dtype, device=device)
    sides = {"model": False}
    if folder is not None:
        from peft import PeftModel

        loaded = PeftModel.from_pretrained(loaded, folder).eval()
        sides = {"base": True, "adapter": False}
    examples = prepare(data, tokenizer, limit=limit)
    groups = None if group is None else _groups(data, group, [e.origin for e in examples])
    prompts = choose_prompts(examples, tokenizer, answers) if chosen else []
    report: dict[str, Any] = {"data": data, "source": source}
    if folder is not None:
        report["adapter_folder"] = str(folder)
    scores = {}
    for side, off in sides.items():
        tell(f"measuring {len(examples):,} examples ({side})")
        if off:
            with without_adapters(loaded):
                scores[side] = score_examples(loaded, examples)
                texts = generate(loaded, tokenizer, prompts, max_new_tokens=max_new_tokens)
        else:
            scores[side] = score_examples(loaded, examples)
            texts = generate(loaded, tokenizer, prompts, max_new_tokens=max_new_tokens)
        report[side] = summary(scores[side])
        if groups is not None:
            report[side]["groups"] = by_group(scores[side], groups)
        if prompts:
            references = [prompt.reference for prompt in prompts]
            report[side]["metrics"] = {n: float(m(texts, references)) for n, m in chosen.items()}
            report[side]["answers"] = len(prompts)
    if folder is not None:
        report["difference"] = difference(scores["adapter"], scores["base"])
    return report


def render(report: dict[str, Any]) -> str:
    """The report for people."""
    lines = []
    for side in ("model", "base", "adapter"):
        if side in report:
            lines += [_line(side, report[side])]
            lines += [_line(f"  {n}", part) for n, part in report[side].get("groups", {}).items()]
            for name, value in report[side].get("metrics", {}).items():
                lines += [f"  {name} {value:.4g} ({report[side]['answers']:,} answers)"]
    if "difference" in report:
        d = report["difference"]
        lines += [
            f"with the adapter the loss is {d['value']:+.4f} ({d['low']:+.4f} to {d['high']:+.4f})"
        ]
    return "\n".join(lines)


def _line(name: str, part: dict[str, Any]) -> str:
    loss, accuracy = part["loss"], part["accuracy"]
    return (
        f"{name}: loss {loss['value']:.4f} ({loss['low']:.4f} to {loss['high']:.4f}), "
        f"perplexity {part['perplexity']['value']:.4g}, accuracy {accuracy['value']:.1%} "
        f"({accuracy['low']:.1%} to {accuracy['high']:.1%}), "
        f"{part['examples']:,} examples, {part['targets']:,} tokens"
    )


def _model_and_adapter(model: str, adapter: str | None) -> tuple[str, Path | None]:
    path = Path(model)
    if adapter is None and path.is_dir() and not (path / "config.json").is_file():
        trained = find_trained(model)
    elif adapter is not None:
        trained = find_trained(adapter, model)
    else:
        return model, None
    if not trained.adapters:
        return str(trained.folder), None
    name = next(iter(chosen_adapters(trained.adapters, [])))
    if Path(trained.base).is_dir():
        check_base(trained.base_folder, trained.read([name]))
    return trained.base, trained.adapters[name]


def _groups(data: str, column: str, origins: Sequence[str]) -> list[str]:
    """The column's value of each example, by its origin."""
    values: dict[str, str] = {}
    columns: set[str] = set()
    for row in open_source(data, None)[1]:
        if isinstance(row, RowError) or not isinstance(row.value, dict):
            continue
        columns |= set(row.value)
        values[row.origin] = str(row.value.get(column, ""))
    if column not in columns:
        close = nearest(column, columns)
        hint = f"did you mean {close}?" if close else f"there is {', '.join(sorted(columns))}"
        raise UserError(f"--group {column}: {data} has no such column; {hint}")
    return [values.get(origin, "") for origin in origins]


def _metric(name: str) -> Metric:
    if name in METRICS:
        return METRICS[name]
    module, colon, function = name.partition(":")
    if not colon:
        close = nearest(name, METRICS)
        hint = f"did you mean {close}?" if close else f"use {', '.join(METRICS)}, module:function"
        raise UserError(f"--metric {name}: is unknown; {hint}")
    try:
        found: Metric = getattr(importlib.import_module(module), function)
    except (ImportError, AttributeError) as error:
        raise UserError(f"--metric {name}: {error}; give module:function") from error
    return found
