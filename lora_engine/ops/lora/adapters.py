"""The adapters of a group of linears, and which rows and columns of its factors each has."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TypeAlias

import torch
from torch import Tensor

from lora_engine.backends.lora_parts import AdapterPart
from lora_engine.ops.lora.trained import OfAdapter, OfGroup
from lora_engine.ops.tensors import check, shape_of
from lora_engine.values import LoraFactors

Adapters: TypeAlias = LoraFactors | Sequence[LoraFactors] | None


@dataclass(frozen=True)
class Block:
    """One adapter of one linear: its rows of W and B, its columns of B, which are its rows of A."""

    factors: LoraFactors
    linear: int
    rows: slice
    columns: slice

    @property
    def scales_by_tensor(self) -> bool:
        """Whether the scaling is a tensor, whose value the host does not know."""
        return isinstance(self.factors.scaling, Tensor)


@dataclass(frozen=True)
class AdapterSet:
    """The adapters that a product is taken with. It does not change: switching adapters makes
    another, so that a backward pass finds those of its own forward pass.

    spans: for each linear its rows of W and its columns of B.
    """

    blocks: tuple[Block, ...]
    spans: tuple[tuple[slice, slice], ...]

    @staticmethod
    def of(adapters: Sequence[Adapters], rows: Sequence[slice], in_features: int) -> "AdapterSet":
        """`adapters[i]` is what linear i has, whose rows of W are `rows[i]`.

        Raises ValueError where shapes do not fit, or an adapter with a magnitude is not alone.
        """
        check(len(adapters) == len(rows), "a group of linears takes one entry of adapters for each")
        blocks, spans, column = [], [], 0
        for i, (entry, span) in enumerate(zip(adapters, rows, strict=True)):
            start, members = column, as_tuple(entry)
            check(
                len(members) <= 1 or all(f.magnitude is None for f in members),
                f"linear {i} of the group has several adapters, one of them DoRA",
            )
            for factors in members:
                _check_factors(factors, span.stop - span.start, in_features)
                rank = factors.lora_a.shape[0]
                blocks.append(
                    Block(
                        factors=factors, linear=i, rows=span, columns=slice(column, column + rank)
                    )
                )
                column += rank
            spans.append((span, slice(start, column)))
        return AdapterSet(tuple(blocks), tuple(spans))

    @property
    def rank(self) -> int:
        """The total of all ranks."""
        return self.spans[-1][1].stop if self.spans else 0

    @cached_property
    def parts(self) -> tuple[AdapterPart, ...]:
        """Of each block what its gradient of B is made of; a scaling that is a tensor is left."""
        return tuple(
            AdapterPart(
                rows=b.rows,
                columns=b.columns,
                scale=1.0 if b.scales_by_tensor else b.factors.scaling,
            )
            for b in self.blocks
        )

    @cached_property
    def ranks(self) -> tuple[int, ...]:
        """Of each block, which has as many columns after those of the one before."""
        return tuple(block.columns.stop - block.columns.start for block in self.blocks)

    @cached_property
    def size_of_b(self) -> int:
        """The elements of all adapters' B."""
        return sum(block.factors.lora_b.numel() for block in self.blocks)

    @cached_property
    def has_bias(self) -> bool:
        """Whether any adapter has a bias."""
        return any(block.factors.bias is not None for block in self.blocks)

    @cached_property
    def has_magnitude(self) -> bool:
        """Whether any adapter is DoRA."""
        return any(block.factors.magnitude is not None for block in self.blocks)

    def tensors(self, biases: Sequence[Tensor | None]) -> OfGroup[Tensor | None]:
        """All that a product's gradients go to, for linears that have `biases` of their own."""
        all_factors = [block.factors for block in self.blocks]
        adapters = [
            OfAdapter(lora_a=f.lora_a, lora_b=f.lora_b, magnitude=f.magnitude, bias=f.bias)
            for f in all_factors
        ]
        return OfGroup(adapters, list(biases))

    def route(self, ids: Tensor, columns: int) -> Tensor:
        """Which of S's `columns` each row uses, [M, R] bool, for rows of adapter `ids` [M]."""
        owner = torch.full((columns,), -1, dtype=torch.int64)
        for block in self.blocks:
            owner[block.columns] = block.factors.adapter
        return ids[:, None] == owner.to(ids.device)


def as_tuple(entry: Adapters) -> tuple[LoraFactors, ...]:
    """What a linear has, as a tuple of any length."""
    if entry is None:
        return ()
    return (entry,) if isinstance(entry, LoraFactors) else tuple(entry)


def total_rank(adapters: Sequence[Adapters]) -> int:
    """The ranks of all adapters together."""
    return sum(factors.lora_a.shape[0] for entry in adapters for factors in as_tuple(entry))


def _check_factors(factors: LoraFactors, n: int, k: int) -> None:
    rank = factors.lora_a.shape[0]
    check(
        factors.lora_a.shape == (rank, k) and factors.lora_b.shape == (n, rank),
        f"lora_a {shape_of(factors.lora_a)} and lora_b "
        f"{shape_of(factors.lora_b)} do not fit weight [{n}, {k}]",
    )
    check(
        factors.magnitude is None or factors.magnitude.shape == (n,),
        f"the magnitude does not fit weight [{n}, {k}]",
    )
    check(
        factors.bias is None or (factors.bias.shape == (n,) and factors.magnitude is None),
        f"the adapter's bias does not fit weight [{n}, {k}], or it has a magnitude too",
    )
