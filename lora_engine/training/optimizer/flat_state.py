"""What an optimiser remembers of flat parameters: where it is, and how an update comes to it."""

import weakref
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from lora_engine.backends import Copies, Copy


class Flat(NamedTuple):
    """A flat tensor of the state, of which one element serves `every` values of the buffers."""

    values: Tensor
    every: int = 1

    def of(self, part: slice) -> Tensor:
        """A view of what serves these values; `part` begins at a multiple of `every`."""
        return self.values[part.start // self.every : -(-part.stop // self.every)]


class DeviceState:
    """Tensors on the device of the parameters."""

    def __init__(self, tensors: Sequence[Flat]) -> None:
        self._tensors = tensors

    def pieces(self, part: slice) -> Iterator[tuple[slice, list[Tensor]]]:
        """The part in pieces, each with its state, to be read and written."""
        yield part, [tensor.of(part) for tensor in self._tensors]

    def settle(self) -> None:
        """Before the host reads or writes the tensors themselves."""


class HostState:
    """Tensors in the host's memory, of which an update sees pieces in two slots on the device.

    While one piece is updated, the next one is on its way to the other slot; then the first goes
    back. size: values of a piece, a multiple of each tensor's `every`.
    """

    def __init__(
        self, tensors: Sequence[Flat], copies: Copies, device: torch.device, size: int
    ) -> None:
        self._tensors, self._copies, self._size = tensors, copies, size
        self._slots = [
            [t.values.new_empty(-(-size // t.every), device=device) for t in tensors]
            for _ in range(2)
        ]
        # Their memory is not given to others while something is copied.
        weakref.finalize(self, copies.finish)

    def pieces(self, part: slice) -> Iterator[tuple[slice, list[Tensor]]]:
        """As `DeviceState.pieces`; what was written goes back when the next one is asked for."""
        starts = range(part.start, part.stop, self._size)
        pieces = [slice(start, min(start + self._size, part.stop)) for start in starts]
        coming = [self._fetch(piece, 0) for piece in pieces[:1]]
        for number, piece in enumerate(pieces):
            arrived = coming.pop()
            # The slot's last piece goes back first: copies are made in order.
            coming += [self._fetch(p, number + 1) for p in pieces[number + 1 : number + 2]]
            arrived.copy.wait()
            yield piece, arrived.values
            for tensor, values in zip(self._tensors, arrived.values, strict=True):
                self._copies.begin(tensor.of(piece), values)

    def settle(self) -> None:
        """See `DeviceState.settle`."""
        self._copies.finish()

    def _fetch(self, piece: slice, number: int) -> "_Coming":
        own = [tensor.of(piece) for tensor in self._tensors]
        slots = self._slots[number % 2]
        values = [slot[: part.numel()] for slot, part in zip(slots, own, strict=True)]
        begun = [self._copies.begin(*pair) for pair in zip(values, own, strict=True)]
        return _Coming(values, begun[-1])


class _Coming(NamedTuple):
    """A piece's state on its way to a slot. copy: the last of them, which the others precede."""

    values: list[Tensor]
    copy: Copy
