"""The tensors of a group that get gradients besides its input: by name, and as a flat list."""

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Generic, TypeVar

T = TypeVar("T")


@dataclass
class OfAdapter(Generic[T]):
    """One value for each tensor of an adapter of one linear."""

    lora_a: T
    lora_b: T
    magnitude: T
    bias: T


@dataclass
class OfGroup(Generic[T]):
    """One value for each tensor of a group: the tensor, its gradient, or whether that is needed.

    adapters: in the order of the group's blocks. biases: of the linears themselves.
    """

    adapters: list[OfAdapter[T]]
    biases: list[T]

    def row(self) -> list[T]:
        """All values as a list, as an autograd function takes tensors and returns gradients."""
        of_adapters = [
            value for a in self.adapters for value in (a.lora_a, a.lora_b, a.magnitude, a.bias)
        ]
        return [*of_adapters, *self.biases]

    @staticmethod
    def of_row(values: Sequence[T], adapters: int) -> "OfGroup[T]":
        """The inverse of `row`, for a number of adapters."""
        end = _PER_ADAPTER * adapters
        starts = range(0, end, _PER_ADAPTER)
        named = [OfAdapter(*values[start : start + _PER_ADAPTER]) for start in starts]
        return OfGroup(named, list(values[end:]))


_PER_ADAPTER = len(fields(OfAdapter))
