"""What stands beside the operands of matrix products, watched while tests run.

A product on a CPU's matrix unit reads an operand in whole blocks: oneDNN's AMX product of bfloat16
rows [M, K] that start further than K apart reads each up to the next multiple of 32 columns, and
multiplies what it finds there by zero. NaN or inf beside the row makes NaN of it. Other processors
do not show that, so tests look at what stands there instead of at the result.
"""

import itertools
import warnings
from collections.abc import Callable, Sequence
from contextlib import ExitStack, nullcontext
from functools import lru_cache, partial, wraps
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch.utils._device import _device_constructors
from torch.utils._python_dispatch import _disable_current_modes

from lora_engine import backends

_ALLOCATIONS = (
    *((torch, name) for name in ("empty", "empty_like", "empty_strided")),
    *((Tensor, name) for name in ("new_empty", "new_empty_strided")),
)
_PRODUCTS = (
    *("mm", "mm.out", "bmm", "bmm.out", "addbmm", "addbmm_", "addbmm.out"),
    *("addmm", "addmm_", "addmm.out", "_addmm_activation", "_addmm_activation.out"),
    *("baddbmm", "baddbmm_", "baddbmm.out", "addmv", "addmv_", "addmv.out", "dot", "vdot"),
    *("_grouped_mm", "convolution", "convolution_backward"),
    "_scaled_dot_product_flash_attention_for_cpu",
    "_scaled_dot_product_flash_attention_for_cpu_backward",
)


class OperandGuard:
    """Fails every product of torch's on a CPU that has something not finite beside an operand.

    Inside it memory that Python asks torch for, uninitialised, holds NaN, so that columns nobody
    wrote are found out. The CPU's kernels of products are others while it is entered, in all
    threads: a TorchDispatchMode sees the same, but doubles the time of a model's test.
    """

    def __enter__(self) -> None:
        self._end = ExitStack()
        _device_constructors()  # remembers at its first call what a device's context acts upon
        for owner, name in _ALLOCATIONS:
            poisoned = _poisoned(getattr(owner, name))
            self._end.enter_context(mock.patch.object(owner, name, poisoned))
        library = torch.library.Library("aten", "IMPL")
        self._end.callback(library._destroy)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Warning only once for all operators")
            for name in _PRODUCTS:
                kernel = torch.library.get_kernel(f"aten::{name}", "CPU")
                checked = partial(_checked, name.partition(".")[0], kernel.call_boxed)
                library.impl(name, checked, "CPU", with_keyset=True, allow_override=True)

    def __exit__(self, *error: object) -> None:
        self._end.close()


def _checked(
    name: str, kernel: Callable[..., Any], keys: torch.DispatchKeySet, *args: Any, **kwargs: Any
) -> Any:
    _check(name, args)
    return kernel(keys, *args, **kwargs)


def _poisoned(allocate: Callable[..., Tensor]) -> Callable[..., Tensor]:
    @wraps(allocate)
    def poisoned(*args: Any, **kwargs: Any) -> Tensor:
        made = allocate(*args, **kwargs)
        if made.is_floating_point():
            observed = torch._C._len_torch_dispatch_stack()  # by a test that counts calls
            with _disable_current_modes() if observed else nullcontext():
                made.detach().fill_(float("nan"))
        return made

    return poisoned


def _check(name: str, args: Any) -> None:
    for x in _operands(name, args):
        if not backends.reads_beside_operands(x.device):
            continue
        if x.is_contiguous():
            continue
        near = beside(x)
        if len(near) and not near.isfinite().all():
            raise AssertionError(
                f"{name}: not finite beside an operand {list(x.shape)} {x.dtype}, strides "
                f"{list(x.stride())}; all: {[_described(arg) for arg in args]}"
            )


def beside(x: Tensor) -> Tensor:
    """The elements of x's memory that are between its rows, and not x's own.

    A row is what of x stands together without a gap. Nothing is beside the last one: a product
    cuts its blocks off there, or it would leave the operand's memory.
    """
    others = _others(x.shape, x.stride())
    if others is None:
        return x.new_zeros(0)
    memory = x.as_strided((x.untyped_storage().nbytes() // x.element_size(),), (1,), 0)
    return memory[x.storage_offset() :][: len(others)][others.to(x.device)]


@lru_cache
def _others(shape: Sequence[int], strides: Sequence[int]) -> Tensor | None:
    """Whether the elements from a tensor's first to its last are not its own; None: all are."""
    row = 1
    outer = []
    for stride, size in sorted(zip(strides, shape, strict=True)):
        if size == 1 or stride == 0:
            continue
        if not outer and stride == row:
            row *= size
        else:
            outer.append((stride, size))
    if not outer or 0 in shape:
        return None
    starts = torch.zeros(1, dtype=torch.int64)
    for stride, size in outer:
        starts = (starts[:, None] + stride * torch.arange(size)).flatten()
    others = torch.ones(int(starts.max()) + row, dtype=torch.bool)
    others[(starts[:, None] + torch.arange(row)).flatten()] = False
    return others if others.any() else None


def _operands(name: str, args: Any) -> list[Tensor]:
    """What of a product's arguments is multiplied: not what it is added to, nor biases."""
    given = args[1:] if name.startswith(("add", "_add", "badd")) else args
    flat = itertools.chain.from_iterable(x if isinstance(x, list | tuple) else [x] for x in given)
    return [x for x in flat if isinstance(x, Tensor) and x.dim() > 1 and x.is_floating_point()]


def _described(x: Any) -> Any:
    return (list(x.shape), list(x.stride())) if isinstance(x, Tensor) else x
