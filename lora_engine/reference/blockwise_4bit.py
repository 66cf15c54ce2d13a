"""NF4 and FP4 in float32 arithmetic; the format is `quantization.blockwise_4bit`'s."""

import torch
from torch import Tensor

from lora_engine.quantization.blockwise_4bit import (
    TINY,
    Code,
    ascending_codes,
    code_bounds,
    code_values,
)


def quantize_4bit(
    w: Tensor,  # [N, K]
    *,
    code: Code,
    block: int,
) -> tuple[Tensor, Tensor]:
    """Codes [ceil(P / 2)] uint8 of the values nearest to w / absmax, absmax [ceil(P / block)].

    A value is multiplied by 1 / absmax, but divided by it in a last block that is not full.
    """
    flat = w.detach().reshape(-1).float()
    full = flat.numel() // block * block
    whole, rest = flat[:full].view(-1, block), flat[full:]
    absmax = whole.abs().amax(dim=1) if full else flat.new_empty(0)
    scaled = (whole * (1.0 / absmax.clamp(min=TINY))[:, None]).view(-1)
    if rest.numel():
        last = rest.abs().amax().clamp(min=TINY)
        absmax = torch.cat([absmax, last[None]])
        scaled = torch.cat([scaled, rest / last])
    scaled = torch.nn.functional.pad(scaled, (0, scaled.numel() % 2))
    codes = ascending_codes(code, w.device)[torch.bucketize(scaled, code_bounds(code, w.device))]
    return codes[::2] << 4 | codes[1::2], absmax


def dequantize_4bit(
    codes: Tensor,  # [ceil(P / 2)] uint8
    absmax: Tensor,  # [ceil(P / block)] float32
    *,
    first: int,
    count: int,
    code: Code,
    block: int,
) -> Tensor:
    """Values [count] float32, of which the first is value `first` of the weight."""
    places = torch.arange(first, first + count, device=codes.device)
    byte = codes[places // 2]
    nibbles = torch.where(places % 2 == 0, byte >> 4, byte & 15)
    return code_values(code, codes.device)[nibbles.long()] * absmax[places // block]
