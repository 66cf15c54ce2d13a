"""How a linear's weight is stored, whoever stored it."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TypeGuard

import torch
from torch import nn

from lora_engine.models.families.modules import PackedLinear, QuantState
from lora_engine.models.quantized.linear import QuantizedLinear
from lora_engine.models.sharded.linear import ShardedLinear
from lora_engine.ops import QuantizedWeight, Weight
from lora_engine.quantization.blockwise_4bit import BLOCKS, Blockwise4bit
from lora_engine.quantization.nested_absmax import NESTED_BLOCK


def is_plain_linear(module: object) -> bool:
    """Whether the class is one of those whose weights are known here: nn.Linear, not its others."""
    kinds = (nn.Linear, QuantizedLinear, ShardedLinear)
    return type(module) in kinds or _is_bitsandbytes_4bit(module)


def why_not_stored(layer: nn.Module) -> str | None:
    """Why the layer's weight cannot be taken as it is stored; None if it can."""
    if not is_plain_linear(layer):
        return f"the base layer is {type(layer).__name__}, not nn.Linear"
    return _why_not_bitsandbytes(layer) if _is_bitsandbytes_4bit(layer) else None


def stored_weight(layer: nn.Linear) -> Weight:
    """The layer's weight as it is stored: nothing is copied."""
    if isinstance(layer, ShardedLinear):
        return layer.sharded
    if isinstance(layer, QuantizedLinear):
        return layer.quantized
    return _of_bitsandbytes(layer) if _is_bitsandbytes_4bit(layer) else layer.weight


def decoded_dtype(layer: nn.Linear) -> torch.dtype:
    """The dtype of the numbers that the layer's weight stands for, however it is stored."""
    if isinstance(layer, QuantizedLinear | ShardedLinear):
        return layer.dtype
    state = _state_of(layer)
    return layer.weight.dtype if state is None else state.dtype


@contextmanager
def not_packed_anew(model: nn.Module) -> Iterator[None]:
    """Within, bitsandbytes packs no weight anew for this CPU, which it does in eval mode.

    That rounds the scales, and they stay rounded.
    """
    layers = [
        module
        for module in model.modules()
        if _is_bitsandbytes_4bit(module) and getattr(module, "support_avx512bf16_for_cpu", False)
    ]
    for layer in layers:
        layer.support_avx512bf16_for_cpu = False
    try:
        yield
    finally:
        for layer in layers:
            layer.support_avx512bf16_for_cpu = True


def weight_count(module: nn.Module) -> int:
    """The numbers that the module's own parameters stand for."""
    own = module._parameters.items()
    sizes = {name: p.numel() for name, p in own if p is not None}
    if isinstance(module, nn.Linear) and type(module) is not nn.Linear and "weight" in sizes:
        sizes["weight"] = module.in_features * module.out_features
    return sum(sizes.values())


def _is_bitsandbytes_4bit(module: object) -> TypeGuard[PackedLinear]:
    bitsandbytes = sys.modules.get("bitsandbytes")  # a layer of its own has imported it
    return bitsandbytes is not None and isinstance(module, bitsandbytes.nn.Linear4bit)


def _state_of(layer: nn.Linear) -> QuantState | None:
    state: QuantState | None = getattr(layer.weight, "quant_state", None)
    return state


def _why_not_bitsandbytes(layer: PackedLinear) -> str | None:
    state = _state_of(layer)
    if state is None:
        return "bitsandbytes has not quantised its weight yet: move the model to its device"
    if getattr(state, "packing_format_for_cpu", False):
        return "bitsandbytes has packed its weight in another order, for this CPU"
    if layer.compute_dtype not in (None, state.dtype):
        return f"it computes in {layer.compute_dtype}, and decodes its weight to {state.dtype}"
    if len(state.shape) != 2 or state.blocksize not in BLOCKS:
        return f"its weight is {list(state.shape)} in blocks of {state.blocksize}"
    if state.nested and state.state2.blocksize != NESTED_BLOCK:
        return f"its scales are quantised in blocks of {state.state2.blocksize}"
    try:
        _of_bitsandbytes(layer)
    except ValueError as error:  # scales that it keeps for a CPU, of a weight that it unpacked
        return f"bitsandbytes keeps its weight otherwise: {error}"
    return None


def _of_bitsandbytes(layer: PackedLinear) -> QuantizedWeight:
    state = layer.weight.quant_state
    tensors = {"codes": layer.weight.detach().view(torch.uint8).view(-1), "absmax": state.absmax}
    if state.nested:
        tensors["nested_absmax"] = state.state2.absmax
        tensors["nested_code"] = state.state2.code
        tensors["offset"] = state.offset
    format = Blockwise4bit(state.quant_type, state.blocksize, state.nested)
    return QuantizedWeight(format, tensors, (state.shape[0], state.shape[1]), state.dtype)
