"""Products of large matrices: PyTorch's, or those of our kernel where the choice is that."""

import torch
from torch import Tensor

from lora_engine.backends import selection
from lora_engine.backends.cpu import matmul as kernel


def multiply(out: Tensor, a: Tensor, b: Tensor, addend: Tensor | None = None) -> Tensor:
    """Writes a b + addend to `out` [m, n], rounded once, and returns it.

    a is [m, k], b is [k, n], addend [n] or [m, n]; it may be `out`. All are of one dtype and on one
    device. No gradient is recorded.
    """
    if selection.multiplies(out.device, out.dtype) and _readable(out, a, b, addend):
        kernel.matmul(a, b, out, addend)
        return out
    if addend is None:
        return torch.mm(a, b, out=out)
    if addend is out:
        return out.addmm_(a, b)
    return torch.addmm(addend, a, b, out=out)


def copies_no_addend(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether `multiply` reads an addend where it is; PyTorch's product copies it to `out`."""
    return selection.multiplies(device, dtype)


def _readable(out: Tensor, a: Tensor, b: Tensor, addend: Tensor | None) -> bool:
    """Whether our kernel reads them: rows of adjacent elements, or columns of b, of one dtype."""
    return (
        out.dtype == a.dtype == b.dtype
        and (addend is None or addend.dtype == out.dtype)
        and out.stride(1) == 1
        and a.stride(1) == 1
        and (b.stride(1) == 1 or b.stride(0) == 1)
        and (addend is None or addend.stride(-1) == 1)
    )
