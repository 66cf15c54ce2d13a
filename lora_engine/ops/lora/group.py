"""A group of linears that share their input: the frozen base weight, its adapters, its biases."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from lora_engine import backends
from lora_engine.backends import lora_contracts
from lora_engine.backends.request import Product
from lora_engine.ops.lora.adapters import Adapters, AdapterSet, total_rank
from lora_engine.ops.lora.base import BaseWeight, DenseBase, Factors, padded_rank
from lora_engine.ops.lora.dora import MagnitudeScale, magnitude_scale
from lora_engine.ops.lora.placed import PlacedFactors
from lora_engine.ops.tensors import accumulate_dtype, check


@dataclass(frozen=True)
class Filling:
    """The adapters' values as one product uses them: see `LoraGroup.fill`.

    write: the count of `PlacedFactors.writes` after their factors were placed.
    base: the weight that is multiplied by.
    added: the factors that products add to it, zero where it has the adapters in it.
    """

    write: int
    base: BaseWeight
    added: Factors
    adapters: AdapterSet
    biases: tuple[Tensor | None, ...]  # [N_i]: the linears' own
    bias: Tensor | None  # [N] in the base's dtype: of the linears and adapters
    dora: MagnitudeScale | None

    @cached_property
    def tensors(self) -> tuple[Tensor | None, ...]:
        """What gradients go to, in a row: see `OfGroup`."""
        return tuple(self.adapters.tensors(self.biases).row())


class LoraGroup:
    """Linears that share their input, with LoRA: what `lora_linear` multiplies by.

    `adapters[i]` is what linear i has: nothing, one adapter, or several that add up. `fill` copies
    A, B, biases and magnitudes from their tensors before every product, which is so made with their
    present values.

    `capacity` is the least total rank to keep place for: `set_adapters` may put others in later. A
    base that has a place for factors of its own ignores it.
    """

    def __init__(
        self,
        base: BaseWeight,
        adapters: Sequence[Adapters],
        biases: Sequence[Tensor | None] | None = None,  # [N_i]
        *,
        capacity: int = 0,
    ) -> None:
        self.base, self.out_features = base, base.out_features
        self.in_features = base.in_features
        self.biases = tuple(biases) if biases is not None else (None,) * len(base.out_features)
        self.rows = spans(base.out_features)
        factors = base.factors
        if factors is None:
            factors = _new_factors(base, max(capacity, total_rank(adapters)))
        self.placed = PlacedFactors(factors)
        self._nothing = Factors(*map(torch.zeros_like, factors)) if base.merges else factors
        self.set_adapters(adapters)

    @staticmethod
    def dense(
        weights: Sequence[Tensor],  # [N_i, K]
        adapters: Sequence[Adapters],
        biases: Sequence[Tensor | None] | None = None,  # [N_i]
        *,
        capacity: int = 0,
    ) -> "LoraGroup":
        """A group over a DenseBase, which copies the weights."""
        base = DenseBase(weights, max(capacity, total_rank(adapters)))
        return LoraGroup(base, adapters, biases)

    @property
    def padded_rank(self) -> int:
        """R: the columns of S, of which the adapters' may be fewer."""
        return self.placed.rank

    def forward_strategy(self, rows: int) -> str:
        """How Y [rows, N] is made: one of `backends.STRATEGIES`."""
        return self._strategy(rows, sum(self.out_features), self.in_features, False)

    def backward_strategy(self, rows: int, *, masked: bool = False) -> str:
        """How dX [rows, K] is made; `masked`: under the mask of a dropout."""
        return self._strategy(rows, self.in_features, sum(self.out_features), masked)

    def _strategy(self, rows: int, outer: int, inner: int, masked: bool) -> str:
        base = self.base
        sizes = Product(
            m=rows,
            n=outer,
            k=inner,
            r=self.padded_rank,
            dropout=masked,
            augmentable=base.is_augmentable,
        )
        return backends.product_strategy(base.device, base.dtype, sizes, base.format)

    def set_adapters(self, adapters: Sequence[Adapters]) -> None:
        """Takes other adapters from the next `fill` on.

        Raises ValueError where they do not fit the linears or have too many ranks.
        """
        chosen = AdapterSet.of(adapters, self.rows, self.in_features)
        check(
            chosen.rank <= self.padded_rank,
            f"adapters of rank {chosen.rank} together exceed the group's capacity of "
            f"{self.padded_rank}",
        )
        self.adapters = chosen

    def tensors(self) -> list[Tensor | None]:
        """What gradients of the next product go to, in a row: see `OfGroup`."""
        return self.adapters.tensors(self.biases).row()

    def fill(self, kernels: lora_contracts.LoraLinear) -> Filling:
        """Places the adapters' factors as they are now."""
        adapters = self.adapters
        self.placed.write(adapters, kernels)
        dora = bias = None
        if adapters.has_magnitude:
            dora = magnitude_scale(self.base, adapters)
        if adapters.has_bias or any(bias is not None for bias in self.biases):
            bias = self.bias(adapters)
        base = self.base.merged(adapters)
        placed = Factors(self.placed.lora_a, self.placed.lora_b)
        if base is not self.base and base.factors is not None:
            for place, factor in zip(base.factors, placed, strict=True):
                place.copy_(factor)
        return Filling(
            write=self.placed.writes,
            base=base,
            added=self._nothing if self.base.merges else placed,
            adapters=adapters,
            biases=self.biases,
            bias=bias,
            dora=dora,
        )

    def fill_again(self, filling: Filling, kernels: lora_contracts.LoraLinear) -> None:
        """Places the factors of `filling` again, if others were placed since."""
        if filling.write != self.placed.writes:
            self.placed.write(filling.adapters, kernels)

    @torch.no_grad()
    def bias(self, adapters: AdapterSet) -> Tensor:
        """[N]: the linears' biases plus the adapters' times their scaling."""
        dtype = accumulate_dtype(self.base.dtype)
        total = torch.zeros(sum(self.out_features), dtype=dtype, device=self.base.device)
        for rows, bias in zip(self.rows, self.biases, strict=True):
            if bias is not None:
                total[rows] = bias.to(dtype)
        for block in adapters.blocks:
            if block.factors.bias is not None:
                total[block.rows] += block.factors.bias.to(dtype) * block.factors.scaling
        return total.to(self.base.dtype)


def spans(widths: Sequence[int]) -> list[slice]:
    """Consecutive slices of the given widths."""
    slices, start = [], 0
    for width in widths:
        slices.append(slice(start, start + width))
        start += width
    return slices


def _new_factors(base: BaseWeight, rank: int) -> Factors:
    rank, n, k = padded_rank(rank, base.dtype), sum(base.out_features), base.in_features
    lora_a = torch.zeros(rank, k, dtype=base.dtype, device=base.device)
    return Factors(lora_a, torch.zeros(n, rank, dtype=base.dtype, device=base.device))
