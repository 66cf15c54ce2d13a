"""Rotary position embedding."""

from torch import Tensor

from lora_engine import backends
from lora_engine.cpu.address import dtype_code


def rope(
    x: Tensor,  # [tokens, heads, head_dim], heads dense
    y: Tensor,  # the same shape; may be x
    cos: Tensor,  # [tokens, head_dim] float32
    sin: Tensor,  # [tokens, head_dim] float32
    *,
    inverse: bool,
) -> None:
    """Writes y; `inverse` is the transposed rotation, the backward pass."""
    tokens, heads, head_dim = x.shape
    backends.native().rope(
        dtype_code(x.dtype),
        x.data_ptr(),
        y.data_ptr(),
        cos.data_ptr(),
        sin.data_ptr(),
        tokens,
        heads,
        head_dim,
        x.stride(0),
        y.stride(0),
        inverse,
    )
