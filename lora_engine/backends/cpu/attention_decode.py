"""Attention of one new token of each sequence over the rows of a cache."""

from torch import Tensor

from lora_engine.backends.cpu.launch import dtype_code, kernels, pointer
from lora_engine.backends.cpu.structs import AttentionDecodeArgs


def attention_decode(
    q: Tensor,  # [sequences, q_heads head_dim]
    k: Tensor,  # [sequences, kv_heads head_dim]
    v: Tensor,  # [sequences, kv_heads head_dim]
    cos: Tensor | None,  # [sequences, head_dim] float32
    sin: Tensor | None,  # [sequences, head_dim] float32
    keys: Tensor,  # [slots, kv_heads head_dim]
    values: Tensor,  # [slots, kv_heads head_dim]
    slots: Tensor,  # [sequences] int64
    spans: Tensor,  # [P, 2] int64: a span's first row of the cache, and how many
    cu_spans: Tensor,  # [sequences + 1] int32
    o: Tensor,  # [sequences, q_heads head_dim]
    *,
    head_dim: int,
    scale: float,
    window: int,
) -> None:
    """Writes o, and k (rotated) and v into the cache's rows `slots`."""
    kernels().attention_decode(
        dtype_code(q.dtype),
        AttentionDecodeArgs(
            q=q.data_ptr(),
            k=k.data_ptr(),
            v=v.data_ptr(),
            cos=pointer(cos),
            sin=pointer(sin),
            keys=keys.data_ptr(),
            values=values.data_ptr(),
            slots=slots.data_ptr(),
            spans=spans.data_ptr(),
            cu_spans=cu_spans.data_ptr(),
            o=o.data_ptr(),
            sequences=q.shape[0],
            q_heads=q.shape[1] // head_dim,
            kv_heads=k.shape[1] // head_dim,
            head_dim=head_dim,
            q_stride=q.stride(0),
            k_stride=k.stride(0),
            v_stride=v.stride(0),
            o_stride=o.stride(0),
            cache_stride=keys.stride(0),
            window=window,
            softmax_scale=scale,
        ),
    )
