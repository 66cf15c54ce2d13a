"""Double quantisation: the scales of blocks, quantised in their turn.

Dettmers and others, 2023, arXiv:2305.14314, section 3. Less their mean, scales are in the signed
dynamic code of 8 bits, in blocks of 256; rounding and table are bitsandbytes' (0.50), bit for bit.
They are few, one for a block of a weight: PyTorch's operations do.
"""

from functools import cache

import torch
from torch import Tensor

NESTED_BLOCK = 256  # scales that share an absmax of their own
# bitsandbytes looks codes up in a table over a grid of so many points in [-1, 1].
_GRID = 65536


def quantize_absmax(absmax: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Double quantisation of absmax [B] float32.

    Codes [B] uint8 of `nested_code`, nested_absmax [ceil(B / 256)], and the offset [], the mean.
    Values of a block that is all zeros, once the mean is off, have code 0.
    """
    offset = absmax.mean()
    centred = absmax - offset
    blocks = torch.nn.functional.pad(centred, (0, -centred.numel() % NESTED_BLOCK))
    blocks = blocks.view(-1, NESTED_BLOCK)
    nested_absmax = blocks.abs().amax(dim=1)
    scaled = (blocks * (1.0 / nested_absmax)[:, None]).clamp(-1.0, 1.0)
    points = ((scaled + 1.0) * 0.5 * (_GRID - 1) + 0.5).nan_to_num(0.0).long()
    codes = torch.where(nested_absmax[:, None] > 0, _codes_of_grid(absmax.device)[points], 0)
    return codes.view(-1)[: absmax.numel()].clone(), nested_absmax, offset


@cache
def _codes_of_grid(device: torch.device) -> Tensor:
    """[_GRID] uint8: the code that is nearest to each point."""
    values = nested_code().to(device)
    grid = torch.arange(_GRID, dtype=torch.float32, device=device)
    grid = 2.0 * grid / (_GRID - 1) - 1.0
    return torch.bucketize(grid, (values[:-1] + values[1:]) / 2).to(torch.uint8)


def dequantize_absmax(
    codes: Tensor,  # [B] uint8
    nested_absmax: Tensor,  # [ceil(B / 256)] float32
    nested_code: Tensor,  # [256] float32
    offset: Tensor,  # [] float32
) -> Tensor:
    """absmax [B] float32: the product rounded, then the sum."""
    scales = nested_absmax.repeat_interleave(NESTED_BLOCK)[: codes.numel()]
    return nested_code[codes.long()] * scales + offset


@cache
def nested_code() -> Tensor:
    """[256] float32: the ascending values of the 8-bit code in which bitsandbytes keeps absmax.

    The signed dynamic code (see dynamic_code.py) as float32 arithmetic gives it, a few values of
    which differ in the last bit from the correctly rounded ones.
    """
    # Dtype and device are named: the program may have set others as torch's default.
    dtype, device = torch.float32, "cpu"
    values = [0.0, 1.0]
    for decade in range(7):
        ends = torch.linspace(0.1, 1, 2**decade + 1, dtype=dtype, device=device)
        centres = (10.0 ** (decade - 6) * ((ends[:-1] + ends[1:]) / 2)).tolist()
        values += centres + [-x for x in centres]
    return torch.tensor(values, dtype=dtype, device=device).sort().values
