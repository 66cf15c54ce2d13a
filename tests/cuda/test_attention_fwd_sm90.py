"""Attention's forward kernel for sm_90a, executed as PTX, against float64."""

import math
import struct
from itertools import accumulate
from pathlib import Path
from typing import NamedTuple

import ptx
import pytest
import torch
from ptx.nvcc import compile_cuda
from torch import Tensor

from lora_engine import backends

SOURCE = Path(backends.__file__).parents[2] / "csrc" / "cuda" / "attention_fwd_sm90.cu"
NO_WINDOW = 1 << 30
LOG2_E = 1.4426950408889634


class Shape(NamedTuple):
    """As FwdShape of csrc/cuda/attention_fwd_tiles.cuh."""

    queries: int
    keys: int
    stages: int

    @property
    def threads(self) -> int:
        return 2 * self.queries + 128

    def shared(self, head_dim: int) -> int:
        rows = self.queries + 2 * self.stages * self.keys
        return rows * head_dim * 2 + (6 + 4 * self.stages) * 8 + 48 + 1024


SHAPES = {128: Shape(128, 128, 2), 64: Shape(192, 128, 2)}


def attend(
    lengths: list[int],
    head_dim: int,
    *,
    heads: tuple[int, int] = (2, 1),
    causal: bool = True,
    window: int = 0,
    dtype: torch.dtype = torch.bfloat16,
    poisoned: int | None = None,
    completion: ptx.kernel.Completion = "late",
    blocks: int = 3,
) -> None:
    """Runs the kernel and compares every sequence with float64.

    poisoned: a sequence that is NaN, and is not compared."""
    torch.manual_seed(0)
    tokens, (q_heads, kv_heads), shape = sum(lengths), heads, SHAPES[head_dim]
    widths = [n * head_dim for n in (q_heads, kv_heads, kv_heads)]
    rows = torch.randn(tokens, sum(widths)).to(dtype)
    bounds = torch.tensor([0, *accumulate(lengths)], dtype=torch.int32)
    if poisoned is not None:
        rows[bounds[poisoned] : bounds[poisoned + 1]] = float("nan")
    q, k, v = rows.split(widths, 1)
    o, lse = torch.full((tokens, widths[0]), 7.0, dtype=dtype), torch.full((q_heads, tokens), 7.0)
    taken = torch.zeros((), dtype=torch.int32)
    tiles = tokens // shape.queries + len(lengths)
    arguments = struct.pack(
        "<QQQQqqiiiiiif4x",
        o.data_ptr(),
        lse.data_ptr(),
        bounds.data_ptr(),
        taken.data_ptr(),
        tokens,
        o.stride(0),
        len(lengths),
        q_heads,
        q_heads // kv_heads,
        tiles,
        causal,
        window or NO_WINDOW,
        head_dim**-0.5 * LOG2_E,
    )

    def boxes(x: Tensor, rows: int) -> ptx.TensorMap:
        halves = head_dim // 64
        dims = 64, tokens, x.shape[1] // 64
        strides = x.stride(0) * 2, 128
        return ptx.TensorMap(x, (64, rows, halves), 128, dims=dims, strides=strides)

    name = "8BFloat16" if dtype == torch.bfloat16 else "7Float16"
    kernel = ptx.Kernel(compile_cuda(SOURCE, "90a"), f"{name}ELi{head_dim}E")
    kernel.launch(
        (min(blocks, tiles * q_heads),),
        shape.threads,
        [boxes(q, shape.queries), boxes(k, shape.keys), boxes(v, shape.keys), arguments],
        shared=shape.shared(head_dim),
        memory=[o, lse, bounds, taken],
        completion=completion,
    )
    assert taken == max(0, tiles * q_heads)
    found = o.double().unflatten(1, (-1, head_dim))
    for s, (begin, length) in enumerate(zip(bounds.tolist(), lengths, strict=False)):
        if s == poisoned or length == 0:
            continue
        part = slice(begin, begin + length)
        expected, sums = exact(*(x[part] for x in (q, k, v)), head_dim, causal, window)
        assert (found[part] - expected).abs().max() < 2e-2, s
        assert (lse[:, part] - sums).abs().max() < 1e-4, s


def exact(
    q: Tensor, k: Tensor, v: Tensor, head_dim: int, causal: bool, window: int
) -> tuple[Tensor, Tensor]:
    """Output [L, heads, head_dim] and log-sum-exp [heads, L] of one sequence, in float64."""
    group = q.shape[1] // k.shape[1]
    q, k, v = (x.double().unflatten(1, (-1, head_dim)).transpose(0, 1) for x in (q, k, v))
    k, v = (x.repeat_interleave(group, 0) for x in (k, v))
    places = torch.arange(q.shape[1])
    behind = places[:, None] - places
    hidden = (behind < 0) & causal | (behind >= (window or NO_WINDOW))
    scores = (q @ k.mT * head_dim**-0.5).masked_fill(hidden, -math.inf)
    return (scores.softmax(-1) @ v).transpose(0, 1), scores.logsumexp(-1)


@pytest.mark.parametrize("completion", ["late", "early", "random"])
@pytest.mark.parametrize("head_dim", [64, 128])
def test_ragged_sequences_beside_one_of_nan(
    head_dim: int, completion: ptx.kernel.Completion
) -> None:
    attend([1, 63, 200, 64, 65], head_dim, poisoned=1, completion=completion)


@pytest.mark.parametrize("head_dim", [64, 128])
def test_all_keys_are_seen_without_a_causal_mask(head_dim: int) -> None:
    attend([65, 0, 200], head_dim, heads=(2, 2), causal=False, dtype=torch.float16)


@pytest.mark.parametrize("head_dim", [64, 128])
def test_a_window_of_keys(head_dim: int) -> None:
    attend([65, 430], head_dim, window=100)


def test_several_tiles_of_keys_and_query_heads() -> None:
    attend([515], 128, heads=(3, 1), dtype=torch.float16, blocks=2)
