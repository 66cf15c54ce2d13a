"""The frozen weights of a group of linears: what products need of them, however they are stored."""

from collections.abc import Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from lora_engine.ops.lora.adapters import AdapterSet
from lora_engine.ops.tensors import check, shape_of

ROW_ALIGNMENT_BYTES = 16


class Factors(NamedTuple):
    """The factors of all adapters of a group, in the products' dtype, zero where there are none."""

    lora_a: Tensor  # [R, K]
    lora_b: Tensor  # [N, R]: times scaling, block-diagonal


class BaseWeight(Protocol):
    """W [N, K]: the weights [N_i, K] of linears that share their input, one below the other.

    Adapters and products know nothing else of it: it may be kept dense, quantised, in shards of
    several processes, or as an expert's slice of a stack.

    Operands are lent: valid until the context closes, or in `blocks` until the next block is asked
    for. The base may reuse their memory after that. Borrowers do not write into them. One operand
    is lent at a time, to the product that runs: a backward pass borrows again, and keeps nothing.
    """

    @property
    def out_features(self) -> tuple[int, ...]:
        """Every linear's N_i."""

    @property
    def in_features(self) -> int:
        """K."""

    @property
    def dtype(self) -> torch.dtype:
        """Of the operands, and so of the products; not of what is stored."""

    @property
    def device(self) -> torch.device:
        """Of the operands."""

    @property
    def format(self) -> str:
        """How the weights are stored: one of `backends.choice.FORMATS`."""

    @property
    def is_augmentable(self) -> bool:
        """Whether W can be lent together with the adapters' factors, as one operand."""

    @property
    def merges(self) -> bool:
        """Whether products multiply by `merged`, and add nothing of adapters themselves."""

    @property
    def factors(self) -> Factors | None:
        """The place for the adapters' factors in a buffer of the base's own; None: it has none."""

    @property
    def resident(self) -> Tensor | None:
        """W as one tensor [N, K] that outlives any product; None where there is none."""

    def merged(self, adapters: AdapterSet) -> "BaseWeight":
        """The weight that a product with these adapters multiplies by: itself, or where it `merges`
        one that has what they add in it. It stays as it is when the adapters change."""

    def weight(self, i: int) -> Tensor | None:
        """Linear i's weight [N_i, K] where it is kept, for a module to take as its own.

        None: the base has no such tensor, and the module keeps the one that it has.
        """

    def read(self, rows: slice) -> Tensor:
        """W[rows] for rows with a start and a stop, valid until the base is next asked."""

    def blocks(self) -> Iterable[tuple[slice, Tensor]]:
        """W in blocks of consecutive rows, all of them in order: which rows, and W[rows]."""

    def forward_operand(self, lora_b: Tensor) -> AbstractContextManager[Tensor]:
        """[W | lora_b]ᵀ, [K + R, N], if the base is augmentable.

        lora_b [N, R] is `factors.lora_b`, or the borrower's where `factors` is None.
        """

    def backward_operand(self, lora_a: Tensor) -> AbstractContextManager[Tensor]:
        """W with lora_a below it, [N + R, K]; as `forward_operand`."""


class DenseBase:
    """A BaseWeight that keeps W and the factors in one buffer, of which every operand is a view.

        W̃ = [ W  sB ]    [N + R, K + R]
            [ A   0 ]

    The weights are copied in. Modules may take the views that `weight(i)` gives, so that there is
    one copy only. R is `rank`, rounded up so that rows start aligned.

    Raises ValueError where the weights have not all the same K and dtype.
    """

    format = "dense"
    is_augmentable = True
    merges = False

    def __init__(
        self,
        weights: Sequence[Tensor],  # [N_i, K]
        rank: int,
    ) -> None:
        check(len(weights) > 0, "a group of linears needs weights")
        first = weights[0]
        for weight in weights:
            check(
                weight.dim() == 2
                and weight.shape[1] == first.shape[1]
                and weight.dtype == first.dtype,
                f"the weight {shape_of(weight)} does not share the input of {shape_of(first)}",
            )
        self.out_features = tuple(weight.shape[0] for weight in weights)
        self.in_features = first.shape[1]
        self.dtype, self.device = first.dtype, first.device
        n, k, r = sum(self.out_features), self.in_features, padded_rank(rank, first.dtype)
        self.buffer = torch.empty(n + r, k + r, dtype=first.dtype, device=first.device)
        self.resident = self.buffer[:n, :k]
        self._linears = self.resident.split(self.out_features)
        for weight, place in zip(weights, self._linears, strict=True):
            place.copy_(weight.detach())
        # Finite from the start: a vendor's product may read what stands beside its operand.
        # After the copies, which fault the new memory in on every thread.
        self.buffer[n:].zero_()
        self.buffer[:n, k:].zero_()
        self.factors = Factors(self.buffer[n:, :k], self.buffer[:n, k:])
        self._blocks = ((slice(0, n), self.resident),)
        self._forward = nullcontext(self.buffer[:n].t())
        self._backward = nullcontext(self.buffer[:, :k])

    @staticmethod
    def takes(weights: Sequence[object]) -> bool:
        """Whether these are floating-point weights of 16 bits or more, alike but for their rows."""
        first = weights[0]
        return (
            isinstance(first, Tensor)
            and first.dtype.is_floating_point
            and first.dtype.itemsize >= 2
            and all(
                isinstance(w, Tensor)
                and (w.dtype, w.device, w.shape[1:]) == (first.dtype, first.device, first.shape[1:])
                for w in weights
            )
        )

    def merged(self, adapters: AdapterSet) -> "DenseBase":
        """Itself."""
        return self

    def weight(self, i: int) -> Tensor:
        """Linear i's weight [N_i, K], a view of the buffer."""
        return self._linears[i]

    def read(self, rows: slice) -> Tensor:
        """W[rows], a view."""
        return self.resident[rows]

    def blocks(self) -> Iterable[tuple[slice, Tensor]]:
        """W as one block."""
        return self._blocks

    def forward_operand(self, lora_b: Tensor) -> AbstractContextManager[Tensor]:
        """[W | sB]ᵀ; lora_b stands in the buffer already."""
        return self._forward

    def backward_operand(self, lora_a: Tensor) -> AbstractContextManager[Tensor]:
        """W with A below it; lora_a stands in the buffer already."""
        return self._backward


def padded_rank(rank: int, dtype: torch.dtype) -> int:
    """`rank` rounded up to whole ROW_ALIGNMENT_BYTES of dtype."""
    step = max(1, ROW_ALIGNMENT_BYTES // dtype.itemsize)
    return -(-rank // step) * step
