"""`lora-engine evaluate`: a model, or its base beside the adapter, on held-out data."""

from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

from lora_engine.app.config_data import DataConfig
from lora_engine.app.datasets import prepare_as_heldout, prepare_data
from lora_engine.app.deploy import as_json, told_of
from lora_engine.app.trained import Tell, Trained, check_base, find_trained, load_tokenizer_of
from lora_engine.app.writing import trained_or_model
from lora_engine.data import prepare
from lora_engine.data.account import account, told_of_records
from lora_engine.data.readers import RowError
from lora_engine.data.render import Example
from lora_engine.data.sources import BUILT_IN, files_of, open_source
from lora_engine.errors import UserError, nearest
from lora_engine.evaluation.choices import (
    Question,
    choice_difference,
    choice_examples,
    choices_by_group,
    read_questions,
    score_choices,
    summarise_choices,
)
from lora_engine.evaluation.metrics import Metric, measure, metric_of
from lora_engine.evaluation.modes import without_adapters
from lora_engine.evaluation.samples import Prompt, choose_prompts, generate
from lora_engine.evaluation.scores import by_group, difference, score_examples, summary
from lora_engine.export.loading import load_adapter
from lora_engine.files import write_text
from lora_engine.models.attach.accelerate import accelerate
from lora_engine.models.load.load import load_model
from lora_engine.objectives.base import NATS_PER_TARGET
from lora_engine.report.evaluation_page import evaluation_page
from lora_engine.report.template import EVALUATION, page_path

_SAMPLES = 8  # prompts whose answers the report has


@dataclass(frozen=True)
class _Measured:
    """Of one model. section: of the report. scores: of each example, for the difference of two.
    texts: what it wrote for the prompts of metrics."""

    section: dict[str, Any]
    scores: Sequence[Any]
    texts: Sequence[str]


def evaluate(
    model: str,
    *,
    data: str | None = None,
    adapter: str | None = None,
    base: str | None = None,
    choices: bool = False,
    group: str | None = None,
    metrics: Sequence[str] = (),
    answers: int = 100,
    max_new_tokens: int = 64,
    limit: int | None = None,
    html: str | None = None,
    dtype: str = "auto",
    device: str = "auto",
    tell: Tell = lambda text: None,
) -> dict[str, Any]:
    """Loss, perplexity and accuracy on `data`, and metrics of what the model writes.

    model: as `load_model` takes it, or a run's folder, whose base and adapter are then meant.
    data: None: what the run held out. base: where the run's is now.
    choices: the rows are questions with choices (`read_questions`), of which it is measured how
    often the right one is the likeliest. group: a column of the data. metrics: names of
    `metrics.METRICS`, or "module:function" of a function of answers and references; `answers`
    prompts, spread over the data, are answered for them. The report has a section "model", or with
    an adapter "base" and "adapter". html: a file to write it to as a page. Raises UserError for
    what cannot be read, and for a file that is there and is no such page.
    """
    page = None if html is None else page_path(html, EVALUATION)
    if choices and metrics:
        raise UserError(
            f"--metric {metrics[0]}: questions with choices are not answered in words; give one of "
            "the two"
        )
    chosen = {name: metric_of(name) for name in metrics}
    source, trained = _model_and_adapter(model, adapter, base)
    held_out = None
    if data is None:
        held_out = _held_out_of(model, trained, choices, group)
        data = ""
    elif data not in BUILT_IN:
        files_of(data)  # what is not there is told before a model is loaded
    questions = read_questions(data, limit=limit) if choices else []
    sides = ["model"]
    report: dict[str, Any] = {"data": data, "source": source}
    adapted = trained is not None and bool(trained.adapters)
    if trained is not None and adapted:
        (folder,) = trained.adapters.values()
        tell(f"loading {source}{told_of(trained.packing, trained.served_as)}")
        loaded, tokenizer = trained.load_base(dtype=dtype, device=device)
        loaded = load_adapter(loaded, folder).eval()
        if trained.served_as is not None:
            trained.served_as.apply(loaded)
        tokenizer = _tokenizer_of(trained) or tokenizer
        sides = ["base", "adapter"]
        report |= {"adapter_folder": str(folder), "trained_over": as_json(trained.packing)}
    else:
        tell(f"loading {source}")
        loaded, tokenizer = load_model(source, dtype=dtype, device=device)
    accelerate(loaded)
    if choices:
        examples: Sequence[Example] = choice_examples(questions, tokenizer)
        origins = [question.origin for question in questions]
    else:
        how = None if trained is None else trained.config
        if held_out is not None:
            read = prepare_data(held_out, tokenizer)[1]
            report["data"], examples = read.name, list(read)[:limit]
        elif how is not None:
            examples = read = prepare_as_heldout(data, how, tokenizer, limit)
        else:
            examples = read = prepare(data, tokenizer, limit=limit)
        report["measured"] = _measured_tokens(None if how is None else how.data)
        report["findings"] = account(read)["findings"]
        judged = next((example for example in examples if example.role), None)
        if judged is not None:
            raise UserError(
                f"{judged.origin}: is a record of preferences, of which no loss is measured here; "
                "give --data with prompts and answers, chats or texts"
            )
        origins = [example.origin for example in examples]
    groups = None if group is None else _groups(data, group, origins)
    prompts = choose_prompts(examples, tokenizer, answers) if chosen else []
    if chosen and not prompts:
        raise UserError(
            f"--metric {metrics[0]}: {report['data']} has no prompt with an answer; give other data"
        )

    def measured() -> _Measured:
        if choices:
            return _of_questions(loaded, questions, examples, groups)
        texts = generate(loaded, tokenizer, prompts, max_new_tokens=max_new_tokens)
        return _of_examples(loaded, examples, groups, chosen, prompts, texts)

    found: dict[str, _Measured] = {}
    for side in sides:
        tell(f"measuring {len(origins):,} {'questions' if choices else 'examples'} ({side})")
        with without_adapters(loaded) if side == "base" else nullcontext():
            found[side] = measured()
        report[side] = found[side].section
    if adapted:
        both = found["adapter"].scores, found["base"].scores
        report["difference"] = (choice_difference if choices else difference)(*both)
    report["samples"] = [
        {
            "prompt": prompt.text,
            "reference": prompt.reference,
            **{side: found[side].texts[i] for side in sides},
        }
        for i, prompt in enumerate(prompts[:_SAMPLES])
    ]
    if page is not None:
        write_text(page, evaluation_page(report))
    return report


_LOSS_ON = {
    "assistant": "what the assistant writes",
    "last_assistant": "the assistant's last message",
    "completion": "what the assistant writes after the last message of a user",
    "all": "all tokens",
}


def _measured_tokens(data: DataConfig | None) -> str:
    """What of the examples is measured, in words. data: of the run that says so."""
    if data is None:
        return f"{_LOSS_ON['assistant']}, or a text"
    left_out = [] if data.train_on_reasoning else ["reasoning"]
    left_out += [] if data.train_on_tool_calls else ["tool calls"]
    without = f" without {' and '.join(left_out)}" if left_out else ""
    return f"{_LOSS_ON[data.loss_on]}{without}, as the run learned"


def _held_out_of(
    model: str, trained: Trained | None, choices: bool, group: str | None
) -> DataConfig:
    """The data of the run, of which a part is held out. Raises UserError where there is none."""
    config = None if trained is None else trained.config
    if (
        config is None
        or choices
        or group is not None
        or config.chosen_objective().unit != NATS_PER_TARGET
    ):
        is_run = config is not None
        what = "this model" if is_run else f"{model}, which is no run's folder,"
        what = "--choices" if choices else "--group" if group else what
        raise UserError(f"evaluate: {what} needs data of its own; give --data SOURCE")
    return config.data


def _of_examples(
    model: Any,
    examples: Sequence[Example],
    groups: Sequence[str] | None,
    metrics: Mapping[str, Metric],
    prompts: Sequence[Prompt],
    texts: Sequence[str],
) -> _Measured:
    scores = score_examples(model, examples)
    section: dict[str, Any] = {**summary(scores)}
    if groups is not None:
        section["groups"] = by_group(scores, groups)
    if prompts:
        references = [prompt.reference for prompt in prompts]
        section["metrics"] = {n: measure(n, m, texts, references) for n, m in metrics.items()}
        section["answers"] = len(prompts)
        group_of = dict(zip((e.origin for e in examples), groups or (), strict=False))
        for group, part in section.get("groups", {}).items():
            own = [i for i, p in enumerate(prompts) if group_of[p.origin] == group]
            if own:
                asked = [texts[i] for i in own], [references[i] for i in own]
                part["metrics"] = {n: measure(n, m, *asked) for n, m in metrics.items()}
                part["answers"] = len(own)
    return _Measured(section, scores, texts)


def _of_questions(
    model: Any,
    questions: Sequence[Question],
    examples: Sequence[Example],
    groups: Sequence[str] | None,
) -> _Measured:
    found = score_choices(model, questions, examples)
    section: dict[str, Any] = {**summarise_choices(found)}
    if groups is not None:
        section["groups"] = choices_by_group(found, groups)
    return _Measured(section, found, ())


def render(report: dict[str, Any]) -> str:
    """The report for people."""
    lines = told_of_records(report.get("findings", ()))
    if "measured" in report:
        lines += [f"{report['data']}: measured on {report['measured']}"]
    for side in ("model", "base", "adapter"):
        if side in report:
            lines += [_line(side, report[side]), *_metric_lines(report[side], "  ")]
            for name, part in report[side].get("groups", {}).items():
                lines += [_line(f"  {name}", part), *_metric_lines(part, "    ")]
    if "difference" in report:
        d = report["difference"]
        form = "+.1%" if "questions" in report["adapter"] else "+.4f"
        what = "accuracy" if "questions" in report["adapter"] else "loss"
        value, low, high = (format(d[key], form) for key in ("value", "low", "high"))
        lines += [f"with the adapter the {what} is {value} ({low} to {high})"]
    return "\n".join(lines)


def _metric_lines(part: dict[str, Any], indent: str) -> list[str]:
    lines = []
    for name, found in part.get("metrics", {}).items():
        ends = f" ({found['low']:.4g} to {found['high']:.4g})" if "low" in found else ""
        lines.append(f"{indent}{name} {found['value']:.4g}{ends}, {part['answers']:,} answers")
    return lines


def _line(name: str, part: dict[str, Any]) -> str:
    if "questions" in part:
        return (
            f"{name}: accuracy {_share(part['accuracy'])}, by byte "
            f"{_share(part['accuracy_per_byte'])}, {part['questions']:,} questions"
        )
    loss = part["loss"]
    return (
        f"{name}: loss {loss['value']:.4f} ({loss['low']:.4f} to {loss['high']:.4f}), "
        f"perplexity {part['perplexity']['value']:.4g}, accuracy {_share(part['accuracy'])}, "
        f"{part['examples']:,} examples, {part['targets']:,} tokens"
    )


def _share(found: Mapping[str, float]) -> str:
    return f"{found['value']:.1%} ({found['low']:.1%} to {found['high']:.1%})"


def _model_and_adapter(
    model: str, adapter: str | None, base: str | None
) -> tuple[str, Trained | None]:
    """What is to be loaded, and the folder that was named, with one adapter or with none."""
    if adapter is not None and base is not None:
        raise UserError(f"--base {base}: --adapter has {model} as its base; give one of the two")
    trained = trained_or_model(model, base) if adapter is None else find_trained(adapter, model)
    if trained is None:
        return model, None
    if not trained.adapters:
        if adapter is not None:
            raise UserError(f"--adapter {adapter}: is a whole model; give it as MODEL")
        return str(trained.folder), trained
    if len(trained.adapters) > 1:
        there = ", ".join(map(str, trained.adapters.values()))
        of_base = "" if adapter is not None else f" {trained.base} and"
        raise UserError(
            f"{trained.folder}: holds several adapters; give{of_base} --adapter with one of {there}"
        )
    trained, chosen = trained.choose([])
    check_base(trained.base_folder, chosen)
    return trained.base, trained


def _tokenizer_of(trained: Trained) -> Any:
    """The tokenizer, with its chat template, that was saved with the adapter; None without one."""
    folders = [*trained.adapters.values(), trained.folder]
    if not any((folder / "tokenizer_config.json").is_file() for folder in folders):
        return None
    return load_tokenizer_of(trained, folders[0])


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
        there = f"there is {', '.join(sorted(columns))}" if columns else "it has none, leave it out"
        hint = f"did you mean {close}?" if close else there
        raise UserError(f"--group {column}: {data} has no such column; {hint}")
    return [values.get(origin, "") for origin in origins]
