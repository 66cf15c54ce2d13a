"""What PyTorch's attentions need to stand behind the contract of our own kernels."""

from collections.abc import Sequence

import torch
from torch import Tensor

from lora_engine.backends.triton.rope import rope


def heads_of(*tensors: Tensor, head_dim: int) -> list[Tensor]:
    """Tensors [tokens, heads head_dim] as [tokens, heads, head_dim]."""
    return [x.unflatten(1, (-1, head_dim)) for x in tensors]


def rotated(
    q: Tensor,  # [tokens, q_heads, head_dim]
    k: Tensor,  # [tokens, kv_heads, head_dim]
    cos: Tensor | None,  # [tokens, head_dim]
    sin: Tensor | None,  # [tokens, head_dim]
) -> tuple[Tensor, Tensor]:
    """q and k rotated into memory of their own; themselves without tables."""
    if cos is None or sin is None:
        return q, k
    turned_q, turned_k = (torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (q, k))
    rope(q, k, turned_q, turned_k, cos, sin, None, interleaved=False, inverse=False)
    return turned_q, turned_k


def write_gradients(
    found: Sequence[Tensor],  # of rotated q and k, and of v: [tokens, heads, head_dim]
    wanted: Sequence[Tensor],  # dq, dk, dv [tokens, heads head_dim]
    cos: Tensor | None,  # [tokens, head_dim]
    sin: Tensor | None,  # [tokens, head_dim]
    *,
    head_dim: int,
) -> None:
    """Writes the gradients, those of q and k rotated back."""
    raw_dq, raw_dk, raw_dv = found
    dq, dk, dv = heads_of(*wanted, head_dim=head_dim)
    dv.copy_(raw_dv)
    if cos is None or sin is None:
        dq.copy_(raw_dq)
        dk.copy_(raw_dk)
    else:
        rope(raw_dq, raw_dk, dq, dk, cos, sin, None, interleaved=False, inverse=True)
