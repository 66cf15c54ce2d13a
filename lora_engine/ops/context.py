"""What autograd hands to both passes of a function."""

from collections.abc import Sequence
from typing import NamedTuple, Protocol, TypeVar

from torch import Tensor

Kept = TypeVar("Kept")
Record = TypeVar("Record", bound=NamedTuple)
T = TypeVar("T")


class Context(Protocol[Kept]):
    """One call of an autograd function.

    kept: what the forward pass leaves for the backward pass besides tensors.
    needs_input_grad: for each input of the forward pass whether it needs a gradient.
    saved_tensors: what the forward pass gave to `save_for_backward`, in the same order.
    """

    kept: Kept

    @property
    def needs_input_grad(self) -> tuple[bool, ...]: ...
    @property
    def saved_tensors(self) -> tuple[Tensor, ...]: ...
    def save_for_backward(self, *tensors: Tensor | None) -> None: ...
    def mark_dirty(self, *changed: Tensor) -> None: ...
    def mark_non_differentiable(self, *outputs: Tensor) -> None: ...
    def set_materialize_grads(self, value: bool) -> None: ...


def named_first(record: type[Record], values: Sequence[T]) -> tuple[Record, Sequence[T]]:
    """The first of `values` by the names of `record`'s fields, and those that follow them.

    For functions that take, or save, any number of tensors behind those that have names.
    """
    count = len(record._fields)
    return record._make(values[:count]), values[count:]
