"""Attention as PyTorch and transformers compute it, where `ops.attention` cannot run."""

from contextlib import nullcontext

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from lora_engine import backends
from lora_engine.models.attach.masks import dense_mask
from lora_engine.models.attach.sequences import of_mask
from lora_engine.values import accumulate_dtype


def added_mask(
    mask: Tensor | None, query: Tensor, keys: int, causal: bool, window: int | None
) -> Tensor | None:
    """A mask as eager attention adds it to the scores, [B, 1, Q, K] in the query's dtype.

    For a static cache `generate` has called `padding_mask` itself.
    """
    batch, _, length, _ = query.shape
    if mask is None and causal and length > 1:  # of tokens that are first in their cache
        mask = query.new_ones(1, 1, length, keys, dtype=torch.bool).tril()
        mask = mask.triu(1 - window) if window else mask
    elif mask is not None and mask.dim() == 2:
        bounds, index = of_mask(mask)
        seen = dense_mask(bounds, index, batch, length, causal=causal, window=window or 0)
        mask = seen & (mask != 0)[:, None, :, None]
    if mask is None or mask.dtype != torch.bool:
        return mask
    lowest = torch.finfo(query.dtype).min
    return query.new_zeros(mask.shape).masked_fill(~mask.to(query.device), lowest)


def sdpa(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    scaling: float | None,
    dropout: float,
    **kwargs: object,
) -> tuple[Tensor, None]:
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    additive = mask is not None and mask.is_floating_point()
    one = backends.takes_one_query(query.shape[2], query.device, query.dtype, dropout=dropout != 0)
    blind = mask is not None and (one or additive) and _blinds(mask)
    # PyTorch's kernel where a mask differs by head, or leaves a query without a key.
    if one and not blind and (mask is None or mask.shape[1] == 1):
        return _of_one_query(query, key, value, mask, scaling), None
    # Under an additive mask a query without a key has equal probabilities. Only the MATH backward
    # gives them: the others subtract lse from scores so low that it is lost in rounding.
    with sdpa_kernel(SDPBackend.MATH) if additive and blind else nullcontext():
        result: tuple[Tensor, None] = sdpa_attention_forward(
            module, query, key, value, mask, dropout=dropout, scaling=scaling, **kwargs
        )
    return result


def _of_one_query(
    query: Tensor,  # [B, Hq, 1, D]
    key: Tensor,  # [B, Hkv, K, D]
    value: Tensor,  # [B, Hkv, K, Dv]
    mask: Tensor | None,  # [B or 1, 1, 1, K], bool or added to the scores
    scaling: float | None,
) -> Tensor:
    """Attention of one new token, [B, 1, Hq, Dv]; query heads of one key are one product."""
    batch, heads, _, head_dim = query.shape
    number = accumulate_dtype(query.dtype)
    scaling = head_dim**-0.5 if scaling is None else scaling
    grouped = query.reshape(batch, key.shape[1], -1, head_dim).to(number) * scaling
    scores = grouped @ key.to(number).transpose(2, 3)
    if mask is not None:
        allowed = mask.dtype == torch.bool
        scores = scores.masked_fill(~mask, -torch.inf) if allowed else scores + mask
    out = scores.softmax(-1) @ value.to(number)
    return out.view(batch, 1, heads, -1).to(query.dtype)


def _blinds(mask: Tensor) -> bool:
    """Whether a mask [B, 1, Q, K], bool or added to the scores, takes every key from a query."""
    if mask.dtype == torch.bool:
        return not bool(mask.any(-1).all())
    return bool((mask <= torch.finfo(mask.dtype).min).all(-1).any())
