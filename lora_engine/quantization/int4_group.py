"""Integers of 4 bits (or 8) in groups of columns with a scale and a zero point each.

    value = (code - zero) * scale

Three checkpoint formats pack the same numbers, 32 / bits of them to an int32, the first in the
lowest bits, into differently ordered words:

    compressed  compressed-tensors' pack-quantized. codes [N, K/8] along a row; scale [N, G];
                zero [N/8, G] along the rows, or none: then it is 8.
    gptq        Frantar and others, 2022, arXiv:2210.17323. codes [K/8, N] down a column;
                scale [G, N]; zero [G, N/8], one less than it is. gptq_v2: as it is.
    awq         Lin and others, 2023, arXiv:2306.00978. codes [K, N/8], each word's columns in the
                order 0 2 4 6 1 3 5 7; scale [G, N]; zero [G, N/8] in that order too.

With `ordered`, group_of [K] names each column's group (activation order); otherwise groups are of
consecutive columns.
"""

import sys
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from typing import Literal

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

PACKINGS = ("compressed", "gptq", "gptq_v2", "awq")
GROUP = 128  # of what is written here, unless another is asked for
_AWQ_ORDER = (0, 4, 1, 5, 2, 6, 3, 7)  # the place in its word of each of eight columns
_TINY = torch.finfo(torch.float32).tiny


@dataclass(frozen=True)
class Int4Group:
    """The format of one weight.

    group: columns that share scale and zero; 0: all. zeros: whether there are zero points.
    ordered: whether columns name their group. scales: their dtype. bits: 4 or 8.

    Raises ValueError where no checkpoint has such a combination.
    """

    packing: str = "compressed"
    group: int = GROUP
    zeros: bool = False
    ordered: bool = False
    scales: str = "bfloat16"
    bits: int = 4

    def __post_init__(self) -> None:
        if self.packing not in PACKINGS:
            raise ValueError(f"int4: packing {self.packing!r}, expected {', '.join(PACKINGS)}")
        if type(self.group) is not int or self.group < 0:
            raise ValueError(f"int4: block {self.group!r}, expected a number of columns")
        if self.bits not in (4, 8):
            raise ValueError(f"int4: {self.bits} bits; expected 4 or 8")
        if self.packing == "awq" and (self.bits != 4 or self.ordered):
            raise ValueError("int4: AWQ has 4 bits and groups of consecutive columns")
        if self.packing != "compressed" and not self.zeros:
            raise ValueError(f"int4: {self.packing} has zero points")
        scale_dtype(self.scales)

    @property
    def name(self) -> str:
        """ "int4", or "int8_packed" for 8 bits."""
        return "int4" if self.bits == 4 else "int8_packed"

    def layout(self, shape: tuple[int, int]) -> Mapping[str, Entry]:
        """codes and zero int32, scale, group_of int32, in the packing's shapes."""
        n, k = shape
        groups, each = group_count(k, self.group), 32 // self.bits
        if self.packing == "compressed":
            codes, scale, zero = (n, -(-k // each)), (n, groups), (-(-n // each), groups)
        else:
            if n % each or (k % each and self.packing != "awq"):
                raise ValueError(f"int4: {self.packing} packs no weight {list(shape)}")
            codes = (k, n // each) if self.packing == "awq" else (k // each, n)
            scale, zero = (groups, n), (groups, n // each)
        entries = {
            "codes": Entry(codes, torch.int32),
            "scale": Entry(scale, scale_dtype(self.scales)),
        }
        if self.zeros:
            entries["zero"] = Entry(zero, torch.int32)
        if self.ordered:
            entries["group_of"] = Entry((k,), torch.int32)
        return entries

    def decode(
        self, tensors: Mapping[str, Tensor], shape: tuple[int, int], start: int, stop: int
    ) -> Tensor:
        """Rows [stop - start, K], float32."""
        values = self._codes(tensors["codes"], shape, start, stop).float()
        by_row = self.packing == "compressed"
        scale = tensors["scale"][start:stop] if by_row else tensors["scale"][:, start:stop].t()
        scale = scale.float()
        zero = self._zeros(tensors["zero"], start, stop) if self.zeros else None
        if self.ordered:
            of = tensors["group_of"].long()
            values -= float(2 ** (self.bits - 1)) if zero is None else zero[:, of]
            return values.mul_(scale[:, of])
        if zero is None:
            values -= float(2 ** (self.bits - 1))
        else:
            in_groups_(values, Tensor.sub_, zero, self.group)
        return in_groups_(values, Tensor.mul_, scale, self.group)

    def packed_rows(self, tensors: Mapping[str, Tensor], start: int, stop: int) -> Scaled | None:
        """Rows [start, stop) as kernels decode them: codes along a row, groups in their order."""
        if self.packing != "compressed" or self.ordered or sys.byteorder != "little":
            return None
        zero: Tensor | float = float(2 ** (self.bits - 1))
        if self.zeros:
            zero = self._zeros(tensors["zero"], start, stop)
        codes = tensors["codes"][start:stop].view(torch.uint8)
        element: Literal["uint4", "uint8"] = "uint4" if self.bits == 4 else "uint8"
        return Scaled(
            codes=codes,
            element=element,
            scale=tensors["scale"][start:stop].float(),
            zero=zero,
            group=self.group,
        )

    @property
    def rows_together(self) -> int:
        """Those of a scale."""
        return 1

    def is_finite(self, tensors: Mapping[str, Tensor]) -> bool:
        """Whether no value is NaN or infinite."""
        return all_finite(tensors["scale"])

    def encode(self, w: Tensor, largest: Tensor) -> dict[str, Tensor]:
        """Codes nearest to w / scale, in compressed-tensors' packing without zero points.

        A group's scale is its absmax over half of the range of codes. Raises ValueError for
        another packing: their tools choose codes by data.
        """
        if self != Int4Group(group=self.group, scales=self.scales, bits=self.bits):
            raise ValueError(f"int4: nothing is written in {self}")
        half = 2 ** (self.bits - 1)
        scale = (group_absmax(w, self.group) / (half - 0.5)).to(scale_dtype(self.scales))
        steps = scale.float().clamp(min=_TINY)
        codes = in_groups_(w.clone(), Tensor.div_, steps, self.group)
        codes.round_().clamp_(-half, half - 1)
        return {"codes": pack((codes + half).int(), self.bits), "scale": scale}

    def _codes(self, words: Tensor, shape: tuple[int, int], start: int, stop: int) -> Tensor:
        """[stop - start, K] int32."""
        each = 32 // self.bits
        if self.packing == "compressed":
            return unpack(words[start:stop], self.bits)[:, : shape[1]]
        if self.packing != "awq":
            return unpack(words[:, start:stop].t(), self.bits)
        first = start // each
        columns = unpack(words[:, first : -(-stop // each)], 4, _AWQ_ORDER)
        return columns[:, start - first * each : stop - first * each].t().contiguous()

    def _zeros(self, words: Tensor, start: int, stop: int) -> Tensor:
        """[stop - start, G] float32."""
        each = 32 // self.bits
        first = start // each
        last = -(-stop // each)
        words = words[first:last].t() if self.packing == "compressed" else words[:, first:last]
        order = _AWQ_ORDER if self.packing == "awq" else None
        zeros = unpack(words, self.bits, order)[:, start - first * each : stop - first * each]
        if self.packing == "gptq":
            zeros = (zeros + 1) & (2**self.bits - 1)
        return zeros.t().float()


def pack(
    codes: Tensor,  # [N, K] int32, of `bits` bits
    bits: int,
) -> Tensor:
    """[N, ceil(K bits / 32)] int32."""
    each = 32 // bits
    padded = torch.nn.functional.pad(codes, (0, -codes.shape[1] % each))
    shifts = _shifts(tuple(range(each)), bits, codes.device)
    # The fields share no bit: their sum is their union, and wraps into the sign as they do.
    return (padded.unflatten(1, (-1, each)) << shifts).sum(dim=2, dtype=torch.int32)


def unpack(
    words: Tensor,  # [N, W] int32
    bits: int,
    order: tuple[int, ...] | None = None,
) -> Tensor:
    """[N, W 32 / bits] int32. order: the place in its word of each value."""
    shifts = _shifts(order or tuple(range(32 // bits)), bits, words.device)
    return ((words[:, :, None] >> shifts) & (2**bits - 1)).flatten(1)


@cache
def _shifts(places: tuple[int, ...], bits: int, device: torch.device) -> Tensor:
    """The lowest bits of places in a word. Copied to a device once: the host waits for a copy."""
    return torch.tensor([place * bits for place in places], dtype=torch.int32, device=device)
