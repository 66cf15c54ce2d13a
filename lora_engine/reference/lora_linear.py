"""A linear layer with a low-rank adapter (Hu et al., 2021, arXiv:2106.09685)."""

import torch.nn.functional as F
from torch import Tensor


def lora_linear(
    x: Tensor,  # [..., K]
    weight: Tensor,  # [N, K]
    lora_a: Tensor,  # [r, K]
    lora_b: Tensor,  # [N, r]
    scaling: float,
    bias: Tensor | None = None,  # [N]
) -> Tensor:
    """`x Wᵀ + bias + scaling (x Aᵀ) Bᵀ` in x's dtype; the adapter is cast to it."""
    base = F.linear(x, weight, bias)
    return base + scaling * F.linear(F.linear(x, lora_a.to(x.dtype)), lora_b.to(x.dtype))
