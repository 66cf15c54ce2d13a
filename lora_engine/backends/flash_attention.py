"""PyTorch's FlashAttention-2 for packed sequences, behind the contract of our own kernels.

`choice` says where it runs. It takes bfloat16 and float16, and no parents. Its results are copied
into the caller's tensors, and rotation is a launch of our own.
"""

import torch
from torch import Tensor

from lora_engine.backends.torch_attention import copy_rows, heads_of, rotated, write_gradients


def attention_fwd(
    q: Tensor,  # [tokens, q_heads head_dim]
    k: Tensor,  # [tokens, kv_heads head_dim]
    v: Tensor,  # [tokens, kv_heads head_dim]
    cu_seqlens: Tensor,  # [sequences + 1] int32
    cos: Tensor | None,  # [tokens, head_dim] float32
    sin: Tensor | None,  # [tokens, head_dim] float32
    o: Tensor,  # [tokens, q_heads head_dim]
    lse: Tensor,  # [q_heads, tokens] float32
    *,
    head_dim: int,
    scale: float,
    causal: bool,
    window: int,
    parents: Tensor | None = None,  # [sequences] int32
) -> None:
    """Writes o and lse, the logarithm of each query's sum of exponentials."""
    if parents is not None:
        raise ValueError("FlashAttention knows no parents")
    if q.numel() == 0:
        return
    queries, keys, values = heads_of(q, k, v, head_dim=head_dim)
    queries, keys = rotated(queries, keys, cos, sin)
    tokens, (before, behind) = q.shape[0], _sides(window)
    result, sums, *_ = torch.ops.aten._flash_attention_forward(
        queries,
        keys,
        values,
        cu_seqlens,
        cu_seqlens,
        tokens,
        tokens,
        0.0,
        causal,
        False,
        scale=scale,
        window_size_left=before,
        window_size_right=behind,
    )
    copy_rows(result.flatten(1), o)
    lse.copy_(sums)


def attention_bwd(
    d_o: Tensor,  # [tokens, q_heads head_dim]
    q: Tensor,  # [tokens, q_heads head_dim]
    k: Tensor,  # [tokens, kv_heads head_dim]
    v: Tensor,  # [tokens, kv_heads head_dim]
    cu_seqlens: Tensor,  # [sequences + 1] int32
    cos: Tensor | None,  # [tokens, head_dim] float32
    sin: Tensor | None,  # [tokens, head_dim] float32
    o: Tensor,  # [tokens, q_heads head_dim], of the forward pass
    lse: Tensor,  # [q_heads, tokens] float32, of the forward pass
    dq: Tensor,  # [tokens, q_heads head_dim]
    dk: Tensor,  # [tokens, kv_heads head_dim]
    dv: Tensor,  # [tokens, kv_heads head_dim]
    *,
    head_dim: int,
    scale: float,
    causal: bool,
    window: int,
    parents: Tensor | None = None,  # [sequences] int32
) -> None:
    """Writes dq, dk and dv."""
    if parents is not None:
        raise ValueError("FlashAttention knows no parents")
    if q.numel() == 0:
        return
    queries, keys, values, d_out, out = heads_of(q, k, v, d_o, o, head_dim=head_dim)
    queries, keys = rotated(queries, keys, cos, sin)
    tokens, (before, behind) = q.shape[0], _sides(window)
    no_dropout = torch.empty(2, dtype=torch.uint64, device=q.device)
    gradients = torch.ops.aten._flash_attention_backward(
        d_out,
        queries,
        keys,
        values,
        out,
        lse,
        cu_seqlens,
        cu_seqlens,
        tokens,
        tokens,
        0.0,
        causal,
        no_dropout,
        no_dropout.new_empty(0),
        scale=scale,
        window_size_left=before,
        window_size_right=behind,
    )
    write_gradients(gradients, (dq, dk, dv), cos, sin, head_dim=head_dim)


def _sides(window: int) -> tuple[int | None, int | None]:
    """A window as FlashAttention has it: keys before and behind the query, which is not counted."""
    return (window - 1, 0) if window else (None, None)
