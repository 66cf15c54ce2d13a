"""A frozen weight that products multiply by merged with its adapter and quantised, as it is served.

    Q(W + s B A)

The sum is made in float32 (of float64 weights in float64), rounded to the model's dtype, and put
into packed bits: the arithmetic of `lora_engine.export.merge`. Q has no useful derivative; the
gradients of A and B are straight-through (Bengio and others, 2013, arXiv:1308.3432), those that
they would have if Q were the identity, and the input's is that of the quantised weight.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from lora_engine.ops.quantized_weight import QuantizedWeight, put_in_format
from lora_engine.ops.tensors import accumulate_dtype, check, row_ranges
from lora_engine.quantization.format import Format
from lora_engine.values import LoraFactors


class MergeableWeight:
    """W [N, K], and the packed weight that it was last merged into.

    weight: W, on the device of products. format: what it is quantised to. dtype: what W and the sum
    are rounded to before, and what the packed weight decodes to. quantises: False while products
    are W's own, with the adapter beside it: A and B have true gradients then.
    """

    quantises = True

    def __init__(self, weight: Tensor, format: Format, dtype: torch.dtype) -> None:
        self.weight, self.format, self.dtype = weight.detach(), format, dtype
        self._made: QuantizedWeight | None = None
        self._of: tuple[object, ...] = ()  # what `_made` was made of
        self._factors: tuple[Tensor, Tensor] | None = None  # copies: optimisers write in place

    @property
    def shape(self) -> tuple[int, int]:
        """(N, K)."""
        return self.weight.shape[0], self.weight.shape[1]

    @property
    def device(self) -> torch.device:
        """Of W."""
        return self.weight.device

    def merged(self, adapters: Sequence[LoraFactors]) -> QuantizedWeight:
        """Q(W + s B A) of the one adapter, by its present values; Q(W) without any.

        Made anew where W, or a value of A or B, is another than the last time: a GPU is waited for.
        Raises ValueError for several adapters, for DoRA, for a scaling that is a tensor, and for a
        sum that is not finite.
        """
        check(len(adapters) <= 1, "a weight is merged with one adapter at a time")
        factors = adapters[0] if adapters else None
        check(
            factors is None
            or (factors.magnitude is None and not isinstance(factors.scaling, Tensor)),
            "a weight is merged with plain LoRA, without magnitudes or a scaling that is a tensor",
        )
        version = 0 if self.weight.is_inference() else self.weight._version
        of = (self.weight.data_ptr(), version, None if factors is None else factors.scaling)
        if self._made is None or of != self._of or not self._has(factors):
            with torch.inference_mode(False), torch.no_grad():
                self._made = None  # freed before the next is made
                self._factors = None if factors is None else _copies(factors)
                self._made = put_in_format(self._sum(factors), self.format)
            self._of = of
        return self._made

    def _has(self, factors: LoraFactors | None) -> bool:
        """Whether the last sum was made with these values of A and B."""
        if factors is None or self._factors is None:
            return factors is None and self._factors is None
        pairs = zip(self._factors, (factors.lora_a, factors.lora_b), strict=True)
        return all(
            kept.dtype == now.dtype and kept.device == now.device and torch.equal(kept, now)
            for kept, now in pairs
        )

    def _sum(self, factors: LoraFactors | None) -> Tensor:
        if factors is None:
            return self.weight.to(self.dtype)
        merged = torch.empty(self.shape, dtype=self.dtype, device=self.device)
        wide = accumulate_dtype(self.dtype)
        a, b = factors.lora_a, factors.lora_b
        with torch.autocast(self.device.type, enabled=False):
            for start, stop in row_ranges(self.shape):
                added = low_rank_rows(a, b, factors.scaling, start, stop, wide)
                merged[start:stop] = self.weight[start:stop].to(self.dtype).to(wide) + added
        return merged


def low_rank_rows(
    lora_a: Tensor,  # [r, K]
    lora_b: Tensor,  # [N, r]
    scaling: float,
    start: int,
    stop: int,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """Rows [stop - start, K] of s B A, computed in `dtype`."""
    return torch.mm(lora_b[start:stop].to(dtype), lora_a.to(dtype)) * scaling


def _copies(factors: LoraFactors) -> tuple[Tensor, Tensor]:
    return factors.lora_a.detach().clone(), factors.lora_b.detach().clone()
