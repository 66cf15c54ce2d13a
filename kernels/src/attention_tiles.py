"""How packed sequences are cut into tiles, and which tiles see each other.

A sequence's queries see the tokens of the sequences that it continues, then its own. Each of these
stretches of tokens is a run; a position counts from a run's first token, so the queries of the
sequence itself have positions from 0 on in its own run, and from the lengths in between on in the
runs before. A query at position p of a run sees key j if j <= p (causal) and p - j < window.
"""

import triton
import triton.language as tl


@triton.jit
def find_tile(
    tile,
    cu_seqlens_ptr,  # [sequences + 1]
    sequences,
    BLOCK: tl.constexpr,
):
    """The tile's sequence, that one's first token and length, and the tile's first row in it.

    Sequence i has the tiles from cu_seqlens[i] // BLOCK + i on: as many as its rows need, or one
    more, which starts behind its last row. So neither a list of tiles nor a copy of the lengths on
    the host is needed, and all sequences together have tokens // BLOCK + sequences tiles.
    """
    low = 0
    high = sequences
    while high - low > 1:
        middle = (low + high) // 2
        starts = tl.load(cu_seqlens_ptr + middle) // BLOCK + middle <= tile
        low = tl.where(starts, middle, low)
        high = tl.where(starts, high, middle)
    begin = tl.load(cu_seqlens_ptr + low)
    length = tl.load(cu_seqlens_ptr + low + 1) - begin
    return low, begin, length, (tile - begin // BLOCK - low) * BLOCK


@triton.jit
def run_length(
    cu_seqlens_ptr,  # [sequences + 1]
    sequence,  # -1: none
):
    """How many tokens a sequence has."""
    exists = sequence >= 0
    end = tl.load(cu_seqlens_ptr + sequence + 1, mask=exists, other=0)
    return end - tl.load(cu_seqlens_ptr + sequence, mask=exists, other=0)


@triton.jit
def key_range(
    row,  # the position in the run of the tile's first query
    length,  # of the run
    window,
    CAUSAL: tl.constexpr,
    WINDOW: tl.constexpr,
    BLOCK_M: tl.constexpr,  # queries of the tile
    BLOCK_N: tl.constexpr,  # keys of a tile
):
    """(start, full_end, end): the keys that a tile of queries sees, in tiles.

    Without a window, all queries see all keys before full_end.
    """
    start = 0
    full_end = length // BLOCK_N * BLOCK_N
    end = length
    if CAUSAL:
        full_end = tl.minimum(full_end, (row + 1) // BLOCK_N * BLOCK_N)
        end = tl.minimum(end, row + BLOCK_M)
    if WINDOW:
        start = tl.maximum(row - window + 1, 0) // BLOCK_N * BLOCK_N
    return start, full_end, end


@triton.jit
def query_range(
    key,  # the tile's first key, counted from the first query: negative before it
    length,  # queries
    window,
    CAUSAL: tl.constexpr,
    WINDOW: tl.constexpr,
    BLOCK_M: tl.constexpr,  # queries of a tile
    BLOCK_N: tl.constexpr,  # keys of the tile
):
    """(start, end): the queries that see a tile of keys, in tiles."""
    start = 0
    end = length
    if CAUSAL:
        start = tl.maximum(key, 0) // BLOCK_M * BLOCK_M
    if WINDOW:
        end = tl.minimum(end, key + BLOCK_N - 1 + window)
    return start, end


@triton.jit
def visible(
    queries,  # positions in the run
    keys,
    window,
    CAUSAL: tl.constexpr,
    WINDOW: tl.constexpr,
):
    """Whether each query may see each key, for positions that broadcast to a tile."""
    seen = keys == keys
    if CAUSAL:
        seen = seen & (keys <= queries)
    if WINDOW:
        seen = seen & (queries - keys < window)
    return seen


@triton.jit
def load_rows(
    ptr,  # [length, D]: a head of a run
    stride,
    start,
    length,
    MASKED: tl.constexpr,
    D: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """The tile [BLOCK, BLOCK_D] from row `start` on; columns from D on are zero.

    So are rows from `length` on, if MASKED: those of another sequence are not read.
    """
    rows = tl.arange(0, BLOCK)
    cols = tl.arange(0, BLOCK_D)
    ptrs = ptr + tl.cast(start, tl.int64) * stride + (rows[:, None] * stride + cols[None, :])
    if MASKED and D < BLOCK_D:
        tile = tl.load(ptrs, mask=(rows < length - start)[:, None] & (cols < D)[None, :], other=0.0)
    elif MASKED:
        tile = tl.load(ptrs, mask=(rows < length - start)[:, None], other=0.0)
    elif D < BLOCK_D:
        tile = tl.load(ptrs, mask=(cols < D)[None, :], other=0.0)
    else:
        tile = tl.load(ptrs)
    return tile


@triton.jit
def rows_of(
    ptr,  # [tokens, heads, D]
    token,  # the first of the run, int64
    stride,
    length,  # of the run
    width,  # heads D
    TMA: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """A run's rows [length, width], for `load_head`: a tensor descriptor if TMA, else a pointer."""
    if TMA:
        rows = tl.make_tensor_descriptor(
            ptr + token * stride, [length, width], [stride, 1], [BLOCK, BLOCK_D]
        )
    else:
        rows = ptr + token * stride
    return rows


@triton.jit
def load_head(
    rows,  # of `rows_of`
    column,  # the head's first
    stride,
    start,
    length,
    MASKED: tl.constexpr,
    TMA: tl.constexpr,
    D: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """As `load_rows` of one head."""
    if TMA:
        tile = rows.load([start, column])
    else:
        tile = load_rows(rows + column, stride, start, length, MASKED, D, BLOCK, BLOCK_D)
    return tile


@triton.jit
def store_rows(
    ptr,  # [length, D]: a head of a sequence
    stride,
    start,
    length,
    tile,  # [BLOCK, BLOCK_D] float32
    D: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Writes the tile's rows and columns that exist, rounded."""
    rows = tl.arange(0, BLOCK)
    cols = tl.arange(0, BLOCK_D)
    ptrs = ptr + tl.cast(start, tl.int64) * stride + (rows[:, None] * stride + cols[None, :])
    mask = (rows < length - start)[:, None] & (cols < D)[None, :]
    tl.store(ptrs, tile.to(ptr.dtype.element_ty), mask=mask)
