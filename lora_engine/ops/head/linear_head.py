"""The logits of a linear head, made chunk by chunk, and the gradients of what they are made of."""

from dataclasses import dataclass

import torch
from torch import Tensor

from lora_engine.ops.tensors import front_columns

ROW_ALIGNMENT = 16  # elements: what Triton wants of a stride to load 16 bytes at once


@dataclass(frozen=True)
class LinearHead:
    """A linear head's parameters in the dtype of its products."""

    weight: Tensor  # [V, H]
    bias: Tensor | None  # [V]
    lora_a: Tensor | None  # [r, H]
    lora_b: Tensor | None  # [V, r]
    scaling: float

    @staticmethod
    def of(
        weight: Tensor,
        bias: Tensor | None,
        lora_a: Tensor | None,
        lora_b: Tensor | None,
        scaling: float,
    ) -> "LinearHead":
        cast = [None if x is None else x.to(weight.dtype) for x in (lora_a, lora_b)]
        return LinearHead(weight, bias, cast[0], cast[1], scaling)

    def buffer(self, rows: int) -> Tensor:
        """An uninitialised [rows, V] with aligned rows."""
        classes = self.weight.shape[0]
        padded = -(-classes // ROW_ALIGNMENT) * ROW_ALIGNMENT
        return front_columns(self.weight.new_empty(rows, padded), classes)

    def logits(self, hidden: Tensor, out: Tensor) -> Tensor | None:
        """Writes the logits of `hidden` [c, H] into `out` [c, V]; returns hidden lora_aᵀ [c, r]."""
        if self.bias is None:
            torch.mm(hidden, self.weight.t(), out=out)
        else:
            torch.addmm(self.bias, hidden, self.weight.t(), out=out)
        if self.lora_a is None or self.lora_b is None:
            return None
        s = torch.mm(hidden, self.lora_a.t())
        out.addmm_(s, self.lora_b.t(), alpha=self.scaling)
        return s

    def rank_gradient(self, dz: Tensor) -> Tensor | None:
        """The gradient of `hidden lora_aᵀ` [c, r] from that of the logits."""
        return None if self.lora_b is None else torch.mm(dz, self.lora_b).mul_(self.scaling)

    def hidden_gradient(self, dz: Tensor, ds: Tensor | None, out: Tensor) -> None:
        """Writes the gradient of hidden [c, H] into `out`."""
        torch.mm(dz, self.weight, out=out)
        if ds is not None and self.lora_a is not None:
            out.addmm_(ds, self.lora_a)
