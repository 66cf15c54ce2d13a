"""Rotary position embedding."""

import torch
from torch import Tensor

from lora_engine.backends.cpu.launch import dtype_code, kernels, pointer
from lora_engine.backends.cpu.structs import RopeArgs, RopeHeads

NO_HEADS = RopeHeads(x=0, y=0, heads=0, x_stride=0, x_head_stride=0, y_stride=0, y_head_stride=0)


def rope(
    q: Tensor | None,  # [tokens, q_heads, head_dim], columns one apart
    k: Tensor | None,  # [tokens, kv_heads, head_dim], columns one apart; q or k is given
    q_out: Tensor | None,  # q's shape
    k_out: Tensor | None,  # k's shape
    cos: Tensor,  # [positions, rotary_dim], columns one apart
    sin: Tensor,  # [positions, rotary_dim], columns one apart
    position_ids: Tensor | None,  # [tokens] int64 or int32, within the tables
    *,
    interleaved: bool,
    inverse: bool,
) -> None:
    """Writes q_out and k_out; `inverse` is the transposed rotation, the backward pass."""
    x = q if q is not None else k
    if x is None:
        return
    if cos.dtype != sin.dtype or cos.dtype == torch.float16:
        cos, sin = cos.float(), sin.float()
    positions = None if position_ids is None else position_ids.to(torch.int64).contiguous()
    kernels().rope(
        dtype_code(x.dtype),
        RopeArgs(
            q=_heads(q, q_out),
            k=_heads(k, k_out),
            cos=cos.data_ptr(),
            sin=sin.data_ptr(),
            position_ids=pointer(positions),
            table_dtype=dtype_code(cos.dtype),
            tokens=x.shape[0],
            head_dim=x.shape[2],
            rotary_dim=cos.shape[1],
            cos_stride=cos.stride(0),
            sin_stride=sin.stride(0),
            interleaved=interleaved,
            inverse=inverse,
        ),
    )


def _heads(x: Tensor | None, y: Tensor | None) -> RopeHeads:
    if x is None or y is None:
        return NO_HEADS
    return RopeHeads(
        x=x.data_ptr(),
        y=y.data_ptr(),
        heads=x.shape[1],
        x_stride=x.stride(0),
        x_head_stride=x.stride(1),
        y_stride=y.stride(0),
        y_head_stride=y.stride(1),
    )
