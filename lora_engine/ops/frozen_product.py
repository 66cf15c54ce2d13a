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


class _Needs(NamedTuple):
    """Which of the function's inputs need a gradient."""

    x: bool
    make_weight: bool


class _Gradients(NamedTuple):
    """The gradients of those inputs."""

    x: Tensor | None = None
    make_weight: None = None


class _FrozenProduct(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Context[_Kept], x: Tensor, make_weight: MakeWeight) -> Tensor:
        ctx.kept = _Kept(make_weight, x.dtype)
        return nn.functional.linear(x, make_weight().to(x.dtype))

    @staticmethod
    def backward(ctx: Context[_Kept], dy: Tensor) -> _Gradients:
        if not _Needs(*ctx.needs_input_grad).x:
            return _Gradients()
        return _Gradients(x=(dy @ ctx.kept.make_weight().to(dy.dtype)).to(ctx.kept.dtype))
