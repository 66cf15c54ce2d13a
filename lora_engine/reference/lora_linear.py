"""A linear layer with a low-rank adapter (Hu et al., 2021, arXiv:2106.09685)."""

import torch.nn.functional as F
from torch import Tensor

from lora_engine.reference.numeric import upcast


def lora_linear(
    x: Tensor,  # [..., K]
    weight: Tensor,  # [N, K]
    lora_a: Tensor,  # [r, K]
    lora_b: Tensor,  # [N, r]
    scaling: float,
    bias: Tensor | None = None,  # [N]
    magnitude: Tensor | None = None,  # [N]
) -> Tensor:
    """`x Wᵀ + scaling (x Aᵀ) Bᵀ + bias` in x's dtype; the adapter is cast to it.

    With `magnitude` the sum before the bias is scaled as DoRA does (`dora_scale`).
    """
    y = F.linear(x, weight) + lora_delta(x, lora_a, lora_b, scaling)
    if magnitude is not None:
        whole = merged_weight(weight, lora_a, lora_b, scaling)
        y = y * dora_scale(whole, magnitude).to(y.dtype)
    return y if bias is None else y + bias


def lora_delta(
    x: Tensor,  # [..., K]
    lora_a: Tensor,  # [r, K]
    lora_b: Tensor,  # [N, r]
    scaling: float,
) -> Tensor:
    """`scaling (x Aᵀ) Bᵀ` in x's dtype: what the adapter adds."""
    return scaling * F.linear(F.linear(x, lora_a.to(x.dtype)), lora_b.to(x.dtype))


def merged_weight(
    weight: Tensor,  # [N, K]
    lora_a: Tensor,  # [r, K]
    lora_b: Tensor,  # [N, r]
    scaling: float,
) -> Tensor:
    """`W + scaling B A` in float32."""
    return upcast(weight) + scaling * (upcast(lora_b) @ upcast(lora_a))


def dora_scale(
    merged: Tensor,  # [N, K]
    magnitude: Tensor,  # [N]
) -> Tensor:
    """`magnitude / norm` [N] of Liu et al., 2024, arXiv:2402.09353.

    norm is the length of each row of the merged weight; as in the paper's section 4.3 it passes no
    gradient on.
    """
    return magnitude / merged.norm(dim=1).detach().to(magnitude.dtype)
