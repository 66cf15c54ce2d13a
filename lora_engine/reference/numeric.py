"""The type arithmetic is done in."""

from torch import Tensor

from lora_engine.values import accumulate_dtype


def upcast(x: Tensor) -> Tensor:
    """`x` in the type arithmetic is done in."""
    return x.to(accumulate_dtype(x.dtype))
