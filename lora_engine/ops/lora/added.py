"""Gradients of adapters that products add where a training loop keeps them, past autograd.

Autograd would be given a tensor for each factor and add them up one by one: two calls of PyTorch
for each of hundreds of factors, most of them of a few thousand values.
"""

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

from lora_engine.backends.lora_parts import Added
from lora_engine.ops.lora.adapters import AdapterSet
from lora_engine.ops.lora.trained import OfGroup

# The total of each parameter, by the parameter's id(). Shared by all threads: autograd may run the
# backward pass in a thread of its own.
_totals: dict[int, Tensor] = {}


@contextmanager
def adding_gradients(totals: Iterable[tuple[Tensor, Tensor]]) -> Iterator[None]:
    """For a backward pass: what products would return as gradients of these tensors they may add to
    the totals instead, float32 and contiguous, of the same shape; autograd is given none then.

    For a loop that reads the totals after the pass, and tensors without hooks: these would not be
    called. Where a product does not add, the gradient arrives as ever.
    """
    global _totals
    pairs, before = list(totals), _totals
    _totals = {id(tensor): total for tensor, total in pairs}
    try:
        yield
    finally:
        _totals = before


def added_gradients(adapters: AdapterSet, needs: OfGroup[bool]) -> Sequence[Added]:
    """Where the gradients of all A and B that `needs` says are added; empty: not all are."""
    if not _totals:
        return ()
    added = []
    for part, block, needed in zip(adapters.parts, adapters.blocks, needs.adapters, strict=True):
        factors = block.factors
        a = _totals.get(id(factors.lora_a)) if needed.lora_a else None
        b = _totals.get(id(factors.lora_b)) if needed.lora_b else None
        if (a is None and needed.lora_a) or (b is None and needed.lora_b):
            return ()
        if block.scales_by_tensor or not (_fits(a, factors.lora_a) and _fits(b, factors.lora_b)):
            return ()
        added.append(Added(part=part, lora_a=a, lora_b=b))
    return added


def _fits(total: Tensor | None, factor: Tensor) -> bool:
    """Whether the factor still has the shape and dtype that it had when it was given a total."""
    if total is None:
        return True
    return total.shape == factor.shape and factor.dtype == total.dtype == torch.float32
