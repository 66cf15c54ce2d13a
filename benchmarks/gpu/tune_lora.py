"""Calls of the kernels of LoRA groups that the tuner measures: thin and wide products, sums."""

import torch
from torch import Tensor

from benchmarks.common.measure import Matmul
from benchmarks.gpu.tune_cases import Call, by_tokens, empty, kernel, moved, normal

RANK = 16


def _group(linears: int, rank: int, outputs: int = 0) -> list[tuple[slice, slice]]:
    """Spans of linears with as many outputs and ranks each."""
    return [
        (slice(i * outputs, (i + 1) * outputs), slice(i * rank, (i + 1) * rank))
        for i in range(linears)
    ]


# Inputs, linears that share them, and the rank of each: q k v, gate and up, o, down.
_NARROW_IN = [
    {"tokens": 8192, "cols": 4096, "linears": 2, "rank": RANK},
    {"tokens": 8192, "cols": 14336, "linears": 1, "rank": RANK},
    {"tokens": 8192, "cols": 2048, "linears": 2, "rank": RANK},
    {"tokens": 16384, "cols": 4096, "linears": 1, "rank": RANK},
    {"tokens": 2048, "cols": 4096, "linears": 2, "rank": RANK},
    {"tokens": 2048, "cols": 14336, "linears": 1, "rank": RANK},
    {"tokens": 2048, "cols": 1024, "linears": 2, "rank": RANK},
]
_WIDE_IN = [
    {"tokens": 8192, "cols": 4096, "linears": 3, "rank": RANK},
    {"tokens": 8192, "cols": 4096, "linears": 2, "rank": 64},
    {"tokens": 2048, "cols": 4096, "linears": 3, "rank": RANK},
    {"tokens": 2048, "cols": 14336, "linears": 1, "rank": 64},
]


def _lora_a_fwd(
    device: torch.device, dtype: torch.dtype, *, tokens: int, cols: int, linears: int, rank: int
) -> Call:
    from lora_engine.backends.triton import lora_linear as lora

    ranks = linears * rank
    x, s = normal(device, dtype, tokens, cols + ranks).split((cols, ranks), dim=1)
    lora_a = normal(device, dtype, ranks, cols, padding=ranks)
    spans = _group(linears, rank)
    return Call(lambda: lora.lora_a_fwd(x, lora_a, s, spans), (s,), moved(x, lora_a, s))


def _lora_a_bwd(
    device: torch.device, dtype: torch.dtype, *, tokens: int, cols: int, linears: int, rank: int
) -> Call:
    from lora_engine.backends.triton import lora_linear as lora

    ranks = linears * rank
    x = normal(device, dtype, tokens, cols, padding=ranks)
    ds, spans = normal(device, dtype, tokens, ranks, padding=cols), _group(linears, rank)
    d_lora_a = empty(device, torch.float32, ranks, cols)
    return Call(
        lambda: lora.lora_a_bwd(ds, x, d_lora_a, spans), (d_lora_a,), moved(ds, x, d_lora_a)
    )


def _lora_b_bwd(
    device: torch.device, dtype: torch.dtype, *, tokens: int, outputs: int, linears: int, rank: int
) -> Call:
    from lora_engine.backends.triton import lora_linear as lora

    from lora_engine.backends.lora_parts import AdapterPart

    ranks, spans = linears * rank, _group(linears, rank, outputs)
    n, parts = linears * outputs, [AdapterPart(*span, 2.0) for span in spans]
    dy, ds = normal(device, dtype, tokens, n + ranks).split((n, ranks), dim=1)
    lora_b, s = normal(device, dtype, n, ranks), normal(device, dtype, tokens, ranks)
    d_lora_b = empty(device, torch.float32, n * rank)
    return Call(
        lambda: lora.lora_b_bwd(dy, lora_b, s, ds, d_lora_b, spans, parts),
        (ds, d_lora_b),
        moved(dy, lora_b, s, ds, d_lora_b),
    )


_TINY_IN = {"tokens": 40, "cols": 64, "linears": 2, "rank": 16}
_TINY_WIDE_IN = {**_TINY_IN, "rank": 32}
kernel("lora_a_fwd", _NARROW_IN, by_tokens, tiny=_TINY_IN)(_lora_a_fwd)
kernel("lora_a_fwd_wide", _WIDE_IN, by_tokens, tiny=_TINY_WIDE_IN)(_lora_a_fwd)
kernel("lora_a_bwd", _NARROW_IN, by_tokens, tiny=_TINY_IN)(_lora_a_bwd)
kernel("lora_a_bwd_wide", _WIDE_IN, by_tokens, tiny=_TINY_WIDE_IN)(_lora_a_bwd)
kernel(
    "lora_b_bwd",
    [
        {"tokens": 8192, "outputs": 4096, "linears": 1, "rank": RANK},
        {"tokens": 8192, "outputs": 14336, "linears": 2, "rank": RANK},
        {"tokens": 8192, "outputs": 2048, "linears": 3, "rank": RANK},
        {"tokens": 2048, "outputs": 4096, "linears": 1, "rank": RANK},
        {"tokens": 2048, "outputs": 14336, "linears": 2, "rank": RANK},
        {"tokens": 16384, "outputs": 4096, "linears": 1, "rank": RANK},
    ],
    by_tokens,
    tiny={"tokens": 40, "outputs": 64, "linears": 2, "rank": 16},
)(_lora_b_bwd)
kernel(
    "lora_b_bwd_wide",
    [
        {"tokens": 8192, "outputs": 4096, "linears": 1, "rank": 64},
        {"tokens": 2048, "outputs": 14336, "linears": 2, "rank": 64},
    ],
    by_tokens,
    tiny={"tokens": 40, "outputs": 64, "linears": 2, "rank": 64},
)(_lora_b_bwd)


_MLPS = [
    {"tokens": 8192, "cols": 14336, "rank": RANK},
    {"tokens": 8192, "cols": 8192, "rank": RANK},
    {"tokens": 2048, "cols": 14336, "rank": RANK},
    {"tokens": 2048, "cols": 3072, "rank": RANK},
]
_TINY_MLP = {"tokens": 40, "cols": 64, "rank": 16}


@kernel("glu_lora_fwd", _MLPS, by_tokens, tiny=_TINY_MLP)
def _glu_lora_fwd(
    device: torch.device, dtype: torch.dtype, *, tokens: int, cols: int, rank: int
) -> Call:
    from lora_engine.backends.triton import glu_lora

    gate, up = normal(device, dtype, tokens, 2 * cols).split(cols, dim=1)
    h, s = normal(device, dtype, tokens, cols + rank).split((cols, rank), dim=1)
    lora_a, spans = normal(device, dtype, rank, cols, padding=rank), _group(1, rank)
    return Call(
        lambda: glu_lora.glu_lora_fwd(gate, up, h, lora_a, s, spans, activation="silu"),
        (h, s),
        moved(gate, up, h, s, lora_a),
    )


@kernel("glu_lora_bwd", _MLPS, by_tokens, tiny=_TINY_MLP)
def _glu_lora_bwd(
    device: torch.device, dtype: torch.dtype, *, tokens: int, cols: int, rank: int
) -> Call:
    from lora_engine.backends.triton import glu_lora

    from lora_engine.backends.lora_parts import AdapterPart, DyGradients, XGradient

    ranks, spans = 2 * rank, _group(2, rank, cols)
    gate, up = normal(device, dtype, tokens, 2 * cols).split(cols, dim=1)
    dgate, dup, ds = normal(device, dtype, tokens, 2 * cols + ranks).split((cols, cols, ranks), 1)
    dh, s = normal(device, dtype, tokens, cols), normal(device, dtype, tokens, ranks)
    lora_b = normal(device, dtype, 2 * cols, ranks)
    d_lora_b = empty(device, torch.float32, 2 * cols * rank)
    parts = [AdapterPart(*span, 2.0) for span in spans]
    inner = DyGradients(lora_b, s, ds, d_lora_b, spans, parts)
    outer_ds, d_lora_a = (
        normal(device, dtype, tokens, rank),
        empty(device, torch.float32, rank, cols),
    )
    outer = XGradient(outer_ds, d_lora_a, _group(1, rank))
    return Call(
        lambda: glu_lora.glu_lora_bwd(dh, gate, up, dgate, dup, inner, outer, activation="silu"),
        (dgate, dup, ds, d_lora_b, d_lora_a),
        moved(dh, gate, up, dgate, dup, lora_b, s, ds, d_lora_b, outer_ds, d_lora_a),
    )


def _by_width(itemsize: int, *, width: int, **_: int) -> int:
    return width


@kernel(
    "lora_sum_chunks",
    [
        {"chunks": 8, "rows": 32, "width": 4096},
        {"chunks": 2, "rows": 16, "width": 14336},
    ],
    _by_width,
    tiny={"chunks": 3, "rows": 24, "width": 16},
    dtype="float32",
)
def _lora_sum_chunks(
    device: torch.device, dtype: torch.dtype, *, chunks: int, rows: int, width: int
) -> Call:
    from lora_engine.backends.triton import lora_sums

    part, out = normal(device, dtype, chunks, rows, width), empty(device, dtype, rows, width)
    return Call(lambda: lora_sums.sum_chunks(part, out), (out,), moved(part, out))


# The wide products in a kernel of our own.

_PRODUCTS = [
    {"tokens": 8192, "cols": 4096, "outputs": 4096},
    {"tokens": 8192, "cols": 4096, "outputs": 28672},
    {"tokens": 2048, "cols": 14336, "outputs": 4096},
]


def _lora_linear_fwd(
    device: torch.device, dtype: torch.dtype, *, tokens: int, cols: int, outputs: int
) -> Call:
    from lora_engine.backends.triton import lora_linear as lora

    x, weight, s, lora_b = _product_operands(device, dtype, tokens, cols, outputs)
    y = empty(device, dtype, tokens, outputs)
    return Call(
        lambda: lora.lora_linear_fwd(x, weight, s, lora_b, y),
        (y,),
        moved(x, weight, s, lora_b, y),
        matmuls=(Matmul(tokens, outputs, cols),),
    )


def _lora_linear_dx_call(
    device: torch.device,
    dtype: torch.dtype,
    *,
    tokens: int,
    cols: int,
    outputs: int,
    dropout: float = 0.0,
) -> Call:
    from lora_engine.backends.triton import lora_linear as lora

    from lora_engine.values import Dropout

    dy = normal(device, dtype, tokens, outputs, padding=RANK)
    _, weight, ds, _ = _product_operands(device, dtype, tokens, cols, outputs)
    lora_a, dx = normal(device, dtype, RANK, cols), empty(device, dtype, tokens, cols)
    mask = Dropout(dropout, 2**40 + 5) if dropout else None
    spans = _group(1, RANK, outputs)
    return Call(
        lambda: lora.lora_linear_dx(dy, weight, ds, lora_a, dx, spans, mask),
        (dx,),
        moved(dy, weight, ds, lora_a, dx),
        matmuls=(Matmul(tokens, outputs, cols, transposed=False),),
    )


def _product_operands(
    device: torch.device, dtype: torch.dtype, tokens: int, cols: int, outputs: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    x = normal(device, dtype, tokens, cols, padding=RANK)
    weight = normal(device, dtype, outputs, cols, padding=RANK)
    s, lora_b = normal(device, dtype, tokens, RANK), normal(device, dtype, outputs, RANK)
    return x, weight, s, lora_b


def _lora_linear_dx(device: torch.device, dtype: torch.dtype, **sizes: int) -> Call:
    return _lora_linear_dx_call(device, dtype, **sizes)


def _lora_linear_dx_dropout(device: torch.device, dtype: torch.dtype, **sizes: int) -> Call:
    return _lora_linear_dx_call(device, dtype, **sizes, dropout=0.1)


_TINY_PRODUCT = {"tokens": 40, "cols": 64, "outputs": 96}
kernel("lora_linear_dx_dropout", _PRODUCTS, by_tokens, tiny=_TINY_PRODUCT)(_lora_linear_dx_dropout)
kernel("lora_linear_fwd", _PRODUCTS, by_tokens, tiny=_TINY_PRODUCT)(_lora_linear_fwd)
kernel("lora_linear_dx", _PRODUCTS, by_tokens, tiny=_TINY_PRODUCT)(_lora_linear_dx)
