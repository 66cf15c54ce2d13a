"""The products of a LoRA group: those with few ranks are ours, the wide ones the vendor's."""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from lora_engine import backends
from lora_engine.cpu.address import dtype_code
from lora_engine.cpu.dropout import dropout_fwd
from lora_engine.reference.dropout import Dropout

Span = tuple[slice, slice]  # a linear's rows of [N, ...] and its columns of [..., R]


def lora_a_fwd(
    x: Tensor,  # [M, K]
    lora_a: Tensor,  # [R, K]
    s: Tensor,  # [M, R]
    spans: Sequence[Span],
    dropout: Dropout | None = None,
) -> None:
    """Writes s = drop_i(x) lora_aᵀ, and 0 in columns of no span."""
    for gap in _gaps(spans, s.shape[1]):
        s[:, gap] = 0
    for stream, columns in _products(spans, merge=dropout is None):
        kept = x if dropout is None else _dropped(x, dropout, stream)
        backends.native().lora_a_fwd(
            dtype_code(x.dtype),
            kept.data_ptr(),
            _address(lora_a, columns.start, 0),
            _address(s, 0, columns.start),
            *x.shape,
            columns.stop - columns.start,
            kept.stride(0),
            lora_a.stride(0),
            s.stride(0),
        )


def lora_b_bwd(
    dy: Tensor,  # [M, N]
    lora_b: Tensor,  # [N, R]
    s: Tensor,  # [M, R]
    ds: Tensor,  # [M, R]
    d_lora_b: Tensor | None,  # [N, R], float32 (float64 for float64)
    spans: Sequence[Span],
) -> None:
    """Writes ds = dy lora_b and d_lora_b = dyᵀ s, each linear's block alone.

    Columns of ds in no span become 0; d_lora_b outside the blocks is left as it is.
    """
    for gap in _gaps(spans, ds.shape[1]):
        ds[:, gap] = 0
    for rows, columns in spans:
        if columns.stop > columns.start:
            backends.native().lora_b_bwd(
                dtype_code(dy.dtype),
                _address(dy, 0, rows.start),
                _address(lora_b, rows.start, columns.start),
                _address(s, 0, columns.start),
                _address(ds, 0, columns.start),
                0 if d_lora_b is None else _address(d_lora_b, rows.start, columns.start),
                dy.shape[0],
                rows.stop - rows.start,
                columns.stop - columns.start,
                dy.stride(0),
                lora_b.stride(0),
                s.stride(0),
                ds.stride(0),
                0 if d_lora_b is None else d_lora_b.stride(0),
            )


def lora_a_bwd(
    ds: Tensor,  # [M, R]
    x: Tensor,  # [M, K]
    d_lora_a: Tensor,  # [R, K], float32 (float64 for float64)
    spans: Sequence[Span],
    dropout: Dropout | None = None,
) -> None:
    """Writes d_lora_a = dsᵀ drop_i(x), and 0 in rows of no span."""
    for gap in _gaps(spans, d_lora_a.shape[0]):
        d_lora_a[gap] = 0
    for stream, columns in _products(spans, merge=dropout is None):
        kept = x if dropout is None else _dropped(x, dropout, stream)
        backends.native().lora_a_bwd(
            dtype_code(x.dtype),
            _address(ds, 0, columns.start),
            kept.data_ptr(),
            _address(d_lora_a, columns.start, 0),
            *x.shape,
            columns.stop - columns.start,
            ds.stride(0),
            kept.stride(0),
            d_lora_a.stride(0),
        )


def lora_linear_fwd(
    x: Tensor,  # [M, K]
    weight: Tensor,  # [N, K]
    s: Tensor,  # [M, R]
    lora_b: Tensor,  # [N, R]
    y: Tensor,  # [M, N]
    bias: Tensor | None = None,  # [N]
) -> None:
    """Writes y = x weightᵀ + s lora_bᵀ + bias, rounded after each product.

    Every column of s and lora_b is read: those in no span must be zero in one, finite in the other.
    """
    if bias is None:
        torch.mm(x, weight.t(), out=y)
    else:
        torch.addmm(bias, x, weight.t(), out=y)
    if s.shape[1]:
        y.addmm_(s, lora_b.t())


def lora_linear_dx(
    dy: Tensor,  # [M, N]
    weight: Tensor,  # [N, K]
    ds: Tensor,  # [M, R]
    lora_a: Tensor,  # [R, K]
    dx: Tensor,  # [M, K]
    spans: Sequence[Span],
    dropout: Dropout | None = None,
) -> None:
    """Writes dx = dy weight + ds lora_a, each linear's share of the second under its mask.

    Rounded after each product. Columns of ds and rows of lora_a in no span are not read.
    """
    torch.mm(dy, weight, out=dx)
    for stream, columns in _products(spans, merge=dropout is None):
        if dropout is None:
            dx.addmm_(ds[:, columns], lora_a[columns])
        else:
            share = torch.mm(ds[:, columns], lora_a[columns])
            dropout_fwd(share, share, dropout, stream)
            dx += share


def _address(x: Tensor, row: int, column: int) -> int:
    """Of an element. A view costs a trip through the dispatcher, which is time beside a product."""
    address: int = x.data_ptr() + (row * x.stride(0) + column) * x.element_size()
    return address


def _dropped(x: Tensor, dropout: Dropout, stream: int) -> Tensor:
    kept = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    dropout_fwd(x, kept, dropout, stream)
    return kept


def _ranks(spans: Sequence[Span]) -> list[tuple[int, int, int]]:
    """(start, stop, stream) of every adapter, in order of columns."""
    found = [(columns.start, columns.stop, i) for i, (_, columns) in enumerate(spans)]
    return sorted(part for part in found if part[1] > part[0])


def _products(spans: Sequence[Span], *, merge: bool) -> Iterator[tuple[int, slice]]:
    """(stream, columns) of each product; `merge` joins adjacent columns: X is read once."""
    runs: list[tuple[int, int, int]] = []
    for start, stop, stream in _ranks(spans):
        if merge and runs and runs[-1][1] == start:
            runs[-1] = (runs[-1][0], stop, runs[-1][2])
        else:
            runs.append((start, stop, stream))
    yield from ((stream, slice(start, stop)) for start, stop, stream in runs)


def _gaps(spans: Sequence[Span], ranks: int) -> Iterator[slice]:
    """The columns of [.., ranks] in no span."""
    done = 0
    for start, stop, _ in [*_ranks(spans), (ranks, ranks, 0)]:
        if start > done:
            yield slice(done, start)
        done = stop
