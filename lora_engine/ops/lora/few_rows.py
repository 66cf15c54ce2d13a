"""Products of few rows without gradients, as when a model generates.

The vendor's product packs the whole weight at every call, which takes longer than reading it, and
the adapters' factors would be placed anew. Kernels for few rows (`lora_contracts.FewRows`) read the
weight once, where it is resident or decoded, and A and B from the tensors of the group's adapters.
A row's result is the same to the bit beside any others; a vendor's depends on how many there are.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import Parameter

from lora_engine import backends
from lora_engine.backends import launchers
from lora_engine.backends.lora_contracts import FewRows
from lora_engine.backends.lora_parts import GroupAdapter, GroupLinear
from lora_engine.ops.lora.base import BaseWeight
from lora_engine.ops.lora.dora import magnitude_scale
from lora_engine.ops.lora.group import LoraGroup
from lora_engine.ops.tensors import as_rows, is_observed
from lora_engine.values import LoraFactors


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
    y = x.new_empty(x.shape[0], sum(group.out_features))
    prepared(x, y, residual)
    return y


class PreparedGroup(NamedTuple):
    """A group's tensors as the kernel takes them: those that it had when it was prepared.

    scale: DoRA's, of the values at that time. bias: what is added after it.
    """

    kernels: FewRows
    base: BaseWeight
    linears: list[GroupLinear]
    adapters: list[GroupAdapter]
    scale: Tensor | None  # [N]
    bias: Tensor | None  # [N]

    def __call__(
        self,
        x: Tensor,  # [M, K]
        y: Tensor,  # [M, N]
        residual: Tensor | None = None,  # [M, N]
    ) -> None:
        """Writes the group's outputs, `residual` added."""
        if self.scale is None:
            self._products(x, y, residual)
            return
        self._products(x, y, None)
        y.mul_(self.scale)
        for addend in (self.bias, residual):
            if addend is not None:
                y.add_(addend)

    def _products(self, x: Tensor, y: Tensor, residual: Tensor | None) -> None:
        multiply, weight = self.kernels.lora_linear_few_rows, self.base.resident
        if weight is not None:
            multiply(x, weight, self.linears, self.adapters, y, residual)
            return
        for rows, block in self.base.blocks():
            added = None if residual is None else residual[:, rows]
            multiply(x, block, *_part(self.linears, self.adapters, rows), y[:, rows], added)


def prepare(group: LoraGroup, rows: int) -> PreparedGroup | None:
    """The group for products of up to so many rows; None where it is not for this kernel."""
    base = group.base
    chosen = _implementation(group, rows, base.device, base.dtype, None)
    return None if chosen is None else _prepared(launchers.few_rows(chosen), group)


def _prepared(kernels: FewRows, group: LoraGroup) -> PreparedGroup:
    adapters, biases = group.adapters, list(group.biases)
    base = group.base.merged(adapters)
    dora, after = magnitude_scale(group.base, adapters), None
    blocks = () if group.base.merges else adapters.blocks
    if adapters.has_bias:
        biases = list(group.bias(adapters).split(group.out_features))
    if dora is not None and any(bias is not None for bias in biases):
        biases, after = [None] * len(biases), group.bias(adapters)
    counts = [0] * len(group.out_features)
    for block in blocks:
        counts[block.linear] += 1
    linears = zip(group.out_features, biases, counts, strict=True)
    factors = [block.factors for block in blocks]
    return PreparedGroup(
        kernels=kernels,
        base=base,
        linears=[GroupLinear(rows=rows, bias=bias, adapters=own) for rows, bias, own in linears],
        adapters=[
            GroupAdapter(lora_a=f.lora_a, lora_b=f.lora_b, scaling=f.scaling) for f in factors
        ],
        scale=None if dora is None else dora.scale,
        bias=after,
    )


def _part(
    linears: Sequence[GroupLinear], adapters: Sequence[GroupAdapter], rows: slice
) -> tuple[list[GroupLinear], list[GroupAdapter]]:
    """What of a group's linears, and of their adapters, stands in these rows of its weight."""
    own: list[GroupLinear] = []
    theirs: list[GroupAdapter] = []
    start = taken = 0
    for linear in linears:
        first, last = max(rows.start - start, 0), min(rows.stop - start, linear.rows)
        if first < last:
            bias = None if linear.bias is None else linear.bias[first:last]
            own.append(GroupLinear(rows=last - first, bias=bias, adapters=linear.adapters))
            theirs += [
                adapter._replace(lora_b=adapter.lora_b[first:last])
                for adapter in adapters[taken : taken + linear.adapters]
            ]
        start, taken = start + linear.rows, taken + linear.adapters
    return own, theirs


def linear(
    x: Tensor,  # [..., K]
    weight: Tensor,  # [N, K]
    bias: Tensor | None,  # [N]
    lora: LoraFactors | None = None,
) -> Tensor | None:
    """`torch.nn.functional.linear`, with a low-rank product added; None where it is not for this
    kernel."""
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
    outer, inner = weight.shape
    if not _fits(bias, outer, x.device, x.dtype):
        return None
    adapters = []
    if lora is not None:
        if lora.magnitude is not None or lora.bias is not None:
            return None
        if not _are_plain(lora, outer, inner, x.device, impl):
            return None
        adapters.append(GroupAdapter(lora.lora_a, lora.lora_b, lora.scaling))
    rows = as_rows(x)
    y = x.new_empty(rows.shape[0], outer)
    linears = [GroupLinear(rows=outer, bias=bias, adapters=len(adapters))]
    launchers.few_rows(impl).lora_linear_few_rows(rows, weight, linears, adapters, y)
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
    """Whether the kernel can read W, as it is or as it is decoded, and all else."""
    base, inner = group.base, group.in_features
    weight = base.resident
    if base.device != device or not (weight is None or _is_readable(weight, device, impl)):
        return False
    for block in group.adapters.blocks:
        if not _are_plain(block.factors, group.out_features[block.linear], inner, device, impl):
            return False
    biases = zip(group.biases, group.out_features, strict=True)
    return all(_fits(bias, outer, device, base.dtype) for bias, outer in biases)


def _are_plain(
    factors: LoraFactors, outer: int, inner: int, device: torch.device, impl: str
) -> bool:
    """Whether the kernel can read A [r, inner] and B [outer, r]."""
    a, b = factors.lora_a, factors.lora_b
    # A parameter's data may have been exchanged for data of another shape.
    return (
        a.dtype == b.dtype
        and a.shape[1] == inner
        and b.shape == (outer, a.shape[0])
        and _is_readable(a, device, impl)
        and _is_readable(b, device, impl)
    )


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


def _fits(bias: Tensor | None, outer: int, device: torch.device, dtype: torch.dtype) -> bool:
    return bias is None or (
        bias.device == device
        and bias.dtype == dtype
        and bias.shape == (outer,)
        and bias.is_contiguous()
    )
