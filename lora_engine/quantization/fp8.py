"""FP8: a sign, 4 bits of exponent and 3 of mantissa (e4m3fn), with a scale for a block of values.

    value = e4m3 * scale

A block is the whole weight, a row, or a tile of rows and columns, 128 by 128 in DeepSeek's and
Qwen's checkpoints, where the scale is called weight_scale_inv. Written here, scale = absmax / 448,
448 being e4m3's largest value. Micikevicius and others, 2022, arXiv:2209.05433.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from lora_engine.quantization.format import (
    Entry,
    Scaled,
    all_finite,
    e4m3_finite,
    group_count,
    in_groups_,
    scale_dtype,
)

LARGEST = 448.0
TILE = 128
_TINY = torch.finfo(torch.float32).tiny


@dataclass(frozen=True)
class Fp8:
    """The format of one weight.

    rows, cols: of a block that shares a scale; 0: all of them, of rows only with those of columns.
    scales: their dtype.

    Raises ValueError for blocks that are no whole number of rows and columns, or unknown scales.
    """

    rows: int = 1
    cols: int = 0
    scales: str = "float32"

    def __post_init__(self) -> None:
        for size in (self.rows, self.cols):
            if type(size) is not int or size < 0 or (self.rows == 0 and size):
                raise ValueError(f"fp8: blocks of {self.rows!r} by {self.cols!r}")
        scale_dtype(self.scales)

    @property
    def name(self) -> str:
        """ "fp8"."""
        return "fp8"

    def layout(self, shape: tuple[int, int]) -> Mapping[str, Entry]:
        """codes [N, K] uint8, the bits of e4m3 values, and scale: one for each block."""
        blocks = (group_count(shape[0], self.rows), group_count(shape[1], self.cols))
        return {
            "codes": Entry(shape, torch.uint8),
            "scale": Entry(blocks, scale_dtype(self.scales)),
        }

    def decode(
        self, tensors: Mapping[str, Tensor], shape: tuple[int, int], start: int, stop: int
    ) -> Tensor:
        """Rows [stop - start, K], float32."""
        values = tensors["codes"][start:stop].view(torch.float8_e4m3fn).float()
        scale = self._of_rows(tensors["scale"], start, stop)
        return in_groups_(values, Tensor.mul_, scale, self.cols)

    def packed_rows(self, tensors: Mapping[str, Tensor], start: int, stop: int) -> Scaled:
        """Rows [start, stop) as kernels decode them."""
        scale = self._of_rows(tensors["scale"], start, stop).float()
        return Scaled(
            codes=tensors["codes"][start:stop],
            element="e4m3",
            scale=scale,
            zero=0.0,
            group=self.cols,
        )

    @property
    def rows_together(self) -> int:
        """Those of a scale."""
        return self.rows or 1

    def is_finite(self, tensors: Mapping[str, Tensor]) -> bool:
        """Whether no value is NaN or infinite."""
        return all_finite(tensors["scale"]) and e4m3_finite(tensors["codes"])

    def encode(self, w: Tensor, largest: Tensor) -> dict[str, Tensor]:
        """Codes of the e4m3 values nearest to w / scale."""
        n, k = w.shape
        if self.rows == 0:  # and so are the columns
            largest = largest.view(1, 1)
        else:
            cols = self.cols or k
            down, across = group_count(n, self.rows), group_count(k, cols)
            padded = torch.nn.functional.pad(w, (0, across * cols - k, 0, down * self.rows - n))
            largest = padded.view(down, self.rows, across, cols).abs().amax(dim=(1, 3))
        scale = (largest / LARGEST).to(scale_dtype(self.scales))
        steps = self._of_rows(scale.float().clamp(min=_TINY), 0, n)
        scaled = in_groups_(w.clone(), Tensor.div_, steps, self.cols).clamp_(-LARGEST, LARGEST)
        return {"codes": scaled.to(torch.float8_e4m3fn).view(torch.uint8), "scale": scale}

    def _of_rows(self, scale: Tensor, start: int, stop: int) -> Tensor:
        """The scales of rows [start, stop), a row of them each; one row where all share it."""
        if self.rows == 0:
            return scale
        if self.rows == 1:
            return scale[start:stop]
        return scale[torch.arange(start, stop, device=scale.device) // self.rows]
