"""Second stages of the sums over rows and over columns of dY: partial sums, added in order."""

from collections.abc import Mapping, Sequence

import torch
import triton
import triton.language as tl
from lora_engine.backends.triton import launch
from lora_engine.backends.triton.lora_tiles import Span, choose, rank_tiles
from lora_engine.backends.triton.relaunch import Relaunched
from torch import Tensor


@Relaunched
@triton.jit(do_not_specialize=["M"])
def _sum_blocks_kernel(
    part_ptr,  # [blocks of N, M, P], float32
    ds_ptr,  # [M, R]
    M,
    stride_dsm: tl.constexpr,
    TILES: tl.constexpr,  # rank_tiles with (first block, end block) of the tile's linear
    P: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    """dS = sum of part over the blocks of columns of dY of each linear, in their order."""
    tile = tl.program_id(0)
    offs_m = (tl.program_id(1) * BLOCK_M + tl.arange(0, BLOCK_M)).to(tl.int64)
    offs_r = choose(TILES, tile, 0) + tl.arange(0, BLOCK_R)
    offs_p = offs_r - choose(TILES, tile, 1)
    mask_m = offs_m < M
    mask = mask_m[:, None] & ((offs_p >= 0) & (offs_r < choose(TILES, tile, 2)))[None, :]
    acc = tl.zeros([BLOCK_M, BLOCK_R], dtype=tl.float32)
    for block in range(choose(TILES, tile, 5), choose(TILES, tile, 6)):
        rows = M.to(tl.int64) * block + offs_m
        acc += tl.load(part_ptr + rows[:, None] * P + offs_p[None, :], mask=mask, other=0.0)
    tl.store(
        ds_ptr + offs_m[:, None] * stride_dsm + offs_r[None, :],
        acc.to(ds_ptr.dtype.element_ty),
        mask=mask_m[:, None] & (offs_r < choose(TILES, tile, 3))[None, :],
    )


@Relaunched
@triton.jit(do_not_specialize=["chunks", "rows"])
def _sum_chunks_kernel(
    part_ptr,  # [chunks, rows, P], float32
    out_ptr,  # [rows, ...], float32
    chunks,
    rows,
    stride_out: tl.constexpr,
    BLOCKS: tl.constexpr,  # (first row, end row, first column, end column)
    P: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """out = sum of part over the chunks of rows, in their order."""
    offs_m = (tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)).to(tl.int64)
    offs_p = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    first = tl.zeros([BLOCK_M], dtype=tl.int32)
    width = tl.zeros([BLOCK_M], dtype=tl.int32)
    for i in tl.static_range(len(BLOCKS)):
        here = (offs_m >= BLOCKS[i][0]) & (offs_m < BLOCKS[i][1])
        first = tl.where(here, BLOCKS[i][2], first)
        width = tl.where(here, BLOCKS[i][3] - BLOCKS[i][2], width)
    mask = offs_p[None, :] < width[:, None]
    acc = tl.zeros([BLOCK_M, BLOCK_N], dtype=tl.float32)
    for chunk in range(chunks):
        row = rows.to(tl.int64) * chunk + offs_m
        acc += tl.load(part_ptr + row[:, None] * P + offs_p[None, :], mask=mask, other=0.0)
    columns = first[:, None] + offs_p[None, :]
    tl.store(out_ptr + offs_m[:, None] * stride_out + columns, acc, mask=mask)


def sum_blocks(
    part: Tensor,  # [blocks of N, M, P], float32
    ds: Tensor,  # [M, R]
    spans: Sequence[Span],
    block_range: Mapping[int, tuple[int, int]],
) -> None:
    """Writes ds: each linear's columns from its own range of blocks, by first column; else 0."""
    rows = ds.shape[0]
    block_r, tiles = rank_tiles(spans, ds.shape[1], 64, merge=False)
    with_blocks = tuple((*tile, *block_range[tile[1]]) for tile in tiles)
    config = launch.config("lora_sum_blocks", ds.device, torch.float32, rows)
    _sum_blocks_kernel[(len(tiles), launch.cdiv(rows, config["BLOCK_M"]))](
        part,
        ds,
        rows,
        stride_dsm=ds.stride(0),
        TILES=with_blocks,
        P=part.shape[2],
        BLOCK_R=block_r,
        **config,
    )


def sum_chunks(
    part: Tensor, out: Tensor, blocks: tuple[tuple[int, int, int, int], ...], width: int
) -> None:
    """Sums part [chunks, rows, P] over chunks into each block of `out`, at most `width` wide."""
    chunks, rows, pitch = part.shape
    config = launch.config("lora_sum_chunks", out.device, torch.float32, width)
    grid = (launch.cdiv(rows, config["BLOCK_M"]), launch.cdiv(width, config["BLOCK_N"]))
    _sum_chunks_kernel[grid](
        part, out, chunks, rows, stride_out=out.stride(0), BLOCKS=blocks, P=pitch, **config
    )
