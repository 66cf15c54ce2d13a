"""Second stages of the sums over rows and over columns of dY: partial sums, added in order."""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from lora_engine.backends.triton import launch
from lora_engine.backends.triton.lora_tiles import Span, choose, padded, rank_tiles
from lora_engine.backends.triton.relaunch import Relaunched
from torch import Tensor

from lora_engine.backends.lora_parts import AdapterPart, ScaledColumns, ScaledRows, split_parts


@triton.jit
def _sum_s(
    part_ptr,  # [blocks of N, M, P], float32
    s_ptr,  # [M, R]
    copy_ptr,  # [M, R]
    factors_ptr,  # [M], float32
    pid,
    M,
    stride_sm: tl.constexpr,
    stride_cm: tl.constexpr,
    TILES: tl.constexpr,
    P: tl.constexpr,
    HAS_COPY: tl.constexpr,
    HAS_FACTORS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    tile = pid % len(TILES)
    offs_m = ((pid // len(TILES)) * BLOCK_M + tl.arange(0, BLOCK_M)).to(tl.int64)
    offs_r = choose(TILES, tile, 0) + tl.arange(0, BLOCK_R)
    offs_p = offs_r - choose(TILES, tile, 1)
    mask_m = offs_m < M
    mask = mask_m[:, None] & ((offs_p >= 0) & (offs_r < choose(TILES, tile, 2)))[None, :]
    acc = tl.zeros([BLOCK_M, BLOCK_R], dtype=tl.float32)
    for block in range(choose(TILES, tile, 5), choose(TILES, tile, 6)):
        rows = M.to(tl.int64) * block + offs_m
        acc += tl.load(part_ptr + rows[:, None] * P + offs_p[None, :], mask=mask, other=0.0)
    s = acc.to(s_ptr.dtype.element_ty)
    mask = mask_m[:, None] & (offs_r < choose(TILES, tile, 3))[None, :]
    tl.store(s_ptr + offs_m[:, None] * stride_sm + offs_r[None, :], s, mask=mask)
    if HAS_COPY:
        if HAS_FACTORS:
            factors = tl.load(factors_ptr + offs_m, mask=mask_m, other=0.0)
            s = (s.to(tl.float32) * factors[:, None]).to(s_ptr.dtype.element_ty)
        tl.store(copy_ptr + offs_m[:, None] * stride_cm + offs_r[None, :], s, mask=mask)


@triton.jit
def _sum_db(
    part_ptr,  # [chunks of M, N, P], float32
    db_ptr,  # [E], float32
    pid,
    N,
    chunks,
    scale,
    PARTS: tl.constexpr,
    P: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    part = 0
    for i in tl.static_range(1, len(PARTS)):
        part = tl.where(pid >= PARTS[i][0], i, part)
    width = choose(PARTS, part, 4)
    blocks_c = tl.cdiv(width, BLOCK_C)
    block = pid - choose(PARTS, part, 0)
    offs_n = (block // blocks_c) * BLOCK_N + tl.arange(0, BLOCK_N)
    offs_c = (block % blocks_c) * BLOCK_C + tl.arange(0, BLOCK_C)
    first_row = choose(PARTS, part, 1)
    mask_n = offs_n < choose(PARTS, part, 2) - first_row
    mask = mask_n[:, None] & (offs_c < width)[None, :]
    offs_p = choose(PARTS, part, 3) + offs_c
    acc = tl.zeros([BLOCK_N, BLOCK_C], dtype=tl.float32)
    for chunk in range(chunks):
        rows = N.to(tl.int64) * chunk + first_row + offs_n
        acc += tl.load(part_ptr + rows[:, None] * P + offs_p[None, :], mask=mask, other=0.0)
    db_ptrs = db_ptr + choose(PARTS, part, 5) + offs_n[:, None] * width + offs_c[None, :]
    tl.store(db_ptrs, acc * scale, mask=mask)


@Relaunched
@triton.jit(do_not_specialize=["M", "N", "chunks", "s_programs"])
def _sum_thin_kernel(
    part_ptr,  # [blocks of N, M, P], float32
    s_ptr,  # [M, R]
    copy_ptr,  # [M, R]
    factors_ptr,  # [M], float32
    db_part_ptr,  # [chunks of M, N, P], float32
    db_ptr,  # [E], float32
    M,
    N,
    chunks,
    s_programs,
    scale,
    stride_sm: tl.constexpr,
    stride_cm: tl.constexpr,
    TILES: tl.constexpr,  # rank_tiles with (first block, end block) of the tile's linear
    PARTS: tl.constexpr,  # (first program, first row, end row, first column of P, width, place)
    P: tl.constexpr,
    HAS_COPY: tl.constexpr,
    HAS_FACTORS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """S = sum of part over the blocks of columns of each linear, in their order, by the first
    s_programs programs; by the others dB = scale * sum of db_part over the chunks of rows, in
    their order, each adapter's [n, r] at its place. S is S or dS. The copy is S, or S of each row
    times its factor.
    """
    pid = tl.program_id(0)
    if pid < s_programs:
        _sum_s(
            part_ptr,
            s_ptr,
            copy_ptr,
            factors_ptr,
            pid,
            M,
            stride_sm,
            stride_cm,
            TILES,
            P,
            HAS_COPY,
            HAS_FACTORS,
            BLOCK_M,
            BLOCK_R,
        )
    else:
        pid -= s_programs
        _sum_db(db_part_ptr, db_ptr, pid, N, chunks, scale, PARTS, P, BLOCK_N, BLOCK_C)


@Relaunched
@triton.jit(do_not_specialize=["chunks", "pitch", "rows"])
def _sum_chunks_kernel(
    part_ptr,  # [chunks, pitch, K], float32
    out_ptr,  # [rows, K], float32
    weight_ptr,  # [K]
    chunks,
    pitch,
    rows,
    offset,
    stride_out: tl.constexpr,
    K: tl.constexpr,
    HAS_WEIGHT: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """out = sum of part over the chunks of rows, in their order, times weight + offset."""
    offs_m = (tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)).to(tl.int64)
    offs_k = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    mask = (offs_m < rows)[:, None] & (offs_k < K)[None, :]
    acc = tl.zeros([BLOCK_M, BLOCK_N], dtype=tl.float32)
    for chunk in range(chunks):
        row = pitch.to(tl.int64) * chunk + offs_m
        acc += tl.load(part_ptr + row[:, None] * K + offs_k[None, :], mask=mask, other=0.0)
    if HAS_WEIGHT:
        weight = tl.load(weight_ptr + offs_k, mask=offs_k < K, other=0.0).to(tl.float32)
        acc *= (weight + offset)[None, :]
    tl.store(out_ptr + offs_m[:, None] * stride_out + offs_k[None, :], acc, mask=mask)


class Gradients(NamedTuple):
    """Partial sums of dB, and where its sums go."""

    part: Tensor  # [chunks of M, N, P], float32
    d_lora_b: Tensor  # [E], float32
    parts: Sequence[AdapterPart]


def sum_thin(
    part: Tensor,  # [blocks of N, M, P], float32
    s: Tensor,  # [M, R]
    spans: Sequence[Span],
    block_range: Mapping[int, tuple[int, int]],
    *,
    copy: Tensor | None = None,  # [M, R]
    scaled: ScaledRows | None = None,
    gradients: Gradients | None = None,
) -> None:
    """Writes s (S or dS) and copy or what `scaled` asks for, each linear's columns from its own
    range of blocks, by first column, else 0; and the sums of `gradients`, see
    `lora_contracts.LoraLinear.lora_b_bwd`."""
    rows, factors = s.shape[0], None
    if scaled is not None:
        factors, copy = scaled
    block_r, tiles = rank_tiles(spans, s.shape[1], 64, merge=False)
    with_blocks = tuple((*tile, *block_range[tile[1]]) for tile in tiles)
    config = launch.config("lora_sum_thin", s.device, torch.float32, rows)
    programs = s_programs = len(tiles) * launch.cdiv(rows, config["BLOCK_M"])
    db_part, db, parts = part, part, ()
    table: list[tuple[int, ...]] = [(0, 0, 0, 0, 1, 0)]
    block_c, scales = 16, [1.0]
    if gradients is not None:
        db_part, db, parts = gradients
        scales = list({float(each.scale) for each in parts})
        block_c = min(64, padded(max(c.stop - c.start for _, c, _ in parts)))
        table, db_programs = _table_of_parts(spans, parts, config["BLOCK_N"], block_c)
        programs += db_programs
    _sum_thin_kernel[(programs,)](
        part,
        s,
        s if copy is None else copy,
        part if factors is None else factors,
        db_part,
        db,
        rows,
        db_part.shape[1],
        db_part.shape[0],
        s_programs,
        scales[0] if len(scales) == 1 else 1.0,
        stride_sm=s.stride(0),
        stride_cm=0 if copy is None else copy.stride(0),
        TILES=with_blocks,
        PARTS=tuple(table),
        P=part.shape[2],
        HAS_COPY=copy is not None,
        HAS_FACTORS=factors is not None,
        BLOCK_R=block_r,
        BLOCK_C=block_c,
        **config,
    )
    if len(scales) > 1:
        for each, gradient in zip(parts, split_parts(db, parts), strict=True):
            gradient *= each.scale


def _table_of_parts(
    spans: Sequence[Span], parts: Sequence[AdapterPart], block_n: int, block_c: int
) -> tuple[list[tuple[int, ...]], int]:
    """PARTS of the kernel, and how many programs they take together."""
    table, programs, place = [], 0, 0
    for rows, columns, _ in parts:
        n, width = rows.stop - rows.start, columns.stop - columns.start
        if n * width == 0:
            continue
        start = next(c.start for r, c in spans if r == rows)
        table.append((programs, rows.start, rows.stop, columns.start - start, width, place))
        programs += launch.cdiv(n, block_n) * launch.cdiv(width, block_c)
        place += n * width
    return table, programs


def sum_chunks(
    part: Tensor,  # [chunks, rows or more, K], float32
    out: Tensor,  # [rows, K], float32
    scaled: ScaledColumns | None = None,
) -> None:
    """Writes the sum of part over chunks, its columns times `scaled`."""
    chunks, pitch, cols = part.shape
    rows = out.shape[0]
    config = launch.config("lora_sum_chunks", out.device, torch.float32, cols)
    grid = (launch.cdiv(rows, config["BLOCK_M"]), launch.cdiv(cols, config["BLOCK_N"]))
    _sum_chunks_kernel[grid](
        part,
        out,
        part if scaled is None else scaled.weight,
        chunks,
        pitch,
        rows,
        0.0 if scaled is None else float(scaled.offset),
        stride_out=out.stride(0),
        K=cols,
        HAS_WEIGHT=scaled is not None,
        **config,
    )
