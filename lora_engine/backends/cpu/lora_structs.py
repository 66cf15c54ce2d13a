"""The arguments of the CPU kernels for products with adapters, as structs.py has the others'."""

from collections.abc import Sequence
from typing import NamedTuple, TypeAlias

from lora_engine.backends.cpu.structs import Address, DTypeCode
from lora_engine.backends.lora_parts import Span

# An adapter's rows and columns, its scale, and where the gradient of one of its factors goes.
LoraPart: TypeAlias = tuple[slice, slice, float, Address]


class LoraAFwdArgs(NamedTuple):
    x: Address
    lora_a: Address
    s: Address
    copy: Address
    rows: int
    cols: int
    x_stride: int
    a_stride: int
    s_stride: int
    copy_stride: int
    spans: Sequence[Span]


class LoraBBwdArgs(NamedTuple):
    dy: Address
    lora_b: Address
    s: Address
    ds: Address
    row_factors: Address
    scaled_ds: Address
    rows: int
    dy_stride: int
    b_stride: int
    s_stride: int
    ds_stride: int
    scaled_stride: int
    spans: Sequence[Span]
    parts: Sequence[LoraPart]
    adds: bool


class LoraABwdArgs(NamedTuple):
    ds: Address
    x: Address
    d_lora_a: Address
    column_weight: Address
    rows: int
    cols: int
    ds_stride: int
    x_stride: int
    d_stride: int
    column_offset: float
    spans: Sequence[Span]
    parts: Sequence[LoraPart]


class LoraPlacing(NamedTuple):
    factor: Address
    dtype: DTypeCode
    place: Address
    rows: int
    cols: int
    row_stride: int
    col_stride: int
    place_stride: int
    scale: float


class PlaceFactorsArgs(NamedTuple):
    placings: Sequence[LoraPlacing]


class LoraAdapter(NamedTuple):
    lora_a: Address
    lora_b: Address
    dtype: DTypeCode
    ranks: int
    a_stride: int
    b_stride: int
    scaling: float


class LoraBase(NamedTuple):
    rows: int
    bias: Address
    adapters: int


class FewRowsArgs(NamedTuple):
    x: Address
    weight: Address
    residual: Address
    y: Address
    rows: int
    cols: int
    x_stride: int
    w_stride: int
    residual_stride: int
    y_stride: int
    linears: Sequence[LoraBase]
    adapters: Sequence[LoraAdapter]
