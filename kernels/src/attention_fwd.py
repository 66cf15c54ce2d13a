"""Attention's forward kernel: online softmax over tiles of keys (arXiv:2307.08691)."""

import triton
import triton.language as tl
from lora_engine.backends.triton.attention_tiles import (
    find_tile,
    key_range,
    load_head,
    load_rows,
    rows_of,
    run_length,
    store_rows,
    visible,
)
from lora_engine.backends.triton.relaunch import Relaunched

LOG_2 = tl.constexpr(0.6931471805599453)


@triton.jit
def _attend(
    q,  # [BLOCK_M, BLOCK_D]
    acc,  # [BLOCK_M, BLOCK_D] float32
    m,  # [BLOCK_M]
    total,  # [BLOCK_M]
    k_rows,  # of a run
    v_rows,
    column,  # the key head's first
    stride_k,
    stride_v,
    row,  # the position of the first query
    start,
    end,
    length,
    window,
    scale,
    MASKED: tl.constexpr,
    CAUSAL: tl.constexpr,
    WINDOW: tl.constexpr,
    PRECISION: tl.constexpr,
    TMA: tl.constexpr,
    D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Folds the keys of tiles in [start, end) into the online softmax of each query.

    acc is the weighted sum of values, m the running maximum and total the sum of exponentials.
    Scores and m are in units of log 2, so that exponentials are powers of two.
    """
    for first in tl.range(start, end, BLOCK_N):
        k = load_head(k_rows, column, stride_k, first, length, MASKED, TMA, D, BLOCK_N, BLOCK_D)
        scores = tl.dot(q, tl.trans(k), input_precision=PRECISION)
        if MASKED:
            keys = first + tl.arange(0, BLOCK_N)
            queries = row + tl.arange(0, BLOCK_M)
            seen = visible(queries[:, None], keys[None, :], window, CAUSAL, WINDOW)
            seen = seen & (keys < length)[None, :]
            scores = tl.where(seen, scores * scale, float("-inf"))
            new_m = tl.maximum(m, tl.max(scores, axis=1))
            # A query that has seen no key yet: -inf - -inf would be NaN.
            safe_m = tl.where(new_m == float("-inf"), 0.0, new_m)
            p = tl.exp2(scores - safe_m[:, None])
        else:
            new_m = tl.maximum(m, tl.max(scores, axis=1) * scale)
            safe_m = new_m
            p = tl.exp2(scores * scale - new_m[:, None])
        correction = tl.exp2(m - safe_m)
        total = total * correction + tl.sum(p, axis=1)
        v = load_head(v_rows, column, stride_v, first, length, MASKED, TMA, D, BLOCK_N, BLOCK_D)
        acc = tl.dot(p.to(v.dtype), v, acc * correction[:, None], input_precision=PRECISION)
        m = new_m
    return acc, m, total


@triton.jit
def _attend_run(
    q,  # [BLOCK_M, BLOCK_D]
    acc,  # [BLOCK_M, BLOCK_D] float32
    m,  # [BLOCK_M]
    total,  # [BLOCK_M]
    k_rows,  # of a run
    v_rows,
    column,  # the key head's first
    stride_k,
    stride_v,
    row,  # the position of the first query
    length,
    window,
    scale,
    SPLIT: tl.constexpr,
    CAUSAL: tl.constexpr,
    WINDOW: tl.constexpr,
    PRECISION: tl.constexpr,
    TMA: tl.constexpr,
    D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Folds all keys of a run that the queries see into acc, m and total.

    SPLIT: tiles without a mask have a loop of their own.
    """
    start, full_end, end = key_range(row, length, window, CAUSAL, WINDOW, BLOCK_M, BLOCK_N)
    if SPLIT:
        acc, m, total = _attend(
            q, acc, m, total, k_rows, v_rows, column, stride_k, stride_v,
            row, start, full_end, length, window, scale,
            False, CAUSAL, WINDOW, PRECISION, TMA, D, BLOCK_M, BLOCK_N, BLOCK_D,
        )  # fmt: skip
        start = full_end
    acc, m, total = _attend(
        q, acc, m, total, k_rows, v_rows, column, stride_k, stride_v,
        row, start, end, length, window, scale,
        True, CAUSAL, WINDOW, PRECISION, TMA, D, BLOCK_M, BLOCK_N, BLOCK_D,
    )  # fmt: skip
    return acc, m, total


@Relaunched
@triton.jit(do_not_specialize=["sequences", "window"])
def _attention_fwd_kernel(
    q_ptr,  # [tokens, heads, D]
    k_ptr,  # [tokens, heads / GROUP, D]
    v_ptr,  # [tokens, heads / GROUP, D]
    o_ptr,  # [tokens, heads, D]
    lse_ptr,  # [heads, tokens] float32
    cu_seqlens_ptr,  # [sequences + 1]
    parents_ptr,  # [sequences] or None
    tokens,
    sequences,
    heads,
    window,
    scale,  # of the scores, not negative, in units of log 2
    stride_q,  # of tokens, in vectors of VEC elements
    stride_k,
    stride_v,
    stride_o,
    NEGATED: tl.constexpr,
    SPLIT: tl.constexpr,
    CAUSAL: tl.constexpr,
    WINDOW: tl.constexpr,
    GROUP: tl.constexpr,
    VEC: tl.constexpr,
    PRECISION: tl.constexpr,
    TMA: tl.constexpr,
    D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """O = softmax(scale Q K^T) V, and lse = log sum exp of each row of scores.

    A program has a tile of queries of one head. Under a causal mask the last tile of a sequence has
    most keys: it comes first, so that the short ones fill the device's last wave. NEGATED: of
    scores with a negative scale, whose largest is that of -Q. SPLIT: see `_attend_run`.
    TMA: keys and values come through tensor descriptors, without parents and for D = BLOCK_D.
    """
    head = tl.program_id(0) % heads
    tile = tl.num_programs(0) // heads - 1 - tl.program_id(0) // heads
    sequence, begin, rows, first = find_tile(tile, cu_seqlens_ptr, sequences, BLOCK_M)
    if first >= rows:
        return
    stride_q *= VEC
    stride_k *= VEC
    stride_v *= VEC
    stride_o *= VEC
    token = begin.to(tl.int64)
    q_ptr += token * stride_q + head * D
    q = load_rows(q_ptr, stride_q, first, rows, True, D, BLOCK_M, BLOCK_D)
    if NEGATED:
        q = (-q.to(tl.float32)).to(q.dtype)
    column = head // GROUP * D
    width = heads // GROUP * D
    acc = tl.zeros([BLOCK_M, BLOCK_D], dtype=tl.float32)
    m = tl.full([BLOCK_M], float("-inf"), dtype=tl.float32)
    total = tl.zeros([BLOCK_M], dtype=tl.float32)

    if parents_ptr is None:
        k_rows = rows_of(k_ptr, token, stride_k, rows, width, TMA, BLOCK_N, BLOCK_D)
        v_rows = rows_of(v_ptr, token, stride_v, rows, width, TMA, BLOCK_N, BLOCK_D)
        acc, m, total = _attend_run(
            q, acc, m, total, k_rows, v_rows, column, stride_k, stride_v,
            first, rows, window, scale,
            SPLIT, CAUSAL, WINDOW, PRECISION, TMA, D, BLOCK_M, BLOCK_N, BLOCK_D,
        )  # fmt: skip
    else:
        run = sequence
        row = first
        while run >= 0:
            origin = tl.load(cu_seqlens_ptr + run).to(tl.int64)
            acc, m, total = _attend_run(
                q, acc, m, total, k_ptr + origin * stride_k, v_ptr + origin * stride_v, column,
                stride_k, stride_v, row, run_length(cu_seqlens_ptr, run), window, scale,
                False, CAUSAL, WINDOW, PRECISION, False, D, BLOCK_M, BLOCK_N, BLOCK_D,
            )  # fmt: skip
            run = tl.load(parents_ptr + run)
            row += run_length(cu_seqlens_ptr, run)

    o_ptr += token * stride_o + head * D
    store_rows(o_ptr, stride_o, first, rows, acc / total[:, None], D, BLOCK_M, BLOCK_D)
    offs = first + tl.arange(0, BLOCK_M)
    lse = (m + tl.log2(total)) * LOG_2
    tl.store(lse_ptr + tl.cast(head, tl.int64) * tokens + begin + offs, lse, mask=offs < rows)
