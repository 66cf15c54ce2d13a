"""Frozen weights in NF4 for train_step.py: ours, and bitsandbytes'.

A job's weights are rounded to what NF4 holds before any contender takes them, so that dense and
packed weights are the same numbers.
"""

from typing import Any

import torch
from torch import nn

import lora_engine
from benchmarks.gpu.step_models import add_adapters

BLOCK = 64


def _linears(model: nn.Module) -> list[tuple[nn.Module, str, nn.Linear]]:
    """Every linear but the head: what holds it, its name there, itself."""
    return [
        (module, name, linear)
        for module in model.modules()
        for name, linear in module.named_children()
        if type(linear) is nn.Linear and name != "lm_head"
    ]


@torch.no_grad()
def round_to_nf4(model: nn.Module) -> None:
    """Gives every linear but the head the weights that NF4 makes of its own."""
    for _, _, linear in _linears(model):
        packed = lora_engine.quantize_weight(linear.weight, "nf4", block=BLOCK)
        linear.weight.copy_(packed.dequantize())


def packed(model: Any) -> Any:
    """The model over weights of `lora_engine.quantize_model`, with new adapters."""
    base = model.unload()
    lora_engine.quantize_model(base, "nf4", block=BLOCK)
    return add_adapters(base)


@torch.no_grad()
def bitsandbytes(model: Any) -> Any:
    """The model with bitsandbytes' Linear4bit in the place of its linears, and new adapters."""
    import bitsandbytes as bnb

    base = model.unload()
    for parent, name, linear in _linears(base):
        weight = linear.weight
        made = bnb.nn.Linear4bit(
            linear.in_features,
            linear.out_features,
            bias=linear.bias is not None,
            compute_dtype=weight.dtype,
            compress_statistics=False,
            quant_type="nf4",
            device="meta",
        )
        made.weight = bnb.nn.Params4bit(
            weight.data,
            requires_grad=False,
            blocksize=BLOCK,
            compress_statistics=False,
            quant_type="nf4",
            module=made,
        ).to(weight.device)
        made.bias = linear.bias
        setattr(parent, name, made)
    base.is_loaded_in_4bit = True
    return add_adapters(base)
