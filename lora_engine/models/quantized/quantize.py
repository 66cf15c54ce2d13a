"""A model's linears in packed bits."""

from collections.abc import Iterator, Sequence
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import nn

from lora_engine.errors import UserError
from lora_engine.models.quantized.linear import QuantizedLinear
from lora_engine.ops import quantize_weight

# Linears that stay as they are: of heads, and those that choose experts.
SKIPPED = ("lm_head", "score", "classifier", "router", "gate", "shared_expert_gate")


def quantize_model(
    model: nn.Module,
    format: str = "nf4",
    *,
    block: int = 64,
    double_quant: bool = False,
    skip: Sequence[str] = SKIPPED,
    device: str | torch.device | None = None,
) -> None:
    """Puts a `QuantizedLinear` in the place of every linear of `model`, one after the other.

    For LoRA over 4-bit weights (QLoRA): quantise, then `peft.get_peft_model`, then `accelerate`.
    format, block, double_quant: see `quantize_weight`. skip: patterns of names, or of their last
    parts, of linears that stay; norms and embeddings do in any case. device: where each weight is
    quantised and kept, one at a time, so that the whole model need never be there; None: where it
    is. Everything else stays where it is.

    Raises UserError for a format or block that does not exist, for a model that has adapters or was
    accelerated, and, with its name, for a weight that cannot be quantised.
    """
    for name, module in model.named_modules():
        if "forward" in vars(module) or hasattr(module, "base_layer"):
            what = f"{name or type(model).__name__} has an adapter or a forward of its own"
            raise UserError(f"quantize_model: {what}; quantise the model before that")
    for parent, child, name, linear in list(_linears(model, skip)):
        weight = linear.weight.detach()
        try:
            packed = quantize_weight(
                weight if device is None else weight.to(device),
                format,
                block=block,
                double_quant=double_quant,
            )
        except ValueError as error:
            raise UserError(f"quantize_model: {name}.weight: {error}") from error
        bias = None if linear.bias is None else linear.bias.to(packed.device)
        setattr(parent, child, QuantizedLinear(packed, bias).train(linear.training))


def _linears(
    model: nn.Module, skip: Sequence[str]
) -> Iterator[tuple[nn.Module, str, str, nn.Linear]]:
    """Each linear to be replaced: what it is part of, its name there, and its whole name."""
    head: Any = getattr(model, "get_output_embeddings", lambda: None)()
    for prefix, parent in model.named_modules():
        for child, module in parent.named_children():
            name = f"{prefix}.{child}" if prefix else child
            skipped = any(fnmatchcase(name, p) or fnmatchcase(child, p) for p in skip)
            if type(module) is nn.Linear and module is not head and not skipped:
                yield parent, child, name, module
