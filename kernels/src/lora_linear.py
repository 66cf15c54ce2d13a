"""The wide products of a LoRA group, its low-rank part a second stretch of the inner dimension.

    Y  = X Wᵀ + S Bᵀ + bias        dX = dY W + sum_i mask_i ∘ (dS_i A_i) / (1 - p)

One accumulator takes both, so the result is rounded once and the low-rank part makes no pass of
its own over it. The thin products are in lora_factors.py.
"""

from collections.abc import Sequence
from typing import Any

import triton
import triton.language as tl
from lora_engine.kernels import launch
from lora_engine.kernels.lora_factors import PRECISION, lora_a_bwd, lora_a_fwd, lora_b_bwd
from lora_engine.kernels.lora_tiles import Span, aligned, padded
from lora_engine.kernels.philox import keep_mask, signed_words
from lora_engine.reference.dropout import Dropout
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

__all__ = ["lora_a_bwd", "lora_a_fwd", "lora_b_bwd", "lora_linear_dx", "lora_linear_fwd"]

FIRST_TMA_CAPABILITY = 90


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
    R,
    stride_xm,
    stride_w,
    stride_ym,
    stride_sm,
    stride_low,
    scale,
    seed_low,
    seed_high,
    threshold,
    SPANS: tl.constexpr,  # where DROPOUT: (first column, end column) of R, in order of streams
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
            if ROWS_ARE_OUT:
                b = tl.trans(weight.load([first_n, k]))
            else:
                b = weight.load([k, first_n])
            acc = tl.dot(a, b, acc, input_precision=PRECISION)
    else:
        for k in range(0, K, BLOCK_K):
            offs_k = k + tl.arange(0, BLOCK_K)
            mask = mask_m[:, None] & (offs_k < K)[None, :]
            a = tl.load(x + rows * stride_xm + offs_k[None, :], mask=mask, other=0.0)
            b = _load_columns(weight, stride_w, offs_n, offs_k, N, K, ROWS_ARE_OUT)
            acc = tl.dot(a, b, acc, input_precision=PRECISION)

    if DROPOUT:
        for i in tl.static_range(len(SPANS)):
            if SPANS[i][1] > SPANS[i][0]:
                part = tl.zeros([BLOCK_M, BLOCK_N], dtype=tl.float32)
                for r in tl.range(SPANS[i][0], SPANS[i][1], BLOCK_R, num_stages=1):
                    offs_r = r + tl.arange(0, BLOCK_R)
                    mask = mask_m[:, None] & (offs_r < SPANS[i][1])[None, :]
                    a = tl.load(s_ptr + rows * stride_sm + offs_r[None, :], mask=mask, other=0.0)
                    b = _load_columns(
                        low_ptr, stride_low, offs_n, offs_r, N, SPANS[i][1], ROWS_ARE_OUT
                    )
                    part = tl.dot(a, b, part, input_precision=PRECISION)
                keep = keep_mask(seed_low, seed_high, threshold, i, offs_m, first_n, BLOCK_N)
                acc += tl.where(keep, part * scale, 0.0)
    else:
        for r in range(0, R, BLOCK_R):
            offs_r = r + tl.arange(0, BLOCK_R)
            mask = mask_m[:, None] & (offs_r < R)[None, :]
            a = tl.load(s_ptr + rows * stride_sm + offs_r[None, :], mask=mask, other=0.0)
            b = _load_columns(low_ptr, stride_low, offs_n, offs_r, N, R, ROWS_ARE_OUT)
            acc = tl.dot(a, b, acc, input_precision=PRECISION)

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
    """Writes y = x weightᵀ + s lora_bᵀ + bias. Launch size: M."""
    _launch("lora_linear_fwd", x, weight, s, lora_b, y, bias, rows_are_out=True)


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

    Columns of ds in no span are not read. Launch size: M.
    """
    if dropout is None:
        _launch("lora_linear_dx", dy, weight, ds, lora_a, dx, None, rows_are_out=False)
        return
    _launch(
        "lora_linear_dx_dropout",
        dy,
        weight,
        ds,
        lora_a,
        dx,
        None,
        rows_are_out=False,
        spans=spans,
        dropout=dropout,
    )


def _launch(
    name: str,
    x: Tensor,  # [M, inner]
    weight: Tensor,
    s: Tensor,  # [M, R]
    low: Tensor,
    y: Tensor,  # [M, outer]
    bias: Tensor | None,
    *,
    rows_are_out: bool,
    spans: Sequence[Span] = (),
    dropout: Dropout | None = None,
) -> None:
    (rows, inner), outer, rank = x.shape, y.shape[1], s.shape[1]
    if rows == 0 or outer == 0:
        return
    columns = tuple((c.start, c.stop) for _, c in spans)
    widest = max((stop - start for start, stop in columns), default=rank)
    config: dict[str, Any] = launch.config(name, x.device, x.dtype, rows)
    block_m, block_n, block_k = (config[f"BLOCK_{axis}"] for axis in "MNK")
    config["TMA"] = bool(config["TMA"]) and aligned(x, weight, y)
    config["BLOCK_R"] = min(config["BLOCK_R"], padded(widest))
    operands: tuple[Any, ...] = (x, weight, y)
    if config["TMA"]:
        weight_block = [block_n, block_k] if rows_are_out else [block_k, block_n]
        blocks = [block_m, block_k], weight_block, [block_m, block_n]
        operands = tuple(
            TensorDescriptor(tensor, list(tensor.shape), list(tensor.stride()), block)
            for tensor, block in zip(operands, blocks, strict=True)
        )
    grid = (triton.cdiv(rows, block_m) * triton.cdiv(outer, block_n),)
    _two_segment_kernel[grid](
        *operands,
        s,
        low,
        bias if bias is not None else s,
        rows,
        outer,
        inner,
        rank,
        x.stride(0),
        weight.stride(0),
        y.stride(0),
        s.stride(0),
        low.stride(0),
        1.0 if dropout is None else dropout.scale,
        *signed_words(dropout),
        SPANS=columns,
        ROWS_ARE_OUT=rows_are_out,
        HAS_BIAS=bias is not None,
        DROPOUT=dropout is not None,
        PRECISION=PRECISION,
        **config,
    )
