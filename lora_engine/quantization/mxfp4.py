"""MXFP4: 4-bit floats in blocks of 32 columns that share a power of two.

    value = e2m1 * 2 ** (scale - 127)

The scale is a byte of exponent alone (e8m0). Open Compute Project, Microscaling Formats 1.0, 2023;
the experts of gpt-oss are kept so. Written here as compressed-tensors does: the exponent is that of
the block's absmax, less 2, once the absmax is rounded up from 1.75 times a power of two: its value
would otherwise be clipped from more than 7 to 6.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from lora_engine.quantization import e2m1
from lora_engine.quantization.format import Entry, Scaled, group_absmax, in_groups_

BLOCK = 32
_BIAS = 127


@dataclass(frozen=True)
class Mxfp4:
    """The format of any weight whose columns are whole blocks."""

    @property
    def name(self) -> str:
        """ "mxfp4"."""
        return "mxfp4"

    def layout(self, shape: tuple[int, int]) -> Mapping[str, Entry]:
        """codes [N, K / 2] uint8 and scale [N, K / 32] uint8."""
        if shape[1] % BLOCK:
            raise ValueError(f"mxfp4: {shape[1]} columns are no whole number of blocks of {BLOCK}")
        return {
            "codes": Entry((shape[0], shape[1] // 2), torch.uint8),
            "scale": Entry((shape[0], shape[1] // BLOCK), torch.uint8),
        }

    def decode(
        self, tensors: Mapping[str, Tensor], shape: tuple[int, int], start: int, stop: int
    ) -> Tensor:
        """Rows [stop - start, K], float32."""
        values = e2m1.unpack(tensors["codes"][start:stop])
        return in_groups_(values, Tensor.mul_, _powers(tensors["scale"][start:stop]), BLOCK)

    def packed_rows(self, tensors: Mapping[str, Tensor], start: int, stop: int) -> Scaled:
        """Rows [start, stop) as kernels decode them."""
        scale = _powers(tensors["scale"][start:stop])
        return Scaled(
            codes=tensors["codes"][start:stop], element="e2m1", scale=scale, zero=0.0, group=BLOCK
        )

    @property
    def rows_together(self) -> int:
        """Those of a scale."""
        return 1

    def is_finite(self, tensors: Mapping[str, Tensor]) -> bool:
        """Whether no value is NaN or infinite."""
        return not bool((tensors["scale"] == 255).any())

    def encode(self, w: Tensor, largest: Tensor) -> dict[str, Tensor]:
        """Codes nearest to w over the power of two."""
        mantissa, exponent = torch.frexp(group_absmax(w, BLOCK))  # absmax = mantissa * 2^exponent
        exponent = exponent - 1 + (mantissa >= 0.875).int() - 2
        exponent = torch.where(mantissa == 0, -_BIAS, exponent.clamp(-_BIAS, _BIAS))
        scale = (exponent + _BIAS).to(torch.uint8)
        codes = e2m1.nearest_codes(in_groups_(w.clone(), Tensor.div_, _powers(scale), BLOCK))
        return {"codes": e2m1.pack(codes), "scale": scale}


def _powers(scale: Tensor) -> Tensor:
    """2 ** (scale - 127) as float32, made of its bits: 0 is a subnormal number's."""
    exponents = scale.int()
    return torch.where(exponents == 0, 1 << 22, exponents << 23).view(torch.float32)
