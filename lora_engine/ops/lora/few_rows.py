"""Products of few rows without gradients, as when a model generates: see csrc/cpu/few_rows.cpp.

The vendor's product packs the whole weight at every call, which takes longer than reading it, and
the buffer W̃ would be filled with the adapters anew. This one reads each weight once, and A and B
from the tensors that were given to the group.
"""

import torch
from torch import Tensor

from lora_engine import backends
from lora_engine.backends.cpu import few_rows as kernel
from lora_engine.ops.lora.weight import AugmentedWeight
from lora_engine.ops.tensors import as_rows


def suits(x: Tensor, *weights: AugmentedWeight, impl: str | None = None) -> bool:
    """Whether `lora_linear` can take rows like x [..., K] of these weights, adapters undropped."""
    if torch.is_grad_enabled():
        return False
    rows = x.numel() // x.shape[-1] if x.shape[-1] else 0
    return backends.takes_few_rows(rows, x.device, x.dtype, impl) and all(map(_is_plain, weights))


def lora_linear(
    x: Tensor,  # [M, K]
    weight: AugmentedWeight,
    residual: Tensor | None = None,  # [M, N]
) -> Tensor:
    """The group's outputs [M, N] side by side, `residual` added."""
    x = as_rows(x)
    y = x.new_empty(x.shape[0], weight.base.shape[0])
    blocks = weight.adapters.blocks
    counts = [0] * len(weight.out_features)
    for block in blocks:
        counts[block.linear] += 1
    kernel.lora_linear_few_rows(
        x,
        weight.base,
        list(zip(weight.out_features, weight.biases, counts, strict=True)),
        [(f.lora_a, f.lora_b, f.scaling) for f in (block.factors for block in blocks)],
        y,
        residual,
    )
    return y


def linear(
    x: Tensor,  # [..., K]
    weight: Tensor,  # [N, K]
    bias: Tensor | None,  # [N]
) -> Tensor | None:
    """`torch.nn.functional.linear`; None where it is not for this kernel."""
    if torch.is_autocast_enabled("cpu") and x.dtype != torch.get_autocast_dtype("cpu"):
        return None
    if torch.jit.is_tracing() or torch.compiler.is_compiling():
        return None
    if not (suits(x) and weight.dtype == x.dtype and weight.shape[1] == x.shape[-1]):
        return None
    if not (_is_readable(weight) and _fits(bias, weight.shape[0], x)):
        return None
    rows = as_rows(x)
    y = x.new_empty(rows.shape[0], weight.shape[0])
    kernel.lora_linear_few_rows(rows, weight, [(weight.shape[0], bias, 0)], [], y)
    return y.view(*x.shape[:-1], weight.shape[0])


def _is_plain(weight: AugmentedWeight) -> bool:
    """Whether the adapters are low-rank products alone, of tensors that the kernel can read."""
    for block in weight.adapters.blocks:
        factors = block.factors
        a, b = factors.lora_a, factors.lora_b
        if factors.magnitude is not None or factors.bias is not None or a.dtype != b.dtype:
            return False
        # Whoever exchanged a parameter's data may have given it another shape.
        outer, inner = weight.out_features[block.linear], weight.in_features
        if a.shape[1] != inner or b.shape != (outer, a.shape[0]):
            return False
        if not (_is_readable(a) and _is_readable(b)):
            return False
    found = zip(weight.biases, weight.out_features, strict=True)
    return all(_fits(bias, outer, weight.buffer) for bias, outer in found)


def _is_readable(x: Tensor) -> bool:
    """Whether the kernel can read the rows of x [.., cols] where they are."""
    return x.stride(1) == 1 and x.dtype in backends.DTYPES["cpu"] and x.device.type == "cpu"


def _fits(bias: Tensor | None, outer: int, like: Tensor) -> bool:
    return bias is None or (
        bias.dtype == like.dtype and bias.shape == (outer,) and bias.is_contiguous()
    )
