"""The model card: README.md beside saved weights, for whoever gets the folder."""

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import yaml

from lora_engine.data.dataset import TokenizedDataset
from lora_engine.models.families.modules import AdapterConfig
from lora_engine.models.load.origin import Base
from lora_engine.training.config import TrainConfig
from lora_engine.training.state import TrainResult

_ADAPTER_SETTINGS = (
    "r",
    "lora_alpha",
    "lora_dropout",
    "use_rslora",
    "use_dora",
    "bias",
    "target_modules",
    "modules_to_save",
)
MergedForm = Literal["model", "packed", "gguf", "gguf-lora"]
_LIBRARIES = {"model": "transformers", "packed": "lora_engine", "gguf": "gguf", "gguf-lora": "gguf"}
# What loads a folder that transformers does not, in its language; {}: the file in it.
_RUNNING = {
    "packed": ("python", 'model, tokenizer = lora_engine.load_model(".")  # this folder'),
    "gguf": ("sh", "llama-server -m {}"),
    "gguf-lora": ("sh", "llama-server -m BASE.gguf --lora {}  # the base model above, in GGUF"),
}
# Settings of the run that are another section's, or say nothing about the weights.
_LEFT_OUT = frozenset({"output_dir", "adapter_learning_rates", "share_prefixes"})


@dataclass(frozen=True)
class CardFacts:
    """What a card tells of a run.

    loss_unit: of the objective, "" for none. heldout: None if nothing was measured.
    """

    config: TrainConfig
    result: TrainResult
    total_steps: int
    loss_unit: str
    train: TokenizedDataset
    heldout: TokenizedDataset | None


def adapter_card(
    base: Base,
    facts: CardFacts,
    peft_config: AdapterConfig,
    *,
    name: str,
    beside: list[str],
    tokenizer: bool,
) -> str:
    """The card of one adapter. name: its own. beside: those trained with it."""
    kind = _plain(peft_config.peft_type).replace("LORA", "LoRA")
    title = f"{kind} adapter" + (f" {_code(name)}" if name != "default" else "")
    known = {key: getattr(peft_config, key, None) for key in _ADAPTER_SETTINGS}
    settings = [
        f"- {key}: {_code(_plain(value))}"
        for key, value in known.items()
        if value not in (None, [])
    ]
    own_rate = facts.config.adapter_learning_rates.get(name)
    if own_rate is not None:
        settings.append(f"- learning rate: that of the run times {own_rate:g}")
    together = [f"Trained together with {', '.join(map(_code, beside))}.", ""] if beside else []
    return _card(
        base,
        "peft",
        [
            f"# {title} for {_code(base.name or 'an unnamed model')}",
            "",
            *together,
            *_base_section(base),
            *_loading(base, "adapter", tokenizer),
            "## Adapter",
            "",
            *settings,
            "",
            *_run_sections(facts),
        ],
    )


def model_card(base: Base, facts: CardFacts, *, tokenizer: bool) -> str:
    """The card of a model all of whose weights, or a part of its own, were trained."""
    return _card(
        base,
        "transformers",
        [
            f"# {_code(base.name or 'A model')}, fine-tuned",
            "",
            *_base_section(base),
            *_loading(base, "model", tokenizer),
            *_run_sections(facts),
        ],
    )


def merged_card(
    base: Base, adapters: list[Path], form: MergedForm = "model", file: str = ""
) -> str:
    """The card of a base with adapters merged into it; adapters: their folders.

    form: "model" as transformers loads it, "packed" as lora_engine alone does, or the GGUF file
    `file`, of a model or of an adapter. What the adapters' own cards say of data, settings and
    figures is part of it.
    """
    name = _code(base.name or "A model")
    title = f"{name} with an adapter merged into it" if adapters else name
    if form == "gguf-lora":
        title = f"LoRA adapter for {name}"
    lines = [f"# {title}{', in GGUF' if file else ''}", "", *_base_section(base)]
    if form == "model":
        lines += _loading(base, "model", tokenizer=True)
    else:
        language, code = _RUNNING[form]
        lines += ["## How to load", "", f"```{language}", code.format(file), "```", ""]
    for folder in adapters:
        try:
            card = (folder / "README.md").read_text(encoding="utf-8")
        except (OSError, ValueError):
            continue
        start = card.find("## Adapter")
        lines += [card[start:].rstrip(), ""] if start >= 0 else []
    return _card(base, _LIBRARIES[form], lines)


def index_card(base: Base, folders: list[str]) -> str:
    """The card of a folder that holds a folder for each adapter."""
    lines = [f"- {_code(name)}" for name in folders]
    title = f"# Adapters for {_code(base.name or 'an unnamed model')}"
    return _card(base, "peft", [title, "", "Each folder is complete by itself:", "", *lines, ""])


def _card(base: Base, library: str, lines: list[str]) -> str:
    data: dict[str, object] = {"library_name": library, "pipeline_tag": "text-generation"}
    data["tags"] = ["lora", "lora_engine"] if library == "peft" else ["lora_engine"]
    if base.hub_id:
        data["base_model"] = _line(base.hub_id)
        data["base_model_relation"] = "adapter" if library == "peft" else "finetune"
    front = yaml.safe_dump(data, sort_keys=True, allow_unicode=True, width=10_000)
    return f"---\n{front}---\n\n" + "\n".join(lines)


def _base_section(base: Base) -> list[str]:
    lines = ["## Base model", "", f"- name: {_code(base.name or 'none, it was made by a program')}"]
    if base.revision:
        lines.append(f"- revision on the Hugging Face hub: {_code(base.revision)}")
    for name, sha256 in base.files.items():
        content = f"SHA-256 `{sha256}`" if sha256 else "which could not be read for its SHA-256"
        lines.append(f"- weights: {_code(name)}, {content}")
    return [*lines, ""]


def _loading(base: Base, what: str, tokenizer: bool) -> list[str]:
    source = _line(base.name) or "MODEL"
    gguf = next((name for name in base.files if name.endswith(".gguf")), None)
    arguments = _string(source)
    if gguf and not base.hub_id:
        arguments = f'"FOLDER", gguf_file={_string(gguf)}'
    lines = ["## How to load", "", "```python"]
    if what == "adapter":
        lines += ["from peft import PeftModel"]
    lines += [f"from transformers import AutoModelForCausalLM{', AutoTokenizer' * tokenizer}", ""]
    lines += ['folder = "."  # this one']
    if what == "adapter":
        note = "" if base.hub_id else "  # the base model above, wherever it is"
        lines += [f"base = AutoModelForCausalLM.from_pretrained({arguments}){note}"]
        lines += ["model = PeftModel.from_pretrained(base, folder)"]
    else:
        lines += ["model = AutoModelForCausalLM.from_pretrained(folder)"]
    if tokenizer:
        lines += ["tokenizer = AutoTokenizer.from_pretrained(folder)"]
    return [*lines, "```", ""]


def _run_sections(facts: CardFacts) -> list[str]:
    result, config = facts.result, facts.config
    lines = ["## Data", "", f"- training: {_data(facts.train)}"]
    lines += [f"- held out: {_data(facts.heldout) if facts.heldout else 'none'}", ""]
    lines += ["## Training", ""]
    lines += [f"- steps: {result.steps:,} of {facts.total_steps:,} ({_line(result.stopped)})"]
    if config.final_weights == "best" and result.best_step is not None:
        best = "lowest held-out loss" if config.best_by == "loss" else f"best {config.best_by}"
        lines += [f"- weights: those of step {result.best_step:,}, the {_line(best)}"]
    lines += [f"- tokens: {result.train_tokens:,}"]
    lines += [
        f"- {key}: {_code(_plain(value))}"
        for key, value in config.trajectory().items()
        if key not in _LEFT_OUT and value is not None
    ]
    lines += ["", "## Figures", "", "| | before | after |", "| --- | --- | --- |"]
    loss = result.heldout_loss_before, result.heldout_loss_after
    accuracy = result.heldout_accuracy_before, result.heldout_accuracy_after
    unit = facts.loss_unit and f", {_line(facts.loss_unit)}"
    lines += [_figures(f"held-out loss{unit}", loss, ".4f")]
    if accuracy != (None, None) or loss == (None, None):
        lines += [_figures("held-out token accuracy", accuracy, ".1%")]
    if result.probe_loss_before is not None:
        probe = result.probe_loss_before, result.probe_loss_after
        lines += [_figures("loss on the probe, nats per token", probe, ".4f")]
    rewards = [
        m.get("reward") for m in (result.heldout_metrics_before, result.heldout_metrics_after)
    ]
    if rewards != [None, None]:
        lines += [_figures("held-out reward", (rewards[0], rewards[1]), ".4f")]
    return [*lines, "", f"Made with {', '.join(_versions())}.", ""]


def _data(dataset: TokenizedDataset) -> str:
    name, comma, part = dataset.name.rpartition(", ")
    source, rest = (name, comma + part) if comma else (part, "")
    if source.startswith(("/", "~", "\\")) or Path(source).is_absolute() or ".." in source:
        source = Path(source).name  # where it lies on this machine helps nobody
    shown = _code(source + rest) if source else "examples without a name"
    return f"{shown}, {len(dataset):,} examples"


def _figures(what: str, values: tuple[float | None, float | None], form: str) -> str:
    shown = ("not measured" if value is None else format(value, form) for value in values)
    return f"| {what} | {' | '.join(shown)} |"


def _versions() -> list[str]:
    from importlib.metadata import PackageNotFoundError, version

    from lora_engine import __version__

    versions = [f"lora_engine {__version__}"]
    for package in ("torch", "transformers", "peft"):
        try:
            versions.append(f"{package} {version(package)}")
        except PackageNotFoundError:
            continue
    return versions


def _plain(value: object) -> str:
    if isinstance(value, set | frozenset | list | tuple):
        names = sorted({str(name).rpartition(".")[2] or str(name) for name in value})
        return ", ".join(names)
    return str(getattr(value, "value", value))


def _string(text: str) -> str:
    """`text` as a string in Python code."""
    return json.dumps(_line(text), ensure_ascii=False)


def _line(text: str) -> str:
    """`text` in one line, without what changes the direction of writing, writable as UTF-8."""
    text = text.encode("utf-8", "backslashreplace").decode("utf-8")
    return re.sub(r"[\x00-\x20\x7f-\x9f\u2028-\u202e\u2066-\u2069]+", " ", text).strip()


def _code(text: str) -> str:
    """`text` as Markdown code, in which nothing has a meaning."""
    line = _line(text) or " "
    longest = max(map(len, re.findall("`+", line)), default=0)
    fence, space = "`" * (longest + 1), " " if "`" in line else ""
    return f"{fence}{space}{line}{space}{fence}"
