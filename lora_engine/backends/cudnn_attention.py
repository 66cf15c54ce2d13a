"""cuDNN's attention for packed sequences of one length, behind the contract of our own kernels.

`choice` says where it runs. T tokens are B sequences of T / B tokens each, which cuDNN is given as
[B, heads, T / B, head_dim]. For sequences of several lengths PyTorch asks cuDNN for a new plan at
every call. Rotation is a launch of our own, and results are copied into the caller's tensors.

PyTorch keeps cuDNN's plans by the shapes and strides of q, k and v. A plan of the backward pass
holds the strides of o and of its gradient too, and would be run for tensors with others: q's rows
are as far apart as o's, and the gradient's follow each other.
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
    _check(window, parents)
    if q.numel() == 0:
        return
    sequences = cu_seqlens.numel() - 1
    queries, keys, values = heads_of(q, k, v, head_dim=head_dim)
    queries, keys = rotated(queries, keys, cos, sin)
    result, sums, *_ = torch.ops.aten._scaled_dot_product_cudnn_attention(
        *(_batched(x, sequences) for x in (queries, keys, values)),
        None,
        True,
        0.0,
        causal,
        False,
        scale=scale,
    )
    copy_rows(result.transpose(1, 2).flatten(2), o.unflatten(0, (sequences, -1)))
    lse.unflatten(1, (sequences, -1)).copy_(sums.view(sums.shape[:3]).transpose(0, 1))


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
    _check(window, parents)
    if q.numel() == 0:
        return
    sequences = cu_seqlens.numel() - 1
    length = q.shape[0] // sequences
    if cos is None or sin is None:
        o = o.contiguous()
    queries, keys, values, d_out, out = heads_of(q, k, v, d_o.contiguous(), o, head_dim=head_dim)
    queries, keys = rotated(queries, keys, cos, sin, q_columns=o.stride(0))
    sums = lse.unflatten(1, (sequences, length)).transpose(0, 1).contiguous()
    no_dropout = torch.zeros((), dtype=torch.int64, device=q.device)
    gradients = torch.ops.aten._scaled_dot_product_cudnn_attention_backward(
        *(_batched(x, sequences) for x in (d_out, queries, keys, values, out)),
        sums[..., None],
        no_dropout,
        no_dropout,
        None,
        None,
        None,
        length,
        length,
        0.0,
        causal,
        scale=scale,
    )
    raw = [x.transpose(1, 2).flatten(0, 1) for x in gradients]
    write_gradients(raw, (dq, dk, dv), cos, sin, head_dim=head_dim)


def _check(window: int, parents: Tensor | None) -> None:
    if window or parents is not None:
        raise ValueError("cuDNN's attention knows no window and no parents")


def _batched(x: Tensor, sequences: int) -> Tensor:
    """[tokens, heads, head_dim] as [sequences, heads, length, head_dim]."""
    return x.unflatten(0, (sequences, -1)).transpose(1, 2)
