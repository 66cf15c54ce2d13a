"""The product with a frozen weight that is made for each pass and not kept in between."""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn

from lora_engine.ops.context import Context

MakeWeight = Callable[[], Tensor]  # [N, K], valid until the next call


def frozen_product(
    x: Tensor,  # [..., K]
    make_weight: MakeWeight,
) -> Tensor:
    """x Wᵀ [..., N] in x's dtype. The backward pass makes W again for dX = dY W."""
    y: Tensor = _FrozenProduct.apply(x, make_weight)
    return y


class _Kept(NamedTuple):
    make_weight: MakeWeight
    dtype: torch.dtype  # of x


class _FrozenProduct(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Context[_Kept], x: Tensor, make_weight: MakeWeight) -> Tensor:
        ctx.kept = _Kept(make_weight, x.dtype)
        return nn.functional.linear(x, make_weight().to(x.dtype))

    @staticmethod
    def backward(ctx: Context[_Kept], dy: Tensor) -> tuple[Tensor | None, None]:
        if not ctx.needs_input_grad[0]:
            return None, None
        return (dy @ ctx.kept.make_weight().to(dy.dtype)).to(ctx.kept.dtype), None
