"""Buffers whose rows have padding columns, so that a matrix product can be augmented in place.

The augmented product `[X | S] W̃ᵀ` reads S from the columns behind X. The operation that makes X
(a norm, a gated activation, attention; in the backward pass their gradients) asks `empty` for a
buffer with that many padding columns and returns the front columns as ordinary tensors. `claim`
gives the consumer the whole buffer, if the tensors it received are still those columns and nobody
claimed them before; otherwise it makes a copy with padding columns. So only one consumer ever
writes the padding, and a tensor from anywhere else works too, at the cost of a copy.

Other products of these tensors may read what is beside them (see `front_columns`). So `empty`
zeroes the padding columns, and `operand` copies a foreign tensor that is part of a wider one.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lora_engine.ops.tensors import empty_rows, front_columns, not_a_view

_ATTRIBUTE = "_lora_engine_padding"


@dataclass
class _Padding:
    buffer: Tensor  # [rows, sum(widths) + tail]
    widths: tuple[int, ...]
    claimed: bool = False


def empty(
    rows: int,
    widths: Sequence[int],
    tail: int,
    *,
    dtype: torch.dtype,
    device: torch.device,
    zeros: bool = True,
) -> tuple[Tensor, ...]:
    """One tensor [rows, width] for each width, side by side in one buffer with `tail` to spare.

    The tensors are uninitialised, the spare columns zero. `zeros=False` leaves these uninitialised
    too, for a caller who claims the tensors before anybody multiplies them.
    """
    if tail == 0 and len(widths) == 1:
        return (empty_rows(rows, widths[0], dtype=dtype, device=device),)
    cols = sum(widths)
    buffer = empty_rows(rows, cols + tail, dtype=dtype, device=device)
    # .data has a version counter of its own: writing the padding changes no column that autograd
    # may have saved.
    padding = _Padding(buffer.data, tuple(widths))
    front = front_columns(buffer, cols) if zeros else buffer[:, :cols]
    parts = front.split(list(widths), dim=1)
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
    """`shaped` for an autograd function to return: no view where it has no padding columns, so that
    the caller may change it in place.

    With padding columns it stays a view: a function that saved the buffer would miss the change.
    """
    made = shaped(rows, shape)
    return made if hasattr(made, _ATTRIBUTE) else not_a_view(made)


def operand(x: Tensor) -> Tensor:
    """`x` [..., cols], copied if what stands beside its rows is not known to be finite."""
    return x if hasattr(x, _ATTRIBUTE) else x.contiguous()


def claim(parts: Sequence[Tensor], tail: int) -> Tensor:
    """The buffer [rows, sum(widths) + tail] whose front columns are `parts` [..., width] each.

    The last `tail` columns hold anything. The caller may write them, and only them, and writes them
    before the buffer or its front columns go into a product.
    """
    padding: _Padding | None = getattr(parts[0], _ATTRIBUTE, None)
    if padding is not None and not padding.claimed and _are_columns(parts, padding, tail):
        padding.claimed = True
        return padding.buffer
    if tail == 0 and len(parts) == 1:
        return operand(parts[0]).reshape(-1, parts[0].shape[-1])
    flat = [part.reshape(-1, part.shape[-1]) for part in parts]
    widths = [part.shape[-1] for part in flat]
    first = flat[0]
    buffer = empty_rows(first.shape[0], sum(widths) + tail, dtype=first.dtype, device=first.device)
    torch.cat(flat, dim=1, out=buffer[:, : sum(widths)])
    return buffer


def _are_columns(parts: Sequence[Tensor], padding: _Padding, tail: int) -> bool:
    buffer = padding.buffer
    widths = tuple(part.shape[-1] for part in parts)
    if widths != padding.widths or sum(widths) + tail != buffer.shape[1]:
        return False
    column = 0
    for part in parts:
        same_place = part.data_ptr() == buffer.data_ptr() + column * buffer.element_size()
        same_rows = part.numel() == buffer.shape[0] * part.shape[-1] and (
            part.shape[-1] == 0 or part.reshape(-1, part.shape[-1]).data_ptr() == part.data_ptr()
        )
        if getattr(part, _ATTRIBUTE, None) is not padding or not (same_place and same_rows):
            return False
        column += part.shape[-1]
    return True
