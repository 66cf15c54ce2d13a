"""Products of few rows without gradients, as when a model generates: see csrc/cpu/few_rows.cpp.

The vendor's product packs the whole weight at every call, which takes longer than reading it, and
the adapters' factors would be placed anew. This kernel reads the weight once, where it is resident,
and A and B from the tensors of the group's adapters.
"""

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import Parameter

from lora_engine import backends
from lora_engine.backends.cpu import few_rows as kernel
from lora_engine.ops.lora.group import LoraGroup
from lora_engine.ops.tensors import as_rows, is_observed


def suits(x: Tensor, *groups: LoraGroup, impl: str | None = None) -> bool:
    """Whether `lora_linear` can take rows like x [..., K] of these groups, without dropout."""
    if is_observed():
        return False
    rows = _rows(x)
    return all(
        backends.takes_few_rows(rows, x.device, x.dtype, impl, group.base.format)
        and _is_plain(group, x.device)
        for group in groups
    )


def lora_linear(
    x: Tensor,  # [M, K]
    group: LoraGroup,
    residual: Tensor | None = None,  # [M, N]
) -> Tensor:
    """The group's outputs [M, N] side by side, `residual` added."""
    x, prepared = as_rows(x), _prepared(group)
    y = x.new_empty(x.shape[0], prepared.weight.shape[0])
    prepared(x, y, residual)
    return y


class PreparedGroup(NamedTuple):
    """A group's tensors as the kernel takes them: those that it had when it was prepared."""

    weight: Tensor  # [N, K]
    linears: list[kernel.Linear]
    adapters: list[kernel.Adapter]

    def __call__(
        self,
        x: Tensor,  # [M, K]
        y: Tensor,  # [M, N]
        residual: Tensor | None = None,  # [M, N]
    ) -> None:
        """Writes the group's outputs, `residual` added."""
        kernel.lora_linear_few_rows(x, self.weight, self.linears, self.adapters, y, residual)


def prepare(group: LoraGroup, rows: int) -> PreparedGroup | None:
    """The group for products of up to so many rows; None where it is not for this kernel."""
    base = group.base
    if not backends.takes_few_rows(rows, base.device, base.dtype, None, base.format):
        return None
    return _prepared(group) if _is_plain(group, base.device) else None


def _prepared(group: LoraGroup) -> PreparedGroup:
    weight, blocks = group.base.resident, group.adapters.blocks
    assert weight is not None
    counts = [0] * len(group.out_features)
    for block in blocks:
        counts[block.linear] += 1
    return PreparedGroup(
        weight,
        list(zip(group.out_features, group.biases, counts, strict=True)),
        [(f.lora_a, f.lora_b, f.scaling) for f in (block.factors for block in blocks)],
    )


def linear(
    x: Tensor,  # [..., K]
    weight: Tensor,  # [N, K]
    bias: Tensor | None,  # [N]
) -> Tensor | None:
    """`torch.nn.functional.linear`; None where it is not for this kernel."""
    device = x.device.type
    if torch.is_autocast_enabled(device) and x.dtype != torch.get_autocast_dtype(device):
        return None
    if torch.compiler.is_compiling() or type(x) is not Tensor:
        return None
    if is_observed() or not (weight.dtype == x.dtype and weight.shape[1] == x.shape[-1]):
        return None
    if not backends.takes_few_rows(_rows(x), x.device, x.dtype):
        return None
    if not (_is_readable(weight, x.device) and _fits(bias, weight.shape[0], x)):
        return None
    rows = as_rows(x)
    y = x.new_empty(rows.shape[0], weight.shape[0])
    kernel.lora_linear_few_rows(rows, weight, [(weight.shape[0], bias, 0)], [], y)
    return y.view(*x.shape[:-1], weight.shape[0])


def _rows(x: Tensor) -> int:
    return x.numel() // x.shape[-1] if x.shape[-1] else 0


def _is_plain(group: LoraGroup, device: torch.device) -> bool:
    """Whether W and the adapters, low-rank products alone, are tensors that the kernel can read."""
    weight = group.base.resident
    if weight is None or not _is_readable(weight, device):
        return False
    for block in group.adapters.blocks:
        factors = block.factors
        a, b = factors.lora_a, factors.lora_b
        if factors.magnitude is not None or factors.bias is not None or a.dtype != b.dtype:
            return False
        # A parameter's data may have been exchanged for data of another shape.
        outer, inner = group.out_features[block.linear], group.in_features
        if a.shape[1] != inner or b.shape != (outer, a.shape[0]):
            return False
        if not (_is_readable(a, device) and _is_readable(b, device)):
            return False
    biases = zip(group.biases, group.out_features, strict=True)
    return all(_fits(bias, outer, weight) for bias, outer in biases)


def _is_readable(x: Tensor, device: torch.device) -> bool:
    """Whether the kernel can read the rows of x [.., cols] where they are."""
    return (
        type(x) in (Tensor, Parameter)  # subclasses need not have their elements in memory
        and x.device == device
        and x.dtype in kernel.DTYPES
        and x.layout == torch.strided
        and x.stride(1) == 1
        and not x.is_neg()
    )


def _fits(bias: Tensor | None, outer: int, like: Tensor) -> bool:
    return bias is None or (
        bias.device == like.device
        and bias.dtype == like.dtype
        and bias.shape == (outer,)
        and bias.is_contiguous()
    )
