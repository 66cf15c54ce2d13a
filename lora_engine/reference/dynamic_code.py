"""Block-wise 8-bit dynamic quantisation (Dettmers and others, 2022, arXiv:2110.02861).

Blocks of 256 consecutive values share their largest magnitude; each value takes the nearest code of
`quantization.dynamic_code`.
"""

import torch
from torch import Tensor

from lora_engine.quantization.dynamic_code import BLOCK, dynamic_code

TINY = 1e-37


def quantize_blockwise(
    x: Tensor,  # [P]
    *,
    signed: bool,
) -> tuple[Tensor, Tensor]:
    """Codes [P] uint8 nearest to x / absmax, and absmax [ceil(P / 256)] in x's dtype.

    A positive value never becomes zero in the unsigned code, since AdamW divides by its root; but a
    block whose absmax is TINY or less becomes zeros.
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
