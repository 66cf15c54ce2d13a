"""The backward kernels of attention for sm_90a, as PTX on the machine that executes it."""

import struct
from itertools import accumulate, pairwise
from typing import NamedTuple

import ptx
import pytest
import torch
from compiled_module import ROOT
from ptx.nvcc import compile_cuda
from torch import Tensor

from lora_engine import reference
from lora_engine.backends.cuda.attention_hopper import TILE_KEYS, TILE_ROWS
from lora_engine.testing import cu_seqlens

SOURCE = ROOT / "csrc" / "cuda" / "attention_bwd_sm90.cu"
STAGES, PAD = 2, 8
TYPES = {torch.bfloat16: "8BFloat16", torch.float16: "7Float16"}
TOLERANCE = {torch.bfloat16: 1e-2, torch.float16: 2e-3}


class Case(NamedTuple):
    """heads: of queries, and of keys. dirty: sequences that are NaN throughout."""

    lengths: list[int]
    head_dim: int
    heads: tuple[int, int] = (2, 1)
    causal: bool = True
    dtype: torch.dtype = torch.bfloat16
    dirty: tuple[int, ...] = ()


def rows(case: Case, heads: int) -> Tensor:
    """Random, the rows farther apart than they are wide."""
    return torch.randn(sum(case.lengths), heads * case.head_dim + PAD).to(case.dtype)[:, :-PAD]


def forward(case: Case, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """o [tokens, heads, head_dim] and lse [heads, tokens] of float64 heads."""
    bounds = cu_seqlens(case.lengths)
    o = reference.attention(q, k, v, bounds, causal=case.causal)
    sums = []
    for begin, end in pairwise(bounds.tolist()):
        if begin == end:
            continue
        keys = k[begin:end].repeat_interleave(case.heads[0] // case.heads[1], 1)
        scores = torch.einsum("qhd,khd->hqk", q[begin:end], keys) * case.head_dim**-0.5
        if case.causal:
            hidden = torch.ones(end - begin, end - begin, dtype=torch.bool).triu(1)
            scores = scores.masked_fill(hidden, -torch.inf)
        sums.append(scores.logsumexp(-1))
    return o, torch.cat(sums, 1)


def backward(case: Case, **options: object) -> list[tuple[Tensor, Tensor]]:
    """dq, dk and dv of the kernels beside those of float64, of the clean sequences."""
    torch.manual_seed(0)
    dim, (heads, kv_heads) = case.head_dim, case.heads
    tokens = sum(case.lengths)
    q, k, v, d_o = (rows(case, h) for h in (heads, kv_heads, kv_heads, heads))
    leaves = [x.double().unflatten(1, (-1, dim)).requires_grad_() for x in (q, k, v)]
    exact_o, exact_lse = forward(case, *leaves)
    expected = torch.autograd.grad(exact_o, leaves, d_o.double().unflatten(1, (-1, dim)))
    o, lse = exact_o.detach().flatten(1).to(case.dtype), exact_lse.detach().float()
    starts = [0, *accumulate(case.lengths)]
    clean = torch.ones(tokens, dtype=torch.bool)
    for i in case.dirty:
        clean[starts[i] : starts[i + 1]] = False
    for x in (q, k, v, d_o, o, lse.T):
        x[~clean] = torch.nan
    found = [torch.full_like(x, torch.nan) for x in (q, k, v)]
    order = run(case, [d_o, q, k, v, o], lse.contiguous(), found, **options)
    check_order(case, order.tolist())
    return [
        (x.double().unflatten(1, (-1, dim))[clean], y[clean])
        for x, y in zip(found, expected, strict=True)
    ]


def run(
    case: Case, inputs: list[Tensor], lse: Tensor, found: list[Tensor], **options: object
) -> Tensor:
    """The order of the tiles; the kernels are launched as csrc/cuda/attention_bwd_sm90.cu does."""
    text = compile_cuda(SOURCE, "90a")
    dim, (heads, kv_heads) = case.head_dim, case.heads
    d_o, q, k, v, o = inputs
    dq, dk, dv = found
    bounds = cu_seqlens(case.lengths)
    tokens, sequences, size = sum(case.lengths), len(case.lengths), TILE_ROWS[dim]
    tiles, key_tiles = tokens // size + sequences, tokens // TILE_KEYS + sequences
    stats = torch.full((heads * tiles * 2 * size,), torch.nan)
    dq_sum = torch.full((heads * tiles * size * dim,), torch.nan)
    order = torch.full((key_tiles,), -1, dtype=torch.int32)
    memory = [*inputs, lse, *found, bounds, stats, dq_sum, order]

    def packed(layout: str, *values: Tensor | int | float) -> bytes:
        return struct.pack(layout, *(x.data_ptr() if isinstance(x, Tensor) else x for x in values))

    of_rows = packed(
        "<8Q3q5if", o, d_o, lse, stats, dq_sum, dq, bounds, order,
        *(x.stride(0) for x in (o, d_o, dq)), tokens, sequences, heads, tiles, key_tiles, dim**-0.5,
    )  # fmt: skip
    of_tiles = packed(
        "<6Q2q4if4x", stats, dq_sum, dk, dv, bounds, order, dk.stride(0), dv.stride(0),
        sequences, kv_heads, heads // kv_heads, tiles, dim**-0.5,
    )  # fmt: skip

    def boxes(x: Tensor, tile: int) -> ptx.TensorMap:
        sizes, strides = (64, tokens, x.shape[1] // 64), (x.stride(0) * 2, 128)
        return ptx.TensorMap(x, (64, tile, dim // 64), 128, dims=sizes, strides=strides)

    name = TYPES[case.dtype]
    shared = 4 * TILE_KEYS * dim + STAGES * (4 * size * dim + 8 * size) + 4 * TILE_KEYS * size
    maps = [boxes(q, size), boxes(d_o, size), boxes(k, TILE_KEYS), boxes(v, TILE_KEYS)]
    for kernel, grid, threads, args, dynamic in (
        (
            f"delta_kernelINS1_{name}ELi{dim}ELb{case.causal:d}E",
            tiles * heads + 1,
            256,
            [of_rows],
            0,
        ),
        (
            f"tiles_kernelINS1_{name}ELi{dim}ELb{case.causal:d}E",
            key_tiles * kv_heads,
            384,
            [*maps, of_tiles],
            shared + 8 + 16 * STAGES,
        ),
        (f"dq_kernelINS1_{name}ELi{dim}E", tiles * heads, 256, [of_rows], 0),
    ):
        entry = ptx.Kernel(text, f"attention_bwd_{kernel}")
        entry.launch((grid,), threads, args, shared=dynamic, memory=memory, **options)
    return order


def check_order(case: Case, order: list[int]) -> None:
    """The tiles of keys come by their work, in classes of half an octave."""
    counts, begin, size = {}, 0, TILE_ROWS[case.head_dim]
    for sequence, length in enumerate(case.lengths):
        first_tile, queries = begin // TILE_KEYS + sequence, -(-length // size)
        for tile in range(-(-length // TILE_KEYS)):
            hidden = tile * TILE_KEYS // size if case.causal else 0
            counts[first_tile + tile] = queries - hidden
        begin += length
    assert sorted(order) == list(range(len(order)))

    def rank(tile: int) -> tuple[int, int, int]:
        count = counts.get(tile, 0)
        octave = count.bit_length()
        return -octave, -(2 * count >= 3 << (octave - 1) if count else 0), tile

    assert order == sorted(order, key=rank)


CASES = {
    "one_tile": Case([64], 128),
    "ragged": Case([1, 63, 200, 64, 65], 128),
    "ragged_64": Case([1, 63, 200, 64, 65], 64),
    "several_heads": Case([130], 64, (6, 2)),
    "whole": Case([200, 3], 128, causal=False),
    "whole_64": Case([200, 3], 64, causal=False),
    "many": Case([0] * 130 + [300, 1] + [0] * 130, 64, (1, 1)),
    "float16": Case([140], 128, dtype=torch.float16),
    "float16_64": Case([140], 64, dtype=torch.float16),
}


@pytest.mark.parametrize(
    ("name", "completion"),
    [
        *((name, "late") for name in CASES),
        *((name, how) for name in ("ragged", "ragged_64") for how in ("early", "random")),
        ("whole", "random"),
    ],
)
def test_is_that_of_float64(name: str, completion: str) -> None:
    case = CASES[name]
    for found, expected in backward(case, completion=completion, seed=1):
        error = (found - expected).abs().max() / expected.abs().max()
        assert error < TOLERANCE[case.dtype]


@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize("causal", [True, False])
def test_rows_of_other_sequences_are_not_touched(head_dim: int, causal: bool) -> None:
    case = Case([70, 1, 130, 64, 3, 129], head_dim, causal=causal, dirty=(1, 3, 5))
    for found, expected in backward(case):
        assert (found - expected).abs().max() < 1e-2 * expected.abs().max()
