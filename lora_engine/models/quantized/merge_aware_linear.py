"""A linear whose weight is merged with its adapter and quantised before every product."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from lora_engine.ops import LoraFactors, MergeableWeight
from lora_engine.ops.frozen_product import frozen_product
from lora_engine.quantization.format import Format


class MergeAwareLinear(nn.Linear):
    """A frozen linear that computes with Q(W + s B A), the weight that is served: see
    `ops.mergeable_weight`.

    weight: W itself, the parameter of the linear that this is made from. adapters: tells which
    factors are active. W and the sum are rounded to `dtype`, whatever the module is cast to.
    Gradients of the factors are not made here, where they are no inputs.
    """

    def __init__(
        self,
        linear: nn.Linear,
        format: Format,
        dtype: torch.dtype,
        adapters: Callable[[], Sequence[LoraFactors]],
    ) -> None:
        nn.Module.__init__(self)
        self.out_features, self.in_features = linear.out_features, linear.in_features
        self.weight = linear.weight
        self.register_parameter("bias", linear.bias)
        self.format, self.dtype = format, dtype
        self._adapters = adapters
        self._mergeable: MergeableWeight | None = None

    @property
    def mergeable(self) -> MergeableWeight:
        """W where it is now."""
        kept = self._mergeable
        if kept is None or kept.weight.data_ptr() != self.weight.data_ptr():
            kept = MergeableWeight(self.weight, self.format, self.dtype)
            self._mergeable = kept
        return kept

    def forward(self, input: Tensor) -> Tensor:
        """input [..., K] times the merged weight, plus the bias: [..., N], in input's dtype."""
        kept = self.mergeable
        if not kept.quantises:
            return nn.functional.linear(input, self.weight.detach(), self.bias)
        y = frozen_product(input, kept.merged(self._adapters()).dequantize)
        return y if self.bias is None else y + self.bias.to(y.dtype)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, merged into {self.format}"


@contextmanager
def unquantised(model: nn.Module) -> Iterator[None]:
    """Within, merge-aware linears compute with W, and their adapters beside it.

    Of W + s B A the straight-through gradients are the true ones: what compares gradients with
    differences of the loss can do so here. Quantised weights change in jumps.
    """
    weights = [m.mergeable for m in model.modules() if isinstance(m, MergeAwareLinear)]
    for weight in weights:
        weight.quantises = False
    try:
        yield
    finally:
        for weight in weights:
            weight.quantises = True
