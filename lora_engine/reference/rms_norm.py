"""RMSNorm (Zhang and Sennrich, 2019, arXiv:1910.07467)."""

from typing import overload

import torch
from torch import Tensor

from lora_engine.reference.numeric import upcast


@overload
def rms_norm(
    x: Tensor, weight: Tensor, eps: float, *, residual: None = None, offset: float = 0.0
) -> Tensor: ...
@overload
def rms_norm(
    x: Tensor, weight: Tensor, eps: float, *, residual: Tensor, offset: float = 0.0
) -> tuple[Tensor, Tensor]: ...
def rms_norm(
    x: Tensor,  # [..., H]
    weight: Tensor,  # [H]
    eps: float,
    *,
    residual: Tensor | None = None,  # [..., H]
    offset: float = 0.0,
) -> Tensor | tuple[Tensor, Tensor]:
    """`x / sqrt(mean(x²) + eps) * (weight + offset)` over the last dimension, in x's dtype.

    With `residual`, the pair of that for `h = x + residual`, rounded to x's dtype, and `h`.
    """
    h = x if residual is None else (upcast(x) + upcast(residual)).to(x.dtype)
    h32 = upcast(h)
    normed = h32 * torch.rsqrt(h32.square().mean(-1, keepdim=True) + eps)
    y = (normed * (upcast(weight) + offset)).to(x.dtype)
    return y if residual is None else (y, h)
