"""transformers' linears in FP8 (`FineGrainedFP8Config`), taken as they are stored."""

import sys
from typing import TypeGuard

import torch

from lora_engine.models.families.modules import Fp8Linear
from lora_engine.ops import QuantizedWeight
from lora_engine.quantization.fp8 import Fp8


def is_fp8(module: object) -> TypeGuard[Fp8Linear]:
    """Whether it is an FP8Linear."""
    fp8 = sys.modules.get("transformers.integrations.finegrained_fp8")
    return fp8 is not None and type(module) is fp8.FP8Linear


def why_not_fp8(layer: Fp8Linear) -> str | None:
    """Why an FP8Linear's weight cannot be taken as it is stored; None if it can."""
    try:
        weight_fp8(layer, torch.float32)
    except ValueError as error:
        return f"its weight is stored otherwise: {error}"
    return None


def weight_fp8(layer: Fp8Linear, dtype: torch.dtype) -> QuantizedWeight:
    """An FP8Linear's weight, which decodes to `dtype`; nothing is copied.

    Raises ValueError for a weight that is not in e4m3, and scales of other dtypes or numbers.
    """
    weight, scale = layer.weight.detach(), layer.weight_scale_inv.detach()
    if weight.dtype != torch.float8_e4m3fn:
        raise ValueError(f"it is {weight.dtype}")
    rows, cols = layer.block_size or (0, 0)
    format = Fp8(rows, cols, str(scale.dtype).removeprefix("torch."))
    tensors = {"codes": weight.view(torch.uint8), "scale": scale.view(1, 1) if not rows else scale}
    return QuantizedWeight(
        format=format, tensors=tensors, shape=(layer.out_features, layer.in_features), dtype=dtype
    )
