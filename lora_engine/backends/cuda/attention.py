"""Attention on tensor cores of capability 9.0.

`choice` says where it runs: heads of 64 and 128 in bfloat16 or float16, neither window nor parents.
dQ is summed in float32 by atomic additions: two runs differ in the last bits. Rotation is a launch
of its own.
"""

import torch
from torch import Tensor

from lora_engine.backends.cuda.launch import (
    AttentionBwdArgs,
    AttentionFwdArgs,
    dtype_code,
    kernels,
    stream_on,
)
from lora_engine.backends.torch_attention import heads_of, rotated
from lora_engine.backends.triton.rope import rope

# Queries in a tile of the backward pass by the head size, and keys, as
# csrc/cuda/attention_bwd_tiles.cuh.
TILE_ROWS = {64: 128, 128: 64}
TILE_KEYS = 128
ALIGNMENT = 16  # bytes
DENSE = torch.contiguous_format
# Scores are multiplied by at least so much: -infinity stays what it is.
LEAST_SCALE = 1e-30


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
        raise ValueError("attention in CUDA C++ knows no parents")
    if q.numel() == 0:
        return
    queries, keys = heads_of(q, k, head_dim=head_dim)
    queries, keys = rotated(queries, keys, cos, sin)
    if scale < 0:
        queries, scale = -queries, -scale
    inputs = [_readable(x) for x in (queries.flatten(1), keys.flatten(1), v)]
    found = o if _is_aligned(o) else torch.empty_like(o, memory_format=DENSE)
    taken = cu_seqlens.new_empty(())
    with stream_on(q.device) as stream:
        kernels().attention_fwd(
            AttentionFwdArgs(
                q=inputs[0].data_ptr(),
                k=inputs[1].data_ptr(),
                v=inputs[2].data_ptr(),
                cu_seqlens=cu_seqlens.data_ptr(),
                o=found.data_ptr(),
                lse=lse.data_ptr(),
                taken=taken.data_ptr(),
                stride_q=inputs[0].stride(0),
                stride_k=inputs[1].stride(0),
                stride_v=inputs[2].stride(0),
                stride_o=found.stride(0),
                tokens=q.shape[0],
                sequences=cu_seqlens.numel() - 1,
                heads=q.shape[1] // head_dim,
                kv_heads=k.shape[1] // head_dim,
                head_dim=head_dim,
                causal=causal,
                window=window,
                dtype=dtype_code(q.dtype),
                scale=max(scale, LEAST_SCALE),
            ),
            stream,
        )
    if found is not o:
        o.copy_(found)


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
    if window or parents is not None:
        raise ValueError("attention in CUDA C++ knows no window and no parents")
    if q.numel() == 0:
        return
    queries, keys = heads_of(q, k, head_dim=head_dim)
    queries, keys = rotated(queries, keys, cos, sin)
    inputs = [_readable(x) for x in (d_o, queries.flatten(1), keys.flatten(1), v, o)]
    results = dq, dk, dv
    found = [x if _is_aligned(x) else torch.empty_like(x, memory_format=DENSE) for x in results]
    heads, sequences = q.shape[1] // head_dim, cu_seqlens.numel() - 1
    rows = TILE_ROWS[head_dim]
    tiles = heads * (q.shape[0] // rows + sequences)
    stats = lse.new_empty(tiles * 2 * rows)
    dq_sum = lse.new_empty(tiles * rows * head_dim)
    order = cu_seqlens.new_empty(q.shape[0] // TILE_KEYS + sequences)
    with stream_on(q.device) as stream:
        kernels().attention_bwd(
            AttentionBwdArgs(
                d_o=inputs[0].data_ptr(),
                q=inputs[1].data_ptr(),
                k=inputs[2].data_ptr(),
                v=inputs[3].data_ptr(),
                o=inputs[4].data_ptr(),
                lse=lse.data_ptr(),
                dq=found[0].data_ptr(),
                dk=found[1].data_ptr(),
                dv=found[2].data_ptr(),
                cu_seqlens=cu_seqlens.data_ptr(),
                stats=stats.data_ptr(),
                dq_sum=dq_sum.data_ptr(),
                order=order.data_ptr(),
                stride_do=inputs[0].stride(0),
                stride_q=inputs[1].stride(0),
                stride_k=inputs[2].stride(0),
                stride_v=inputs[3].stride(0),
                stride_o=inputs[4].stride(0),
                stride_dq=found[0].stride(0),
                stride_dk=found[1].stride(0),
                stride_dv=found[2].stride(0),
                tokens=q.shape[0],
                sequences=sequences,
                heads=heads,
                kv_heads=k.shape[1] // head_dim,
                head_dim=head_dim,
                causal=causal,
                dtype=dtype_code(q.dtype),
                scale=scale,
            ),
            stream,
        )
    if cos is not None and sin is not None:
        raw = heads_of(*found[:2], head_dim=head_dim)
        turned = heads_of(dq, dk, head_dim=head_dim)
        rope(*raw, *turned, cos, sin, None, interleaved=False, inverse=True)
        found[:2] = results[:2]
    for written, result in zip(found, results, strict=True):
        if written is not result:
            result.copy_(written)


def _is_aligned(x: Tensor) -> bool:
    """Whether bulk copies can read its rows."""
    return x.data_ptr() % ALIGNMENT == 0 and x.stride(0) * x.element_size() % ALIGNMENT == 0


def _readable(x: Tensor) -> Tensor:
    """x, or a copy that is aligned."""
    return x if _is_aligned(x) else x.clone(memory_format=DENSE)
