"""Tokens for heads, and heads for tokens, between processes that share a batch; with gradients."""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from lora_engine.distributed.token_parts import TokenParts
from lora_engine.ops.context import Context
from lora_engine.ops.once_differentiable import once_differentiable
from lora_engine.ops.tensors import check


def to_heads(tensors: Sequence[Tensor], parts: TokenParts) -> list[Tensor]:
    """Of each [t, C], the columns of this process's t tokens, [T, C / W]: a W-th of the columns, of
    all tokens, in the order of tokens; one exchange for all tensors.

    All processes of `parts.world` call it, in the backward pass too. Raises ValueError where W does
    not divide the columns.
    """
    size = parts.world.size
    widths = [x.shape[1] // size for x in tensors]
    for x, width in zip(tensors, widths, strict=True):
        check(width * size == x.shape[1], f"to_heads: {size} do not divide {x.shape[1]} columns")
    by_rank = torch.cat([x.unflatten(1, (size, -1)) for x in tensors], 2)
    own: Tensor = _Exchange.apply(by_rank, parts.to_heads, parts.to_tokens)
    return list(own.split_with_sizes(widths, 1))


def to_tokens(x: Tensor, parts: TokenParts) -> Tensor:
    """Of [T, C / W], this process's columns of all tokens, [t, C]: all columns of its t tokens."""
    y: Tensor = _Exchange.apply(x, parts.to_tokens, parts.to_heads)
    return y.flatten(1)


class _Gradients(NamedTuple):
    x: Tensor
    there: None = None
    back: None = None


class _Exchange(torch.autograd.Function):
    """`there(x)`; its gradient goes `back`, the inverse."""

    @staticmethod
    def forward(
        ctx: Context[Callable[[Tensor], Tensor]],
        x: Tensor,
        there: Callable[[Tensor], Tensor],
        back: Callable[[Tensor], Tensor],
    ) -> Tensor:
        ctx.kept = back
        return there(x)

    @staticmethod
    @once_differentiable
    def backward(ctx: Context[Callable[[Tensor], Tensor]], dy: Tensor) -> _Gradients:
        return _Gradients(ctx.kept(dy))
