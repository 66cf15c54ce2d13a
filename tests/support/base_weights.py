"""Base weights that are kept otherwise than a DenseBase is, and whose operands nobody can keep.

What they lend is NaN as soon as the loan is over, and they refuse a second loan beside it.
"""

import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

from lora_engine.distributed.world import ALONE
from lora_engine.ops import (
    BaseWeight,
    DenseBase,
    LoraGroup,
    QuantizedBase,
    QuantizedWeight,
    quantize_weight,
    shard_weight,
)
from lora_engine.ops.lora.adapters import Adapters, AdapterSet, total_rank
from lora_engine.ops.lora.base import Factors
from lora_engine.ops.lora.sharded_base import ShardedBase


class LentBase:
    """Weights kept in float64, and blocks of `height` of their rows lent in the products' dtype."""

    format = "dense"
    is_augmentable = False
    merges = False
    factors: Factors | None = None
    resident: Tensor | None = None

    def __init__(self, weights: Sequence[Tensor], height: int) -> None:
        self.out_features = tuple(weight.shape[0] for weight in weights)
        self.in_features = weights[0].shape[1]
        self.dtype, self.device = weights[0].dtype, weights[0].device
        whole = torch.cat([weight.detach() for weight in weights]).to("cpu", torch.float64)
        self._stored = [block.clone() for block in whole.split(height)]
        self._is_lent = False

    def merged(self, adapters: AdapterSet) -> "LentBase":
        return self

    def weight(self, i: int) -> Tensor | None:
        return None

    def read(self, rows: slice) -> Tensor:
        return torch.cat(self._stored)[rows].to(self.device, self.dtype)

    def blocks(self) -> Iterable[tuple[slice, Tensor]]:
        heights = [len(block) for block in self._stored]
        for stop, height in zip(itertools.accumulate(heights), heights, strict=True):
            rows = slice(stop - height, stop)
            with self._lend(self.read(rows)) as block:
                yield rows, block

    def forward_operand(self, lora_b: Tensor) -> "contextmanager[Tensor]":
        raise AssertionError("blocks of rows have no columns for factors")

    backward_operand = forward_operand

    @contextmanager
    def _lend(self, operand: Tensor) -> Iterator[Tensor]:
        assert not self._is_lent, "two products at a time"
        self._is_lent = True
        try:
            yield operand
        finally:
            operand.fill_(float("nan"))
            self._is_lent = False


class BlockBase(LentBase):
    """W in blocks of seven rows, which end where no linear does."""

    def __init__(self, weights: Sequence[Tensor]) -> None:
        super().__init__(weights, 7)


class ScratchBase(LentBase):
    """W with the factors around it, made for each product, as of weights that are decoded."""

    is_augmentable = True

    def __init__(self, weights: Sequence[Tensor]) -> None:
        super().__init__(weights, sum(weight.shape[0] for weight in weights))

    def forward_operand(self, lora_b: Tensor) -> "contextmanager[Tensor]":
        return self._lend(torch.cat((self._whole(), lora_b), dim=1).t())

    def backward_operand(self, lora_a: Tensor) -> "contextmanager[Tensor]":
        return self._lend(torch.cat((self._whole(), lora_a)))

    def _whole(self) -> Tensor:
        return self.read(slice(0, sum(self.out_features)))


class Pieces(BlockBase):
    """A storage with a format of its own, for weights that a DenseBase would keep too."""

    format = "pieces"
    takes = staticmethod(DenseBase.takes)

    def __init__(self, weights: Sequence[Tensor], rank: int) -> None:
        super().__init__(weights)


def nf4(weight: Tensor) -> QuantizedWeight:
    """In blocks of 32, of which rows of these tests' widths end inside some."""
    return quantize_weight(weight, "nf4", block=32, double_quant=False)


def kept(kind: str, weights: Sequence[Tensor]) -> list[Tensor]:
    """What a base of this kind keeps of the weights: a rounded one quantises to itself."""
    return [nf4(weight).dequantize() if kind == "nf4" else weight for weight in weights]


BASES: dict[str, Callable[[Sequence[Tensor], int], BaseWeight]] = {
    "dense": DenseBase,
    "blocks": lambda weights, rank: BlockBase(weights),
    "scratch": lambda weights, rank: ScratchBase(weights),
    "nf4": lambda weights, rank: QuantizedBase([nf4(weight) for weight in weights]),
    "sharded": lambda weights, rank: ShardedBase([shard_weight(w, ALONE) for w in weights]),
}


def _is_kept(kind: str) -> bool:
    weight = torch.linspace(-1, 1, 32).view(2, 16)
    return torch.equal(kept(kind, [weight])[0], weight)


# Those that keep any weights as they are given.
LOSSLESS = [kind for kind in BASES if _is_kept(kind)]


def group_over(
    kind: str,
    weights: Sequence[Tensor],  # [N_i, K]
    adapters: Sequence[Adapters],
    biases: Sequence[Tensor | None] | None = None,  # [N_i]
) -> LoraGroup:
    """A group over the base of this kind."""
    return LoraGroup(BASES[kind](weights, total_rank(adapters)), adapters, biases)
