"""The type arithmetic is done in."""

import torch
from torch import Tensor


def accumulate_dtype(dtype: torch.dtype) -> torch.dtype:
    """float32, except for float64."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def upcast(x: Tensor) -> Tensor:
    """`x` in the type arithmetic is done in."""
    return x.to(accumulate_dtype(x.dtype))
