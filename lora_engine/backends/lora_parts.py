"""The adapters of a LoRA group as launchers take them: where factors go and gradients come from."""

from collections.abc import Sequence
from typing import NamedTuple, TypeAlias

import torch
from torch import Tensor

from lora_engine.values import LoraFactors

# A linear's rows of [N, ...] and its columns of [..., R]. A group's columns ascend.
Span: TypeAlias = tuple[slice, slice]


class AdapterPart(NamedTuple):
    """One adapter of a group: its linear's rows of B, its columns, and what multiplies B."""

    rows: slice
    columns: slice
    scale: float


class Placing(NamedTuple):
    """One adapter's factors, and where products read them."""

    factors: LoraFactors
    lora_a: Tensor  # [r, K], of the group's [R, K]
    lora_b: Tensor  # [n, r], of the group's [N, R]

    def by_torch(self) -> None:
        """Writes A and scaling * B into lora_a and lora_b with PyTorch's operations.

        For factors that a kernel cannot read where they are: tensor subclasses, other layouts
        and devices, scalings that are tensors.
        """
        with torch.no_grad():
            self.lora_a.copy_(self.factors.lora_a)
            torch.mul(self.factors.lora_b, self.factors.scaling, out=self.lora_b)


class Added(NamedTuple):
    """Where a backward pass adds the gradients of one adapter's A and B, float32.

    None: that factor needs no gradient.
    """

    part: AdapterPart
    lora_a: Tensor | None  # [r, K], contiguous
    lora_b: Tensor | None  # [n, r], contiguous


class GroupLinear(NamedTuple):
    """One linear of a group, for a product of few rows."""

    rows: int  # of the group's weight
    bias: Tensor | None  # [rows]
    adapters: int  # how many of the group's adapters, which stand in order, are its own


class GroupAdapter(NamedTuple):
    """One adapter of a group, for a product of few rows; both factors of one dtype."""

    lora_a: Tensor  # [r, K], rows any stride apart, as lora_b's
    lora_b: Tensor  # [n, r]
    scaling: float


class ScaledRows(NamedTuple):
    """dS once more with each row times a factor, of dS as it is rounded."""

    factors: Tensor  # [M] float32
    ds: Tensor  # [M, R]: to be written


class ScaledColumns(NamedTuple):
    """What each column of dA is multiplied by: weight + offset, as a norm multiplies x."""

    weight: Tensor  # [K]
    offset: float


class DyGradients(NamedTuple):
    """What `lora_b_bwd` has beside dY."""

    lora_b: Tensor  # [N, R]
    s: Tensor  # [M, R]
    ds: Tensor  # [M, R]
    d_lora_b: Tensor | None  # [E] float32
    spans: Sequence[Span]
    parts: Sequence[AdapterPart] = ()
    scaled: ScaledRows | None = None


class XGradient(NamedTuple):
    """What `lora_a_bwd` has beside X, without dropout."""

    ds: Tensor  # [M, R]
    d_lora_a: Tensor  # [R, K] float32
    spans: Sequence[Span]


def split_parts(d_lora_b: Tensor, parts: Sequence[AdapterPart]) -> list[Tensor]:
    """Each part's [n, r] of d_lora_b [E], which holds them one after the other."""
    split, place = [], d_lora_b.storage_offset()
    for rows, columns, _ in parts:
        n, r = rows.stop - rows.start, columns.stop - columns.start
        split.append(d_lora_b.as_strided((n, r), (r, 1), place))
        place += n * r
    return split
