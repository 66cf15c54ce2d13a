"""Attention on tensor cores by mma.sync, for capability 8.0 and later.

bfloat16 and float16, heads of up to 128 columns in multiples of 8. Every sum has a fixed order: two
runs give the same bits. Rotation is a launch of its own.
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
    AttentionMmaBwdArgs,
    AttentionMmaFwdArgs,
    dtype_code,
    kernels,
    pointer,
    stream_on,
)


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
    if q.numel() == 0:
        return
    with stream_on(q.device) as stream:
        queries, keys = rotate(q, k, cos, sin, head_dim)
        queries, scale = with_positive_scale(queries, scale)
        inputs, found = readable(queries, keys, v), writable(o)
        kernels().attention_mma_fwd(
            AttentionMmaFwdArgs(
                q=inputs[0].data_ptr(),
                k=inputs[1].data_ptr(),
                v=inputs[2].data_ptr(),
                cu_seqlens=cu_seqlens.data_ptr(),
                parents=pointer(parents),
                o=found[0].data_ptr(),
                lse=lse.data_ptr(),
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
    if q.numel() == 0:
        return
    with stream_on(q.device) as stream:
        inputs = readable(d_o, *rotate(q, k, cos, sin, head_dim), v, o)
        results = [dq, dk, dv]
        found = writable(*results)
        sequences = cu_seqlens.numel() - 1
        delta = lse.new_empty(lse.shape)
        last = None if parents is None else parents.new_empty(sequences)
        kernels().attention_mma_bwd(
            AttentionMmaBwdArgs(
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
                parents=pointer(parents),
                delta=delta.data_ptr(),
                last=pointer(last),
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
        if cos is not None and sin is not None:
            rotate_back(found[:2], results[:2], cos, sin, head_dim)
            found[:2] = results[:2]
        copy_back(found, results)
