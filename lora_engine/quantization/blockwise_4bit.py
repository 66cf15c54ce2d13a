"""NF4 and FP4: blocks of consecutive values with one scale, two codes in a byte.

A weight [N, K] is taken row by row as P = N K values. `block` consecutive ones share an absmax; a
value is that times one of the 16 values of a code. The codes of values 2 i and 2 i + 1 are the
upper and the lower half of byte i.

NF4 (Dettmers and others, 2023, arXiv:2305.14314) has values between which a normal distribution has
about equal mass; FP4 is a sign, two bits of exponent and one of mantissa, over its largest value.
Double quantisation keeps the absmax, less their mean, in an 8-bit dynamic code in blocks of 256.
The layout, the order of rounding and the tables are bitsandbytes' (0.50), bit for bit.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, TypeAlias

import torch
from torch import Tensor

from lora_engine.quantization.format import Entry
from lora_engine.quantization.nested_absmax import NESTED_BLOCK

Code: TypeAlias = Literal["nf4", "fp4"]

BLOCKS = (32, 64, 128, 256, 512, 1024, 2048, 4096)
TINY = 1e-38  # what a block without a larger magnitude is scaled by

# Of codes 0 to 15.
_VALUES: dict[str, tuple[float, ...]] = {
    "nf4": (
        -1.0,
        -0.6961928009986877,
        -0.5250730514526367,
        -0.39491748809814453,
        -0.28444138169288635,
        -0.18477343022823334,
        -0.09105003625154495,
        0.0,
        0.07958029955625534,
        0.16093020141124725,
        0.24611230194568634,
        0.33791524171829224,
        0.44070982933044434,
        0.5626170039176941,
        0.7229568362236023,
        1.0,
    ),
    # Sign, then exponent and mantissa; subnormals below the exponent 1.
    "fp4": tuple(
        sign * magnitude / 12.0
        for sign in (1, -1)
        for magnitude in (0.0, 0.0625, 8.0, 12.0, 4.0, 6.0, 2.0, 3.0)
    ),
}
# The codes from the smallest value to the largest. FP4 has two zeros, of which the first comes
# first: what rounds down to zero is code 0, what rounds up to it would be code 8.
_ASCENDING: dict[str, tuple[int, ...]] = {
    "nf4": tuple(range(16)),
    "fp4": (11, 10, 13, 12, 15, 14, 9, 0, 8, 1, 6, 7, 4, 5, 2, 3),
}


@dataclass(frozen=True)
class Blockwise4bit:
    """The format of one weight.

    block: one of BLOCKS. nested: whether the absmax are quantised too (double quantisation).

    Raises ValueError for another code or block.
    """

    code: Code = "nf4"
    block: int = 64
    nested: bool = False

    def __post_init__(self) -> None:
        if self.code not in _VALUES:
            raise ValueError(f"code {self.code!r}: expected nf4 or fp4")
        if type(self.block) is not int or self.block not in BLOCKS:
            known = ", ".join(map(str, BLOCKS))
            raise ValueError(f"{self.code}: block {self.block!r}, expected one of {known}")

    @property
    def name(self) -> str:
        """ "nf4" or "fp4"."""
        return self.code

    def layout(self, shape: tuple[int, int]) -> Mapping[str, Entry]:
        """codes: two in a byte. absmax: of a block.

        With `nested`, absmax are codes of `nested_code`, times the nested_absmax of 256 of them,
        plus `offset`.
        """
        values = shape[0] * shape[1]
        blocks = -(-values // self.block)
        codes = Entry((-(-values // 2),), torch.uint8)
        if not self.nested:
            return {"codes": codes, "absmax": Entry((blocks,), torch.float32)}
        return {
            "codes": codes,
            "absmax": Entry((blocks,), torch.uint8),
            "nested_absmax": Entry((-(-blocks // NESTED_BLOCK),), torch.float32),
            "nested_code": Entry((256,), torch.float32),
            "offset": Entry((), torch.float32),
        }


def code_values(code: Code, device: torch.device | None = None) -> Tensor:
    """[16] float32: the values of codes 0 to 15."""
    return torch.tensor(_VALUES[code], dtype=torch.float32, device=device)


def ascending_codes(code: Code, device: torch.device | None = None) -> Tensor:
    """[16] uint8: the codes in the order of their values."""
    return torch.tensor(_ASCENDING[code], dtype=torch.uint8, device=device)


def code_bounds(code: Code, device: torch.device | None = None) -> Tensor:
    """[15] float32: midpoints of ascending values; a value on one takes the code below it."""
    ascending = code_values(code, device)[ascending_codes(code, device).long()]
    return (ascending[:-1] + ascending[1:]) / 2
