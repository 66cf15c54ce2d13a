"""Matrix products as the vendor library of another processor may compute them.

oneDNN and MKL have many kernels for one product and choose by the processor, the sizes, strides and
threads. Each adds up in an order of its own, so that a row's result depends on how many rows there
are. A test that needs one order passes on some processors only. `pytest --products=other` has torch
compute in orders that no library uses, other ones for other numbers of rows.
"""

from typing import Any

import numpy as np
import torch
from torch import Tensor

HALF = (torch.bfloat16, torch.float16)

_kept: list[torch.library.Library] = []  # a library's kernels end with it


def install() -> None:
    """Has all of torch's products on the CPU computed here, for the rest of the process."""
    library = torch.library.Library("aten", "IMPL")
    _kept.append(library)
    for name in ("mm", "bmm"):
        library.impl(name, lambda a, b: _result(product(a, b), a), "CPU")
        library.impl(f"{name}.out", lambda a, b, *, out: _write(product(a, b), out), "CPU")
    for name in ("addmm", "baddbmm"):
        library.impl(name, lambda x, a, b, **scales: _result(_sum(x, a, b, **scales), a), "CPU")
        library.impl(
            f"{name}_", lambda x, a, b, **scales: _write(_sum(x, a, b, **scales), x), "CPU"
        )
        library.impl(
            f"{name}.out",
            lambda x, a, b, *, out, **scales: _write(_sum(x, a, b, **scales), out),
            "CPU",
        )


def product(a: Tensor, b: Tensor) -> np.ndarray:
    """`a` [..., M, K] times `b` [..., K, N] in float32 or float64, before it is rounded."""
    left, right = _array(a), _array(b)
    parts = 2 + a.shape[-2] % 3
    total = np.zeros((*left.shape[:-1], right.shape[-1]), left.dtype)
    for i in reversed(range(parts)):
        total += left[..., i::parts] @ right[..., i::parts, :]
    return total


def _sum(x: Tensor, a: Tensor, b: Tensor, *, beta: Any = 1, alpha: Any = 1) -> np.ndarray:
    total = product(a, b) * np.asarray(alpha, _array(a[..., :0, :0]).dtype)
    return total if beta == 0 else total + _array(x) * np.asarray(beta, total.dtype)


def _array(x: Tensor) -> np.ndarray:
    x = x.detach()
    return (x.float() if x.dtype in HALF else x).resolve_conj().resolve_neg().numpy()


def _result(total: np.ndarray, like: Tensor) -> Tensor:
    return torch.from_numpy(np.ascontiguousarray(total)).to(like.dtype)


def _write(total: np.ndarray, out: Tensor) -> Tensor:
    if out.shape != total.shape:
        out.resize_(total.shape)
    out.detach().copy_(torch.from_numpy(np.ascontiguousarray(total)))
    return out
