"""Attention within each of several packed sequences, some of which continue others."""

from torch import Tensor

from lora_engine.backends.cpu.address import dtype_code, pointer
from lora_engine.backends.extension import native


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
    native().attention_fwd(
        dtype_code(q.dtype),
        *_arguments(
            q, k, v, cu_seqlens, parents, cos, sin, o, lse, head_dim, scale, causal, window
        ),
    )


def attention_bwd(
    d_o: Tensor,  # [tokens, q_heads head_dim]
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens: Tensor,
    cos: Tensor | None,
    sin: Tensor | None,
    o: Tensor,
    lse: Tensor,
    dq: Tensor,  # shaped as q, k, v
    dk: Tensor,
    dv: Tensor,
    *,
    head_dim: int,
    scale: float,
    causal: bool,
    window: int,
    parents: Tensor | None = None,
) -> None:
    """Writes dq, dk and dv; o and lse are the forward pass's."""
    native().attention_bwd(
        dtype_code(q.dtype),
        *_arguments(
            q, k, v, cu_seqlens, parents, cos, sin, o, lse, head_dim, scale, causal, window
        ),
        d_o.data_ptr(),
        dq.data_ptr(),
        dk.data_ptr(),
        dv.data_ptr(),
        d_o.stride(0),
        dq.stride(0),
        dk.stride(0),
        dv.stride(0),
    )


def _arguments(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens: Tensor,
    parents: Tensor | None,
    cos: Tensor | None,
    sin: Tensor | None,
    o: Tensor,
    lse: Tensor,
    head_dim: int,
    scale: float,
    causal: bool,
    window: int,
) -> tuple[int | float | bool, ...]:
    return (
        q.data_ptr(),
        k.data_ptr(),
        v.data_ptr(),
        pointer(cos),
        pointer(sin),
        cu_seqlens.data_ptr(),
        pointer(parents),
        o.data_ptr(),
        lse.data_ptr(),
        q.shape[0],
        cu_seqlens.numel() - 1,
        q.shape[1] // head_dim,
        k.shape[1] // head_dim,
        head_dim,
        q.stride(0),
        k.stride(0),
        v.stride(0),
        o.stride(0),
        window,
        scale,
        causal,
    )
