"""INT8: signed integers of 8 bits with a scale for each row, or for each group of columns.

    value = code * scale

As torchao's weight-only and compressed-tensors' integer checkpoints keep them: codes in
[-127, 127] when written here, and scale = absmax / 127. bitsandbytes' LLM.int8 (Dettmers and
others, 2022, arXiv:2208.07339) keeps a row's absmax itself, and value = code * absmax * (1 / 127),
rounded after each product.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from lora_engine.quantization.format import (
    Entry,
    Scaled,
    all_finite,
    group_absmax,
    group_count,
    in_groups_,
    scale_dtype,
)

_TINY = torch.finfo(torch.float32).tiny


@dataclass(frozen=True)
class Int8:
    """The format of one weight.

    group: consecutive columns of a row that share a scale; 0: all of them. absmax: whether the
    scales are bitsandbytes' absmax. scales: their dtype.

    Raises ValueError for a group that is no whole number of columns, or unknown scales.
    """

    group: int = 0
    absmax: bool = False
    scales: str = "float32"

    def __post_init__(self) -> None:
        if type(self.group) is not int or self.group < 0:
            raise ValueError(f"int8: block {self.group!r}, expected a number of columns")
        scale_dtype(self.scales)

    @property
    def name(self) -> str:
        """ "int8"."""
        return "int8"

    def layout(self, shape: tuple[int, int]) -> Mapping[str, Entry]:
        """codes [N, K] int8 and scale [N, G]."""
        groups = group_count(shape[1], self.group)
        return {
            "codes": Entry(shape, torch.int8),
            "scale": Entry((shape[0], groups), scale_dtype(self.scales)),
        }

    def decode(
        self, tensors: Mapping[str, Tensor], shape: tuple[int, int], start: int, stop: int
    ) -> Tensor:
        """Rows [stop - start, K], float32."""
        values = tensors["codes"][start:stop].float()
        in_groups_(values, Tensor.mul_, tensors["scale"][start:stop], self.group)
        return values.mul_(1 / 127) if self.absmax else values

    def packed_rows(self, tensors: Mapping[str, Tensor], start: int, stop: int) -> Scaled:
        """Rows [start, stop) as kernels decode them."""
        codes = tensors["codes"][start:stop].view(torch.uint8)
        scale = tensors["scale"][start:stop].float()
        return Scaled(
            codes=codes,
            element="int8",
            scale=scale,
            zero=0.0,
            group=self.group,
            factor=1 / 127 if self.absmax else 1.0,
        )

    @property
    def rows_together(self) -> int:
        """Those of a scale."""
        return 1

    def is_finite(self, tensors: Mapping[str, Tensor]) -> bool:
        """Whether no value is NaN or infinite."""
        return all_finite(tensors["scale"])

    def encode(self, w: Tensor, largest: Tensor) -> dict[str, Tensor]:
        """Codes of the integers nearest to w / scale."""
        largest = group_absmax(w, self.group)
        scale = (largest if self.absmax else largest / 127).to(scale_dtype(self.scales))
        if self.absmax:
            steps = 127.0 / scale.float().clamp(min=127 * _TINY)
            codes = in_groups_(w.clone(), Tensor.mul_, steps, self.group)
        else:
            codes = in_groups_(w.clone(), Tensor.div_, scale.float().clamp(min=_TINY), self.group)
        codes.round_().clamp_(-127, 127)
        return {"codes": codes.to(torch.int8), "scale": scale}
