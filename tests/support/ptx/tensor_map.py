"""Tensor maps: what cuTensorMapEncodeTiled describes, in bytes of this machine's own."""

import struct
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

MAGIC = 0x70616D726F736E74
SWIZZLES = (0, 32, 64, 128)
# Numbers that core/bulk.cpp knows types by; others can be copied, not reduced.
TYPES = {
    torch.float32: 1,
    torch.float16: 2,
    torch.bfloat16: 3,
    torch.float64: 4,
    torch.int32: 6,
    torch.uint8: 0,
    torch.int8: 0,
    torch.float8_e4m3fn: 0,
    torch.float8_e5m2: 0,
}


@dataclass
class TensorMap:
    """Boxes of a tensor for cp.async.bulk.tensor.

    tensor: whose memory it is, and whose dtype. dims, box: elements, innermost first; by default
    the tensor's own dims. strides: bytes from the second dimension on. swizzle: 0, 32, 64 or 128.
    Raises ValueError for what cuTensorMapEncodeTiled refuses.
    """

    tensor: Tensor
    box: Sequence[int]
    swizzle: int = 0
    dims: Sequence[int] = field(default=())
    strides: Sequence[int] = field(default=())

    def __post_init__(self) -> None:
        size = self.tensor.element_size()
        if not self.dims:
            self.dims = tuple(reversed(self.tensor.shape))
            self.strides = tuple(s * size for s in reversed(self.tensor.stride()[:-1]))
            if self.tensor.stride(-1) != 1:
                raise ValueError("the innermost dimension of a tensor map is contiguous")
        rank = len(self.dims)
        inner = self.box[0] * size
        wrong = [
            (not 1 <= rank <= 5, "between one and five dimensions"),
            (len(self.box) != rank or len(self.strides) != rank - 1, "a box and strides to fit"),
            (self.tensor.data_ptr() % 16 != 0, "an address that is a multiple of 16"),
            (any(s % 16 for s in self.strides), "strides that are multiples of 16 bytes"),
            (any(not 0 < b <= 256 for b in self.box), "boxes of 1 to 256 elements a dimension"),
            (inner % 16 != 0, "a box whose rows are multiples of 16 bytes"),
            (self.swizzle not in SWIZZLES, "a swizzle of 0, 32, 64 or 128"),
            (
                bool(self.swizzle) and inner > self.swizzle,
                "a box no wider than its swizzle",
            ),
            (any(d <= 0 for d in self.dims), "dimensions of at least one element"),
        ]
        for fails, rule in wrong:
            if fails:
                raise ValueError(f"a tensor map needs {rule}: {self}")

    def __bytes__(self) -> bytes:
        def five(values: Sequence[int]) -> list[int]:
            return [*values, *[0] * (5 - len(values))]

        packed = struct.pack(
            "<QQ4I5I5I4Q",
            MAGIC,
            self.tensor.data_ptr(),
            len(self.dims),
            self.tensor.element_size(),
            self.swizzle,
            TYPES.get(self.tensor.dtype, 0),
            *five(self.dims),
            *five(self.box),
            *[*self.strides, *[0] * (4 - len(self.strides))],
        )
        return packed.ljust(128, b"\0")
