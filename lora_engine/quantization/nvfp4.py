"""NVFP4: 4-bit floats in blocks of 16 columns with FP8 scales, and one scale for the weight.

    value = e2m1 * (scale / global_scale)

`scale` is an e4m3 value for each block. compressed-tensors keeps the divisor, global_scale =
448 * 6 / absmax; NVIDIA's ModelOpt keeps its reciprocal, and value = e2m1 * (scale * global_scale).
"""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from lora_engine.quantization import e2m1, fp8
from lora_engine.quantization.format import (
    Entry,
    Scaled,
    all_finite,
    e4m3_finite,
    group_absmax,
    in_groups_,
)

BLOCK = 16
_LEAST_SCALE = 2.0**-9  # of e4m3's values above zero
_TINY = torch.finfo(torch.float32).tiny


@dataclass(frozen=True)
class Nvfp4:
    """The format of one weight. divides: whether global_scale is the divisor."""

    divides: bool = True

    @property
    def name(self) -> str:
        """ "nvfp4"."""
        return "nvfp4"

    def layout(self, shape: tuple[int, int]) -> Mapping[str, Entry]:
        """codes [N, K / 2] uint8, scale [N, K / 16] uint8, bits of e4m3, and global_scale []."""
        if shape[1] % BLOCK:
            raise ValueError(f"nvfp4: {shape[1]} columns are no whole number of blocks of {BLOCK}")
        return {
            "codes": Entry((shape[0], shape[1] // 2), torch.uint8),
            "scale": Entry((shape[0], shape[1] // BLOCK), torch.uint8),
            "global_scale": Entry((), torch.float32),
        }

    def decode(
        self, tensors: Mapping[str, Tensor], shape: tuple[int, int], start: int, stop: int
    ) -> Tensor:
        """Rows [stop - start, K], float32."""
        scale = self._scale(tensors["scale"][start:stop], tensors["global_scale"])
        values = e2m1.unpack(tensors["codes"][start:stop])
        return in_groups_(values, Tensor.mul_, scale, BLOCK)

    def packed_rows(self, tensors: Mapping[str, Tensor], start: int, stop: int) -> Scaled:
        """Rows [start, stop) as kernels decode them."""
        scale = self._scale(tensors["scale"][start:stop], tensors["global_scale"])
        return Scaled(
            codes=tensors["codes"][start:stop], element="e2m1", scale=scale, zero=0.0, group=BLOCK
        )

    @property
    def rows_together(self) -> int:
        """Those of a scale."""
        return 1

    def is_finite(self, tensors: Mapping[str, Tensor]) -> bool:
        """Whether no value is NaN or infinite."""
        return all_finite(tensors["global_scale"]) and e4m3_finite(tensors["scale"])

    def encode(self, w: Tensor, largest: Tensor) -> dict[str, Tensor]:
        """Codes nearest to w over its block's scale."""
        whole = (fp8.LARGEST * e2m1.LARGEST / largest.clamp(min=_TINY)).clamp(
            max=torch.finfo(torch.float32).max
        )
        if not self.divides:
            whole = 1 / whole
        steps = group_absmax(w, BLOCK) / e2m1.LARGEST
        steps = steps * whole if self.divides else steps / whole
        scale = steps.clamp(_LEAST_SCALE, fp8.LARGEST).to(torch.float8_e4m3fn).view(torch.uint8)
        steps = self._scale(scale, whole)
        codes = e2m1.nearest_codes(in_groups_(w.clone(), Tensor.div_, steps, BLOCK))
        return {"codes": e2m1.pack(codes), "scale": scale, "global_scale": whole}

    def _scale(self, scale: Tensor, whole: Tensor) -> Tensor:
        values = scale.view(torch.float8_e4m3fn).float()
        return values / whole if self.divides else values * whole
