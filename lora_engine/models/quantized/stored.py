"""How a linear's weight is stored, whoever stored it."""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial

import torch
from torch import Tensor, nn

from lora_engine.models.quantized.bitsandbytes_linears import (
    is_4bit,
    is_8bit,
    state_of,
    weight_4bit,
    weight_8bit,
    why_not_4bit,
    why_not_8bit,
)
from lora_engine.models.quantized.fp8_linear import is_fp8, weight_fp8, why_not_fp8
from lora_engine.models.quantized.linear import QuantizedLinear
from lora_engine.models.quantized.merge_aware_linear import MergeAwareLinear
from lora_engine.models.sharded.linear import ShardedLinear
from lora_engine.ops import QuantizedWeight, Weight
from lora_engine.ops.frozen_product import frozen_product


def is_plain_linear(module: object) -> bool:
    """Whether the class is one of those whose weights are known here: nn.Linear, not its others."""
    if type(module) in (nn.Linear, QuantizedLinear, ShardedLinear, MergeAwareLinear):
        return True
    return is_4bit(module) or is_8bit(module) or is_fp8(module)


def why_not_stored(layer: nn.Module) -> str | None:
    """Why the layer's weight cannot be taken as it is stored; None if it can."""
    if not is_plain_linear(layer):
        return f"the base layer is {type(layer).__name__}, not nn.Linear"
    assert isinstance(layer, nn.Linear)
    if is_4bit(layer):
        return why_not_4bit(layer)
    if is_8bit(layer):
        return why_not_8bit(layer)
    return why_not_fp8(layer) if is_fp8(layer) else None


def stored_weight(layer: nn.Linear, dtype: torch.dtype) -> Weight:
    """The layer's weight as it is stored: nothing is copied.

    dtype: what numbers decode to that nobody has said a dtype of, the model's.
    """
    if isinstance(layer, ShardedLinear):
        return layer.sharded
    if isinstance(layer, QuantizedLinear):
        return layer.quantized
    if isinstance(layer, MergeAwareLinear):
        return layer.mergeable
    if is_4bit(layer):
        return weight_4bit(layer)
    if is_8bit(layer):
        return weight_8bit(layer, dtype)
    return weight_fp8(layer, dtype) if is_fp8(layer) else layer.weight


def decoded_dtype(layer: nn.Linear, dtype: torch.dtype) -> torch.dtype:
    """The dtype of the numbers that the layer's weight stands for; `dtype`: see `stored_weight`."""
    if isinstance(layer, QuantizedLinear | ShardedLinear | MergeAwareLinear):
        return layer.dtype
    if is_8bit(layer) or is_fp8(layer):
        return dtype
    state = state_of(layer)
    return layer.weight.dtype if state is None else state.dtype


@contextmanager
def not_packed_anew(model: nn.Module) -> Iterator[None]:
    """Within, bitsandbytes packs no weight anew for this CPU, which it does in eval mode.

    That rounds the scales, and they stay rounded.
    """
    layers = [
        module
        for module in model.modules()
        if is_4bit(module) and getattr(module, "support_avx512bf16_for_cpu", False)
    ]
    for layer in layers:
        layer.support_avx512bf16_for_cpu = False
    try:
        yield
    finally:
        for layer in layers:
            layer.support_avx512bf16_for_cpu = True


@contextmanager
def inputs_unrounded(model: nn.Module) -> Iterator[None]:
    """Within, linears that round their inputs to 8 bits multiply them as they are, as ours do."""
    layers = [
        module
        for module in model.modules()
        if isinstance(module, nn.Linear)
        and (is_8bit(module) or is_fp8(module))
        and why_not_stored(module) is None
        and "forward" not in vars(module)
    ]
    for layer in layers:
        vars(layer)["forward"] = partial(_product, layer)
    try:
        yield
    finally:
        for layer in layers:
            del vars(layer)["forward"]


def _product(layer: nn.Linear, input: Tensor) -> Tensor:
    weight = stored_weight(layer, input.dtype)
    assert isinstance(weight, QuantizedWeight)
    y = frozen_product(input, weight.dequantize)
    return y if layer.bias is None else y + layer.bias.to(y.dtype)


def weight_count(module: nn.Module) -> int:
    """The numbers that the module's own parameters stand for."""
    own = module._parameters.items()
    scales = ("weight_scale_inv", "activation_scale") if is_fp8(module) else ()
    sizes = {name: p.numel() for name, p in own if p is not None and name not in scales}
    if isinstance(module, nn.Linear) and type(module) is not nn.Linear and "weight" in sizes:
        sizes["weight"] = module.in_features * module.out_features
    return sum(sizes.values())
