"""Small things every operation needs: rows, buffers whose memory is reused, messages."""

from collections.abc import Callable
from functools import wraps
from typing import ParamSpec, TypeVar

import torch
from torch import Tensor
from torch.autograd import forward_ad

from lora_engine.values import accumulate_dtype as accumulate_dtype

P = ParamSpec("P")
R = TypeVar("R")


def as_rows(x: Tensor) -> Tensor:
    """`x` [..., cols] as [rows, cols] with unit column stride, copied only if it has to be."""
    rows = x if x.dim() == 2 else x.reshape(-1, x.shape[-1])
    return rows if rows.stride(-1) == 1 else rows.contiguous()


ROW_STEP = 64


def empty_rows(rows: int, cols: int, *, dtype: torch.dtype, device: torch.device) -> Tensor:
    """An uninitialised [rows, cols] whose memory is a multiple of ROW_STEP rows.

    Packed batches differ by a few tokens; with memory in steps they reuse each other's blocks.
    """
    spare = -rows % ROW_STEP
    buffer = torch.empty(rows + spare, cols, dtype=dtype, device=device)
    return buffer[:rows] if spare else buffer


def not_a_view(x: Tensor) -> Tensor:
    """`x`'s memory as a tensor that is no view of another.

    What a custom autograd function returns as a view must not be changed in place, which models do
    with the results of their linears and norms. Only for memory that nothing saved for a backward
    pass: the result has a version counter of its own.
    """
    return x.new_empty(0).set_(x.untyped_storage(), x.storage_offset(), x.size(), x.stride())


def front_columns(buffer: Tensor, cols: int) -> Tensor:
    """The first `cols` columns of an uninitialised `buffer` [rows, more], with zeros behind them.

    Matrix units take operands in whole blocks of columns: oneDNN's AMX product of bfloat16 rows
    reads to the next multiple of 32 and multiplies what it finds by zero, which makes NaN of NaN
    and inf. So what stands beside an operand within its rows has to be finite, and a view that is
    narrower than its buffer is made here.
    """
    if cols < buffer.shape[1]:
        buffer[:, cols:].zero_()
    return buffer[:, :cols]


def matmul(a: Tensor, b: Tensor) -> Tensor:
    """`a @ b` [M, N] into `empty_rows`."""
    out = empty_rows(a.shape[0], b.shape[1], dtype=a.dtype, device=a.device)
    return torch.mm(a, b, out=out)


def check(condition: bool, message: str | Callable[[], str]) -> None:
    """ValueError with `message` unless `condition`.

    A message that says what the tensors are takes microseconds to make: pass a function where the
    check stands before every call of a kernel.
    """
    if not condition:
        raise ValueError(message if isinstance(message, str) else message())


def without_autocast(operation: Callable[P, R]) -> Callable[P, R]:
    """`operation` computing in the types of its operands, under `torch.autocast` as elsewhere.

    Of its products autocast would take some in another type and, as these write into tensors that
    are there already, not all.
    """

    @wraps(operation)
    def exact(*args: P.args, **kwargs: P.kwargs) -> R:
        if not (torch.is_autocast_enabled("cpu") or torch.is_autocast_enabled("cuda")):
            return operation(*args, **kwargs)
        with torch.autocast("cpu", enabled=False), torch.autocast("cuda", enabled=False):
            return operation(*args, **kwargs)

    return exact


def is_observed() -> bool:
    """Whether gradients may be asked for, or a trace or transform follows torch's calls.

    Operations are `torch.autograd.Function`s then, which these record or refuse. What kernels write
    outside one they would take for uninitialised memory, or a constant.
    """
    return (
        torch.is_grad_enabled()
        or torch.jit.is_tracing()
        or forward_ad._current_level >= 0
        or torch._C._are_functorch_transforms_active()
    )


def shape_of(x: Tensor) -> str:
    """`[2, 3] float32`, for messages."""
    return f"{list(x.shape)} {str(x.dtype).removeprefix('torch.')}"
