"""Small things every operation needs: rows, buffers whose memory is reused, messages."""

import math
from collections.abc import Callable, Iterator, Sequence
from functools import wraps
from typing import ParamSpec, TypeVar

import torch
from torch import Tensor
from torch.autograd import forward_ad

from lora_engine.backends.products import multiply
from lora_engine.values import accumulate_dtype as accumulate_dtype

P = ParamSpec("P")
R = TypeVar("R")


def as_rows(x: Tensor) -> Tensor:
    """`x` [..., cols] as [rows, cols] with unit column stride, copied only if it has to be."""
    rows = x if x.dim() == 2 else x.reshape(-1, x.shape[-1])
    return rows if rows.stride(-1) == 1 else rows.contiguous()


ROW_STEP = 64
LEAST_STEPPED_BYTES = 2**20
_VALUES_AT_A_TIME = 2**23


def stepped_rows(rows: int, row_bytes: int) -> int:
    """The rows that `empty_rows` allocates: whole steps of ROW_STEP where the memory is large.

    Packed batches differ by a few tokens: in sizes of whole steps the allocator can reuse memory.
    Of small memory the front rows' view would cost more time than that saves.
    """
    return rows + -rows % ROW_STEP if rows * row_bytes >= LEAST_STEPPED_BYTES else rows


def empty_rows(rows: int, cols: int, *, dtype: torch.dtype, device: torch.device) -> Tensor:
    """An uninitialised [rows, cols], the front of `stepped_rows`."""
    allocated = stepped_rows(rows, cols * dtype.itemsize)
    buffer = torch.empty(allocated, cols, dtype=dtype, device=device)
    return buffer[:rows] if allocated > rows else buffer


def not_a_view(x: Tensor) -> Tensor:
    """`x`'s memory as a tensor that is no view of another.

    Autograd refuses in-place changes of a view that a custom function returned, and models change
    results of linears and norms in place. Not for memory that was saved for a backward pass: the
    result has a version counter of its own, so a change would go unnoticed.
    """
    return x.new_empty(0).set_(x.untyped_storage(), x.storage_offset(), x.size(), x.stride())


def front_columns(buffer: Tensor, cols: int) -> Tensor:
    """The first `cols` columns of an uninitialised `buffer` [rows, more], the others zeroed.

    A matrix unit may read beyond an operand's columns: oneDNN's AMX product of bfloat16 rows reads
    to the next multiple of 32 and multiplies those values by zero, and NaN or inf times zero is
    NaN. So padding columns have to be finite, and a view narrower than its buffer is made here.
    """
    if cols < buffer.shape[1]:
        buffer[:, cols:].zero_()
    return buffer[:, :cols]


def matmul(a: Tensor, b: Tensor) -> Tensor:
    """`a @ b` [M, N] into `empty_rows`."""
    out = empty_rows(a.shape[0], b.shape[1], dtype=a.dtype, device=a.device)
    return multiply(out, a, b)


def check(condition: bool, message: str | Callable[[], str]) -> None:
    """ValueError with `message` unless `condition`.

    A message with shapes and dtypes takes microseconds to make: where a check comes before every
    call of a kernel, pass a function that makes it.
    """
    if not condition:
        raise ValueError(message if isinstance(message, str) else message())


def row_ranges(shape: Sequence[int]) -> Iterator[tuple[int, int]]:
    """The rows of a tensor, of one dimension or more, in runs of about 8 million values, as many
    as are copied to float32 at once."""
    step = max(1, _VALUES_AT_A_TIME // max(1, math.prod(shape[1:])))
    for start in range(0, shape[0], step):
        yield start, min(start + step, shape[0])


def without_autocast(operation: Callable[P, R]) -> Callable[P, R]:
    """`operation`, computed in its operands' dtypes under `torch.autocast` too.

    Autocast would change the dtype of some of its products but not of those that write into
    tensors allocated before.
    """

    @wraps(operation)
    def exact(*args: P.args, **kwargs: P.kwargs) -> R:
        if not (torch.is_autocast_enabled("cpu") or torch.is_autocast_enabled("cuda")):
            return operation(*args, **kwargs)
        with torch.autocast("cpu", enabled=False), torch.autocast("cuda", enabled=False):
            return operation(*args, **kwargs)

    return exact


def is_observed() -> bool:
    """Whether autograd, a trace or a functorch transform records torch's calls.

    Operations then run as `torch.autograd.Function`s, which all of these record or refuse. A result
    that a kernel wrote outside of one would be recorded as uninitialised memory, or as a constant.
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
