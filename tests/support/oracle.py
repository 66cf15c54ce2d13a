"""One comparison for every operation: our kernel, PyTorch in the same dtype, a float64 oracle."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from lora_engine.testing import assert_as_good_as

# What rounding alone may differ by: an ulp of the result and a little for the order of sums.
TOLERANCE = {
    torch.float64: 1e-13,
    torch.float32: 3e-6,
    torch.float16: 1e-3,
    torch.bfloat16: 8e-3,
}

# Triton's compiler gives rows that are not made of 16-byte vectors another layout, and sums another
# order, in each variant of a kernel.
WHOLE_VECTORS = 16


def check(
    ours: Callable[..., Tensor],
    peer: Callable[..., Tensor],
    inputs: Sequence[Tensor],
    *,
    tolerance: float | None = None,
    floor: float = 1e-30,
    alone: bool = True,
) -> None:
    """The result and every gradient of `ours` are as good as those of `peer` in the same dtype.

    `peer` in float64 is the oracle. Every gradient is also asked for alone, unless `alone` is off.
    """
    dtype = inputs[0].dtype
    limit = TOLERANCE[dtype] if tolerance is None else tolerance
    leaves = [x.detach().clone().requires_grad_() for x in inputs]
    exact = [x.detach().double().requires_grad_() for x in inputs]
    same = [x.detach().clone().requires_grad_() for x in inputs]
    y, y_exact, y_same = ours(*leaves), peer(*exact), peer(*same)
    assert_as_good_as(y, y_same, y_exact, tolerance=limit, floor=floor)
    dy = torch.randn(y.shape, generator=torch.Generator().manual_seed(1)).to(y)
    grads = torch.autograd.grad(y, leaves, dy)
    oracle = torch.autograd.grad(y_exact, exact, dy.double())
    peers = torch.autograd.grad(y_same, same, dy.to(y_same.dtype))
    for i, (ours_i, same_i, exact_i) in enumerate(zip(grads, peers, oracle, strict=True)):
        assert_as_good_as(
            ours_i, same_i, exact_i, tolerance=limit, floor=floor, what=f"gradient {i}"
        )
        if not alone:
            continue
        single = [x.detach().requires_grad_(j == i) for j, x in enumerate(inputs)]
        (grad,) = torch.autograd.grad(ours(*single), single[i], dy)
        what = f"gradient {i}, asked for alone"
        if y.is_cuda and any(size % WHOLE_VECTORS for size in y.shape[-1:]):
            assert_as_good_as(grad, same_i, exact_i, tolerance=limit, floor=floor, what=what)
        else:
            assert torch.equal(grad, ours_i), f"{what}, has other bits"
