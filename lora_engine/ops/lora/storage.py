"""Which base keeps a group's weights: nothing above names a class of base weights."""

from collections.abc import Sequence
from typing import NoReturn, Protocol, TypeAlias, cast

import torch
from torch import Tensor

from lora_engine.ops.lora.base import BaseWeight, DenseBase
from lora_engine.ops.lora.merged_base import MergedBase
from lora_engine.ops.lora.quantized_base import QuantizedBase
from lora_engine.ops.lora.sharded_base import ShardedBase
from lora_engine.ops.tensors import check, shape_of

# The type of weights that a class is made from. It differs from class to class; as the type of a
# parameter only the one without values (NoReturn) is a subtype of them all.
Kind: TypeAlias = Sequence[NoReturn]


class Weight(Protocol):
    """The weight [N, K] of one linear, as it is stored: a Tensor, or of a class of ours."""

    @property
    def shape(self) -> Sequence[int]:
        """(N, K)."""

    @property
    def dtype(self) -> torch.dtype:
        """Of its numbers."""


class Storage(Protocol):
    """A class of base weights, for weights of one kind."""

    def __call__(self, weights: Kind, rank: int) -> BaseWeight:
        """The base of these weights, with place for `rank` ranks if it has one for factors."""

    def takes(self, weights: Kind) -> bool:
        """Whether it can keep the weights, at least one, as one group."""


# The first that takes the weights keeps them.
STORAGES: list[Storage] = [DenseBase, QuantizedBase, ShardedBase, MergedBase]


def has_base(weights: Sequence[Weight]) -> bool:
    """Whether there is a base for the weights, at least one, of linears that share their input."""
    return any(storage.takes(cast(Kind, weights)) for storage in STORAGES)


def base_of(weights: Sequence[Weight], rank: int) -> BaseWeight:
    """The base that keeps these weights as they are stored; `rank`: see `LoraGroup`'s capacity.

    Raises ValueError where there is none.
    """
    check(len(weights) > 0, "a group of linears needs weights")
    for storage in STORAGES:
        if storage.takes(cast(Kind, weights)):
            return storage(cast(Kind, weights), rank)
    raise ValueError(f"no base weight keeps {', '.join(map(_described, weights))} as one group")


def _described(weight: Weight) -> str:
    if isinstance(weight, Tensor):
        return shape_of(weight)
    return f"{list(weight.shape)} {type(weight).__name__}"
