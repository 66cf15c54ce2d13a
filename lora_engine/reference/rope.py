"""Rotary position embedding (Su et al., 2021, arXiv:2104.09864)."""

import torch
from torch import Tensor

from lora_engine.reference.numeric import upcast
from lora_engine.values import accumulate_dtype


def rope(
    q: Tensor,  # [T, Hq, D]
    k: Tensor | None,  # [T, Hkv, D]
    cos: Tensor,  # [T, R]; with position_ids [P, R]
    sin: Tensor,  # as cos
    *,
    position_ids: Tensor | None = None,  # [T] int64 or int32
    interleaved: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """`rotate` of q and k by the tables' rows, row `position_ids[t]` for token t; q alone if no k.

    Both in their own dtype.
    """
    if position_ids is not None:
        cos, sin = cos[position_ids], sin[position_ids]
    rotated = rotate(q, cos, sin, interleaved=interleaved)
    return rotated if k is None else (rotated, rotate(k, cos, sin, interleaved=interleaved))


def rotate(
    x: Tensor,  # [T, heads, D]
    cos: Tensor,  # [T, R]
    sin: Tensor,  # [T, R]
    *,
    interleaved: bool = False,
) -> Tensor:
    """The first R elements of each head turned, `x cos + turned(x) sin`; the others as they are.

    `turned` takes each pair (a, b) to (-b, a). A pair is elements i and i + R / 2, or 2i and
    2i + 1 if interleaved.
    """
    rotary = cos.shape[-1]
    x32 = upcast(x[..., :rotary])
    if interleaved:
        turned = torch.stack((-x32[..., 1::2], x32[..., 0::2]), dim=-1).flatten(-2)
    else:
        first, second = x32.chunk(2, dim=-1)
        turned = torch.cat((-second, first), dim=-1)
    cos, sin = (table.to(accumulate_dtype(x.dtype))[:, None] for table in (cos, sin))
    y = (x32 * cos + turned * sin).to(x.dtype)
    return y if rotary == x.shape[-1] else torch.cat((y, x[..., rotary:]), dim=-1)
