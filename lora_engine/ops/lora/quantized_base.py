"""A base weight in packed bits, decoded for each product into memory that all of them share."""

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

from lora_engine import backends
from lora_engine.ops.lora.adapters import AdapterSet
from lora_engine.ops.lora.base import Factors
from lora_engine.ops.quantized_weight import QuantizedWeight
from lora_engine.ops.tensors import check


class QuantizedBase:
    """A BaseWeight of packed weights; nothing that is decoded outlives its product.

    Operands are decoded into scratch memory that all bases share, with the factors placed around
    them. `read` and `weight` give no views: there are none.

    Raises ValueError where the weights have not all the same K, dtype, device and format.
    """

    is_augmentable = True
    merges = False
    factors: Factors | None = None
    resident: Tensor | None = None

    def __init__(self, weights: Sequence[QuantizedWeight], rank: int = 0) -> None:
        """`rank` is of no use: the place for factors is the borrower's."""
        check(len(weights) > 0, "a group of linears needs weights")
        first = weights[0]
        for weight in weights:
            check(
                _kind(weight) == _kind(first),
                f"{_described(weight)} does not share the input of {_described(first)}",
            )
        self.weights = tuple(weights)
        self.out_features = tuple(weight.shape[0] for weight in weights)
        self.in_features = first.shape[1]
        self.dtype, self.device = first.dtype, first.device
        self.format = first.format.name

    @staticmethod
    def takes(weights: Sequence[object]) -> bool:
        """Whether these are packed weights, alike but for their rows."""
        packed = [weight for weight in weights if isinstance(weight, QuantizedWeight)]
        return len(packed) == len(weights) and len(set(map(_kind, packed))) == 1

    def merged(self, adapters: AdapterSet) -> "QuantizedBase":
        """Itself."""
        return self

    def weight(self, i: int) -> Tensor | None:
        """None: linear i's weight is nowhere but in packed bits."""
        return None

    def read(self, rows: slice) -> Tensor:
        """W[rows], in memory of its own."""
        count = rows.stop - rows.start
        out = torch.empty(count, self.in_features, dtype=self.dtype, device=self.device)
        self._decode(rows.start, out)
        return out

    def blocks(self) -> Iterator[tuple[slice, Tensor]]:
        """W in blocks of as many rows as the device decodes at a time."""
        total = sum(self.out_features)
        step = backends.decoded_rows(self.device, self.dtype, total)
        for start in range(0, total, step):
            stop = min(start + step, total)
            block = backends.scratch_matrix(stop - start, self.in_features, self.dtype, self.device)
            self._decode(start, block)
            yield slice(start, stop), block

    @contextmanager
    def forward_operand(self, lora_b: Tensor) -> Iterator[Tensor]:
        """[W | lora_b]ᵀ in the scratch memory."""
        n, k = sum(self.out_features), self.in_features
        operand = backends.scratch_matrix(n, k + lora_b.shape[1], self.dtype, self.device)
        self._decode(0, operand[:, :k])
        operand[:, k:] = lora_b
        yield operand.t()

    @contextmanager
    def backward_operand(self, lora_a: Tensor) -> Iterator[Tensor]:
        """W with lora_a below it in the scratch memory."""
        n, k = sum(self.out_features), self.in_features
        operand = backends.scratch_matrix(n + lora_a.shape[0], k, self.dtype, self.device)
        self._decode(0, operand[:n])
        operand[n:] = lora_a
        yield operand

    def _decode(self, start: int, out: Tensor) -> None:
        """Writes rows of W from `start` on into `out`."""
        for rows, weight in self._parts(start, start + out.shape[0]):
            weight.rows(rows.start, rows.stop, out=out[: rows.stop - rows.start])
            out = out[rows.stop - rows.start :]

    def _parts(self, start: int, stop: int) -> Iterable[tuple[slice, QuantizedWeight]]:
        """The weights that rows [start, stop) of W are in, and which of their rows."""
        offset = 0
        for weight in self.weights:
            n = weight.shape[0]
            first, last = max(start - offset, 0), min(stop - offset, n)
            if first < last:
                yield slice(first, last), weight
            offset += n


def _kind(weight: QuantizedWeight) -> tuple[object, ...]:
    """What the weights of a group have in common."""
    return weight.shape[1], weight.dtype, weight.device, weight.format.name


def _described(weight: QuantizedWeight) -> str:
    dtype = str(weight.dtype).removeprefix("torch.")
    return f"a weight {list(weight.shape)} of {dtype} in {weight.format.name} on {weight.device}"
