"""What a format of packed weights says of itself, whichever it is."""

from collections.abc import Callable, Mapping
from typing import Literal, NamedTuple, Protocol

import torch
from torch import Tensor

_LOOKED_AT = 1 << 18  # values


class Entry(NamedTuple):
    """A tensor of a packed weight."""

    shape: tuple[int, ...]
    dtype: torch.dtype


class Format(Protocol):
    """A frozen dataclass: how the bits of one weight [N, K] are laid out.

    Its fields are strings, integers and booleans, so that a file can hold them as JSON.
    """

    @property
    def name(self) -> str:
        """What users and `backends.choice.FORMATS` call it."""

    def layout(self, shape: tuple[int, int]) -> Mapping[str, Entry]:
        """The tensors of a weight [N, K]; `codes`, the largest, is always one of them.

        Raises ValueError for a shape that the format cannot hold.
        """


class Scaled(NamedTuple):
    """Rows of a weight as codes with scales: (code - zero) * scale * factor, in float32.

    codes: uint8, a row its bytes. element: what a code is; of four bits two are in a byte, the
    first in its lower half. scale, zero: for each `group` columns (0: all of them) of a row, or of
    all rows; zero is one number where all have it.
    """

    codes: Tensor  # [rows, bytes]
    element: Literal["int8", "uint8", "e4m3", "e2m1", "uint4"]
    scale: Tensor  # [rows or 1, G] float32
    zero: Tensor | float  # [rows, G] float32
    group: int
    factor: float = 1.0


class BlockScales(NamedTuple):
    """Scales of blocks: absmax, or the values of its codes, scaled by blocks of 256 and offset."""

    absmax: Tensor  # [blocks] float32, or uint8 with the others
    nested_absmax: Tensor | None = None  # [ceil(blocks / 256)] float32
    nested_code: Tensor | None = None  # [256] float32
    offset: Tensor | None = None  # [] float32


class Blocks(NamedTuple):
    """Rows of a weight as blocks of a GGUF file, whose type is `type`."""

    codes: Tensor  # [rows, bytes] uint8
    type: str


class TorchFormat(Format, Protocol):
    """A format that PyTorch's operations decode, on any device."""

    def packed_rows(
        self, tensors: Mapping[str, Tensor], start: int, stop: int
    ) -> Scaled | Blocks | None:
        """Rows [start, stop) as kernels decode them; None where none does."""

    def decode(
        self,
        tensors: Mapping[str, Tensor],  # those of layout(shape)
        shape: tuple[int, int],
        start: int,
        stop: int,
    ) -> Tensor:
        """Rows [stop - start, K] of the weight, float32, in new memory."""

    def is_finite(self, tensors: Mapping[str, Tensor]) -> bool:
        """Whether no value of the weight is NaN or infinite."""


class WritableFormat(TorchFormat, Protocol):
    """A format that weights can be put in."""

    @property
    def rows_together(self) -> int:
        """Rows that have to be encoded at once; a weight's last may be fewer."""

    def encode(
        self,
        w: Tensor,  # [rows, K] float32, finite, contiguous
        largest: Tensor,  # []
    ) -> dict[str, Tensor]:
        """The tensors of `layout` for some rows of a weight whose largest magnitude is `largest`.

        Each value becomes the code that is nearest, or next to it.
        """


def scale_dtype(name: str) -> torch.dtype:
    """The dtype of scales by its name. Raises ValueError for a name that is none of theirs."""
    dtypes = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
    if name not in dtypes:
        raise ValueError(f"scales of {name}: expected one of {', '.join(dtypes)}")
    return dtypes[name]


def group_count(cols: int, group: int) -> int:
    """Groups of so many columns in a row, of which the last may be shorter; 0 stands for one."""
    return -(-cols // group) if group else 1


def in_groups_(
    values: Tensor,  # [R, K] float32, contiguous
    operation: Callable[[Tensor, Tensor], Tensor],  # in place: Tensor.mul_, div_, sub_
    of_group: Tensor,  # [R, G] or [1, G]
    group: int,
) -> Tensor:
    """`values`, changed by `operation` with what their group of columns has."""
    cols = values.shape[1]
    of_group = of_group.float()
    if group == 0 or group >= cols:
        return operation(values, of_group)
    full = cols // group
    operation(values[:, : full * group].unflatten(1, (full, group)), of_group[:, :full, None])
    if full * group < cols:
        operation(values[:, full * group :], of_group[:, full:])
    return values


def group_absmax(
    w: Tensor,  # [N, K] float32
    group: int,
) -> Tensor:
    """[N, G]: the largest magnitude of each group of columns."""
    cols = w.shape[1]
    count = group_count(cols, group)
    size = group or cols
    padded = torch.nn.functional.pad(w, (0, count * size - cols)) if count * size > cols else w
    return padded.unflatten(1, (count, size)).abs().amax(dim=2)


def all_finite(tensor: Tensor) -> bool:
    """Whether no value is NaN or infinite. Of a large tensor parts are looked at in turn."""
    parts = tensor.reshape(-1).split(_LOOKED_AT)
    return all(bool(part.isfinite().all()) for part in parts)


def e4m3_finite(bits: Tensor) -> bool:
    """Whether no byte is one of e4m3fn's two NaNs; it has no infinity."""
    parts = bits.reshape(-1).split(_LOOKED_AT)
    return not any(bool((part & 0x7F == 0x7F).any()) for part in parts)
