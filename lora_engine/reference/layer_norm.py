"""LayerNorm (Ba, Kiros and Hinton, 2016, arXiv:1607.06450)."""

import torch
from torch import Tensor

from lora_engine.reference.numeric import upcast


def layer_norm(
    x: Tensor,  # [..., H]
    weight: Tensor | None,  # [H]
    bias: Tensor | None,  # [H]
    eps: float,
) -> Tensor:
    """`(x - mean(x)) / sqrt(var(x) + eps) * weight + bias` over the last dimension, in x's dtype.

    The variance divides by H. No weight is a weight of ones, no bias one of zeros.
    """
    centred = upcast(x) - upcast(x).mean(-1, keepdim=True)
    y = centred * torch.rsqrt(centred.square().mean(-1, keepdim=True) + eps)
    if weight is not None:
        y = y * upcast(weight)
    if bias is not None:
        y = y + upcast(bias)
    return y.to(x.dtype)
