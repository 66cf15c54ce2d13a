"""Products of few rows without gradients, as when a model generates.

The vendor's product packs the whole weight at every call, which takes longer than reading it, and
the adapters' factors would be placed anew. Kernels for few rows (`lora_contracts.FewRows`) read the
weight once, where it is resident, and A and B from the tensors of the group's adapters.
"""

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import Parameter

from lora_engine import backends
from lora_engine.backends import launchers
from lora_engine.backends.lora_contracts import FewRows
from lora_engine.backends.lora_parts import GroupAdapter, GroupLinear
from lora_engine.ops.lora.group import LoraGroup
from lora_engine.ops.tensors import as_rows, is_observed


def kernels_for(x: Tensor, *groups: LoraGroup, impl: str | None = None) -> FewRows | None:
    """The kernels that take rows like x [..., K] of all these groups, without dropout.

    None where there are none. impl: the implementation that a caller forces.
    """
    if is_observed():
        return None
    rows = _rows(x)
    chosen = {_implementation(group, rows, x.device, x.dtype, impl) for group in groups}
    one = chosen.pop() if len(chosen) == 1 else None
    return None if one is None else launchers.few_rows(one)


def lora_linear(
    kernels: FewRows,
    x: Tensor,  # [M, K]
    group: LoraGroup,
    residual: Tensor | None = None,  # [M, N]
) -> Tensor:
    """The group's outputs [M, N] side by side, `residual` added, by what `kernels_for` found."""
    x, prepared = as_rows(x), _prepared(kernels, group)
    y = x.new_empty(x.shape[0], prepared.weight.shape[0])
    prepared(x, y, residual)
    return y


class PreparedGroup(NamedTuple):
    """A group's tensors as the kernel takes them: those that it had when it was prepared."""

    kernels: FewRows
    weight: Tensor  # [N, K]
    linears: list[GroupLinear]
    adapters: list[GroupAdapter]

    def __call__(
        self,
        x: Tensor,  # [M, K]
        y: Tensor,  # [M, N]
        residual: Tensor | None = None,  # [M, N]
    ) -> None:
        """Writes the group's outputs, `residual` added."""
        self.kernels.lora_linear_few_rows(x, self.weight, self.linears, self.adapters, y, residual)


def prepare(group: LoraGroup, rows: int) -> PreparedGroup | None:
    """The group for products of up to so many rows; None where it is not for this kernel."""
    base = group.base
    chosen = _implementation(group, rows, base.device, base.dtype, None)
    return None if chosen is None else _prepared(launchers.few_rows(chosen), group)


def _prepared(kernels: FewRows, group: LoraGroup) -> PreparedGroup:
    weight, blocks = group.base.resident, group.adapters.blocks
    assert weight is not None
    counts = [0] * len(group.out_features)
    for block in blocks:
        counts[block.linear] += 1
    linears = zip(group.out_features, group.biases, counts, strict=True)
    factors = [block.factors for block in blocks]
    return PreparedGroup(
        kernels=kernels,
        weight=weight,
        linears=[GroupLinear(rows=rows, bias=bias, adapters=own) for rows, bias, own in linears],
        adapters=[
            GroupAdapter(lora_a=f.lora_a, lora_b=f.lora_b, scaling=f.scaling) for f in factors
        ],
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
    impl = backends.few_rows_impl(_rows(x), x.device, x.dtype)
    if impl is None or not _is_readable(weight, x.device, impl):
        return None
    outer = weight.shape[0]
    if not _fits(bias, outer, x):
        return None
    rows = as_rows(x)
    y = x.new_empty(rows.shape[0], outer)
    linears = [GroupLinear(rows=outer, bias=bias, adapters=0)]
    launchers.few_rows(impl).lora_linear_few_rows(rows, weight, linears, [], y)
    return y.view(*x.shape[:-1], outer)


def _rows(x: Tensor) -> int:
    return x.numel() // x.shape[-1] if x.shape[-1] else 0


def _implementation(
    group: LoraGroup, rows: int, device: torch.device, dtype: torch.dtype, impl: str | None
) -> str | None:
    """Whose kernels take so many rows of the group; None: nobody's."""
    chosen = backends.few_rows_impl(rows, device, dtype, impl, group.base.format)
    return chosen if chosen is not None and _is_plain(group, device, chosen) else None


def _is_plain(group: LoraGroup, device: torch.device, impl: str) -> bool:
    """Whether W and the adapters, low-rank products alone, are tensors that the kernel can read."""
    weight = group.base.resident
    if weight is None or not _is_readable(weight, device, impl):
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
        if not (_is_readable(a, device, impl) and _is_readable(b, device, impl)):
            return False
    biases = zip(group.biases, group.out_features, strict=True)
    return all(_fits(bias, outer, weight) for bias, outer in biases)


def _is_readable(x: Tensor, device: torch.device, impl: str) -> bool:
    """Whether the kernel can read the rows of x [.., cols] where they are."""
    return (
        type(x) in (Tensor, Parameter)  # subclasses need not have their elements in memory
        and x.device == device
        and x.dtype in backends.dtypes_of("few_rows", impl)
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
