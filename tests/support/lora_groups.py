"""Groups of linears with adapters, their operands, and comparison with a formula in float64."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from implementations import Backend
from oracle import TOLERANCE
from torch import Tensor

from lora_engine.backends.lora_parts import AdapterPart
from lora_engine.reference.dropout import drop
from lora_engine.testing import assert_as_good_as
from lora_engine.values import Dropout


@dataclass(frozen=True)
class Group:
    """Linears of `outs` rows and `ranks` over an input of `cols`; `gap` columns after each rank."""

    rows: int
    cols: int
    outs: tuple[int, ...]
    ranks: tuple[int, ...]
    gap: int = 0

    def __str__(self) -> str:
        ranks = "+".join(map(str, self.ranks))
        return f"{self.rows}x{self.cols}-r{ranks}" + (f"-gap{self.gap}" if self.gap else "")

    @property
    def spans(self) -> list[tuple[slice, slice]]:
        found, row, column = [], 0, 0
        for out, rank in zip(self.outs, self.ranks, strict=True):
            found.append((slice(row, row + out), slice(column, column + rank)))
            row, column = row + out, column + rank + self.gap
        return found

    @property
    def parts(self) -> list[AdapterPart]:
        """One adapter of each linear, of a scale of its own; see `backends.lora_parts`."""
        return [AdapterPart(*span, 0.5 + i) for i, span in enumerate(self.spans)]

    @property
    def size_of_b(self) -> int:
        """The elements of all adapters' B."""
        return sum(out * rank for out, rank in zip(self.outs, self.ranks, strict=True))

    @property
    def total(self) -> int:
        return sum(self.ranks) + self.gap * len(self.ranks)


GROUPS = [
    Group(63, 96, (130,), (8,)),
    Group(200, 130, (96, 33, 65), (16, 1, 3), gap=2),
    Group(1, 257, (257,), (1,)),
    Group(65, 64, (64, 64), (64, 0)),
    Group(40, 48, (40, 16), (3, 100), gap=1),
    Group(0, 32, (48,), (4,), gap=4),
]
DROPOUTS = [None, Dropout(0.1, 77), Dropout(0.5, 2**63 + 5)]


@dataclass
class Inputs:
    x: Tensor
    weight: Tensor
    lora_a: Tensor
    lora_b: Tensor
    bias: Tensor
    s: Tensor
    dy: Tensor
    ds: Tensor


def view(x: Tensor, spare: int, beside: float = math.nan) -> Tensor:
    """`x` as the front columns of a wider buffer of `beside`."""
    buffer = torch.full((x.shape[0], x.shape[1] + spare), beside).to(x)
    buffer[:, : x.shape[1]] = x
    return buffer[:, : x.shape[1]]


def beside_of_wide(backend: Backend) -> float:
    """What may stand beside operands of the wide products: a vendor's multiplies it by zero."""
    return 1e4 if backend.impl == "cpu" else math.nan


def make(
    group: Group, backend: Backend, dtype: torch.dtype, spare: int = 5, beside: float = math.nan
) -> Inputs:
    """Random operands, views of wider buffers; lora_b and s, ds are zero outside the spans."""
    generator = torch.Generator().manual_seed(0)
    n, k, r = sum(group.outs), group.cols, group.total

    def normal(rows: int, cols: int) -> Tensor:
        values = torch.randn(rows, cols, generator=generator, dtype=torch.float64)
        return view((values * cols**-0.5).to(dtype), spare, beside)

    inputs = Inputs(
        x=normal(group.rows, k),
        weight=normal(n, k),
        lora_a=normal(r, k),
        lora_b=normal(n, r) if r else torch.zeros(n, r, dtype=dtype),
        bias=torch.randn(n, generator=generator, dtype=torch.float64).to(dtype),
        s=normal(group.rows, r) if r else torch.zeros(group.rows, r, dtype=dtype),
        dy=normal(group.rows, n),
        ds=normal(group.rows, r) if r else torch.zeros(group.rows, r, dtype=dtype),
    )
    blocks = torch.zeros(n, r, dtype=torch.bool)
    used = torch.zeros(r, dtype=torch.bool)
    for rows, columns in group.spans:
        blocks[rows, columns] = True
        used[columns] = True
    inputs.lora_b.masked_fill_(~blocks, 0)
    inputs.s.masked_fill_(~used, 0)
    # What is not to be used.
    inputs.ds.masked_fill_(~used, beside)
    inputs.lora_a.masked_fill_(~used[:, None], math.nan)
    for name, tensor in vars(inputs).items():
        wide = tensor if tensor.dim() == 1 or tensor._base is None else tensor._base
        (moved,) = backend.put(wide)
        setattr(inputs, name, moved if wide is tensor else moved[:, : tensor.shape[1]])
    return inputs


def agree(
    actual: Tensor, formula: Callable[..., Tensor], operands: Sequence[Tensor], what: str = "result"
) -> None:
    """As near to the formula in float64 as the formula in the operands' dtype."""
    dtype = operands[0].dtype
    same_operands = [x.cpu().contiguous() for x in operands]
    exact = formula(*[x.double() for x in same_operands])
    same = formula(*same_operands)
    assert_as_good_as(
        actual.cpu().to(same.dtype) if actual.dtype == dtype else actual.cpu(),
        same,
        exact,
        tolerance=TOLERANCE[dtype],
        what=what,
    )


def masked(x: Tensor, dropout: Dropout | None, stream: int) -> Tensor:
    return x if dropout is None else drop(x, dropout, stream)


def wide_nan(rows: int, cols: int, dtype: torch.dtype, backend: Backend) -> Tensor:
    return torch.full((rows, cols + 3), float("nan"), dtype=dtype, device=backend.device)[:, :cols]


def untouched(out: Tensor) -> bool:
    """Whether the columns behind `wide_nan`'s are as they were."""
    assert out._base is not None
    return bool(out._base[:, out.shape[1] :].isnan().all())
