"""The thin products of a LoRA group: S = drop(X) Aᵀ, dS = dY B with dB = dYᵀ S, dA = dSᵀ drop(X).

Each reads its one large operand once. Sums over rows are partial sums of fixed chunks of rows,
added in order by a second kernel, so results do not depend on what ran first.
"""

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from lora_engine.backends.triton import launch
from lora_engine.backends.triton.lora_sums import Gradients, sum_chunks, sum_thin
from lora_engine.backends.triton.lora_tiles import (
    Span,
    aligned,
    by_rank,
    choose,
    has_ranks,
    padded,
    rank_tiles,
    split_rows,
)
from lora_engine.backends.triton.philox import keep_mask, signed_words
from lora_engine.backends.triton.relaunch import Relaunched
from torch import Tensor

from lora_engine.backends.lora_parts import (
    AdapterPart,
    Added,
    ScaledColumns,
    ScaledRows,
    split_parts,
)
from lora_engine.values import Dropout

# float32 products take no tf32 short cut. They run on the ordinary arithmetic units.
PRECISION = "ieee"


@Relaunched
@triton.jit(do_not_specialize=["M", "seed_low", "seed_high", "threshold"])
def _lora_a_fwd_kernel(
    x_ptr,  # [M, K]
    a_ptr,  # [R, K]
    s_ptr,  # [M, R]
    copy_ptr,  # [M, R]
    M,
    K,
    scale,
    seed_low,
    seed_high,
    threshold,
    stride_xm: tl.constexpr,
    stride_ar: tl.constexpr,
    stride_sm: tl.constexpr,
    stride_cm: tl.constexpr,
    TILES: tl.constexpr,  # see rank_tiles
    DROPOUT: tl.constexpr,
    HAS_COPY: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """S = drop(X) A^T; drop multiplies by keep / (1 - p), a mask of its own for each linear."""
    # The tiles of the same rows are neighbours: all but the first find X in the cache.
    tile = tl.program_id(0) % len(TILES)
    offs_m = (tl.program_id(0) // len(TILES)) * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_r = choose(TILES, tile, 0) + tl.arange(0, BLOCK_R)
    offs_k = tl.arange(0, BLOCK_K)
    mask_m = offs_m < M
    mask_r = (offs_r >= choose(TILES, tile, 1)) & (offs_r < choose(TILES, tile, 2))
    x_ptrs = x_ptr + offs_m.to(tl.int64)[:, None] * stride_xm + offs_k[None, :]
    a_ptrs = a_ptr + offs_r.to(tl.int64)[:, None] * stride_ar + offs_k[None, :]
    acc = tl.zeros([BLOCK_M, BLOCK_R], dtype=tl.float32)
    for k in range(0, K, BLOCK_K):
        mask_k = offs_k < K - k
        x = tl.load(x_ptrs + k, mask=mask_m[:, None] & mask_k[None, :], other=0.0)
        a = tl.load(a_ptrs + k, mask=mask_r[:, None] & mask_k[None, :], other=0.0)
        if DROPOUT:
            substream = choose(TILES, tile, 4)
            keep = keep_mask(seed_low, seed_high, threshold, substream, offs_m, k, BLOCK_K)
            x = tl.where(keep, x, tl.zeros_like(x))
        acc = tl.dot(x, tl.trans(a), acc, input_precision=PRECISION)
    if DROPOUT:
        acc *= scale
    s = acc.to(s_ptr.dtype.element_ty)
    rows = offs_m.to(tl.int64)[:, None]
    mask = mask_m[:, None] & (offs_r < choose(TILES, tile, 3))[None, :]
    tl.store(s_ptr + rows * stride_sm + offs_r[None, :], s, mask=mask)
    if HAS_COPY:
        tl.store(copy_ptr + rows * stride_cm + offs_r[None, :], s, mask=mask)


@Relaunched
@triton.jit(do_not_specialize=["M", "chunk"])
def _lora_b_bwd_kernel(
    dy_ptr,  # [M, N]
    b_ptr,  # [N, R]
    s_ptr,  # [M, R]
    ds_ptr,  # [blocks of N, M, P], float32
    db_ptr,  # [chunks of M, N, P], float32
    M,
    N,
    chunk,
    stride_dym: tl.constexpr,
    stride_bn: tl.constexpr,
    stride_sm: tl.constexpr,
    SPANS: tl.constexpr,  # (first block, first row, end row, first column, end column)
    P: tl.constexpr,
    HAS_DB: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    """dS = dY B and dB = dY^T S of one reading of dY.

    Written are partial sums: of dS for each block of columns of dY, of dB for each chunk of rows.
    """
    block = tl.program_id(1)
    span = 0
    for i in tl.static_range(1, len(SPANS)):
        span = tl.where(block >= SPANS[i][0], i, span)
    first_row = choose(SPANS, span, 1) + (block - choose(SPANS, span, 0)) * BLOCK_N
    offs_n = first_row + tl.arange(0, BLOCK_N)
    offs_p = tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R)
    offs_r = choose(SPANS, span, 3) + offs_p
    mask_n = offs_n < choose(SPANS, span, 2)
    mask_r = offs_r < choose(SPANS, span, 4)
    start = tl.program_id(2) * chunk
    offs_i = tl.arange(0, BLOCK_M)
    b = tl.load(
        b_ptr + offs_n.to(tl.int64)[:, None] * stride_bn + offs_r[None, :],
        mask=mask_n[:, None] & mask_r[None, :],
        other=0.0,
    )
    db = tl.zeros([BLOCK_N, BLOCK_R], dtype=tl.float32)
    for m in range(start, tl.minimum(start + chunk, M), BLOCK_M):
        offs_m = (m + offs_i).to(tl.int64)
        mask_m = offs_m < M
        dy = tl.load(
            dy_ptr + offs_m[:, None] * stride_dym + offs_n[None, :],
            mask=mask_m[:, None] & mask_n[None, :],
            other=0.0,
        )
        ds = tl.dot(dy, b, input_precision=PRECISION)
        tl.store(
            ds_ptr + (block.to(tl.int64) * M + offs_m)[:, None] * P + offs_p[None, :],
            ds,
            mask=mask_m[:, None],
        )
        if HAS_DB:
            s = tl.load(
                s_ptr + offs_m[:, None] * stride_sm + offs_r[None, :],
                mask=mask_m[:, None] & mask_r[None, :],
                other=0.0,
            )
            db = tl.dot(tl.trans(dy), s, db, input_precision=PRECISION)
    if HAS_DB:
        rows = tl.program_id(2).to(tl.int64) * N + offs_n
        tl.store(db_ptr + rows[:, None] * P + offs_p[None, :], db, mask=mask_n[:, None])


@Relaunched
@triton.jit(do_not_specialize=["M", "chunk", "seed_low", "seed_high", "threshold"])
def _lora_a_bwd_kernel(
    ds_ptr,  # [M, R]
    x_ptr,  # [M, K]
    da_ptr,  # [chunks of M, R, K], float32
    M,
    K,
    R,
    chunk,
    scale,
    seed_low,
    seed_high,
    threshold,
    stride_dsm: tl.constexpr,
    stride_xm: tl.constexpr,
    TILES: tl.constexpr,  # see rank_tiles
    DROPOUT: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """dA = dS^T drop(X), a partial sum for each chunk of rows."""
    tile = tl.program_id(0)
    first_k = tl.program_id(1) * BLOCK_K
    offs_k = first_k + tl.arange(0, BLOCK_K)
    offs_r = choose(TILES, tile, 0) + tl.arange(0, BLOCK_R)
    offs_i = tl.arange(0, BLOCK_M)
    mask_k = offs_k < K
    mask_r = (offs_r >= choose(TILES, tile, 1)) & (offs_r < choose(TILES, tile, 2))
    start = tl.program_id(2) * chunk
    # Held transposed: the tensor cores want at least 64 rows, and ranks are often fewer.
    acc = tl.zeros([BLOCK_K, BLOCK_R], dtype=tl.float32)
    for m in range(start, tl.minimum(start + chunk, M), BLOCK_M):
        offs_m = (m + offs_i).to(tl.int64)
        mask_m = offs_m < M
        x = tl.load(
            x_ptr + offs_m[:, None] * stride_xm + offs_k[None, :],
            mask=mask_m[:, None] & mask_k[None, :],
            other=0.0,
        )
        ds = tl.load(
            ds_ptr + offs_m[:, None] * stride_dsm + offs_r[None, :],
            mask=mask_m[:, None] & mask_r[None, :],
            other=0.0,
        )
        if DROPOUT:
            substream = choose(TILES, tile, 4)
            keep = keep_mask(seed_low, seed_high, threshold, substream, offs_m, first_k, BLOCK_K)
            x = tl.where(keep, x, tl.zeros_like(x))
        acc = tl.dot(tl.trans(x), ds, acc, input_precision=PRECISION)
    if DROPOUT:
        acc *= scale
    rows = tl.program_id(2).to(tl.int64) * R + offs_r
    tl.store(
        da_ptr + rows[None, :] * K + offs_k[:, None],
        acc,
        mask=mask_k[:, None] & (offs_r < choose(TILES, tile, 3))[None, :],
    )


def lora_a_fwd(
    x: Tensor,  # [M, K]
    lora_a: Tensor,  # [R, K]
    s: Tensor,  # [M, R]
    spans: Sequence[Span],
    dropout: Dropout | None = None,
    copy: Tensor | None = None,  # [M, R]
) -> None:
    """Writes s = drop_i(x) lora_aᵀ, and 0 in columns of no span; to copy too. Launch size: M."""
    rows, cols = x.shape
    if rows == 0 or cols == 0 or not has_ranks(spans):
        for result in (s,) if copy is None else (s, copy):
            result.zero_()
        return
    block_r, tiles = rank_tiles(spans, s.shape[1], 128, merge=dropout is None)
    name = by_rank("lora_a_fwd", block_r) if aligned(x, lora_a) else "lora_a_fwd_unaligned"
    config = launch.config(name, x.device, x.dtype, rows)
    grid = (launch.cdiv(rows, config["BLOCK_M"]) * len(tiles),)
    _lora_a_fwd_kernel[grid](
        x,
        lora_a,
        s,
        s if copy is None else copy,
        rows,
        cols,
        1.0 if dropout is None else dropout.scale,
        *signed_words(dropout),
        stride_xm=x.stride(0),
        stride_ar=lora_a.stride(0),
        stride_sm=s.stride(0),
        stride_cm=0 if copy is None else copy.stride(0),
        TILES=tiles,
        DROPOUT=dropout is not None,
        HAS_COPY=copy is not None,
        PRECISION=PRECISION,
        BLOCK_R=block_r,
        **config,
    )


def lora_b_bwd(
    dy: Tensor,  # [M, N]
    lora_b: Tensor,  # [N, R]
    s: Tensor,  # [M, R]
    ds: Tensor,  # [M, R]
    d_lora_b: Tensor | None,  # [E], float32
    spans: Sequence[Span],
    parts: Sequence[AdapterPart] = (),
    scaled: ScaledRows | None = None,
    added: Sequence[Added] = (),
) -> None:
    """Writes ds = dy lora_b, each linear's columns alone, and d_lora_b = scale dyᵀ s of each part,
    one [n, r] after the other; and what `scaled` asks for. One pass over dy. Without d_lora_b the
    same is added to what `added` has for each adapter, in a launch more.

    Columns of ds in no span become 0. Launch size: M.
    """
    totals = [(each.part, each.lora_b) for each in added if each.lora_b is not None]
    if d_lora_b is None and totals:
        parts = [part for part, _ in totals]
        sums = torch.empty(sum(b.numel() for _, b in totals), dtype=torch.float32, device=dy.device)
        lora_b_bwd(dy, lora_b, s, ds, sums, spans, parts, scaled)
        torch._foreach_add_([b for _, b in totals], split_parts(sums, parts))
        return
    rows, cols = dy.shape
    linears = [(n, r) for n, r in spans if n.stop > n.start and r.stop > r.start]
    if not linears or rows == 0:
        for result in (ds, d_lora_b, None if scaled is None else scaled.ds):
            if result is not None:
                result.zero_()
        return
    width = max(r.stop - r.start for _, r in linears)
    block_r = min(64, padded(width))
    config = launch.config(by_rank("lora_b_bwd", block_r), dy.device, dy.dtype, rows)
    table, blocks, block_range = [], 0, {}
    for n, r in linears:
        table.append((blocks, n.start, n.stop, r.start, r.stop))
        count = launch.cdiv(n.stop - n.start, config["BLOCK_N"])
        block_range[r.start] = (blocks, blocks + count)
        blocks += count
    rank_blocks = launch.cdiv(width, block_r)
    pitch = rank_blocks * block_r
    chunks, chunk = split_rows(rows, config["BLOCK_M"], blocks * rank_blocks, dy.device)
    ds_part = torch.empty(blocks, rows, pitch, dtype=torch.float32, device=dy.device)
    db_part = ds_part
    if d_lora_b is not None:
        db_part = torch.empty(chunks, cols, pitch, dtype=torch.float32, device=dy.device)
    _lora_b_bwd_kernel[(rank_blocks, blocks, chunks)](
        dy,
        lora_b,
        s,
        ds_part,
        db_part,
        rows,
        cols,
        chunk,
        stride_dym=dy.stride(0),
        stride_bn=lora_b.stride(0),
        stride_sm=s.stride(0),
        SPANS=tuple(table),
        P=pitch,
        HAS_DB=d_lora_b is not None,
        PRECISION=PRECISION,
        BLOCK_R=block_r,
        **config,
    )
    gradients = (
        None if d_lora_b is None else Gradients(part=db_part, d_lora_b=d_lora_b, parts=parts)
    )
    sum_thin(ds_part, ds, linears, block_range, scaled=scaled, gradients=gradients)


def lora_a_bwd(
    ds: Tensor,  # [M, R]
    x: Tensor,  # [M, K]
    d_lora_a: Tensor | None,  # [R, K], float32
    spans: Sequence[Span],
    dropout: Dropout | None = None,
    scaled: ScaledColumns | None = None,
    added: Sequence[Added] = (),
) -> None:
    """Writes d_lora_a = dsᵀ drop_i(x), its columns times `scaled`, and 0 in rows of no span.

    Without d_lora_a the same is added to what `added` has for each adapter, in a launch more.
    Launch size: M.
    """
    rows, cols = x.shape
    rank = ds.shape[1]
    if d_lora_a is None:
        sums = torch.empty(rank, cols, dtype=torch.float32, device=x.device)
        lora_a_bwd(ds, x, sums, spans, dropout, scaled)
        totals = [(each.part, each.lora_a) for each in added if each.lora_a is not None]
        if totals:
            made = [sums[part.columns] for part, _ in totals]
            torch._foreach_add_([a for _, a in totals], made)
        return
    if rows == 0 or cols == 0 or not has_ranks(spans):
        d_lora_a.zero_()
        return
    block_r, tiles = rank_tiles(spans, rank, 128, merge=dropout is None)
    config = launch.config(by_rank("lora_a_bwd", block_r), x.device, x.dtype, rows)
    blocks = launch.cdiv(cols, config["BLOCK_K"])
    chunks, chunk = split_rows(rows, config["BLOCK_M"], blocks * len(tiles), x.device)
    whole = chunks == 1 and d_lora_a.is_contiguous() and scaled is None
    part = (
        d_lora_a if whole else torch.empty(chunks, rank, cols, dtype=torch.float32, device=x.device)
    )
    _lora_a_bwd_kernel[(len(tiles), blocks, chunks)](
        ds,
        x,
        part,
        rows,
        cols,
        rank,
        chunk,
        1.0 if dropout is None else dropout.scale,
        *signed_words(dropout),
        stride_dsm=ds.stride(0),
        stride_xm=x.stride(0),
        TILES=tiles,
        DROPOUT=dropout is not None,
        PRECISION=PRECISION,
        BLOCK_R=block_r,
        **config,
    )
    if not whole:
        sum_chunks(part, d_lora_a, scaled)
