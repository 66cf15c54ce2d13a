"""What a model writes before it is trained; kept in the run's folder for when the run goes on."""

import json
from pathlib import Path
from typing import Any

from lora_engine.app.config import RunConfig
from lora_engine.evaluation.samples import Prompt, generate


def counted(count: int) -> str:
    return "1 sample" if count == 1 else f"{count:,} samples"


def samples_before(
    config: RunConfig,
    model: Any,
    tokenizer: Any,
    prompts: list[Prompt],
    kept: dict[str, Any] | None,
    tell: Any,
) -> dict[str, Any]:
    """What the untrained model writes, "texts", to what is "asked"; a resumed run has it kept."""
    asked = {
        "max_new_tokens": config.samples.max_new_tokens,
        "prompts": [list(prompt.input_ids) for prompt in prompts],
    }
    if kept is not None and kept.get("asked") == asked:
        texts = kept.get("texts")
        if isinstance(texts, list) and [type(text) for text in texts] == [str] * len(prompts):
            return kept
    if prompts:
        tell(f"writing {counted(len(prompts))} before training")
    texts = generate(model, tokenizer, prompts, max_new_tokens=config.samples.max_new_tokens)
    return {"asked": asked, "texts": texts}


def read_json(path: Path) -> dict[str, Any] | None:
    """The object in a file; None if there is none that can be read."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return None
    return content if isinstance(content, dict) else None
