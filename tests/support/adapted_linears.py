"""Linears with adapters of every kind, made of leaves, for operations and for the reference."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from implementations import Backend
from torch import Tensor

from lora_engine import ops
from lora_engine.values import AdaptedLinear, LoraFactors

SCALING = 0.5
RANKS = (3, 5)
# partial: the first linear has no adapter. several: two each, numbered 0 and 1.
KINDS = ("lora", "dora", "bias", "lora_bias", "partial", "several")


@dataclass
class Linears:
    """Linears of `outs` over one input of `features`.

    weights: frozen. leaves: of all adapters and biases, in the order that `take` uses them up.
    """

    weights: list[Tensor]
    leaves: list[Tensor]
    kind: str

    @staticmethod
    def make(
        backend: Backend, outs: Sequence[int], features: int, dtype: torch.dtype, kind: str
    ) -> "Linears":
        def normal(*shape: int) -> Tensor:
            return backend.put(torch.randn(shape).to(dtype))[0]

        linears = Linears([normal(n, features) * features**-0.5 for n in outs], [], kind)
        for i, n in enumerate(outs):
            for rank in linears._ranks(i):
                linears.leaves += [normal(rank, features) * features**-0.5, normal(n, rank)]
                if kind == "dora":
                    linears.leaves.append(normal(n).abs())
                if kind == "lora_bias":
                    linears.leaves.append(normal(n))
            if kind == "bias":
                linears.leaves.append(normal(n))
        return linears

    def _ranks(self, i: int) -> tuple[int, ...]:
        if self.kind == "several":
            return RANKS
        return () if self.kind == "partial" and i == 0 else RANKS[:1]

    def take(self, leaves: Iterator[Tensor], dtype: torch.dtype) -> list[AdaptedLinear]:
        """The linears in `dtype`, of the next of `leaves`."""
        found = []
        for i, weight in enumerate(self.weights):
            adapters = []
            for number, _ in enumerate(self._ranks(i)):
                a, b = next(leaves), next(leaves)
                magnitude = next(leaves) if self.kind == "dora" else None
                bias = next(leaves) if self.kind == "lora_bias" else None
                adapters.append(LoraFactors(a, b, SCALING, magnitude, number, bias))
            bias = next(leaves) if self.kind == "bias" else None
            found.append(AdaptedLinear(weight.to(dtype), adapters, bias))
        return found


def group_of(linears: Sequence[AdaptedLinear]) -> ops.LoraGroup:
    """The linears as one group."""
    return ops.LoraGroup.dense(
        [linear.weight for linear in linears],
        [linear.adapters for linear in linears],
        [linear.bias for linear in linears],
    )
