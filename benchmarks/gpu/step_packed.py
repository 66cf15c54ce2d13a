"""Frozen weights in NF4 for train_step.py: ours, and bitsandbytes'.

A job's weights are rounded to what NF4 holds before any contender takes them, so that dense and
packed weights are the same numbers.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from lora_engine import quantize_weight

BLOCK = 64


def _packed_linears(model: nn.Module) -> list[tuple[nn.Module, str, nn.Linear]]:
    """Every linear but the head: what holds it, its name there, itself."""
    found = []
    for name, module in model.named_modules():
        for child, linear in module.named_children():
            if type(linear) is nn.Linear and child != "lm_head" and "lora_" not in name:
                found.append((module, child, linear))
    return found


@torch.no_grad()
def round_to_nf4(model: nn.Module) -> None:
    """Gives every linear but the head the weights that NF4 makes of its own."""
    for _, _, linear in _packed_linears(model):
        linear.weight.copy_(quantize_weight(linear.weight, "nf4", block=BLOCK).dequantize())


@contextmanager
def packed_weights(model: Any) -> Iterator[None]:
    """Within this context an accelerated model's linears have their weights in NF4 alone."""
    from lora_engine.models.attach.attachment import attachment
    from lora_engine.models.attach.head import transformers_model
    from lora_engine.models.peft.lora_state import rank_capacity
    from lora_engine.ops.lora.group import LoraGroup
    from lora_engine.ops.lora.quantized_base import QuantizedBase

    attached = attachment(transformers_model(model))
    assert attached is not None
    # It would hold the dense weights for restore(model), after which they are put back here.
    undo = attached.patches._undo
    undo[:] = [entry for entry in undo if entry[0].__name__ != "_own_storage"]
    packed = []
    for group in _groups(model):
        weights = [quantize_weight(p, "nf4", block=BLOCK) for _, p, _ in group._placed]
        base = QuantizedBase(weights)
        empty = [None] * len(weights)
        group.lora = LoraGroup(base, empty, capacity=rank_capacity(group.modules))
        group._state = None
        for i, (layer, parameter, _) in enumerate(group._placed):
            parameter.data = parameter.data.new_empty(0)
            group._placed[i] = (layer, parameter, parameter.detach())
            packed.append((parameter, weights[i]))
    try:
        yield
    finally:
        for parameter, weight in packed:
            parameter.data = weight.dequantize()


def _groups(model: nn.Module) -> Iterator[Any]:
    """The groups of linears of an accelerated model."""
    for module in model.modules():
        forward = vars(module).get("forward")
        for name in ("qkv", "output", "gate_up", "down", "group"):
            group = getattr(forward, name, None)
            if group is not None and group.lora is not None:
                yield group


@torch.no_grad()
def bitsandbytes(model: Any) -> Any:
    """The model with bitsandbytes' Linear4bit in the place of its linears, and new adapters."""
    import bitsandbytes as bnb

    from benchmarks.gpu.step_models import add_adapters

    base = model.unload()
    for parent, name, linear in _packed_linears(base):
        weight = linear.weight
        packed = bnb.nn.Linear4bit(
            linear.in_features,
            linear.out_features,
            bias=linear.bias is not None,
            compute_dtype=weight.dtype,
            compress_statistics=False,
            quant_type="nf4",
            device="meta",
        )
        packed.weight = bnb.nn.Params4bit(
            weight.data,
            requires_grad=False,
            blocksize=BLOCK,
            compress_statistics=False,
            quant_type="nf4",
            module=packed,
        ).to(weight.device)
        packed.bias = linear.bias
        setattr(parent, name, packed)
    base.is_loaded_in_4bit = True
    return add_adapters(base)
