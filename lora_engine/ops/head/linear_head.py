"""The logits of a linear head, chunk by chunk, and the gradients of its operands."""

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from lora_engine.backends.products import multiply
from lora_engine.ops.tensors import front_columns

ROW_ALIGNMENT = (
    16  # elements: Triton loads 16 bytes at once only if it knows the stride as a multiple of 16
)


class HeadParameters(NamedTuple):
    """A linear head's tensors."""

    weight: Tensor  # [V, H]
    bias: Tensor | None  # [V]
    lora_a: Tensor | None  # [r, H]
    lora_b: Tensor | None  # [V, r]


class ParameterGradients(NamedTuple):
    """The gradients of `HeadParameters`; None for what gets none."""

    weight: Tensor | None = None
    bias: Tensor | None = None
    lora_a: Tensor | None = None
    lora_b: Tensor | None = None


class WantedHeadGradients(NamedTuple):
    """Which of the hidden rows and of the head's parameters get a gradient."""

    hidden: bool
    weight: bool
    bias: bool
    lora_a: bool
    lora_b: bool

    @property
    def trains_head(self) -> bool:
        return self.weight or self.bias or self.lora_a or self.lora_b


@dataclass(frozen=True)
class LinearHead:
    """A linear head's parameters in the dtype of its products."""

    weight: Tensor  # [V, H]
    bias: Tensor | None  # [V]
    lora_a: Tensor | None  # [r, H]
    lora_b: Tensor | None  # [V, r]
    scaling: float

    @staticmethod
    def of(parameters: HeadParameters, scaling: float) -> "LinearHead":
        weight, bias, lora_a, lora_b = parameters
        return LinearHead(
            weight=weight,
            bias=bias,
            lora_a=None if lora_a is None else lora_a.to(weight.dtype),
            lora_b=None if lora_b is None else lora_b.to(weight.dtype),
            scaling=scaling,
        )

    def buffer(self, rows: int) -> Tensor:
        """An uninitialised [rows, V] with aligned rows."""
        classes = self.weight.shape[0]
        padded = -(-classes // ROW_ALIGNMENT) * ROW_ALIGNMENT
        return front_columns(self.weight.new_empty(rows, padded), classes)

    def logits(self, hidden: Tensor, out: Tensor) -> Tensor | None:
        """Writes the logits of `hidden` [c, H] into `out` [c, V]; returns hidden lora_aᵀ [c, r]."""
        multiply(out, hidden, self.weight.t(), self.bias)
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
        multiply(out, dz, self.weight)
        if ds is not None and self.lora_a is not None:
            multiply(out, ds, self.lora_a, out)
