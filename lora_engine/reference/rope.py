"""Rotary position embedding (Su et al., 2021, arXiv:2104.09864), half-rotated layout."""

import torch
from torch import Tensor

from lora_engine.reference.numeric import upcast


def rope(
    x: Tensor,  # [T, heads, D]
    cos: Tensor,  # [T, D]
    sin: Tensor,  # [T, D]
) -> Tensor:
    """`x cos + rotate_half(x) sin` for each head, in x's dtype."""
    x32 = upcast(x)
    first, second = x32.chunk(2, dim=-1)
    rotated = torch.cat((-second, first), dim=-1)
    return (x32 * upcast(cos)[:, None] + rotated * upcast(sin)[:, None]).to(x.dtype)
