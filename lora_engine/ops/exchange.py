"""Tokens for heads, and heads for tokens, between processes that share a batch; with gradients."""

from collections.abc import Sequence

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
    own: Tensor = _ToHeads.apply(by_rank, parts)
    return list(own.split_with_sizes(widths, 1))


def to_tokens(x: Tensor, parts: TokenParts) -> Tensor:
    """Of [T, C / W], this process's columns of all tokens, [t, C]: all columns of its t tokens."""
    y: Tensor = _ToTokens.apply(x, parts)
    return y.flatten(1)


class _ToHeads(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Context[TokenParts], x: Tensor, parts: TokenParts) -> Tensor:
        ctx.kept = parts
        return parts.to_heads(x)

    @staticmethod
    @once_differentiable
    def backward(ctx: Context[TokenParts], dy: Tensor) -> "tuple[Tensor | None, ...]":
        gradients: list[Tensor | None] = [ctx.kept.to_tokens(dy), None]
        return (*gradients,)


class _ToTokens(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Context[TokenParts], x: Tensor, parts: TokenParts) -> Tensor:
        ctx.kept = parts
        return parts.to_tokens(x)

    @staticmethod
    @once_differentiable
    def backward(ctx: Context[TokenParts], dy: Tensor) -> "tuple[Tensor | None, ...]":
        gradients: list[Tensor | None] = [ctx.kept.to_heads(dy), None]
        return (*gradients,)
