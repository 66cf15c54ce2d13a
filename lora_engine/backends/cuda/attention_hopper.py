"""Attention on tensor cores of capability 9.0.

`choice` says where it runs: heads of 64 and 128 in bfloat16 or float16, neither window nor parents.
dQ is summed in float32 by atomic additions: two runs differ in the last bits. Rotation is a launch
of its own.
"""

from torch import Tensor

from lora_engine.backends.cuda.attention_operands import (
    copy_back,
    readable,
    rotate,
    rotate_back,
    with_positive_scale,
    writable,
)
from lora_engine.backends.cuda.launch import (
    AttentionBwdArgs,
    AttentionFwdArgs,
    dtype_code,
    kernels,
    stream_on,
)

# Queries in a tile of the backward pass by the head size, and keys, as
# csrc/cuda/attention_bwd_tiles.cuh.
TILE_ROWS = {64: 128, 128: 64}
TILE_KEYS = 128


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
        raise ValueError("attention for capability 9.0 knows no parents")
    if q.numel() == 0:
        return
    queries, keys = rotate(q, k, cos, sin, head_dim)
    queries, scale = with_positive_scale(queries, scale)
    inputs, found = readable(queries, keys, v), writable(o)
    taken = cu_seqlens.new_empty(())
    with stream_on(q.device) as stream:
        kernels().attention_fwd(
            AttentionFwdArgs(
                q=inputs[0].data_ptr(),
                k=inputs[1].data_ptr(),
                v=inputs[2].data_ptr(),
                cu_seqlens=cu_seqlens.data_ptr(),
                o=found[0].data_ptr(),
                lse=lse.data_ptr(),
                taken=taken.data_ptr(),
                stride_q=inputs[0].stride(0),
                stride_k=inputs[1].stride(0),
                stride_v=inputs[2].stride(0),
                stride_o=found[0].stride(0),
                tokens=q.shape[0],
                sequences=cu_seqlens.numel() - 1,
                heads=q.shape[1] // head_dim,
                kv_heads=k.shape[1] // head_dim,
                head_dim=head_dim,
                causal=causal,
                window=window,
                dtype=dtype_code(q.dtype),
                scale=scale,
            ),
            stream,
        )
    copy_back(found, [o])


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
        raise ValueError("attention's backward pass for capability 9.0 knows no window or parents")
    if q.numel() == 0:
        return
    inputs = readable(d_o, *rotate(q, k, cos, sin, head_dim), v, o)
    results = [dq, dk, dv]
    found = writable(*results)
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
        rotate_back(found[:2], results[:2], cos, sin, head_dim)
        found[:2] = results[:2]
    copy_back(found, results)
