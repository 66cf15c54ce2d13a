"""The probe: texts and questions that a run does not train on, to see what it forgets."""

import json
from importlib import resources

from lora_engine.data.dataset import TokenizedDataset, prepare
from lora_engine.data.inputs import NO_INPUTS, TemplateInputs
from lora_engine.data.template import Tokenizer

SHIPPED = "shipped"
_NAME = "the shipped probe (evaluation.probe: null leaves it out)"


def shipped_probe(
    tokenizer: Tokenizer, *, max_length: int | None = 2048, inputs: TemplateInputs = NO_INPUTS
) -> TokenizedDataset:
    """General texts, and questions with answers, out of Python's own documentation.

    The questions are chats where the tokenizer has a chat template, else plain text. What the
    template cannot write is left out. See `probe_source` for how they were made, and
    `probe_licence.txt` for their licence.
    """
    return prepare(
        _Probe(_record(line, tokenizer.chat_template is not None) for line in _lines()),
        tokenizer,
        max_length=max_length,
        on_undecidable="drop",
        inputs=inputs,
    )


class _Probe(list[dict[str, object]]):
    """Records with a name for messages."""

    name = _NAME


def _lines() -> list[dict[str, str]]:
    text = resources.files("lora_engine.data").joinpath("probe.jsonl").read_text(encoding="utf-8")
    return [json.loads(line) for line in text.splitlines()]


def _record(line: dict[str, str], as_chat: bool) -> dict[str, object]:
    if "text" in line:
        return {"text": line["text"]}
    question, answer = line["question"], line["answer"]
    if as_chat:
        roles = {"user": question, "assistant": answer}
        return {"messages": [{"role": role, "content": text} for role, text in roles.items()]}
    return {"prompt": f"Question: {question}\nAnswer:", "completion": f" {answer}"}
