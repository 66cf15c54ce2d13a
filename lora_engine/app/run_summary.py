"""What summary.json says of a run beside its result."""

import json
import math
from datetime import datetime
from pathlib import Path
from typing import Any

from lora_engine.app.config import RunConfig
from lora_engine.data import TokenizedDataset
from lora_engine.models.peft.adapters import LoraConfig
from lora_engine.objectives.base import NATS_PER_TARGET

SMOLLM2_NAME = "SmolLM2-135M-Instruct"


def model_name(config: RunConfig) -> str:
    """The model's name for people: the last part of its path or hub id."""
    if config.model.path == "smollm2":
        return SMOLLM2_NAME
    return Path(config.model.path).name or config.model.path


def description(
    config: RunConfig, model: Any, train_data: TokenizedDataset, eval_data: TokenizedDataset
) -> dict[str, Any]:
    """What was trained on what."""
    sizes = [(p.numel(), p.requires_grad) for p in model.parameters()]
    return {
        "model": model_name(config),
        "method": _method(config.lora),
        "device": next(model.parameters()).device.type,
        "data": config.data.name(),
        "train_examples": len(train_data),
        "eval_examples": len(eval_data),
        "parameters": sum(size for size, _ in sizes),
        "trainable_parameters": sum(size for size, trained in sizes if trained),
        "finished": datetime.now().strftime("%Y-%m-%d %H:%M"),
    }


def _method(lora: LoraConfig | None) -> str:
    if lora is None:
        return "Full fine-tuning"
    if lora.adapters is None:
        return f"LoRA of rank {lora.r}"
    ranks = ", ".join(f"{name} (rank {own.r})" for name, own in lora.of_adapters().items())
    return f"LoRA: {ranks}"


def earlier_peak(metrics: Path) -> int:
    """The most memory a step took, in bytes, also in sittings before a resumption."""
    lines = metrics.read_text(encoding="utf-8").splitlines()
    return max((json.loads(line).get("peak_memory_bytes", 0) for line in lines), default=0)


def perplexity(loss: float | None, unit: str) -> float | None:
    """exp(loss); None for no loss, one of another unit, or one too large for the exponential."""
    if loss is None or unit != NATS_PER_TARGET or loss >= 700:
        return None
    return math.exp(loss)
