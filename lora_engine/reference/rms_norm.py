"""RMSNorm (Zhang and Sennrich, 2019, arXiv:1910.07467)."""

import torch
from torch import Tensor

from lora_engine.reference.numeric import upcast


def rms_norm(
    x: Tensor,  # [..., H]
    weight: Tensor,  # [H]
    eps: float,
) -> Tensor:
    """`x / sqrt(mean(x²) + eps) * weight` over the last dimension, in x's dtype."""
    x32 = upcast(x)
    normed = x32 * torch.rsqrt(x32.square().mean(-1, keepdim=True) + eps)
    return (normed * upcast(weight)).to(x.dtype)
