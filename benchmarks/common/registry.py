"""What a kernel benchmark consists of. The cases themselves are in cases.py.

A case is named by its operation's stem and builds a `Problem` for a size and dtype: inputs, our
function, the same in PyTorch as people write it, the oracle, and how much work there is to do.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TypeAlias

import torch
from torch import Tensor

from benchmarks.common.measure import Matmul
from benchmarks.train.train_flops import ModelShape

Function: TypeAlias = Callable[..., Tensor | tuple[Tensor, ...]]

EPS = 1e-5


@dataclass(frozen=True)
class Contender:
    """An implementation of a case.

    in_place: it changes its inputs, where ours need not.
    timed: where it has arrays of its own kind, makes of the inputs what is timed, with the backward
        pass or without; None: the function itself is.
    """

    function: Function
    in_place: bool = False
    timed: Callable[[Sequence[Tensor], bool], Callable[[], object]] | None = None


@dataclass(frozen=True)
class Work:
    """What one call cannot avoid: bytes moved, or floating-point operations.

    amount: bytes, or operations with a multiply-add as two.
    matmuls: None if memory bounds the case (the ceiling is then a copy of as many bytes), else
        the products whose measured rate is the ceiling.
    arithmetic: operations on each byte where memory bounds the case, exp and its like as one; they
        place it in the roofline, and nothing else depends on them.
    """

    amount: int
    matmuls: tuple[Matmul, ...] | None = None
    arithmetic: float = 0.0

    @property
    def unit(self) -> str:
        return "GB/s" if self.matmuls is None else "GFLOP/s"

    def intensity(self, itemsize: int) -> float:
        """Operations for each byte that has to be moved, of operands of `itemsize` bytes."""
        if self.matmuls is None:
            return self.arithmetic
        moved = sum(p.m * p.k + p.n * p.k + p.m * p.n for p in self.matmuls) * itemsize
        return self.amount / moved


@dataclass(frozen=True)
class Problem:
    """One case at one size.

    inputs: leaf tensors, the functions' arguments; those that require a gradient get one.
    ours, eager: the implementations; eager is what a PyTorch user writes, in the inputs' dtype.
    oracle: the reference; it is called with float64 copies of the inputs.
    forward, both: work of a forward pass without gradients, and with the backward pass; `both` is
        None for an operation without a gradient.
    in_place: the functions change their inputs.
    more: further ways to do it, in PyTorch or forced, by what they are called in the results.
    operation: what it measures of lora_engine.ops, where the case has another name.
    """

    inputs: tuple[Tensor, ...]
    ours: Function
    eager: Function
    oracle: Function
    forward: Work
    both: Work | None
    in_place: bool = False
    more: Mapping[str, Function] = field(default_factory=dict)
    operation: str | None = None


@dataclass(frozen=True)
class Size:
    """Sizes of a model and of the packed batch it sees."""

    model: ModelShape
    lengths: tuple[int, ...]
    targets: int
    rank: int = 16

    @property
    def tokens(self) -> int:
        return sum(self.lengths)

    def at_most(self, tokens: int, targets: int) -> "Size":
        """The same model with the first of these tokens and targets."""
        lengths: list[int] = []
        for length in self.lengths:
            lengths.append(min(length, tokens - sum(lengths)))
        kept = tuple(length for length in lengths if length)
        return replace(self, lengths=kept, targets=min(targets, self.targets))


Builder: TypeAlias = Callable[[Size, torch.dtype, torch.device], Problem]


def pointwise(rows: int, cols: int, head_dim: int) -> Size:
    """Rows of `cols` numbers, whatever they are: a model's width, its MLP's, its heads together.

    An eighth of them are targets.
    """
    heads = cols // head_dim
    return Size(
        ModelShape(1, cols, cols, heads, max(1, heads // 4), head_dim, 49152),
        (rows // 8,) * 8,
        rows // 8,
    )


LLAMA_8B = ModelShape(32, 4096, 14336, 32, 8, 128, 128256)
POINTWISE = {
    "8192x4096": pointwise(8192, 4096, 128),
    "8192x576": pointwise(8192, 576, 64),
    "4096x4096": pointwise(4096, 4096, 128),
    "8192x1536": pointwise(8192, 1536, 64),
    "8192x14336": pointwise(8192, 14336, 128),
}
SIZES = {
    "tiny": Size(ModelShape(2, 32, 48, 4, 2, 8, 97), (5, 1, 7), 4, rank=4),
    "smollm2": Size(
        ModelShape(30, 576, 1536, 9, 3, 64, 49152), (270, 87, 208, 85, 97, 90, 62, 246), 84
    ),
    "llama-8b": Size(LLAMA_8B, (512,) * 2, 128),
    "hopper": Size(LLAMA_8B, (1024,) * 8, 8192),
    **POINTWISE,
}
# SmolLM2's layers for batches of M tokens in one sequence: how time grows with M.
SWEEP = {
    f"smollm2-m{m}": replace(SIZES["smollm2"], lengths=(m,), targets=max(1, m // 8))
    for m in (16, 64, 256, 1024, 4096)
}
SIZES |= SWEEP
CASES: dict[str, Builder] = {}


def case(builder: Builder) -> Builder:
    """Register a builder under its function's name."""
    CASES[builder.__name__] = builder
    return builder


def as_tuple(outputs: Tensor | Sequence[Tensor]) -> tuple[Tensor, ...]:
    """The outputs of a `Function`, always as a tuple."""
    return (outputs,) if isinstance(outputs, Tensor) else tuple(outputs)
