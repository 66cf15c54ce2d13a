"""The buffer W̃ of a group of linears that share their input, with their adapters in it."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from torch import Tensor

from lora_engine.ops.tensors import accumulate_dtype, check, shape_of

ROW_ALIGNMENT_BYTES = 16
NORM_CHUNK_ROWS = 1024


@dataclass(frozen=True)
class LoraFactors:
    """One adapter of one linear: `y += scaling * (x lora_aᵀ) lora_bᵀ`.

    magnitude: DoRA's (arXiv:2402.09353): the linear's whole output before its bias is multiplied by
        `magnitude / norm`, norm [N] being the length of each row of W + scaling B A, through which
        no gradient goes.
    adapter: which adapter this is, for rows that are routed by adapter.
    bias: lora_b's: `scaling * bias` is added too.
    """

    lora_a: Tensor  # [r, K]
    lora_b: Tensor  # [N, r]
    scaling: float
    magnitude: Tensor | None = None  # [N]
    adapter: int = 0
    bias: Tensor | None = None  # [N]


Adapters: TypeAlias = LoraFactors | Sequence[LoraFactors] | None


@dataclass(frozen=True)
class Block:
    """Where one adapter of one linear stands in W̃: rows of W and B, columns of B (rows of A)."""

    factors: LoraFactors
    linear: int
    rows: slice
    columns: slice


class AugmentedWeight:
    """The buffer W̃ of a group of linears that share their input.

    `weights` [N_i, K] are copied in; read them back with `weight(i)`, a view that a module may use
    as its own weight, so that there is one copy only. `adapters[i]` is what linear i has: nothing,
    one adapter, or several that add up. A, B and DoRA's norms are renewed whenever a factor has
    changed since the last use (by address or `Tensor._version`: in-place steps under
    `torch.no_grad()` count, writes through `.data` do not; call `refresh(force=True)` after those).

    `room` is the least total rank to leave space for: `set_adapters` can put others in later.
    """

    def __init__(
        self,
        weights: Sequence[Tensor],
        adapters: Sequence[Adapters],
        biases: Sequence[Tensor | None] | None = None,
        *,
        room: int = 0,
    ) -> None:
        check(len(weights) > 0, "AugmentedWeight: no weights")
        self.biases = tuple(biases) if biases is not None else (None,) * len(weights)
        self.in_features = weights[0].shape[1]
        self.out_features = tuple(weight.shape[0] for weight in weights)
        for weight in weights:
            check(
                weight.dim() == 2
                and weight.shape[1] == self.in_features
                and weight.dtype == weights[0].dtype,
                f"AugmentedWeight: {shape_of(weight)} does not share {shape_of(weights[0])}'s K",
            )
        self.rows = spans(self.out_features)
        dtype = weights[0].dtype
        # Rows of K + R and of N + R start aligned.
        step = max(1, ROW_ALIGNMENT_BYTES // dtype.itemsize)
        self.tail = -(-max(room, _total_rank(adapters)) // step) * step
        n, k = sum(self.out_features), self.in_features
        self.buffer = torch.zeros(
            n + self.tail, k + self.tail, dtype=dtype, device=weights[0].device
        )
        for weight, span in zip(weights, self.rows, strict=True):
            self.buffer[span, :k].copy_(weight.detach())
        # Views of the buffer: all A [R, K], where rows of padding are zero; all scaled B [N, R],
        # block-diagonal; W [N, K]; the forward product's [W sB]ᵀ and the backward's [W; A].
        self.lora_a, self.lora_b = self.buffer[n:, :k], self.buffer[:n, k:]
        self.base = self.buffer[:n, :k]
        self.forward_operand, self.backward_operand = self.buffer[:n].t(), self.buffer[:, :k]
        self.set_adapters(adapters)

    def set_adapters(self, adapters: Sequence[Adapters]) -> None:
        """Puts other adapters into the buffer. ValueError where they do not fit or lack room."""
        check(
            len(adapters) == len(self.out_features), "AugmentedWeight: one adapter entry per weight"
        )
        check(
            _total_rank(adapters) <= self.tail,
            f"AugmentedWeight: rank {_total_rank(adapters)} exceeds the room of {self.tail}",
        )
        blocks, column = [], 0
        self.columns: list[slice] = []
        for i, entry in enumerate(adapters):
            start = column
            for factors in _as_tuple(entry):
                self._check_factors(i, factors)
                rank = factors.lora_a.shape[0]
                blocks.append(Block(factors, i, self.rows[i], slice(column, column + rank)))
                column += rank
            self.columns.append(slice(start, column))
        self.blocks = tuple(blocks)
        # For each linear: its rows of W, and its columns of B.
        self.spans = list(zip(self.rows, self.columns, strict=True))
        self._check_magnitudes()
        n, k = sum(self.out_features), self.in_features
        self.buffer[n:].zero_()
        self.buffer[:, k:].zero_()
        self.scale: Tensor | None = None  # [N]: DoRA's magnitude / norm, 1 elsewhere
        self.norm: Tensor | None = None  # [N]
        self.bias: Tensor | None = None  # [N] in the weights' dtype: of the linears and adapters
        self._column_adapter: Tensor | None = None
        self._seen: tuple[Any, ...] = ()

    def weight(self, i: int) -> Tensor:
        """Linear i's weight [N_i, K], a view of the buffer."""
        return self.buffer[self.rows[i], : self.in_features]

    def factors(self) -> list[Tensor | None]:
        """lora_a, lora_b and magnitude of every block, every linear's bias, every block's bias."""
        found: list[Tensor | None] = []
        for block in self.blocks:
            found += (block.factors.lora_a, block.factors.lora_b, block.factors.magnitude)
        return [*found, *self.biases, *(block.factors.bias for block in self.blocks)]

    def route(self, ids: Tensor) -> Tensor:
        """Which columns of S each row uses, [M, R] bool, for rows of adapter `ids` [M]."""
        if self._column_adapter is None:
            owner = torch.full((self.tail,), -1, dtype=torch.int64)
            for block in self.blocks:
                owner[block.columns] = block.factors.adapter
            self._column_adapter = owner.to(self.buffer.device)
        return ids[:, None] == self._column_adapter

    def refresh(self, *, force: bool = False) -> None:
        """Copies A and scaling * B into the buffer; renews the bias and DoRA's scale.

        Only if a factor has changed, unless `force`.
        """
        seen = tuple(
            (factor.data_ptr(), factor._version) for factor in self.factors() if factor is not None
        )
        if seen == self._seen and not force:
            return
        with torch.no_grad():
            for block in self.blocks:
                factors = block.factors
                self.lora_a[block.columns].copy_(factors.lora_a)
                self.lora_b[block.rows, block.columns].copy_(factors.lora_b * factors.scaling)
            if any(block.factors.magnitude is not None for block in self.blocks):
                self._refresh_scale()
            self._refresh_bias()
        self._seen = seen

    def _refresh_bias(self) -> None:
        of_blocks = [block for block in self.blocks if block.factors.bias is not None]
        if not of_blocks and all(bias is None for bias in self.biases):
            self.bias = None
            return
        like = self.buffer
        total = like.new_zeros(sum(self.out_features), dtype=accumulate_dtype(like.dtype))
        for rows, bias in zip(self.rows, self.biases, strict=True):
            if bias is not None:
                total[rows] = bias.to(total.dtype)
        for block in of_blocks:
            assert block.factors.bias is not None
            total[block.rows] += block.factors.bias.to(total.dtype) * block.factors.scaling
        self.bias = total.to(like.dtype)

    def _refresh_scale(self) -> None:
        accumulate = accumulate_dtype(self.buffer.dtype)
        ones = torch.ones(sum(self.out_features), dtype=accumulate, device=self.buffer.device)
        self.norm, self.scale = ones, ones.clone()
        for block in self.blocks:
            factors = block.factors
            if factors.magnitude is None:
                continue
            lora_a = factors.lora_a.to(accumulate) * factors.scaling
            weight, lora_b = self.weight(block.linear), factors.lora_b.to(accumulate)
            for begin in range(0, weight.shape[0], NORM_CHUNK_ROWS):
                rows = slice(begin, begin + NORM_CHUNK_ROWS)
                whole = torch.addmm(weight[rows].to(accumulate), lora_b[rows], lora_a)
                start = block.rows.start + begin
                self.norm[start : start + whole.shape[0]] = whole.norm(dim=1)
            self.scale[block.rows] = factors.magnitude.to(accumulate) / self.norm[block.rows]

    def _check_factors(self, i: int, factors: LoraFactors) -> None:
        rank, n = factors.lora_a.shape[0], self.out_features[i]
        check(
            factors.lora_a.shape == (rank, self.in_features) and factors.lora_b.shape == (n, rank),
            f"AugmentedWeight: lora_a {shape_of(factors.lora_a)} and lora_b "
            f"{shape_of(factors.lora_b)} do not fit weight [{n}, {self.in_features}]",
        )
        check(
            factors.magnitude is None or factors.magnitude.shape == (n,),
            f"AugmentedWeight: magnitude does not fit weight [{n}, {self.in_features}]",
        )
        check(
            factors.bias is None or (factors.bias.shape == (n,) and factors.magnitude is None),
            f"AugmentedWeight: the adapter's bias does not fit weight [{n}, {self.in_features}], "
            "or it has a magnitude too",
        )

    def _check_magnitudes(self) -> None:
        for i in range(len(self.columns)):
            found = [b.factors for b in self.blocks if b.linear == i]
            check(
                len(found) <= 1 or all(f.magnitude is None for f in found),
                f"AugmentedWeight: linear {i} has several adapters, one of them DoRA",
            )


def spans(widths: Sequence[int]) -> list[slice]:
    """Consecutive slices of the given widths."""
    found, start = [], 0
    for width in widths:
        found.append(slice(start, start + width))
        start += width
    return found


def _as_tuple(entry: Adapters) -> tuple[LoraFactors, ...]:
    if entry is None:
        return ()
    return (entry,) if isinstance(entry, LoraFactors) else tuple(entry)


def _total_rank(adapters: Sequence[Adapters]) -> int:
    return sum(f.lora_a.shape[0] for entry in adapters for f in _as_tuple(entry))
