"""Attention within each of several packed sequences, some of which continue others."""

from torch import Tensor

from lora_engine.backends.cpu.launch import dtype_code, kernels, pointer
from lora_engine.backends.cpu.structs import AttentionArgs, AttentionBwdArgs


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
    """Writes o and lse, the logarithm of each query's sum of exponentials.

    Raises ValueError for a scale that is not positive: hidden scores, -inf, are multiplied by it.
    """
    if not scale > 0:
        raise ValueError(f"attention: the C++ kernels take a positive softmax_scale, not {scale}")
    kernels().attention_fwd(
        dtype_code(q.dtype),
        _arguments(q, k, v, cu_seqlens, parents, cos, sin, o, lse, head_dim, scale, causal, window),
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
    kernels().attention_bwd(
        dtype_code(q.dtype),
        AttentionBwdArgs(
            fwd=_arguments(
                q, k, v, cu_seqlens, parents, cos, sin, o, lse, head_dim, scale, causal, window
            ),
            d_o=d_o.data_ptr(),
            dq=dq.data_ptr(),
            dk=dk.data_ptr(),
            dv=dv.data_ptr(),
            do_stride=d_o.stride(0),
            dq_stride=dq.stride(0),
            dk_stride=dk.stride(0),
            dv_stride=dv.stride(0),
        ),
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
) -> AttentionArgs:
    return AttentionArgs(
        q=q.data_ptr(),
        k=k.data_ptr(),
        v=v.data_ptr(),
        cos=pointer(cos),
        sin=pointer(sin),
        cu_seqlens=cu_seqlens.data_ptr(),
        parents=pointer(parents),
        o=o.data_ptr(),
        lse=lse.data_ptr(),
        tokens=q.shape[0],
        sequences=cu_seqlens.numel() - 1,
        q_heads=q.shape[1] // head_dim,
        kv_heads=k.shape[1] // head_dim,
        head_dim=head_dim,
        q_stride=q.stride(0),
        k_stride=k.stride(0),
        v_stride=v.stride(0),
        o_stride=o.stride(0),
        window=window,
        softmax_scale=scale,
        causal=causal,
    )
