"""What gets gradients of a group of linears besides its input, by name and in a row."""

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
        """All values in a row, as an autograd function takes tensors and returns gradients."""
        found = [
            value for a in self.adapters for value in (a.lora_a, a.lora_b, a.magnitude, a.bias)
        ]
        return [*found, *self.biases]

    @staticmethod
    def of_row(values: Sequence[T], adapters: int) -> "OfGroup[T]":
        """The values by name, of a row for so many adapters."""
        end = _PER_ADAPTER * adapters
        starts = range(0, end, _PER_ADAPTER)
        named = [OfAdapter(*values[start : start + _PER_ADAPTER]) for start in starts]
        return OfGroup(named, list(values[end:]))


_PER_ADAPTER = len(fields(OfAdapter))
