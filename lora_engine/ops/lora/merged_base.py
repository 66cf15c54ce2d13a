"""A base weight in which the adapters are merged, and which is quantised, before every product."""

from collections.abc import Iterable, Sequence
from contextlib import AbstractContextManager

from torch import Tensor

from lora_engine.ops.lora.adapters import AdapterSet
from lora_engine.ops.lora.base import DenseBase, Factors
from lora_engine.ops.lora.quantized_base import QuantizedBase
from lora_engine.ops.mergeable_weight import MergeableWeight
from lora_engine.ops.quantized_weight import QuantizedWeight
from lora_engine.ops.tensors import check

Kept = MergeableWeight | QuantizedWeight


class MergedBase:
    """A BaseWeight of mergeable weights, and of packed ones beside them that have no adapter.

    `merged` is what products multiply by. Asked itself, it is without adapters.
    """

    is_augmentable = True
    factors: Factors | None = None
    resident: Tensor | None = None

    def __init__(self, weights: Sequence[Kept], rank: int = 0) -> None:
        """`rank`: of the borrower's factors."""
        first = weights[0]
        self._kept, self._rank = tuple(weights), rank
        self.out_features = tuple(weight.shape[0] for weight in weights)
        self.in_features = first.shape[1]
        self.dtype, self.device = first.dtype, first.device
        self.format = first.format.name

    @staticmethod
    def takes(weights: Sequence[object]) -> bool:
        """Whether these are such weights, of one format, alike but for their rows."""
        kept = [weight for weight in weights if isinstance(weight, MergeableWeight)]
        packed = [weight for weight in weights if isinstance(weight, QuantizedWeight)]
        if not kept or len(kept) + len(packed) != len(weights):
            return False
        both: list[Kept] = [*kept, *packed]
        return len({(w.shape[1], w.dtype, w.device, w.format) for w in both}) == 1

    @property
    def merges(self) -> bool:
        """Whether the weights are quantised now; else they are lent as they are."""
        return all(w.quantises for w in self._kept if isinstance(w, MergeableWeight))

    def merged(self, adapters: AdapterSet) -> QuantizedBase | DenseBase:
        """The packed weights with what these adapters add in them; a copy of the weights, and a
        place for the factors, where they are not quantised now."""
        if not self.merges:
            dense = [
                w.weight.to(w.dtype) if isinstance(w, MergeableWeight) else w.dequantize()
                for w in self._kept
            ]
            return DenseBase(dense, self._rank)
        made: list[QuantizedWeight] = []
        for i, weight in enumerate(self._kept):
            own = [block.factors for block in adapters.blocks if block.linear == i]
            if isinstance(weight, QuantizedWeight):
                check(not own, f"linear {i} of the group is in packed bits, and has an adapter")
                made.append(weight)
            else:
                made.append(weight.merged(own))
        return QuantizedBase(made)

    def weight(self, i: int) -> Tensor | None:
        """None: the module keeps linear i's own weight."""
        return None

    def read(self, rows: slice) -> Tensor:
        """Q(W)[rows], in memory of its own."""
        return self._alone().read(rows)

    def blocks(self) -> Iterable[tuple[slice, Tensor]]:
        """Q(W) in blocks of as many rows as the device decodes at a time."""
        return self._alone().blocks()

    def forward_operand(self, lora_b: Tensor) -> AbstractContextManager[Tensor]:
        """[Q(W) | lora_b]ᵀ in the scratch memory."""
        return self._alone().forward_operand(lora_b)

    def backward_operand(self, lora_a: Tensor) -> AbstractContextManager[Tensor]:
        """Q(W) with lora_a below it in the scratch memory."""
        return self._alone().backward_operand(lora_a)

    def _alone(self) -> QuantizedBase | DenseBase:
        return self.merged(AdapterSet((), ()))
