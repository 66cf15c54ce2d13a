"""bitsandbytes' linears, whose weights are taken as they are stored."""

import sys
from typing import TypeGuard

import torch
from torch import Tensor, nn

from lora_engine.models.families.modules import Int8Linear, PackedLinear, QuantState
from lora_engine.ops import QuantizedWeight
from lora_engine.quantization.blockwise_4bit import BLOCKS, Blockwise4bit
from lora_engine.quantization.int8 import Int8
from lora_engine.quantization.nested_absmax import NESTED_BLOCK


def is_4bit(module: object) -> TypeGuard[PackedLinear]:
    """Whether it is a Linear4bit."""
    bitsandbytes = sys.modules.get("bitsandbytes")  # a layer of its own has imported it
    return bitsandbytes is not None and isinstance(module, bitsandbytes.nn.Linear4bit)


def is_8bit(module: object) -> TypeGuard[Int8Linear]:
    """Whether it is a Linear8bitLt."""
    bitsandbytes = sys.modules.get("bitsandbytes")
    return bitsandbytes is not None and type(module) is bitsandbytes.nn.Linear8bitLt


def why_not_4bit(layer: PackedLinear) -> str | None:
    """Why a Linear4bit's weight cannot be taken as it is stored; None if it can."""
    state = state_of(layer)
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
        weight_4bit(layer)
    except ValueError as error:  # scales that it keeps for a CPU, of a weight that it unpacked
        return f"bitsandbytes keeps its weight otherwise: {error}"
    return None


def state_of(layer: nn.Linear) -> QuantState | None:
    """What bitsandbytes knows of a weight in 4 bits; None of others, and before it quantised it."""
    state: QuantState | None = getattr(layer.weight, "quant_state", None)
    return state


def weight_4bit(layer: PackedLinear) -> QuantizedWeight:
    """A Linear4bit's weight; nothing is copied."""
    state = layer.weight.quant_state
    tensors = {"codes": layer.weight.detach().view(torch.uint8).view(-1), "absmax": state.absmax}
    if state.nested:
        tensors["nested_absmax"] = state.state2.absmax
        tensors["nested_code"] = state.state2.code
        tensors["offset"] = state.offset
    format = Blockwise4bit(state.quant_type, state.blocksize, state.nested)
    return QuantizedWeight(
        format=format, tensors=tensors, shape=(state.shape[0], state.shape[1]), dtype=state.dtype
    )


def why_not_8bit(layer: Int8Linear) -> str | None:
    """Why a Linear8bitLt's weight cannot be taken as it is stored; None if it can."""
    if layer.weight.dtype != torch.int8:
        return "bitsandbytes has not quantised its weight, or does so at every call"
    if _absmax(layer) is None:
        return "bitsandbytes keeps no scales of its weight"
    try:
        weight_8bit(layer, torch.float32)
    except ValueError as error:
        return f"bitsandbytes keeps its weight otherwise: {error}"
    return None


def weight_8bit(layer: Int8Linear, dtype: torch.dtype) -> QuantizedWeight:
    """A Linear8bitLt's weight, which decodes to `dtype`; nothing is copied."""
    absmax = _absmax(layer)
    assert absmax is not None
    tensors = {"codes": layer.weight.detach().as_subclass(Tensor), "scale": absmax.view(-1, 1)}
    shape = layer.out_features, layer.in_features
    return QuantizedWeight(format=Int8(absmax=True), tensors=tensors, shape=shape, dtype=dtype)


def _absmax(layer: Int8Linear) -> Tensor | None:
    """[N]: the first call of the layer moves them from the parameter to the layer's state."""
    found: Tensor | None = getattr(layer.weight, "SCB", None)
    return layer.state.SCB if found is None else found
