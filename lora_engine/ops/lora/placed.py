"""The adapters' factors as products read them: cast, scaled, and side by side."""

from lora_engine.backends import lora_contracts
from lora_engine.backends.lora_parts import Placing
from lora_engine.ops.lora.adapters import AdapterSet
from lora_engine.ops.lora.base import Factors


class PlacedFactors:
    """Tensors A [R, K] and sB [N, R] that the factors of a set of adapters are copied into.

    writes: how many times factors were copied.
    """

    def __init__(self, factors: Factors) -> None:
        self.lora_a, self.lora_b = factors
        self.writes = 0
        self._adapters: AdapterSet | None = None  # whose factors A and sB hold
        self._placings: list[Placing] = []

    @property
    def rank(self) -> int:
        """R, the most ranks that the adapters may have together."""
        return self.lora_a.shape[0]

    def write(self, adapters: AdapterSet, kernels: lora_contracts.LoraLinear) -> None:
        """Copies A and scaling * B of every adapter, zeros elsewhere."""
        if adapters is not self._adapters:
            self.lora_a.zero_()
            self.lora_b.zero_()
            self._adapters = adapters
            self._placings = [
                Placing(
                    factors=b.factors,
                    lora_a=self.lora_a[b.columns],
                    lora_b=self.lora_b[b.rows, b.columns],
                )
                for b in adapters.blocks
            ]
        kernels.place_factors(self.lora_a, self.lora_b, self._placings)
        self.writes += 1
