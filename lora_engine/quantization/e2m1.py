"""The 4-bit floats of MXFP4 and NVFP4: a sign, two bits of exponent and one of mantissa.

Codes 0 to 7 are 0, 0.5, 1, 1.5, 2, 3, 4, 6; 8 to 15 are their negatives. Two codes in a byte, the
first in the lower half. Open Compute Project, Microscaling Formats 1.0, 2023.
"""

from functools import cache

import torch
from torch import Tensor

LARGEST = 6.0
_MAGNITUDES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)


@cache
def code_values(device: torch.device) -> Tensor:
    """[16] float32: the values of codes 0 to 15."""
    positive = torch.tensor(_MAGNITUDES, dtype=torch.float32)
    return torch.cat((positive, -positive)).to(device)


@cache
def _bounds(device: torch.device) -> Tensor:
    """[7] float32: the largest magnitude that takes each code below 7.

    A value midway between two takes the one whose mantissa is even: the lower one at every second
    midpoint, the upper one at those between.
    """
    values = torch.tensor(_MAGNITUDES, dtype=torch.float32)
    middles = (values[:-1] + values[1:]) / 2
    below = torch.nextafter(middles, torch.zeros(()))
    odd = torch.arange(7) % 2 == 1
    return torch.where(odd, below, middles).to(device)


def nearest_codes(
    x: Tensor,  # [N, K] float32
) -> Tensor:
    """[N, K] uint8: the codes nearest to x; what is beyond 6 takes 6."""
    magnitudes = torch.bucketize(x.abs(), _bounds(x.device), out_int32=True).to(torch.uint8)
    return magnitudes | (x < 0).to(torch.uint8) << 3


def pack(
    codes: Tensor,  # [N, K] uint8
) -> Tensor:
    """[N, K / 2] uint8."""
    return codes[:, ::2] | codes[:, 1::2] << 4


def unpack(
    packed: Tensor,  # [N, K / 2] uint8
) -> Tensor:
    """The values [N, K] float32."""
    halves = torch.stack((packed & 15, packed >> 4), dim=2)
    return code_values(packed.device)[halves.view(packed.shape[0], -1).int()]
