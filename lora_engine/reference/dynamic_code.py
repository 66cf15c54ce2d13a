"""Block-wise 8-bit dynamic quantisation (Dettmers and others, 2022, arXiv:2110.02861).

A code has seven decades, [10^-7, 10^-6] up to [0.1, 1], and twice as many values in each as in the
one below: relative precision where a block's large values lie, range where its small ones do. A
decade's values are the centres of equal parts of it. With 0 and 1 that makes 256 values, or as many
of both signs with half of them in each decade.
"""

from functools import cache

import torch
from torch import Tensor

BLOCK = 256
DECADES = 7
TINY = 1e-37


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


def quantize_blockwise(
    x: Tensor,  # [P]
    *,
    signed: bool,
) -> tuple[Tensor, Tensor]:
    """Codes [P] uint8 nearest to x / absmax, and absmax [ceil(P / 256)] in x's dtype.

    A positive value never becomes zero in the unsigned code: it is what AdamW divides by. But a
    block of nothing larger than TINY is one of zeros.
    """
    blocks = _in_blocks(x)
    absmax = blocks.abs().amax(dim=1)
    scaled = torch.where(absmax[:, None] > TINY, blocks / absmax[:, None], 0.0)
    code = dynamic_code(signed, x.device).to(x.dtype)
    nearest = torch.bucketize(scaled, (code[1:] + code[:-1]) / 2)
    if not signed:
        nearest = torch.where(scaled > 0, nearest.clamp(min=1), nearest)
    return nearest.to(torch.uint8).view(-1)[: x.numel()], absmax


def dequantize_blockwise(
    codes: Tensor,  # [P] uint8
    absmax: Tensor,  # [ceil(P / 256)]
    *,
    signed: bool,
) -> Tensor:
    """The values [P] that the codes stand for, in absmax's dtype."""
    code = dynamic_code(signed, codes.device).to(absmax.dtype)
    values = code[_in_blocks(codes).int()] * absmax[:, None]
    return values.view(-1)[: codes.numel()]


def _in_blocks(x: Tensor) -> Tensor:
    """x [P] as [ceil(P / 256), 256], zeros behind it."""
    return torch.nn.functional.pad(x, (0, -x.numel() % BLOCK)).view(-1, BLOCK)
