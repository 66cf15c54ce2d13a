"""How the ranks and the rows of a LoRA group are divided among programs."""

from collections.abc import Sequence
from functools import lru_cache

import torch
import triton
import triton.language as tl
from lora_engine.backends.triton import launch
from torch import Tensor

from lora_engine.backends.hardware import multiprocessors

Span = tuple[slice, slice]  # a linear's rows of [N, ...] and its columns of [..., R]

SMALLEST_DOT = 16
NARROW = 32
MOST_CHUNKS = 32
# Waves of programs from which on an unfinished last one costs little.
ENOUGH_WAVES = 3
# Share of a launch's time that pays for more partial sums.
WORTH = 0.05


@triton.jit
def choose(TABLE: tl.constexpr, index, FIELD: tl.constexpr):
    """TABLE[index][FIELD], for an index known at run time."""
    value = 0
    for i in tl.static_range(len(TABLE)):
        value = tl.where(index == i, TABLE[i][FIELD], value)
    return value


def padded(width: int) -> int:
    """The power of two, 16 or more, that holds `width` columns: what tl.dot takes."""
    return max(SMALLEST_DOT, launch.next_power_of_2(width))


def by_rank(kernel: str, block_r: int) -> str:
    """The launch table's name for a kernel working `block_r` ranks at once."""
    return kernel if block_r <= NARROW else f"{kernel}_wide"


def has_ranks(spans: Sequence[Span]) -> bool:
    """Whether any linear has an adapter."""
    return any(columns.stop > columns.start for _, columns in spans)


def rank_runs(spans: Sequence[Span], *, merge: bool) -> list[tuple[int, int, int]]:
    """(start, end, substream) of the linears' columns of [..., R], ascending.

    A linear's index is the substream of its dropout mask. `merge` joins adjacent runs, where no
    mask makes a difference between them.
    """
    return _rank_runs(tuple((c.start, c.stop) for _, c in spans), merge)


def _rank_runs(columns: tuple[tuple[int, int], ...], merge: bool) -> list[tuple[int, int, int]]:
    runs: list[tuple[int, int, int]] = []
    present = [(start, stop, i) for i, (start, stop) in enumerate(columns) if stop > start]
    for start, end, substream in sorted(present):
        if merge and runs and runs[-1][1] == start:
            runs[-1] = (runs[-1][0], end, runs[-1][2])
        else:
            runs.append((start, end, substream))
    return runs


def rank_tiles(
    spans: Sequence[Span], total: int, widest: int, *, merge: bool
) -> tuple[int, tuple[tuple[int, ...], ...]]:
    """A width and the tiles (first, start, end, stop, substream) that cover columns [0, total).

    A tile works the columns from `first` that lie in [start, end), and writes zeros to its others
    before `stop`: each of `rank_runs` owns the padding up to the next.
    """
    return _rank_tiles(tuple((c.start, c.stop) for _, c in spans), total, widest, merge)


@lru_cache(1024)
def _rank_tiles(
    columns: tuple[tuple[int, int], ...], total: int, widest: int, merge: bool
) -> tuple[int, tuple[tuple[int, ...], ...]]:
    runs = _rank_runs(columns, merge)
    firsts = [0, *(start for start, _, _ in runs[1:])]
    stops = [*firsts[1:], total]
    block = min(widest, padded(max(b - a for a, b in zip(firsts, stops, strict=True))))
    tiles = [
        (first, start, end, stop, substream)
        for (start, end, substream), begin, stop in zip(runs, firsts, stops, strict=True)
        for first in range(begin, stop, block)
    ]
    return block, tuple(tiles)


def split_rows(rows: int, block_m: int, tiles: int, device: torch.device) -> tuple[int, int]:
    """How many chunks of how many rows, such that `tiles` programs for each fill the device.

    One wave where it can be filled exactly enough, more where there are many tiles: partial sums
    cost memory traffic in proportion to the chunks.
    """
    resident = 2 * multiprocessors(device)  # programs that the device runs at once
    blocks = launch.cdiv(rows, block_m)
    chunk = launch.cdiv(blocks, _chunks(blocks, tiles, resident)) * block_m
    return launch.cdiv(rows, chunk), chunk


@lru_cache(1024)
def _chunks(blocks: int, tiles: int, resident: int) -> int:
    """One wave of chunks, or ENOUGH_WAVES; the fewest others where that saves WORTH of the time."""
    most = max(1, min(MOST_CHUNKS, blocks))
    one_wave = 2 * tiles <= resident
    usual = resident // tiles if one_wave else -(-ENOUGH_WAVES * resident // tiles)
    usual = min(usual, most)

    def time(chunks: int) -> int:
        """Blocks that one place of a program works after each other."""
        return launch.cdiv(chunks * tiles, resident) * launch.cdiv(blocks, chunks)

    least = (1 + WORTH) * min(map(time, range(1, most + 1)))
    if time(usual) <= least:
        return usual
    return next(chunks for chunks in range(1, most + 1) if time(chunks) <= least)


def aligned(*tensors: Tensor) -> bool:
    """Whether every row starts at a multiple of 16 bytes, which TMA asks for."""
    return all(
        x.data_ptr() % 16 == 0 and x.stride(0) * x.element_size() % 16 == 0 and x.numel() > 0
        for x in tensors
    )
