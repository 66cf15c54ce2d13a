"""A gated activation between adapted linears, whose pass makes their thin products too.

    forward    h = act(gate) up, and S = h Aᵀ of the linear that reads h
    backward   dgate and dup, with dS = dY B and dB = dYᵀ S of each, and dA = dSᵀ h of the linear
               that read h, which is not written

The operands of these products are in registers here, rounded to their dtype as they are stored, so
that none is read again. Sums are partial ones, added in a fixed order by lora_sums.py.

The products of a tile are taken in the turn after the one that computes it. As a value carried into
a turn, a tile is written to shared memory once, and all of its products read it there. Otherwise
Triton moves the products' layouts up to the loads, and computes the activation for each anew.
"""

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from lora_engine.backends.triton import launch
from lora_engine.backends.triton.glu import activated
from lora_engine.backends.triton.lora_factors import PRECISION
from lora_engine.backends.triton.lora_sums import Gradients, sum_chunks, sum_thin
from lora_engine.backends.triton.lora_tiles import Span, padded, split_rows
from lora_engine.backends.triton.relaunch import Relaunched
from torch import Tensor

from lora_engine.backends.lora_parts import DyGradients, XGradient


@Relaunched
@triton.jit(do_not_specialize=["M", "share"])
def _glu_lora_fwd_kernel(
    gate_ptr,  # [M, N]
    up_ptr,  # [M, N]
    h_ptr,  # [M, N]
    a_ptr,  # [R, N]
    s_ptr,  # [shares of N, M, P], float32
    M,
    N,
    share,  # blocks of columns
    stride_gate: tl.constexpr,
    stride_up: tl.constexpr,
    stride_h: tl.constexpr,
    stride_a: tl.constexpr,
    ROWS: tl.constexpr,  # (first, end) row of A
    ACTIVATION: tl.constexpr,
    PRECISION: tl.constexpr,
    NUM_STAGES: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    P: tl.constexpr,
):
    """h = act(gate) up and S = h A^T, a partial sum for each share of the columns."""
    offs_m = (tl.program_id(1) * BLOCK_M + tl.arange(0, BLOCK_M)).to(tl.int64)[:, None]
    mask_m = offs_m < M
    offs_p = tl.arange(0, P)
    offs_r = ROWS[0] + offs_p[:, None]
    offs_i = tl.arange(0, BLOCK_N)[None, :]
    start = tl.program_id(0) * share * BLOCK_N
    end = tl.minimum(start + share * BLOCK_N, N)
    s = tl.zeros([BLOCK_M, P], dtype=tl.float32)
    h = tl.zeros([BLOCK_M, BLOCK_N], dtype=h_ptr.dtype.element_ty)
    for n in tl.range(start, end + BLOCK_N, BLOCK_N, num_stages=NUM_STAGES):
        offs_n = n - BLOCK_N + offs_i
        mask_a = (offs_r < ROWS[1]) & (offs_n >= start) & (offs_n < N)
        a = tl.load(a_ptr + offs_r * stride_a + offs_n, mask=mask_a, other=0.0)
        s = tl.dot(h, tl.trans(a), s, input_precision=PRECISION)
        offs_n = n + offs_i
        mask = mask_m & (offs_n < end)
        gate = tl.load(gate_ptr + offs_m * stride_gate + offs_n, mask=mask, other=0.0)
        up = tl.load(up_ptr + offs_m * stride_up + offs_n, mask=mask, other=0.0)
        value, _ = activated(gate.to(tl.float32), ACTIVATION, gate.dtype)
        h = (value * up.to(tl.float32)).to(h_ptr.dtype.element_ty)
        tl.store(h_ptr + offs_m * stride_h + offs_n, h, mask=mask)
    offs_m += tl.program_id(0).to(tl.int64) * M
    tl.store(s_ptr + offs_m * P + offs_p[None, :], s, mask=mask_m)


@triton.jit
def _products(
    dy,
    b,
    db,
    ds_ptrs,
    s_ptrs,
    mask_m,
    mask_r,
    HAS_DB: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Stores dS = dY B of a tile; db with dY^T S added."""
    ds = tl.dot(dy, b, input_precision=PRECISION)
    tl.store(ds_ptrs, ds, mask=mask_m)
    if HAS_DB:
        s = tl.load(s_ptrs, mask=mask_m & mask_r, other=0.0)
        db = tl.dot(tl.trans(dy), s, db, input_precision=PRECISION)
    return db


@Relaunched
@triton.jit(do_not_specialize=["M", "chunk"])
def _glu_lora_bwd_kernel(
    dh_ptr,  # [M, N]
    gate_ptr,  # [M, N]
    up_ptr,  # [M, N]
    dgate_ptr,  # [M, N]
    dup_ptr,  # [M, N]
    b_ptr,  # [2 N, R]
    s_ptr,  # [M, R]
    outer_ds_ptr,  # [M, outer R]
    ds_ptr,  # [2 blocks of N, M, P], float32
    db_ptr,  # [chunks of M, 2 N, P], float32
    da_ptr,  # [chunks of M, P, N], float32
    M,
    N,
    chunk,
    stride_dh: tl.constexpr,
    stride_gate: tl.constexpr,
    stride_up: tl.constexpr,
    stride_dgate: tl.constexpr,
    stride_dup: tl.constexpr,
    stride_b: tl.constexpr,
    stride_s: tl.constexpr,
    stride_outer_ds: tl.constexpr,
    GATE: tl.constexpr,  # (first, end) column of B and S, equal without an adapter
    UP: tl.constexpr,
    OUTER: tl.constexpr,  # likewise of the other linear's dS
    HAS_DB: tl.constexpr,
    ACTIVATION: tl.constexpr,
    PRECISION: tl.constexpr,
    NUM_STAGES: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    P: tl.constexpr,
):
    """dgate = dh up act'(gate) and dup = dh act(gate), with the products of one reading.

    Written are partial sums: of dS for each block of columns, of dB and dA for each chunk of rows.
    """
    HAS_GATE: tl.constexpr = GATE[1] > GATE[0]
    HAS_UP: tl.constexpr = UP[1] > UP[0]
    HAS_DA: tl.constexpr = OUTER[1] > OUTER[0]
    block = tl.program_id(0)
    offs_n = block * BLOCK_N + tl.arange(0, BLOCK_N)
    mask_n = offs_n < N
    offs_i = tl.arange(0, BLOCK_M)
    offs_p = tl.arange(0, P)
    start = tl.program_id(1) * chunk
    end = tl.minimum(start + chunk, M)
    element = dgate_ptr.dtype.element_ty
    offs_b = offs_n.to(tl.int64)[:, None] * stride_b + offs_p[None, :]
    if HAS_GATE:
        mask_gate = (offs_p < GATE[1] - GATE[0])[None, :]
        b_gate = tl.load(b_ptr + GATE[0] + offs_b, mask=mask_n[:, None] & mask_gate, other=0.0)
        db_gate = tl.zeros([BLOCK_N, P], dtype=tl.float32)
    if HAS_UP:
        mask_up = (offs_p < UP[1] - UP[0])[None, :]
        b_up_ptr = b_ptr + N.to(tl.int64) * stride_b + UP[0]
        b_up = tl.load(b_up_ptr + offs_b, mask=mask_n[:, None] & mask_up, other=0.0)
        db_up = tl.zeros([BLOCK_N, P], dtype=tl.float32)
    if HAS_DA:
        mask_outer = (offs_p < OUTER[1] - OUTER[0])[None, :]
        da = tl.zeros([BLOCK_N, P], dtype=tl.float32)
    dgate = tl.zeros([BLOCK_M, BLOCK_N], dtype=element)
    dup, h = dgate, dgate
    for m in tl.range(start, end + BLOCK_M, BLOCK_M, num_stages=NUM_STAGES):
        offs_m = (m - BLOCK_M + offs_i).to(tl.int64)[:, None]
        mask_m = (offs_m >= start) & (offs_m < M)
        if HAS_GATE:
            rows = block.to(tl.int64) * M + offs_m
            ds_ptrs = ds_ptr + rows * P + offs_p[None, :]
            s_ptrs = s_ptr + GATE[0] + offs_m * stride_s + offs_p[None, :]
            db_gate = _products(
                dgate, b_gate, db_gate, ds_ptrs, s_ptrs, mask_m, mask_gate, HAS_DB, PRECISION
            )
        if HAS_UP:
            rows = (tl.num_programs(0) + block).to(tl.int64) * M + offs_m
            ds_ptrs = ds_ptr + rows * P + offs_p[None, :]
            s_ptrs = s_ptr + UP[0] + offs_m * stride_s + offs_p[None, :]
            db_up = _products(dup, b_up, db_up, ds_ptrs, s_ptrs, mask_m, mask_up, HAS_DB, PRECISION)
        if HAS_DA:
            ds = tl.load(
                outer_ds_ptr + OUTER[0] + offs_m * stride_outer_ds + offs_p[None, :],
                mask=mask_m & mask_outer,
                other=0.0,
            )
            da = tl.dot(tl.trans(h), ds, da, input_precision=PRECISION)
        offs_m = (m + offs_i).to(tl.int64)[:, None]
        mask = (offs_m < end) & mask_n[None, :]
        dh = tl.load(dh_ptr + offs_m * stride_dh + offs_n[None, :], mask=mask, other=0.0)
        gate = tl.load(gate_ptr + offs_m * stride_gate + offs_n[None, :], mask=mask, other=0.0)
        up = tl.load(up_ptr + offs_m * stride_up + offs_n[None, :], mask=mask, other=0.0)
        dh, gate, up = dh.to(tl.float32), gate.to(tl.float32), up.to(tl.float32)
        value, slope = activated(gate, ACTIVATION, element)
        h = (value * up).to(element)
        dup = (dh * value).to(element)
        dgate = (dh * up * slope).to(element)
        tl.store(dgate_ptr + offs_m * stride_dgate + offs_n[None, :], dgate, mask=mask)
        tl.store(dup_ptr + offs_m * stride_dup + offs_n[None, :], dup, mask=mask)
    if HAS_DB:
        rows = tl.program_id(1).to(tl.int64) * (2 * N) + offs_n
        if HAS_GATE:
            tl.store(db_ptr + rows[:, None] * P + offs_p[None, :], db_gate, mask=mask_n[:, None])
        if HAS_UP:
            rows += N
            tl.store(db_ptr + rows[:, None] * P + offs_p[None, :], db_up, mask=mask_n[:, None])
    if HAS_DA:
        rows = tl.program_id(1).to(tl.int64) * P + offs_p
        tl.store(da_ptr + rows[None, :] * N + offs_n[:, None], da, mask=mask_n[:, None])


def glu_lora_fwd(
    gate: Tensor,  # [M, K]
    up: Tensor,  # [M, K]
    y: Tensor,  # [M, K]
    lora_a: Tensor,  # [R, K]
    s: Tensor,  # [M, R]
    spans: Sequence[Span],
    copy: Tensor | None = None,  # [M, R]
    *,
    activation: str,
) -> None:
    """Writes y, and s and copy = y lora_aᵀ of one linear: 0 in other columns. Launch size: M."""
    rows, cols = gate.shape
    if gate.numel() == 0:
        for result in (s,) if copy is None else (s, copy):
            result.zero_()
        return
    ((_, columns),) = spans
    block_p = padded(columns.stop - columns.start)
    config = launch.config("glu_lora_fwd", gate.device, gate.dtype, rows)
    row_blocks, block_n = launch.cdiv(rows, config["BLOCK_M"]), config["BLOCK_N"]
    shares, width = split_rows(cols, block_n, row_blocks, gate.device)
    part = torch.empty(shares, rows, block_p, dtype=torch.float32, device=gate.device)
    _glu_lora_fwd_kernel[(shares, row_blocks)](
        gate,
        up,
        y,
        lora_a,
        part,
        rows,
        cols,
        width // block_n,
        stride_gate=gate.stride(0),
        stride_up=up.stride(0),
        stride_h=y.stride(0),
        stride_a=lora_a.stride(0),
        ROWS=(columns.start, columns.stop),
        ACTIVATION=activation,
        PRECISION=PRECISION,
        P=block_p,
        **config,
    )
    sum_thin(part, s, spans, {columns.start: (0, shares)}, copy=copy)


def glu_lora_bwd(
    dy: Tensor,  # [M, K]
    gate: Tensor,  # [M, K]
    up: Tensor,  # [M, K]
    dgate: Tensor,  # [M, K]
    dup: Tensor,  # [M, K]
    inner: DyGradients,  # N = 2 K
    outer: XGradient | None,
    *,
    activation: str,
) -> None:
    """Writes dgate, dup and what `inner` and `outer` take of this pass. Launch size: M."""
    rows, cols = gate.shape
    linears = [(n, r) for n, r in inner.spans if r.stop > r.start]
    if gate.numel() == 0 or not linears:
        for result in (inner.ds, None if inner.scaled is None else inner.scaled.ds):
            if result is not None:
                result.zero_()
    if gate.numel() == 0:
        if inner.d_lora_b is not None:
            inner.d_lora_b.zero_()
        if outer is not None:
            outer.d_lora_a.zero_()
        return
    (_, gate_columns), (_, up_columns) = inner.spans
    outer_columns = slice(0, 0) if outer is None else outer.spans[0][1]
    width = max(r.stop - r.start for r in (gate_columns, up_columns, outer_columns))
    block_p = padded(width)
    name = "glu_lora_bwd_gelu" if activation == "gelu" else "glu_lora_bwd"
    config = launch.config(name, gate.device, gate.dtype, rows)
    blocks = launch.cdiv(cols, config["BLOCK_N"])
    chunks, chunk = split_rows(rows, config["BLOCK_M"], blocks, gate.device)

    def partial(*shape: int) -> Tensor:
        return torch.empty(shape, dtype=torch.float32, device=gate.device)

    has_db = inner.d_lora_b is not None and len(linears) > 0
    ds_part = partial(2 * blocks, rows, block_p)
    db_part = partial(chunks, 2 * cols, block_p) if has_db else ds_part
    da_part = ds_part if outer is None else partial(chunks, block_p, cols)
    outer_ds = dy if outer is None else outer.ds
    _glu_lora_bwd_kernel[(blocks, chunks)](
        dy,
        gate,
        up,
        dgate,
        dup,
        inner.lora_b,
        inner.s,
        outer_ds,
        ds_part,
        db_part,
        da_part,
        rows,
        cols,
        chunk,
        stride_dh=dy.stride(0),
        stride_gate=gate.stride(0),
        stride_up=up.stride(0),
        stride_dgate=dgate.stride(0),
        stride_dup=dup.stride(0),
        stride_b=inner.lora_b.stride(0),
        stride_s=inner.s.stride(0),
        stride_outer_ds=outer_ds.stride(0),
        GATE=(gate_columns.start, gate_columns.stop),
        UP=(up_columns.start, up_columns.stop),
        OUTER=(outer_columns.start, outer_columns.stop),
        HAS_DB=has_db,
        ACTIVATION=activation,
        PRECISION=PRECISION,
        P=block_p,
        **config,
    )
    if linears:
        ends = zip((gate_columns, up_columns), (blocks, 2 * blocks), strict=True)
        block_range = {r.start: (end - blocks, end) for r, end in ends if r.stop > r.start}
        gradients = None
        if inner.d_lora_b is not None:
            gradients = Gradients(part=db_part, d_lora_b=inner.d_lora_b, parts=inner.parts)
        sum_thin(ds_part, inner.ds, linears, block_range, scaled=inner.scaled, gradients=gradients)
    if outer is not None:
        outer.d_lora_a[: outer_columns.start].zero_()
        outer.d_lora_a[outer_columns.stop :].zero_()
        sum_chunks(da_part, outer.d_lora_a[outer_columns])
