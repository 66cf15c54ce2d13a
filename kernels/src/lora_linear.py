"""The wide products of a LoRA group, its low-rank part a second segment of the inner dimension.

    Y  = X Wᵀ + S Bᵀ + bias        dX = dY W + sum_i mask_i ∘ (dS_i A_i) / (1 - p)

One accumulator sums both, so the result is rounded once and the low-rank part needs no pass over
it. The thin products are in lora_factors.py.
"""

from collections.abc import Sequence

import triton
import triton.language as tl
from lora_engine.backends.triton import launch
from lora_engine.backends.triton.lora_factors import PRECISION, lora_a_bwd, lora_a_fwd, lora_b_bwd
from lora_engine.backends.triton.lora_place import place_factors
from lora_engine.backends.triton.lora_tiles import Span, aligned, choose, padded, rank_runs
from lora_engine.backends.triton.philox import keep_mask, signed_words
from lora_engine.backends.triton.relaunch import Relaunched
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from lora_engine.values import Dropout

__all__ = [
    "lora_a_bwd",
    "lora_a_fwd",
    "lora_b_bwd",
    "lora_linear_dx",
    "lora_linear_fwd",
    "place_factors",
]


@triton.jit
def _load_columns(ptr, stride, offs_out, offs_in, N, end, ROWS_ARE_OUT: tl.constexpr):
    """The tile [inner, outer] of a matrix held as [outer, inner] or as it is."""
    mask_out = offs_out < N
    mask_in = offs_in < end
    if ROWS_ARE_OUT:
        ptrs = ptr + offs_out.to(tl.int64)[:, None] * stride + offs_in[None, :]
        tile = tl.trans(tl.load(ptrs, mask=mask_out[:, None] & mask_in[None, :], other=0.0))
    else:
        ptrs = ptr + offs_in.to(tl.int64)[:, None] * stride + offs_out[None, :]
        tile = tl.load(ptrs, mask=mask_in[:, None] & mask_out[None, :], other=0.0)
    return tile


@Relaunched
@triton.jit(do_not_specialize=["M", "seed_low", "seed_high", "threshold"])
def _two_segment_kernel(
    x,  # [M, K], a tensor descriptor where TMA
    weight,  # [N, K] where ROWS_ARE_OUT, else [K, N]; likewise
    y,  # [M, N]; likewise
    s_ptr,  # [M, R]
    low_ptr,  # [N, R] where ROWS_ARE_OUT, else [R, N]
    bias_ptr,  # [N]
    M,
    N,
    K,
    scale,
    seed_low,
    seed_high,
    threshold,
    stride_xm: tl.constexpr,
    stride_w: tl.constexpr,
    stride_ym: tl.constexpr,
    stride_sm: tl.constexpr,
    stride_low: tl.constexpr,
    SPANS: tl.constexpr,  # (first column, end column, substream) of R
    ROWS_ARE_OUT: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    DROPOUT: tl.constexpr,
    PRECISION: tl.constexpr,
    TMA: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_R: tl.constexpr,
    GROUP_M: tl.constexpr,
):
    """Y = X W^T + S L^T + bias if ROWS_ARE_OUT, else Y = X W + sum_i mask_i * (S_i L_i) / (1 - p).

    L is the low-rank factor (B forward, A backward), i a linear of the group, p the dropout.
    """
    # Programs that run together share rows of X and of the weight: groups of GROUP_M tiles down.
    tiles_m = tl.cdiv(M, BLOCK_M)
    tiles_n = tl.cdiv(N, BLOCK_N)
    group = tl.program_id(0) // (GROUP_M * tiles_n)
    group_rows = tl.minimum(tiles_m - group * GROUP_M, GROUP_M)
    within = tl.program_id(0) % (GROUP_M * tiles_n)
    first_m = (group * GROUP_M + within % group_rows) * BLOCK_M
    first_n = (within // group_rows) * BLOCK_N
    offs_m = first_m + tl.arange(0, BLOCK_M)
    offs_n = first_n + tl.arange(0, BLOCK_N)
    rows = offs_m.to(tl.int64)[:, None]
    mask_m = offs_m < M
    acc = tl.zeros([BLOCK_M, BLOCK_N], dtype=tl.float32)

    if TMA:
        for k in range(0, K, BLOCK_K):
            a = x.load([first_m, k])
            b = tl.trans(weight.load([first_n, k])) if ROWS_ARE_OUT else weight.load([k, first_n])
            acc = tl.dot(a, b, acc, input_precision=PRECISION)
    else:
        for k in range(0, K, BLOCK_K):
            offs_k = k + tl.arange(0, BLOCK_K)
            mask = mask_m[:, None] & (offs_k < K)[None, :]
            a = tl.load(x + rows * stride_xm + offs_k[None, :], mask=mask, other=0.0)
            b = _load_columns(weight, stride_w, offs_n, offs_k, N, K, ROWS_ARE_OUT)
            acc = tl.dot(a, b, acc, input_precision=PRECISION)

    # A mask falls on one linear's whole share, which therefore is summed apart. The loop is not
    # unrolled: with the masks of several linears in flight, registers run out.
    for i in tl.range(len(SPANS), num_stages=1):
        end = choose(SPANS, i, 1)
        share = tl.zeros([BLOCK_M, BLOCK_N], dtype=tl.float32) if DROPOUT else acc
        for r in tl.range(choose(SPANS, i, 0), end, BLOCK_R, num_stages=1):
            offs_r = r + tl.arange(0, BLOCK_R)
            mask = mask_m[:, None] & (offs_r < end)[None, :]
            a = tl.load(s_ptr + rows * stride_sm + offs_r[None, :], mask=mask, other=0.0)
            b = _load_columns(low_ptr, stride_low, offs_n, offs_r, N, end, ROWS_ARE_OUT)
            share = tl.dot(a, b, share, input_precision=PRECISION)
        if DROPOUT:
            substream = choose(SPANS, i, 2)
            keep = keep_mask(seed_low, seed_high, threshold, substream, offs_m, first_n, BLOCK_N)
            acc += tl.where(keep, share * scale, 0.0)
        else:
            acc = share

    if HAS_BIAS:
        bias = tl.load(bias_ptr + offs_n, mask=offs_n < N, other=0.0).to(tl.float32)
        acc += bias[None, :]
    if TMA:
        y.store([first_m, first_n], acc.to(y.dtype))
    else:
        mask = mask_m[:, None] & (offs_n < N)[None, :]
        tl.store(y + rows * stride_ym + offs_n[None, :], acc.to(y.dtype.element_ty), mask=mask)


def lora_linear_fwd(
    x: Tensor,  # [M, K]
    weight: Tensor,  # [N, K]
    s: Tensor,  # [M, R]
    lora_b: Tensor,  # [N, R]
    y: Tensor,  # [M, N]
    bias: Tensor | None = None,  # [N]
) -> None:
    """Writes y = x weightᵀ + s lora_bᵀ + bias, rounded once. Launch size: M.

    Every column of s and lora_b is read: those in no span must be zero in one, finite in the other.
    """
    runs = [(0, s.shape[1], 0)] if s.shape[1] else []
    _launch("lora_linear_fwd", x, weight, s, lora_b, y, runs, bias=bias, rows_are_out=True)


def lora_linear_dx(
    dy: Tensor,  # [M, N]
    weight: Tensor,  # [N, K]
    ds: Tensor,  # [M, R]
    lora_a: Tensor,  # [R, K]
    dx: Tensor,  # [M, K]
    spans: Sequence[Span],
    dropout: Dropout | None = None,
) -> None:
    """Writes dx = dy weight + ds lora_a, of the second each linear's term under its mask.

    Rounded once. Columns of ds and rows of lora_a in no span are not read. Launch size: M.
    """
    name = "lora_linear_dx" if dropout is None else "lora_linear_dx_dropout"
    runs = rank_runs(spans, merge=dropout is None)
    _launch(name, dy, weight, ds, lora_a, dx, runs, dropout=dropout, rows_are_out=False)


def _launch(
    name: str,
    x: Tensor,  # [M, inner]
    weight: Tensor,
    s: Tensor,  # [M, R]
    low: Tensor,
    y: Tensor,  # [M, outer]
    runs: Sequence[tuple[int, int, int]],
    *,
    rows_are_out: bool,
    bias: Tensor | None = None,
    dropout: Dropout | None = None,
) -> None:
    (rows, inner), outer = x.shape, y.shape[1]
    if rows == 0 or outer == 0:
        return
    widest = max((end - start for start, end, _ in runs), default=1)
    rows_aligned = aligned(x, weight, y)
    name = name if rows_aligned else "lora_linear_unaligned"
    config = dict(launch.config(name, x.device, x.dtype, rows))
    block_m, block_n, block_k = config["BLOCK_M"], config["BLOCK_N"], config["BLOCK_K"]
    config["BLOCK_R"] = min(config["BLOCK_R"], padded(widest))
    operands: tuple[Tensor | TensorDescriptor, ...] = (x, weight, y)
    if config["TMA"]:
        weight_block = [block_n, block_k] if rows_are_out else [block_k, block_n]
        blocks = [block_m, block_k], weight_block, [block_m, block_n]
        operands = tuple(
            TensorDescriptor(tensor, list(tensor.shape), list(tensor.stride()), block)
            for tensor, block in zip(operands, blocks, strict=True)
        )
    grid = (launch.cdiv(rows, block_m) * launch.cdiv(outer, block_n),)
    _two_segment_kernel[grid](
        *operands,
        s,
        low,
        bias if bias is not None else s,
        rows,
        outer,
        inner,
        1.0 if dropout is None else dropout.scale,
        *signed_words(dropout),
        stride_xm=x.stride(0),
        stride_w=weight.stride(0),
        stride_ym=y.stride(0),
        stride_sm=s.stride(0),
        stride_low=low.stride(0),
        SPANS=tuple(runs),
        ROWS_ARE_OUT=rows_are_out,
        HAS_BIAS=bias is not None,
        DROPOUT=dropout is not None,
        PRECISION=PRECISION,
        **config,
    )
