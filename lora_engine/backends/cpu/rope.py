"""Rotary position embedding."""

from typing import Any

import torch
from torch import Tensor

from lora_engine.backends.cpu.address import dtype_code, pointer
from lora_engine.backends.extension import native


def rope(
    q: Tensor | None,  # [tokens, q_heads, head_dim], columns one apart
    k: Tensor | None,  # [tokens, kv_heads, head_dim], columns one apart; q or k is given
    q_out: Tensor | None,  # q's shape; may be q
    k_out: Tensor | None,  # k's shape; may be k
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
    native().rope(
        dtype_code(x.dtype),
        _heads(q, q_out),
        _heads(k, k_out),
        dtype_code(cos.dtype),
        cos.data_ptr(),
        sin.data_ptr(),
        pointer(positions),
        x.shape[0],
        x.shape[2],
        cos.shape[1],
        cos.stride(0),
        sin.stride(0),
        interleaved,
        inverse,
    )


def _heads(x: Tensor | None, y: Tensor | None) -> Any:
    make = native().RopeHeads
    if x is None or y is None:
        return make(0, 0, 0, 0, 0, 0, 0)
    strides = x.stride(0), x.stride(1), y.stride(0), y.stride(1)
    return make(x.data_ptr(), y.data_ptr(), x.shape[1], *strides)
