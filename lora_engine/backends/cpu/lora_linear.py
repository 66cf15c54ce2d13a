"""The products of a LoRA group: C++ kernels for those of few ranks, `multiply` for wide ones."""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor
from torch.nn import Parameter

from lora_engine.backends import choice
from lora_engine.backends.cpu.dropout import dropout_fwd
from lora_engine.backends.cpu.launch import dtype_code, kernels, pointer
from lora_engine.backends.cpu.lora_structs import (
    LoraABwdArgs,
    LoraAFwdArgs,
    LoraBBwdArgs,
    LoraPart,
    LoraPlacing,
    PlaceFactorsArgs,
)
from lora_engine.backends.lora_parts import (
    AdapterPart,
    Added,
    Placing,
    ScaledColumns,
    ScaledRows,
    Span,
)
from lora_engine.backends.products import multiply
from lora_engine.values import Dropout

DTYPES = choice.DTYPES["cpu"]  # of factors and of their places


def place_factors(
    lora_a: Tensor,  # [R, K]
    lora_b: Tensor,  # [N, R]
    placings: Sequence[Placing],
) -> None:
    """Writes A and scaling * B of each adapter to its place, rounded once. One launch."""
    listed = []
    for placing in placings:
        factors, a, b = placing
        scale = factors.scaling
        if (
            isinstance(scale, float | int)
            and _is_readable(factors.lora_a, a)
            and _is_readable(factors.lora_b, b)
        ):
            listed += [_placed(factors.lora_a, a, 1.0), _placed(factors.lora_b, b, scale)]
        else:
            placing.by_torch()
    if listed:
        kernels().place_factors(dtype_code(lora_a.dtype), PlaceFactorsArgs(listed))


def _is_readable(factor: Tensor, place: Tensor) -> bool:
    """Whether the kernel can read the elements where they are, and there are as many as in place.

    A parameter's data may have been exchanged for data of another shape, type or device.
    """
    return (
        type(factor) in (Tensor, Parameter)  # subclasses need not have their elements in memory
        and factor.shape == place.shape
        and factor.device == place.device
        and factor.dtype in DTYPES
        and place.dtype in DTYPES
        and factor.layout == torch.strided
        and not factor.is_neg()
    )


def _placed(factor: Tensor, place: Tensor, scale: float) -> LoraPlacing:
    rows, cols = factor.shape
    return LoraPlacing(
        factor=factor.data_ptr(),
        dtype=dtype_code(factor.dtype),
        place=place.data_ptr(),
        rows=rows,
        cols=cols,
        row_stride=factor.stride(0),
        col_stride=factor.stride(1),
        place_stride=place.stride(0),
        scale=scale,
    )


def lora_a_fwd(
    x: Tensor,  # [M, K]
    lora_a: Tensor,  # [R, K]
    s: Tensor,  # [M, R]
    spans: Sequence[Span],
    dropout: Dropout | None = None,
    copy: Tensor | None = None,  # [M, R]
) -> None:
    """Writes s = drop_i(x) lora_aᵀ, and 0 in columns of no span; to copy too."""
    _clear_unused(spans, s, copy)
    for kept, part in _kept(x, spans, dropout):
        kernels().lora_a_fwd(
            dtype_code(x.dtype),
            LoraAFwdArgs(
                x=kept.data_ptr(),
                lora_a=lora_a.data_ptr(),
                s=s.data_ptr(),
                copy=pointer(copy),
                rows=x.shape[0],
                cols=x.shape[1],
                x_stride=kept.stride(0),
                a_stride=lora_a.stride(0),
                s_stride=s.stride(0),
                copy_stride=0 if copy is None else copy.stride(0),
                spans=part,
            ),
        )


def lora_b_bwd(
    dy: Tensor,  # [M, N]
    lora_b: Tensor,  # [N, R]
    s: Tensor,  # [M, R]
    ds: Tensor,  # [M, R]
    d_lora_b: Tensor | None,  # [E], float32 (float64 for float64)
    spans: Sequence[Span],
    parts: Sequence[AdapterPart] = (),
    scaled: ScaledRows | None = None,
    added: Sequence[Added] = (),
) -> None:
    """Writes ds = dy lora_b, each linear's columns alone, and d_lora_b = scale dyᵀ s of each part,
    one [n, r] after the other; and what `scaled` asks for. Without d_lora_b the same is added to
    what `added` has for each adapter.

    Columns of ds in no span become 0.
    """
    scaled_ds = None if scaled is None else scaled.ds
    _clear_unused(spans, ds, scaled_ds)
    kernels().lora_b_bwd(
        dtype_code(dy.dtype),
        LoraBBwdArgs(
            dy=dy.data_ptr(),
            lora_b=lora_b.data_ptr(),
            s=s.data_ptr(),
            ds=ds.data_ptr(),
            row_factors=0 if scaled is None else scaled.factors.data_ptr(),
            scaled_ds=pointer(scaled_ds),
            rows=dy.shape[0],
            dy_stride=dy.stride(0),
            b_stride=lora_b.stride(0),
            s_stride=s.stride(0),
            ds_stride=ds.stride(0),
            scaled_stride=0 if scaled_ds is None else scaled_ds.stride(0),
            spans=spans,
            parts=_adjacent(d_lora_b, parts) if d_lora_b is not None else _parts_of_b(added),
            adds=d_lora_b is None,
        ),
    )


def _adjacent(d_lora_b: Tensor, parts: Sequence[AdapterPart]) -> list[LoraPart]:
    """The parts whose gradients stand in d_lora_b [E] one after the other."""
    adjacent, place = [], d_lora_b.data_ptr()
    for part in parts:
        rows, columns, _ = part
        adjacent.append((*part, place))
        place += (rows.stop - rows.start) * (columns.stop - columns.start) * d_lora_b.itemsize
    return adjacent


def _parts_of_b(added: Sequence[Added]) -> list[LoraPart]:
    return [(*each.part, each.lora_b.data_ptr()) for each in added if each.lora_b is not None]


def lora_a_bwd(
    ds: Tensor,  # [M, R]
    x: Tensor,  # [M, K]
    d_lora_a: Tensor | None,  # [R, K], float32 (float64 for float64)
    spans: Sequence[Span],
    dropout: Dropout | None = None,
    scaled: ScaledColumns | None = None,
    added: Sequence[Added] = (),
) -> None:
    """Writes d_lora_a = dsᵀ drop_i(x), its columns times `scaled`, and 0 in rows of no span.

    Without d_lora_a the same is added to what `added` has for each adapter.
    """
    if d_lora_a is not None:
        for unused in _unused(spans, d_lora_a.shape[0]):
            d_lora_a[unused] = 0
    parts = [(*each.part, each.lora_a.data_ptr()) for each in added if each.lora_a is not None]
    for kept, part in _kept(x, spans, dropout):
        kernels().lora_a_bwd(
            dtype_code(x.dtype),
            LoraABwdArgs(
                ds=ds.data_ptr(),
                x=kept.data_ptr(),
                d_lora_a=pointer(d_lora_a),
                column_weight=0 if scaled is None else scaled.weight.data_ptr(),
                rows=x.shape[0],
                cols=x.shape[1],
                ds_stride=ds.stride(0),
                x_stride=kept.stride(0),
                d_stride=0 if d_lora_a is None else d_lora_a.stride(0),
                column_offset=0.0 if scaled is None else scaled.offset,
                spans=part,
                parts=parts,
            ),
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
    Padding columns of x must be finite (ops/tensors.py: front_columns).
    """
    multiply(y, x, weight.t(), bias)
    if s.shape[1]:
        multiply(y, s, lora_b.t(), y)


def lora_linear_dx(
    dy: Tensor,  # [M, N]
    weight: Tensor,  # [N, K]
    ds: Tensor,  # [M, R]
    lora_a: Tensor,  # [R, K]
    dx: Tensor,  # [M, K]
    spans: Sequence[Span],
    dropout: Dropout | None = None,
) -> None:
    """Writes dx = dy weight + ds lora_a, of the second each linear's term under its dropout mask.

    Rounded after each product. Rows of lora_a in no span are not read; columns of ds in no span,
    and padding columns of dy and ds, must be finite.
    """
    multiply(dx, dy, weight)
    for substream, columns in _products(spans, merge=dropout is None):
        if dropout is None:
            multiply(dx, ds[:, columns], lora_a[columns], dx)
        else:
            term = torch.mm(ds[:, columns], lora_a[columns])
            dropout_fwd(term, term, dropout, substream)
            dx += term


def _kept(
    x: Tensor, spans: Sequence[Span], dropout: Dropout | None
) -> Iterator[tuple[Tensor, Sequence[Span]]]:
    """x after dropout, and the spans whose adapters read it: one mask for each linear."""
    if dropout is None:
        yield x, spans
        return
    for substream, span in enumerate(spans):
        if span[1].stop > span[1].start:
            yield _dropped(x, dropout, substream), [span]


def _dropped(x: Tensor, dropout: Dropout, substream: int) -> Tensor:
    kept = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    dropout_fwd(x, kept, dropout, substream)
    return kept


def _products(spans: Sequence[Span], *, merge: bool) -> list[tuple[int, slice]]:
    """(substream, columns) of each product; `merge` joins adjacent columns: dx is read once."""
    runs: list[tuple[int, slice]] = []
    for substream, (_, columns) in enumerate(spans):
        if columns.stop == columns.start:
            continue
        if merge and runs and runs[-1][1].stop == columns.start:
            runs[-1] = (runs[-1][0], slice(runs[-1][1].start, columns.stop))
        else:
            runs.append((substream, columns))
    return runs


def _clear_unused(spans: Sequence[Span], *copies: Tensor | None) -> None:
    """Writes 0 to the columns of [.., R] in no span."""
    for each in copies:
        if each is not None:
            for unused in _unused(spans, each.shape[1]):
                each[:, unused] = 0


def _unused(spans: Sequence[Span], ranks: int) -> list[slice]:
    """The columns of [.., ranks] in no span."""
    done, unused = 0, []
    for _, columns in spans:
        if columns.start > done:
            unused.append(slice(done, columns.start))
        done = columns.stop
    if done < ranks:
        unused.append(slice(done, ranks))
    return unused
