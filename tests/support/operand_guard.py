"""What stands beside the operands of matrix products, watched while tests run.

A product on a CPU's matrix unit reads an operand in whole blocks: oneDNN's AMX product of bfloat16
rows [M, K] that start further than K apart reads each up to the next multiple of 32 columns, and
multiplies what it finds there by zero. NaN or inf beside the row makes NaN of it. Other processors
do not show that, so tests look at what stands there instead of at the result.
"""

import itertools
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from lora_engine import backends

_ALLOCATIONS = {"empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided"}
_PRODUCTS = ("mm", "mv", "dot", "matmul", "linear", "attention", "convolution")


class OperandGuard(TorchDispatchMode):
    """Fails every product of torch's dispatcher that has something not finite beside an operand.

    Inside it uninitialised memory holds NaN, so that columns nobody wrote are found out.
    """

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kind = _kind(func)
        if kind == "product":
            _check(func.overloadpacket.__name__, args)
        made = func(*args, **(kwargs or {}))
        if kind == "allocation" and made.is_floating_point():
            made.fill_(float("nan"))
        return made


@cache
def _kind(func: Any) -> str:
    name = func.overloadpacket.__name__
    if name in _ALLOCATIONS:
        return "allocation"
    return "product" if any(part.endswith(_PRODUCTS) for part in name.split("_")) else "other"


def _check(name: str, args: Any) -> None:
    for x in _operands(name, args):
        if not backends.reads_beside_operands(x.device):
            continue
        if not x.is_contiguous() and not beside(x).isfinite().all():
            raise AssertionError(
                f"{name}: not finite beside an operand {list(x.shape)} {x.dtype}, strides "
                f"{list(x.stride())}; all: {[_described(arg) for arg in args]}"
            )


def beside(x: Tensor) -> Tensor:
    """The elements of x's memory that are between its rows, and not x's own.

    A row is what of x stands together without a gap. Nothing is beside the last one: a product
    cuts its blocks off there, or it would leave the operand's memory.
    """
    row = 1
    outer = []
    for stride, size in sorted(zip(x.stride(), x.shape, strict=True)):
        if size == 1 or stride == 0:
            continue
        if not outer and stride == row:
            row *= size
        else:
            outer.append((stride, size))
    if not outer or not x.numel():
        return x.new_zeros(0)
    memory = x.as_strided((x.untyped_storage().nbytes() // x.element_size(),), (1,), 0)
    starts = torch.zeros(1, dtype=torch.int64)
    for stride, size in outer:
        starts = (starts[:, None] + stride * torch.arange(size)).flatten()
    others = torch.ones(int(starts.max()) + row, dtype=torch.bool)
    others[(starts[:, None] + torch.arange(row)).flatten()] = False
    return memory[x.storage_offset() :][: len(others)][others.to(x.device)]


def _operands(name: str, args: Any) -> list[Tensor]:
    """What of a product's arguments is multiplied: not what it is added to, nor biases."""
    given = args[1:] if name.startswith(("add", "_add", "badd")) else args
    flat = itertools.chain.from_iterable(x if isinstance(x, list | tuple) else [x] for x in given)
    return [x for x in flat if isinstance(x, Tensor) and x.dim() > 1 and x.is_floating_point()]


def _described(x: Any) -> Any:
    return (list(x.shape), list(x.stride())) if isinstance(x, Tensor) else x
