"""The 8-bit dynamic code (Dettmers and others, 2022, arXiv:2110.02861).

A code has seven decades, [10^-7, 10^-6] up to [0.1, 1], and twice as many values in each as in the
one below: relative precision where a block's large values lie, range where its small ones do. A
decade's values are the centres of equal parts of it. With 0 and 1 that makes 256 values, or as many
of both signs with half of them in each decade.
"""

from functools import cache

import torch
from torch import Tensor

BLOCK = 256  # consecutive values that share an absmax
DECADES = 7


@cache
def dynamic_code(signed: bool, device: torch.device | None = None) -> Tensor:
    """The values of the 256 codes, [256] float32, ascending."""
    magnitudes = []
    for decade in range(DECADES):
        parts = 2**decade if signed else 2 ** (decade + 1)
        centres = 0.1 + 0.9 * (torch.arange(parts, dtype=torch.float64) + 0.5) / parts
        magnitudes.append(centres * 10.0 ** (decade + 1 - DECADES))
    positive = torch.cat(magnitudes)
    ends = torch.tensor([0.0, 1.0], dtype=torch.float64)
    values = torch.cat((-positive, positive, ends) if signed else (positive, ends))
    return values.sort().values.float().to(device)
