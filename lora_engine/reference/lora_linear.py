"""A linear layer with low-rank adapters (Hu et al., 2021, arXiv:2106.09685), every variant of it.

    y = (x Wᵀ + Σ_j [adapter j is the row's] s_j (drop(x) A_jᵀ) B_jᵀ + s_j b_j) · m / norm + bias

over the linear's adapters j, where
    drop      is the identity without dropout, else `reference.drop`: one mask for all adapters of
              a linear, another one for each linear of a group;
    s_j b_j   is the bias of an adapter's B, where it has one;
    m / norm  is DoRA's scale of a linear's only adapter (`dora_scale`), where it has a magnitude.

Where W has the adapters merged in it, the sum adds nothing: y = x Wᵀ + bias. A and B get the
gradients that they would have if it did.
"""

from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor

from lora_engine.reference.dropout import drop
from lora_engine.reference.numeric import upcast
from lora_engine.values import AdaptedLinear, Dropout


def lora_linear(
    x: Tensor,  # [..., K]
    linear: AdaptedLinear,  # of N outputs
    *,
    dropout: Dropout | None = None,
    substream: int = 0,
    routes: Tensor | None = None,  # [...] int64
    residual: Tensor | None = None,  # [..., N]
) -> Tensor:
    """The formula above, with `residual` added last; [..., N] in x's dtype.

    `substream` is that of `dropout_mask`. `routes` gives each row the adapter with that number and
    no other (-1: none). Adapters are cast to x's dtype.
    """
    y = F.linear(x, linear.weight)
    for factors in linear.adapters:
        a, b, scaling = factors.lora_a, factors.lora_b, factors.scaling
        dropped = x.detach() if linear.merged else x
        if dropout is not None:
            dropped = drop(dropped, dropout, substream)
        if routes is not None:
            dropped = dropped * (routes == factors.adapter)[..., None]
        delta = lora_delta(dropped, a, b, scaling)
        y = y + (delta - delta.detach() if linear.merged else delta)
        if factors.bias is not None:
            y = y + scaling * factors.bias.to(y.dtype)
        if factors.magnitude is not None:
            whole = merged_weight(linear.weight, a, b, scaling)
            y = y * dora_scale(whole, factors.magnitude).to(y.dtype)
    for addend in (linear.bias, residual):
        y = y if addend is None else y + addend
    return y


def lora_group(
    x: Tensor,  # [..., K]
    linears: Sequence[AdaptedLinear],  # of N_i outputs
    *,
    dropout: Dropout | None = None,
    routes: Tensor | None = None,  # [...] int64
) -> tuple[Tensor, ...]:
    """The outputs [..., N_i] of linears that share their input; linear i drops by substream i."""
    return tuple(
        lora_linear(x, linear, dropout=dropout, substream=i, routes=routes)
        for i, linear in enumerate(linears)
    )


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
