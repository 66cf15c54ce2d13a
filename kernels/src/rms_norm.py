"""RMSNorm, with or without the residual addition before it.

A program holds BLOCK_M whole rows in registers, so each tensor is read and written once. Rows of
more than BLOCK_N columns are walked twice. The weight's gradient is summed in two stages: every
program sums a row block of its own, loading the next row meanwhile, then the programs' sums are
added.

Rows may stand HEADS side by side: [tokens, heads, cols] with a stride for each token.
"""

import torch
import triton
import triton.language as tl
from lora_engine.backends.triton import launch
from lora_engine.backends.triton.norm_rows import rows_per_program, tile_of
from lora_engine.backends.triton.relaunch import Relaunched
from torch import Tensor


@Relaunched
@triton.jit
def _rms_norm_fwd_kernel(
    x_ptr,  # [rows, N]
    residual_ptr,  # [rows, N]
    weight_ptr,  # [N]
    y_ptr,  # [rows, N]
    h_ptr,  # [rows, N]
    rstd_ptr,  # [rows]
    rows,
    stride_x,
    stride_residual,
    stride_y,
    eps,
    offset,
    N: tl.constexpr,
    HEADS: tl.constexpr,
    ALIGN: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr,
    HAS_H: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """h = x + residual, rounded; rstd = 1 / sqrt(mean(h^2) + eps); y = h rstd (weight + offset)."""
    offs_m = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    mask_m = offs_m < rows
    token = offs_m // HEADS if HEADS > 1 else offs_m
    x_ptr += tl.multiple_of(token * stride_x, ALIGN)[:, None]
    y_ptr += tl.multiple_of(token * stride_y, ALIGN)[:, None]
    if HEADS > 1:
        head = tl.multiple_of(offs_m % HEADS * N, ALIGN)[:, None]
        x_ptr += head
        y_ptr += head
    if HAS_RESIDUAL:
        residual_ptr += tl.multiple_of(offs_m * stride_residual, ALIGN)[:, None]
    if HAS_H:
        h_ptr += (offs_m * N)[:, None]

    offs_n = tl.arange(0, BLOCK_N)
    squares = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for start in tl.static_range(0, N, BLOCK_N):
        offs = (start + offs_n)[None, :]
        mask = mask_m[:, None] & (offs < N)
        h = tl.load(x_ptr + offs, mask=mask, other=0.0).to(tl.float32)
        if HAS_RESIDUAL:
            h += tl.load(residual_ptr + offs, mask=mask, other=0.0).to(tl.float32)
        if HAS_H:
            rounded = h.to(h_ptr.dtype.element_ty)
            tl.store(h_ptr + offs, rounded, mask=mask)
            h = rounded.to(tl.float32)
        squares += h * h
    rstd = tl.rsqrt(tl.sum(squares, axis=1) / N + eps)
    tl.store(rstd_ptr + offs_m, rstd, mask=mask_m)

    for start in tl.static_range(0, N, BLOCK_N):
        offs = (start + offs_n)[None, :]
        mask = mask_m[:, None] & (offs < N)
        if BLOCK_N < N:
            h = tl.load(x_ptr + offs, mask=mask, other=0.0).to(tl.float32)
            if HAS_RESIDUAL:
                h += tl.load(residual_ptr + offs, mask=mask, other=0.0).to(tl.float32)
                h = h.to(h_ptr.dtype.element_ty).to(tl.float32)
        weight = tl.load(weight_ptr + offs, mask=offs < N, other=0.0).to(tl.float32) + offset
        y = h * rstd[:, None] * weight
        tl.store(y_ptr + offs, y.to(y_ptr.dtype.element_ty), mask=mask)


@Relaunched
@triton.jit
def _rms_norm_bwd_kernel(
    dy_ptr,  # [rows, N]
    dh_ptr,  # [rows, N]
    h_ptr,  # [rows, N]
    weight_ptr,  # [N]
    rstd_ptr,  # [rows]
    dx_ptr,  # [rows, N]
    partial_ptr,  # [programs, N] float32: each program's sum of dy * n
    rows,
    rows_per_program,
    stride_dy,
    stride_dh,
    stride_h,
    stride_dx,
    offset,
    N: tl.constexpr,
    HEADS: tl.constexpr,
    ALIGN: tl.constexpr,
    HAS_DH: tl.constexpr,
    HAS_DW: tl.constexpr,
    NUM_STAGES: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """With n = h rstd and g = dy (weight + offset), means over the row:

    dx = rstd (g - n mean(g n)) + dh            dweight = sum over rows of dy n
    """
    first = tl.program_id(0) * rows_per_program
    last = tl.minimum(first + rows_per_program, rows)
    if HAS_DW:
        partial_ptr += tl.program_id(0).to(tl.int64) * N
    offs_n = tl.arange(0, BLOCK_N)
    dweight = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    if HAS_DW and BLOCK_N >= N:  # otherwise read where it is used: registers are dearer
        offs = offs_n[None, :]
        weight = tl.load(weight_ptr + offs, mask=offs < N, other=0.0).to(tl.float32) + offset
    if HAS_DW and BLOCK_N < N:  # too many sums for the registers: they wait in global memory
        for start in tl.static_range(0, N, BLOCK_N):
            offs = (start + offs_n)[None, :]
            tl.store(partial_ptr + offs, dweight, mask=offs < N)
    for begin in tl.range(first, last, BLOCK_M, num_stages=NUM_STAGES):
        offs_m = (begin + tl.arange(0, BLOCK_M)).to(tl.int64)
        mask_m = offs_m < last
        token = offs_m // HEADS if HEADS > 1 else offs_m
        dy_row = dy_ptr + tl.multiple_of(token * stride_dy, ALIGN)[:, None]
        h_row = h_ptr + tl.multiple_of(token * stride_h, ALIGN)[:, None]
        dx_row = dx_ptr + tl.multiple_of(token * stride_dx, ALIGN)[:, None]
        if HEADS > 1:
            head = tl.multiple_of(offs_m % HEADS * N, ALIGN)[:, None]
            dy_row += head
            h_row += head
            dx_row += head
        if HAS_DH:
            dh_row = dh_ptr + tl.multiple_of(offs_m * stride_dh, ALIGN)[:, None]
        rstd = tl.load(rstd_ptr + offs_m, mask=mask_m, other=0.0)[:, None]

        products = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
        for start in tl.static_range(0, N, BLOCK_N):
            offs = (start + offs_n)[None, :]
            mask = mask_m[:, None] & (offs < N)
            dy = tl.load(dy_row + offs, mask=mask, other=0.0).to(tl.float32)
            n = tl.load(h_row + offs, mask=mask, other=0.0).to(tl.float32) * rstd
            if HAS_DH and BLOCK_N >= N:
                dh = tl.load(dh_row + offs, mask=mask, other=0.0)
            if not HAS_DW or BLOCK_N < N:
                weight = tl.load(weight_ptr + offs, mask=offs < N, other=0.0).to(tl.float32)
                weight += offset
            products += dy * weight * n
        pull = (tl.sum(products, axis=1) / N)[:, None]

        for start in tl.static_range(0, N, BLOCK_N):
            offs = (start + offs_n)[None, :]
            mask = mask_m[:, None] & (offs < N)
            if BLOCK_N < N:
                dy = tl.load(dy_row + offs, mask=mask, other=0.0).to(tl.float32)
                n = tl.load(h_row + offs, mask=mask, other=0.0).to(tl.float32) * rstd
                if HAS_DH:
                    dh = tl.load(dh_row + offs, mask=mask, other=0.0)
                weight = tl.load(weight_ptr + offs, mask=offs < N, other=0.0).to(tl.float32)
                weight += offset
            # Fused where it says so and nowhere else: no gradient's bits depend on the other flags.
            dx = tl.fma(-n, pull, dy * weight)
            dx = tl.fma(rstd, dx, dh.to(tl.float32)) if HAS_DH else rstd * dx
            tl.store(dx_row + offs, dx.to(dx_ptr.dtype.element_ty), mask=mask)
            if HAS_DW and BLOCK_N < N:
                so_far = tl.load(partial_ptr + offs, mask=offs < N, other=0.0)
                tl.store(partial_ptr + offs, so_far + dy * n, mask=offs < N)
            elif HAS_DW:
                dweight += dy * n
    if HAS_DW and BLOCK_N >= N:
        tl.store(partial_ptr + offs_n, tl.sum(dweight, axis=0), mask=offs_n < N)


def rms_norm_fwd(
    x: Tensor,  # [rows, cols] or [tokens, heads, cols]
    residual: Tensor | None,  # [rows, cols]
    weight: Tensor,  # [cols]
    y: Tensor,  # as x
    h: Tensor | None,  # [rows, cols], contiguous; given with residual; else a copy
    rstd: Tensor,  # [rows] float32
    eps: float,
    offset: float,
) -> None:
    """Writes y and rstd, and h = x + residual, if given. Launch size: bytes of a row."""
    rows = rstd.numel()
    if not x.numel():
        return
    config, _ = tile_of("rms_norm_fwd", x, residual, y, h)
    _rms_norm_fwd_kernel[(launch.cdiv(rows, config["BLOCK_M"]),)](
        x,
        residual,
        weight,
        y,
        h,
        rstd,
        rows,
        x.stride(0),
        0 if residual is None else residual.stride(0),
        y.stride(0),
        eps,
        offset,
        HEADS=x.shape[1] if x.dim() == 3 else 1,
        HAS_RESIDUAL=residual is not None,
        HAS_H=h is not None,
        **config,
    )


def rms_norm_bwd(
    dy: Tensor,  # as h
    dh: Tensor | None,  # [rows, cols]; added to dx
    h: Tensor,  # [rows, cols] or [tokens, heads, cols], what was normed
    weight: Tensor,  # [cols]
    rstd: Tensor,  # [rows] float32
    dx: Tensor,  # as h; may be dy
    dweight: Tensor | None,  # [cols] float32
    offset: float,
) -> None:
    """Writes dx, and dweight if given. Launch size: bytes of a row."""
    rows, cols = rstd.numel(), h.shape[-1]
    if not h.numel():
        if dweight is not None:
            dweight.zero_()
        return
    kernel = "rms_norm_bwd" if dweight is None else "rms_norm_bwd_dw"
    config, programs = tile_of(kernel, h, dy, dh, dx)
    share, partial = config["BLOCK_M"], None
    if dweight is not None:
        share = rows_per_program(rows, share, programs)
        partial = torch.empty(launch.cdiv(rows, share), cols, dtype=torch.float32, device=h.device)
    _rms_norm_bwd_kernel[(launch.cdiv(rows, share),)](
        dy,
        dh,
        h,
        weight,
        rstd,
        dx,
        partial,
        rows,
        share,
        dy.stride(0),
        0 if dh is None else dh.stride(0),
        h.stride(0),
        dx.stride(0),
        offset,
        HEADS=h.shape[1] if h.dim() == 3 else 1,
        HAS_DH=dh is not None,
        HAS_DW=dweight is not None,
        **config,
    )
    if partial is not None:
        torch.sum(partial, 0, out=dweight)
