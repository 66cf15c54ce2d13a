"""Attention's backward kernels: the probabilities are made again from lse (arXiv:2307.08691).

One kernel owns tiles of queries and writes dQ, the other tiles of keys and writes dK and dV: every
sum is made by one program in a fixed order. With P = exp(scale Q K^T - lse):

    delta = sum(O * dO)    dS = scale P * (dO V^T - delta)
    dQ = dS K              dK = dS^T Q            dV = P^T dO
"""

import triton
import triton.language as tl
from lora_engine.backends.triton.attention_tiles import (
    find_tile,
    key_range,
    load_head,
    load_rows,
    query_range,
    rows_of,
    run_length,
    store_rows,
    visible,
)
from lora_engine.backends.triton.relaunch import Relaunched

LOG2_E = tl.constexpr(1.4426950408889634)


@triton.jit
def _dq_of_keys(
    dq,  # [BLOCK_M, BLOCK_D] float32
    q,  # [BLOCK_M, BLOCK_D]
    d_o,  # [BLOCK_M, BLOCK_D]
    lse,  # [BLOCK_M], in units of log 2
    delta,  # [BLOCK_M]
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
    """Adds dS K / scale over the keys of tiles in [start, end)."""
    for first in tl.range(start, end, BLOCK_N):
        k = load_head(k_rows, column, stride_k, first, length, MASKED, TMA, D, BLOCK_N, BLOCK_D)
        v = load_head(v_rows, column, stride_v, first, length, MASKED, TMA, D, BLOCK_N, BLOCK_D)
        scores = tl.dot(q, tl.trans(k), input_precision=PRECISION)
        p = tl.exp2(scores * scale - lse[:, None])
        if MASKED:
            keys = first + tl.arange(0, BLOCK_N)
            queries = row + tl.arange(0, BLOCK_M)
            seen = visible(queries[:, None], keys[None, :], window, CAUSAL, WINDOW)
            p = tl.where(seen & (keys < length)[None, :], p, 0.0)
        dp = tl.dot(d_o, tl.trans(v), input_precision=PRECISION)
        ds = p * (dp - delta[:, None])
        dq = tl.dot(ds.to(k.dtype), k, dq, input_precision=PRECISION)
    return dq


@triton.jit
def _dq_of_run(
    dq,  # [BLOCK_M, BLOCK_D] float32
    q,  # [BLOCK_M, BLOCK_D]
    d_o,  # [BLOCK_M, BLOCK_D]
    lse,  # [BLOCK_M], in units of log 2
    delta,  # [BLOCK_M]
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
    """Adds dS K / scale over all keys of a run that the queries see, in a loop more if SPLIT."""
    start, full_end, end = key_range(row, length, window, CAUSAL, WINDOW, BLOCK_M, BLOCK_N)
    if SPLIT:
        dq = _dq_of_keys(
            dq, q, d_o, lse, delta, k_rows, v_rows, column, stride_k, stride_v,
            row, start, full_end, length, window, scale,
            False, CAUSAL, WINDOW, PRECISION, TMA, D, BLOCK_M, BLOCK_N, BLOCK_D,
        )  # fmt: skip
        start = full_end
    return _dq_of_keys(
        dq, q, d_o, lse, delta, k_rows, v_rows, column, stride_k, stride_v,
        row, start, end, length, window, scale,
        True, CAUSAL, WINDOW, PRECISION, TMA, D, BLOCK_M, BLOCK_N, BLOCK_D,
    )  # fmt: skip


@Relaunched
@triton.jit(do_not_specialize=["sequences", "window"])
def _attention_bwd_dq_kernel(
    d_o_ptr,  # [tokens, heads, D]
    q_ptr,  # [tokens, heads, D]
    k_ptr,  # [tokens, heads / GROUP, D]
    v_ptr,  # [tokens, heads / GROUP, D]
    o_ptr,  # [tokens, heads, D]
    lse_ptr,  # [heads, tokens] float32
    delta_ptr,  # [heads, tokens] float32
    dq_ptr,  # [tokens, heads, D]
    cu_seqlens_ptr,  # [sequences + 1]
    parents_ptr,  # [sequences] or None
    tokens,
    sequences,
    heads,
    window,
    softmax_scale,
    stride_do,  # of tokens, in vectors of VEC elements
    stride_q,
    stride_k,
    stride_v,
    stride_o,
    stride_dq,
    SPLIT: tl.constexpr,  # see `_dq_of_run`
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
    """Writes delta = sum(O * dO) of each row, and dQ = dS K.

    A program has a tile of queries of one head, in the order of the forward kernel.
    """
    head = tl.program_id(0) % heads
    tile = tl.num_programs(0) // heads - 1 - tl.program_id(0) // heads
    sequence, begin, rows, first = find_tile(tile, cu_seqlens_ptr, sequences, BLOCK_M)
    if first >= rows:
        return
    stride_do *= VEC
    stride_q *= VEC
    stride_k *= VEC
    stride_v *= VEC
    stride_o *= VEC
    stride_dq *= VEC
    token = begin.to(tl.int64)
    q_ptr += token * stride_q + head * D
    o_ptr += token * stride_o + head * D
    d_o_ptr += token * stride_do + head * D
    dq_ptr += token * stride_dq + head * D
    column = head // GROUP * D
    width = heads // GROUP * D
    o = load_rows(o_ptr, stride_o, first, rows, True, D, BLOCK_M, BLOCK_D)
    d_o = load_rows(d_o_ptr, stride_do, first, rows, True, D, BLOCK_M, BLOCK_D)
    delta = tl.sum(o.to(tl.float32) * d_o.to(tl.float32), axis=1)
    q = load_rows(q_ptr, stride_q, first, rows, True, D, BLOCK_M, BLOCK_D)
    offs = first + tl.arange(0, BLOCK_M)
    statistics = tl.cast(head, tl.int64) * tokens + begin + offs
    tl.store(delta_ptr + statistics, delta, mask=offs < rows)
    # Queries that do not exist have an infinite lse, and so probabilities of zero.
    lse = tl.load(lse_ptr + statistics, mask=offs < rows, other=float("inf")) * LOG2_E
    scale = softmax_scale * LOG2_E

    dq = tl.zeros([BLOCK_M, BLOCK_D], dtype=tl.float32)
    if parents_ptr is None:
        k_rows = rows_of(k_ptr, token, stride_k, rows, width, TMA, BLOCK_N, BLOCK_D)
        v_rows = rows_of(v_ptr, token, stride_v, rows, width, TMA, BLOCK_N, BLOCK_D)
        dq = _dq_of_run(
            dq, q, d_o, lse, delta, k_rows, v_rows, column, stride_k, stride_v,
            first, rows, window, scale,
            SPLIT, CAUSAL, WINDOW, PRECISION, TMA, D, BLOCK_M, BLOCK_N, BLOCK_D,
        )  # fmt: skip
    else:
        run = sequence
        row = first
        while run >= 0:
            origin = tl.load(cu_seqlens_ptr + run).to(tl.int64)
            dq = _dq_of_run(
                dq, q, d_o, lse, delta, k_ptr + origin * stride_k, v_ptr + origin * stride_v,
                column, stride_k, stride_v, row, run_length(cu_seqlens_ptr, run), window, scale,
                False, CAUSAL, WINDOW, PRECISION, False, D, BLOCK_M, BLOCK_N, BLOCK_D,
            )  # fmt: skip
            run = tl.load(parents_ptr + run)
            row += run_length(cu_seqlens_ptr, run)
    store_rows(dq_ptr, stride_dq, first, rows, dq * softmax_scale, D, BLOCK_M, BLOCK_D)


@triton.jit
def _dkv_of_queries(
    dk,  # [BLOCK_N, BLOCK_D] float32
    dv,  # [BLOCK_N, BLOCK_D] float32
    k,  # [BLOCK_N, BLOCK_D]
    v,  # [BLOCK_N, BLOCK_D]
    q_rows,  # of a sequence that sees the keys
    d_o_rows,
    column,  # the head's first
    lse_ptr,  # [rows]
    delta_ptr,  # [rows]
    stride_q,
    stride_do,
    key,  # the first key, counted from the first query
    start,
    end,
    rows,
    window,
    scale,
    CAUSAL: tl.constexpr,
    WINDOW: tl.constexpr,
    PRECISION: tl.constexpr,
    TMA: tl.constexpr,
    D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Adds dS^T Q / scale and P^T dO over the queries of tiles in [start, end).

    Scores are held transposed, keys down, so that P^T and dS^T are left operands as they stand.
    All tiles are masked: a second loop for those without a mask would take more registers than
    there are.
    """
    for first in tl.range(start, end, BLOCK_M):
        q = load_head(q_rows, column, stride_q, first, rows, True, TMA, D, BLOCK_M, BLOCK_D)
        d_o = load_head(d_o_rows, column, stride_do, first, rows, True, TMA, D, BLOCK_M, BLOCK_D)
        offs = first + tl.arange(0, BLOCK_M)
        # Queries that do not exist have an infinite lse, and so probabilities of zero.
        lse = tl.load(lse_ptr + offs, mask=offs < rows, other=float("inf"))
        delta = tl.load(delta_ptr + offs, mask=offs < rows, other=0.0)
        scores = tl.dot(k, tl.trans(q), input_precision=PRECISION)
        p = tl.exp2(scores * scale - (lse * LOG2_E)[None, :])
        if CAUSAL:
            keys = key + tl.arange(0, BLOCK_N)
            seen = visible(offs[None, :], keys[:, None], window, CAUSAL, WINDOW)
            p = tl.where(seen, p, 0.0)
        dv = tl.dot(p.to(d_o.dtype), d_o, dv, input_precision=PRECISION)
        dp = tl.dot(v, tl.trans(d_o), input_precision=PRECISION)
        ds = p * (dp - delta[None, :])
        dk = tl.dot(ds.to(q.dtype), q, dk, input_precision=PRECISION)
    return dk, dv


@triton.jit
def _dkv_of_sequence(
    dk,  # [BLOCK_N, BLOCK_D] float32
    dv,  # [BLOCK_N, BLOCK_D] float32
    k,  # [BLOCK_N, BLOCK_D]
    v,  # [BLOCK_N, BLOCK_D]
    q_rows,  # of a sequence that sees the keys
    d_o_rows,
    lse_ptr,  # [heads, tokens]
    delta_ptr,  # [heads, tokens]
    stride_q,
    stride_do,
    kv_head,
    token,  # the sequence's first
    key,  # the first key, counted from there
    rows,
    tokens,
    window,
    scale,
    CAUSAL: tl.constexpr,
    WINDOW: tl.constexpr,
    GROUP: tl.constexpr,
    PRECISION: tl.constexpr,
    TMA: tl.constexpr,
    D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Adds dS^T Q / scale and P^T dO over all queries of a sequence that see the keys."""
    start, end = query_range(key, rows, window, CAUSAL, WINDOW, BLOCK_M, BLOCK_N)
    for member in range(GROUP):
        head = kv_head * GROUP + member
        lses = lse_ptr + tl.cast(head, tl.int64) * tokens + token
        deltas = delta_ptr + tl.cast(head, tl.int64) * tokens + token
        dk, dv = _dkv_of_queries(
            dk, dv, k, v, q_rows, d_o_rows, head * D, lses, deltas, stride_q, stride_do,
            key, start, end, rows, window, scale,
            CAUSAL, WINDOW, PRECISION, TMA, D, BLOCK_M, BLOCK_N, BLOCK_D,
        )  # fmt: skip
    return dk, dv


@Relaunched
@triton.jit(do_not_specialize=["sequences", "window"])
def _attention_bwd_dkv_kernel(
    d_o_ptr,  # [tokens, heads, D]
    q_ptr,  # [tokens, heads, D]
    k_ptr,  # [tokens, heads / GROUP, D]
    v_ptr,  # [tokens, heads / GROUP, D]
    lse_ptr,  # [heads, tokens] float32
    delta_ptr,  # [heads, tokens] float32
    dk_ptr,  # [tokens, heads / GROUP, D]
    dv_ptr,  # [tokens, heads / GROUP, D]
    cu_seqlens_ptr,  # [sequences + 1]
    parents_ptr,  # [sequences] or None
    last_ptr,  # [sequences] or None: the last sequence that continues each, 0 without any
    tokens,
    sequences,
    kv_heads,
    window,
    softmax_scale,
    stride_do,  # of tokens, in vectors of VEC elements
    stride_q,
    stride_k,
    stride_v,
    stride_dk,
    stride_dv,
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
    """dK = dS^T Q and dV = P^T dO, summed over all query heads of a key head.

    A program has a tile of keys of one key head. The first tiles of a sequence are seen by most
    queries, and come first.
    """
    kv_head = tl.program_id(0) % kv_heads
    tile = tl.program_id(0) // kv_heads
    sequence, begin, length, first = find_tile(tile, cu_seqlens_ptr, sequences, BLOCK_N)
    if first >= length:
        return
    stride_do *= VEC
    stride_q *= VEC
    stride_k *= VEC
    stride_v *= VEC
    stride_dk *= VEC
    stride_dv *= VEC
    token = begin.to(tl.int64)
    k_ptr += token * stride_k + kv_head * D
    v_ptr += token * stride_v + kv_head * D
    dk_ptr += token * stride_dk + kv_head * D
    dv_ptr += token * stride_dv + kv_head * D
    k = load_rows(k_ptr, stride_k, first, length, True, D, BLOCK_N, BLOCK_D)
    v = load_rows(v_ptr, stride_v, first, length, True, D, BLOCK_N, BLOCK_D)
    dk = tl.zeros([BLOCK_N, BLOCK_D], dtype=tl.float32)
    dv = tl.zeros([BLOCK_N, BLOCK_D], dtype=tl.float32)
    scale = softmax_scale * LOG2_E

    if parents_ptr is None:
        width = kv_heads * GROUP * D
        q_rows = rows_of(q_ptr, token, stride_q, length, width, TMA, BLOCK_M, BLOCK_D)
        d_o_rows = rows_of(d_o_ptr, token, stride_do, length, width, TMA, BLOCK_M, BLOCK_D)
        dk, dv = _dkv_of_sequence(
            dk, dv, k, v, q_rows, d_o_rows, lse_ptr, delta_ptr, stride_q, stride_do,
            kv_head, token, first, length, tokens, window, scale,
            CAUSAL, WINDOW, GROUP, PRECISION, TMA, D, BLOCK_M, BLOCK_N, BLOCK_D,
        )  # fmt: skip
    else:
        other = sequence
        last = tl.maximum(tl.load(last_ptr + sequence), sequence)
        while other <= last:
            # How far the other sequence's first query is behind the keys' run.
            behind = 0
            ancestor = other
            while ancestor > sequence:
                ancestor = tl.load(parents_ptr + ancestor)
                behind += run_length(cu_seqlens_ptr, ancestor)
            rows = tl.where(ancestor == sequence, run_length(cu_seqlens_ptr, other), 0)
            origin = tl.load(cu_seqlens_ptr + other).to(tl.int64)
            dk, dv = _dkv_of_sequence(
                dk, dv, k, v, q_ptr + origin * stride_q, d_o_ptr + origin * stride_do, lse_ptr,
                delta_ptr, stride_q, stride_do, kv_head, origin, first - behind, rows,
                tokens, window, scale,
                CAUSAL, WINDOW, GROUP, PRECISION, False, D, BLOCK_M, BLOCK_N, BLOCK_D,
            )  # fmt: skip
            other += 1
    store_rows(dk_ptr, stride_dk, first, length, dk * softmax_scale, D, BLOCK_N, BLOCK_D)
    store_rows(dv_ptr, stride_dv, first, length, dv, D, BLOCK_N, BLOCK_D)


@Relaunched
@triton.jit
def _attention_last_kernel(
    parents_ptr,  # [sequences]
    last_ptr,  # [sequences], zeros
):
    """last[a] = the greatest sequence among those that continue a, directly or not."""
    sequence = tl.program_id(0)
    ancestor = tl.load(parents_ptr + sequence)
    while ancestor >= 0:
        tl.atomic_max(last_ptr + ancestor, sequence)
        ancestor = tl.load(parents_ptr + ancestor)
