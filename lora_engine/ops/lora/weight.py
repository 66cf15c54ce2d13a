"""The buffer W̃ of a group of linears that share their input, with their adapters in it."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lora_engine.ops.augmented import operand
from lora_engine.ops.lora.adapters import Adapters, AdapterSet, total_rank
from lora_engine.ops.tensors import accumulate_dtype, check, shape_of
from lora_engine.values import LoraFactors

ROW_ALIGNMENT_BYTES = 16
NORM_CHUNK_ROWS = 1024


@dataclass(frozen=True)
class Filling:
    """The adapters as they were when they were copied into W̃, and what follows from their values.

    number: how many fillings the buffer had had then, this one included.
    """

    number: int
    adapters: AdapterSet
    biases: tuple[Tensor | None, ...]  # [N_i]: the linears' own
    bias: Tensor | None  # [N] in the weights' dtype: of the linears and adapters
    scale: Tensor | None  # [N]: DoRA's magnitude / norm, 1 elsewhere
    norm: Tensor | None  # [N]

    def tensors(self) -> list[Tensor | None]:
        """What gradients go to: see `AdapterSet.tensors`."""
        return self.adapters.tensors(self.biases)


class AugmentedWeight:
    """The buffer W̃ of a group of linears that share their input.

    `weights` [N_i, K] are copied in; read them back with `weight(i)`, a view that a module may use
    as its own weight, so that there is one copy only. `adapters[i]` is what linear i has: nothing,
    one adapter, or several that add up. A, B, biases and magnitudes are copied from their tensors
    by `fill`, before every product: whoever wrote them, and however, they are never out of date.

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
        self.tail = -(-max(room, total_rank(adapters)) // step) * step
        n, k = sum(self.out_features), self.in_features
        self.buffer = torch.empty(
            n + self.tail, k + self.tail, dtype=dtype, device=weights[0].device
        )
        self.buffer[n:].zero_()
        self.buffer[:n, k:].zero_()
        for weight, span in zip(weights, self.rows, strict=True):
            self.buffer[span, :k].copy_(weight.detach())
        # Views of the buffer: all A [R, K], where rows of padding are zero; all scaled B [N, R],
        # block-diagonal; W [N, K]; the forward product's [W sB]ᵀ and the backward's [W; A].
        self.lora_a, self.lora_b = self.buffer[n:, :k], self.buffer[:n, k:]
        self.base = self.buffer[:n, :k]
        self.forward_operand, self.backward_operand = self.buffer[:n].t(), self.buffer[:, :k]
        self._fillings = 0
        self._written: AdapterSet | None = None  # whose factors the buffer holds, and where
        self._places: list[tuple[LoraFactors, Tensor, Tensor]] = []
        self.set_adapters(adapters)

    def set_adapters(self, adapters: Sequence[Adapters]) -> None:
        """Takes other adapters from the next `fill` on.

        Raises ValueError where they do not fit or lack room.
        """
        chosen = AdapterSet.of(adapters, self.rows, self.in_features)
        check(
            chosen.rank <= self.tail,
            f"AugmentedWeight: rank {chosen.rank} exceeds the room of {self.tail}",
        )
        self.adapters = chosen

    def weight(self, i: int) -> Tensor:
        """Linear i's weight [N_i, K], a view of the buffer."""
        return self.buffer[self.rows[i], : self.in_features]

    def factors(self) -> list[Tensor | None]:
        """What gradients of the next product go to: see `AdapterSet.tensors`."""
        return self.adapters.tensors(self.biases)

    def fill(self) -> Filling:
        """Copies A and scaling * B of the adapters into the buffer."""
        with torch.no_grad():
            self._write(self.adapters)
            scale, norm = self._scale_and_norm(self.adapters)
            bias = self._bias(self.adapters)
            return Filling(self._fillings, self.adapters, self.biases, bias, scale, norm)

    def fill_again(self, filling: Filling) -> None:
        """Brings the factors of `filling` back, if the buffer has been filled since."""
        if filling.number != self._fillings:
            with torch.no_grad():
                self._write(filling.adapters)

    def _write(self, adapters: AdapterSet) -> None:
        if adapters is not self._written:
            self.buffer[sum(self.out_features) :].zero_()
            self.buffer[:, self.in_features :].zero_()
            self._written = adapters
            self._places = [
                (b.factors, self.lora_a[b.columns], self.lora_b[b.rows, b.columns])
                for b in adapters.blocks
            ]
        for factors, lora_a, lora_b in self._places:
            lora_a.copy_(factors.lora_a)
            torch.mul(factors.lora_b, factors.scaling, out=lora_b)
        self._fillings += 1

    def _bias(self, adapters: AdapterSet) -> Tensor | None:
        of_blocks = [block for block in adapters.blocks if block.factors.bias is not None]
        if not of_blocks and all(bias is None for bias in self.biases):
            return None
        like = self.buffer
        total = like.new_zeros(sum(self.out_features), dtype=accumulate_dtype(like.dtype))
        for rows, bias in zip(self.rows, self.biases, strict=True):
            if bias is not None:
                total[rows] = bias.to(total.dtype)
        for block in of_blocks:
            assert block.factors.bias is not None
            total[block.rows] += block.factors.bias.to(total.dtype) * block.factors.scaling
        return total.to(like.dtype)

    def _scale_and_norm(self, adapters: AdapterSet) -> tuple[Tensor | None, Tensor | None]:
        if not adapters.has_magnitude:
            return None, None
        accumulate = accumulate_dtype(self.buffer.dtype)
        norm = torch.ones(sum(self.out_features), dtype=accumulate, device=self.buffer.device)
        scale = norm.clone()
        for block in adapters.blocks:
            factors = block.factors
            if factors.magnitude is None:
                continue
            lora_a = factors.lora_a.to(accumulate) * factors.scaling
            weight, lora_b = self.weight(block.linear), operand(factors.lora_b.to(accumulate))
            for begin in range(0, weight.shape[0], NORM_CHUNK_ROWS):
                rows = slice(begin, begin + NORM_CHUNK_ROWS)
                whole = torch.addmm(weight[rows].to(accumulate), lora_b[rows], lora_a)
                start = block.rows.start + begin
                norm[start : start + whole.shape[0]] = whole.norm(dim=1)
            scale[block.rows] = factors.magnitude.to(accumulate) / norm[block.rows]
        return scale, norm


def spans(widths: Sequence[int]) -> list[slice]:
    """Consecutive slices of the given widths."""
    found, start = [], 0
    for width in widths:
        found.append(slice(start, start + width))
        start += width
    return found
