"""An embedding with low-rank adapters (Hu et al., 2021, arXiv:2106.09685)."""

from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor

from lora_engine.values import LoraFactors


def lora_embedding(
    ids: Tensor,  # [...] int64
    weight: Tensor,  # [V, H]
    adapters: Sequence[LoraFactors],
    *,
    routes: Tensor | None = None,  # [...] int64
    padding_idx: int | None = None,
) -> Tensor:
    """`weight[ids] + Σ_j [adapter j is the row's] scaling_j (A_j[:, ids])ᵀ B_jᵀ`, [..., H].

    lora_a is [r, V] and lora_b [H, r]. In weight's dtype, to which the adapters are cast; the
    weight gets no gradient, and column `padding_idx` of A gets none. `routes` gives each id the
    adapter with that number and no other (-1: none).
    """
    y = F.embedding(ids, weight.detach())
    for factors in adapters:
        s = F.embedding(ids, factors.lora_a.t(), padding_idx).to(y.dtype)
        if routes is not None:
            s = s * (routes == factors.adapter)[..., None]
        y = y + factors.scaling * F.linear(s, factors.lora_b.to(y.dtype))
    return y
