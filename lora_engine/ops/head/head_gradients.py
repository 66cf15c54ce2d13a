"""Gradients of a linear head's parameters, summed over chunks of rows."""

import torch
from torch import Tensor

from lora_engine import backends
from lora_engine.ops.head.linear_head import HeadParameters, ParameterGradients, WantedHeadGradients
from lora_engine.ops.tensors import accumulate_dtype

# Half-precision products are added to their float32 sum in pieces of at most this many bytes, so
# that the product of a whole head is never in memory beside the sum.
PIECE_BYTES = 64 * 2**20


class HeadGradients:
    """Sums the wanted gradients of a head's parameters over chunks of rows.

    Sums of several half-precision chunks are float32, so that each chunk's product is rounded once
    and the sum once. A single chunk's product is the result itself.
    """

    def __init__(
        self,
        parameters: HeadParameters,
        wanted: WantedHeadGradients,
        dtype: torch.dtype,
        chunks: int,
    ) -> None:
        self.dtype = dtype if chunks == 1 else accumulate_dtype(dtype)
        self.exact = self.dtype == accumulate_dtype(dtype)
        self.parameters = parameters
        make = torch.empty_like if chunks else torch.zeros_like
        self.begun = False

        def begin(parameter: Tensor | None, want: bool) -> Tensor | None:
            return make(parameter, dtype=self.dtype) if want and parameter is not None else None

        self.sums = ParameterGradients(
            weight=begin(parameters.weight, wanted.weight),
            bias=begin(parameters.bias, wanted.bias),
            lora_a=begin(parameters.lora_a, wanted.lora_a),
            lora_b=begin(parameters.lora_b, wanted.lora_b),
        )

    def add(
        self,
        dz: Tensor,  # [c, V]
        hidden: Tensor,  # [c, H]
        s: Tensor | None,  # [c, r]: hidden lora_aᵀ
        ds: Tensor | None,  # [c, r]: its gradient
        scaling: float,
    ) -> None:
        """Adds the gradients of one chunk."""
        weight, bias, lora_a, lora_b = self.sums
        if weight is not None:
            self._add_product(weight, dz, hidden)
        if bias is not None:
            self._add(bias, dz.sum(0, dtype=bias.dtype))
        if lora_a is not None and ds is not None:
            self._add_product(lora_a, ds, hidden)
        if lora_b is not None and s is not None:
            self._add_product(lora_b, dz, s * scaling)
        self.begun = True

    def _add(self, total: Tensor, part: Tensor) -> None:
        total.add_(part) if self.begun else total.copy_(part)

    def _add_product(self, total: Tensor, left: Tensor, right: Tensor) -> None:
        """`total` [N, K] += left [c, N]ᵀ · right [c, K]; the first chunk overwrites it."""
        if total.dtype == left.dtype:
            total.addmm_(left.t(), right, beta=1 if self.begun else 0)
            return
        step = max(1, PIECE_BYTES // max(1, right.shape[1] * left.element_size()))
        for begin in range(0, total.shape[0], step):
            piece = slice(begin, begin + step)
            self._add(total[piece], torch.mm(left[:, piece].t(), right))

    def finish(self, factor: Tensor | None = None) -> ParameterGradients:
        """The sums, times `factor` (a scalar) where given, in their parameters' dtypes."""

        def end(parameter: Tensor | None, total: Tensor | None) -> Tensor | None:
            if parameter is None or total is None:
                return None
            return (total if factor is None else total.mul_(factor)).to(parameter.dtype)

        parameters, sums = self.parameters, self.sums
        self.sums = ParameterGradients()
        return ParameterGradients(
            weight=end(parameters.weight, sums.weight),
            bias=end(parameters.bias, sums.bias),
            lora_a=end(parameters.lora_a, sums.lora_a),
            lora_b=end(parameters.lora_b, sums.lora_b),
        )


def scaled(x: Tensor | None, factor: Tensor) -> Tensor | None:
    """`x * factor` in x's dtype, rounded once; `factor` is a float32 scalar or has x's rows."""
    if x is None:
        return None
    if factor.dim() == 0 and backends.keeps_scalars(x.device):
        return x * factor
    factor = factor.reshape(-1, *(1,) * (x.dim() - 1))
    return torch.mul(x, factor, out=torch.empty_like(x))
