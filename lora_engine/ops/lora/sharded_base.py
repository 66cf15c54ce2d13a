"""A base weight of which each of several processes keeps a part, gathered for each product."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import cast

from torch import Tensor

from lora_engine.ops.lora.adapters import AdapterSet
from lora_engine.ops.lora.base import Factors
from lora_engine.ops.lora.quantized_base import QuantizedBase
from lora_engine.ops.quantized_weight import QuantizedWeight
from lora_engine.ops.sharded_weight import ShardedGroup, ShardedWeight


class ShardedBase:
    """A BaseWeight of sharded weights. All processes ask for the same operands in the same order.

    Bytes are gathered into memory that all bases share, the next group's while this one's product
    is made. Packed bits are gathered as they are, and decoded by each process; dense weights are
    lent where they were gathered, as one block without a place for factors.
    """

    merges = False
    factors: Factors | None = None
    resident: Tensor | None = None

    def __init__(self, weights: Sequence[ShardedWeight], rank: int = 0) -> None:
        """`rank` is of no use: the place for factors is the borrower's."""
        first = weights[0]
        self._group = ShardedGroup(weights)
        self.out_features = tuple(weight.shape[0] for weight in weights)
        self.in_features = first.shape[1]
        self.dtype, self.device = first.dtype, first.device
        self.format = "dense" if first.format is None else first.format.name
        self.is_augmentable = first.format is not None

    @staticmethod
    def takes(weights: Sequence[object]) -> bool:
        """Whether these are sharded weights, alike but for their rows."""
        sharded = [weight for weight in weights if isinstance(weight, ShardedWeight)]
        return len(sharded) == len(weights) and len(set(map(_kind, sharded))) == 1

    def merged(self, adapters: AdapterSet) -> "ShardedBase":
        """Itself."""
        return self

    def weight(self, i: int) -> Tensor | None:
        """None: linear i's weight is nowhere whole."""
        return None

    def read(self, rows: slice) -> Tensor:
        """W[rows], in memory of its own."""
        return self._dense()[rows].clone() if self.format == "dense" else self._packed().read(rows)

    def blocks(self) -> Iterator[tuple[slice, Tensor]]:
        """W as one block, or in those that packed bits are decoded by."""
        if self.format == "dense":
            yield slice(0, sum(self.out_features)), self._dense()
        else:
            yield from self._packed().blocks()

    @contextmanager
    def forward_operand(self, lora_b: Tensor) -> Iterator[Tensor]:
        """[W | lora_b]ᵀ, of packed weights."""
        with self._packed().forward_operand(lora_b) as operand:
            yield operand

    @contextmanager
    def backward_operand(self, lora_a: Tensor) -> Iterator[Tensor]:
        """W with lora_a below it, of packed weights."""
        with self._packed().backward_operand(lora_a) as operand:
            yield operand

    def _dense(self) -> Tensor:
        """W [N, K] where it was gathered."""
        return self._group.image().view(self.dtype).view(-1, self.in_features)

    def _packed(self) -> QuantizedBase:
        return QuantizedBase(cast(list[QuantizedWeight], self._group.whole()))


def _kind(weight: ShardedWeight) -> tuple[object, ...]:
    """What the weights of a group have in common."""
    name = None if weight.format is None else weight.format.name
    return weight.shape[1], weight.dtype, weight.device, name
