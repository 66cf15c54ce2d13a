"""DoRA (arXiv:2402.09353): the factor that each output is multiplied by before its bias.

scale = magnitude / norm,    norm = ||W + scaling B A|| of each row
"""

from typing import NamedTuple

import torch
from torch import Tensor

from lora_engine.ops.augmented import operand
from lora_engine.ops.lora.adapters import AdapterSet, Block
from lora_engine.ops.lora.base import BaseWeight
from lora_engine.ops.tensors import accumulate_dtype

CHUNK_ROWS = 1024


class MagnitudeScale(NamedTuple):
    """DoRA's scale of each output of a group, and its divisor; both 1 without a magnitude."""

    scale: Tensor  # [N]
    norm: Tensor  # [N]


@torch.no_grad()
def magnitude_scale(base: BaseWeight, adapters: AdapterSet) -> MagnitudeScale | None:
    """The scale by the factors' and magnitudes' present values; None: no adapter is DoRA."""
    if not adapters.has_magnitude:
        return None
    accumulate = accumulate_dtype(base.dtype)
    norm = torch.ones(sum(base.out_features), dtype=accumulate, device=base.device)
    scale = norm.clone()
    for block in adapters.blocks:
        magnitude = block.factors.magnitude
        if magnitude is None:
            continue
        _write_norm(base, block, norm)
        scale[block.rows] = magnitude.to(accumulate) / norm[block.rows]
    return MagnitudeScale(scale, norm)


def _write_norm(base: BaseWeight, block: Block, norm: Tensor) -> None:
    """Writes the norm of the block's rows, CHUNK_ROWS of W + scaling B A at a time."""
    factors, last = block.factors, block.rows.stop
    lora_a = factors.lora_a.to(norm.dtype) * factors.scaling
    lora_b = operand(factors.lora_b.to(norm.dtype))
    for start in range(block.rows.start, last, CHUNK_ROWS):
        rows = slice(start, min(start + CHUNK_ROWS, last))
        of_block = slice(rows.start - block.rows.start, rows.stop - block.rows.start)
        merged = torch.addmm(base.read(rows).to(norm.dtype), lora_b[of_block], lora_a)
        norm[rows] = merged.norm(dim=1)
