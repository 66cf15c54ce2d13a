"""Buffers whose rows have padding columns, so that a matrix product can be augmented in place.

The augmented product `[X | S] W̃ᵀ` reads S from the columns behind X. The operation that makes X
(a norm, a gated activation, attention; in the backward pass their gradients) asks `empty` for a
buffer with that many padding columns and returns the front columns as ordinary tensors. `claim`
gives the consumer the whole buffer, if the tensors it received are still those columns and no other
consumer claimed them before; otherwise it copies them into a buffer with padding columns. So one
consumer at most writes the padding, and tensors from elsewhere work too, at the cost of a copy.

Products of these tensors alone may read the padding columns as well (`tensors.front_columns`). So
`empty` zeroes them where they do, and `operand` copies a tensor from elsewhere that is part of a
wider one.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor

from lora_engine import backends
from lora_engine.ops.tensors import empty_rows, not_a_view

_ATTRIBUTE = "_lora_engine_padding"


class Joined(NamedTuple):
    """X with columns for S behind it."""

    whole: Tensor  # [M, K + R]
    front: Tensor  # [M, K]: X
    behind: Tensor  # [M, R]: S

    @staticmethod
    def of(whole: Tensor, cols: int) -> "Joined":
        """The first `cols` columns are X."""
        front, behind = whole.split_with_sizes((cols, whole.shape[1] - cols), dim=1)
        return Joined(whole, front, behind)


@dataclass
class _Padding:
    buffer: Tensor  # [rows, sum(widths) + padding_columns]
    widths: tuple[int, ...]
    claimed: bool = False


def empty(
    rows: int,
    widths: Sequence[int],
    padding_columns: int,
    *,
    dtype: torch.dtype,
    device: torch.device,
    zeros: bool = True,
) -> tuple[Tensor, ...]:
    """One tensor [rows, width] for each width, adjacent in one buffer with so many padding columns.

    The tensors are uninitialised, the padding columns zero. These are uninitialised too on devices
    whose products do not read them, and with `zeros=False`, for a caller that claims them before
    any product reads the tensors.
    """
    if padding_columns == 0 and len(widths) == 1:
        return (empty_rows(rows, widths[0], dtype=dtype, device=device),)
    cols = sum(widths)
    buffer = empty_rows(rows, cols + padding_columns, dtype=dtype, device=device)
    # .data has a version counter of its own: when a product writes S into the padding columns, the
    # columns before them, which autograd may have saved, do not count as changed. With zeros=False
    # the caller claims the columns before autograd can save any, and the buffer itself will do.
    padding = _Padding(buffer.data if zeros else buffer, tuple(widths))
    *parts, behind = buffer.split_with_sizes((*widths, padding_columns), dim=1)
    if zeros and padding_columns and backends.reads_beside_operands(device):
        behind.zero_()
    for part in parts:
        setattr(part, _ATTRIBUTE, padding)
    return tuple(parts)


def keep_padding(source: Tensor, view: Tensor) -> Tensor:
    """Marks `view`, `source` in another shape, as having the same padding columns; returns it."""
    padding = getattr(source, _ATTRIBUTE, None)
    if padding is not None:
        setattr(view, _ATTRIBUTE, padding)
    return view


def shaped(rows: Tensor, shape: torch.Size) -> Tensor:
    """`rows` [rows, cols] as `shape` [..., cols], with its padding columns."""
    return rows if rows.shape == shape else keep_padding(rows, rows.view(shape))


def result(rows: Tensor, shape: torch.Size) -> Tensor:
    """`shaped`, as an autograd function may return it.

    Without padding columns it is no view, so that the model may change it in place. With padding
    columns it is a view, and autograd refuses that: the function that claimed the buffer may have
    saved it, and would not notice the change.
    """
    made = shaped(rows, shape)
    return made if hasattr(made, _ATTRIBUTE) else not_a_view(made)


def operand(x: Tensor) -> Tensor:
    """`x` [..., cols], copied if the memory between its rows is not known to be finite."""
    return x if hasattr(x, _ATTRIBUTE) else x.contiguous()


def claim(parts: Sequence[Tensor], padding_columns: int) -> Tensor:
    """The buffer whose front columns are `parts` [..., width] each.

    It is [rows, sum(widths) + padding_columns]. The last `padding_columns` columns hold arbitrary
    values. The caller writes these columns only, and all of them before a product reads the buffer
    or its front columns.
    """
    padding: _Padding | None = getattr(parts[0], _ATTRIBUTE, None)
    if (
        padding is not None
        and not padding.claimed
        and _are_columns(parts, padding, padding_columns)
    ):
        padding.claimed = True
        return padding.buffer
    if padding_columns == 0 and len(parts) == 1:
        return operand(parts[0]).reshape(-1, parts[0].shape[-1])
    flat = [part.reshape(-1, part.shape[-1]) for part in parts]
    widths = [part.shape[-1] for part in flat]
    first = flat[0]
    buffer = empty_rows(
        first.shape[0], sum(widths) + padding_columns, dtype=first.dtype, device=first.device
    )
    torch.cat(flat, dim=1, out=buffer[:, : sum(widths)])
    return buffer


def _views_rows(part: Tensor) -> bool:
    """Whether `part` [..., cols] as rows is a view of it, in the same order."""
    sizes, strides = part.shape, part.stride()
    wide = [i for i in range(part.dim() - 1) if sizes[i] != 1]
    return all(strides[i] == strides[j] * sizes[j] for i, j in pairwise(wide))


def _are_columns(parts: Sequence[Tensor], padding: _Padding, padding_columns: int) -> bool:
    buffer = padding.buffer
    widths = tuple(part.shape[-1] for part in parts)
    if widths != padding.widths or sum(widths) + padding_columns != buffer.shape[1]:
        return False
    column = 0
    for part in parts:
        same_place = part.data_ptr() == buffer.data_ptr() + column * buffer.element_size()
        same_rows = part.numel() == buffer.shape[0] * part.shape[-1] and (
            part.shape[-1] == 0 or _views_rows(part)
        )
        if getattr(part, _ATTRIBUTE, None) is not padding or not (same_place and same_rows):
            return False
        column += part.shape[-1]
    return True
