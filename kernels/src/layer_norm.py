"""LayerNorm. Programs, tiles and sums over rows as in rms_norm.py."""

import torch
import triton
import triton.language as tl
from lora_engine.backends.triton import launch
from lora_engine.backends.triton.norm_rows import rows_per_program, tile_of
from lora_engine.backends.triton.relaunch import Relaunched
from torch import Tensor


@Relaunched
@triton.jit
def _layer_norm_fwd_kernel(
    x_ptr,  # [rows, N]
    weight_ptr,  # [N]
    bias_ptr,  # [N]
    y_ptr,  # [rows, N]
    mean_ptr,  # [rows]
    rstd_ptr,  # [rows]
    rows,
    stride_x,
    stride_y,
    eps,
    N: tl.constexpr,
    ALIGN: tl.constexpr,
    HAS_WEIGHT: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """y = (x - mean) rstd weight + bias, with rstd = 1 / sqrt(mean((x - mean)^2) + eps)."""
    offs_m = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    mask_m = offs_m < rows
    x_ptr += tl.multiple_of(offs_m * stride_x, ALIGN)[:, None]
    y_ptr += tl.multiple_of(offs_m * stride_y, ALIGN)[:, None]

    offs_n = tl.arange(0, BLOCK_N)
    total = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for start in tl.static_range(0, N, BLOCK_N):
        offs = (start + offs_n)[None, :]
        mask = mask_m[:, None] & (offs < N)
        x = tl.load(x_ptr + offs, mask=mask, other=0.0).to(tl.float32)
        total += x
    mean = tl.sum(total, axis=1) / N

    squares = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for start in tl.static_range(0, N, BLOCK_N):
        offs = (start + offs_n)[None, :]
        mask = mask_m[:, None] & (offs < N)
        if BLOCK_N < N:
            x = tl.load(x_ptr + offs, mask=mask, other=0.0).to(tl.float32)
        centred = tl.where(mask, x - mean[:, None], 0.0)
        squares += centred * centred
    rstd = tl.rsqrt(tl.sum(squares, axis=1) / N + eps)
    tl.store(mean_ptr + offs_m, mean, mask=mask_m)
    tl.store(rstd_ptr + offs_m, rstd, mask=mask_m)

    for start in tl.static_range(0, N, BLOCK_N):
        offs = (start + offs_n)[None, :]
        mask = mask_m[:, None] & (offs < N)
        if BLOCK_N < N:
            x = tl.load(x_ptr + offs, mask=mask, other=0.0).to(tl.float32)
            centred = x - mean[:, None]
        y = centred * rstd[:, None]
        if HAS_WEIGHT:
            y *= tl.load(weight_ptr + offs, mask=offs < N, other=0.0).to(tl.float32)
        if HAS_BIAS:
            y += tl.load(bias_ptr + offs, mask=offs < N, other=0.0).to(tl.float32)
        tl.store(y_ptr + offs, y.to(y_ptr.dtype.element_ty), mask=mask)


@Relaunched
@triton.jit
def _layer_norm_bwd_kernel(
    dy_ptr,  # [rows, N]
    x_ptr,  # [rows, N]
    weight_ptr,  # [N]
    mean_ptr,  # [rows]
    rstd_ptr,  # [rows]
    dx_ptr,  # [rows, N]
    dweight_ptr,  # [programs, N] float32: each program's sum of dy * n
    dbias_ptr,  # [programs, N] float32: and of dy
    rows,
    rows_per_program,
    stride_dy,
    stride_x,
    stride_dx,
    N: tl.constexpr,
    ALIGN: tl.constexpr,
    HAS_WEIGHT: tl.constexpr,
    HAS_DW: tl.constexpr,
    HAS_DB: tl.constexpr,
    NUM_STAGES: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """With n = (x - mean) rstd and g = dy weight, means over the row:

    dx = rstd (g - mean(g) - n mean(g n))       dweight = sum of dy n    dbias = sum of dy
    """
    first = tl.program_id(0) * rows_per_program
    last = tl.minimum(first + rows_per_program, rows)
    if HAS_DW:
        dweight_ptr += tl.program_id(0).to(tl.int64) * N
    if HAS_DB:
        dbias_ptr += tl.program_id(0).to(tl.int64) * N
    offs_n = tl.arange(0, BLOCK_N)
    dweight = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    dbias = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    if BLOCK_N < N:  # BLOCK_M is 1, and the sums over rows wait in global memory
        for start in tl.static_range(0, N, BLOCK_N):
            offs = (start + offs_n)[None, :]
            if HAS_DW:
                tl.store(dweight_ptr + offs, dweight, mask=offs < N)
            if HAS_DB:
                tl.store(dbias_ptr + offs, dbias, mask=offs < N)
    for begin in tl.range(first, last, BLOCK_M, num_stages=NUM_STAGES):
        offs_m = (begin + tl.arange(0, BLOCK_M)).to(tl.int64)
        mask_m = offs_m < last
        dy_row = dy_ptr + tl.multiple_of(offs_m * stride_dy, ALIGN)[:, None]
        x_row = x_ptr + tl.multiple_of(offs_m * stride_x, ALIGN)[:, None]
        dx_row = dx_ptr + tl.multiple_of(offs_m * stride_dx, ALIGN)[:, None]
        mean = tl.load(mean_ptr + offs_m, mask=mask_m, other=0.0)[:, None]
        rstd = tl.load(rstd_ptr + offs_m, mask=mask_m, other=0.0)[:, None]

        # dy is 0 beyond the row, and with it both addends.
        gradients = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
        products = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
        for start in tl.static_range(0, N, BLOCK_N):
            offs = (start + offs_n)[None, :]
            mask = mask_m[:, None] & (offs < N)
            dy = tl.load(dy_row + offs, mask=mask, other=0.0).to(tl.float32)
            n = (tl.load(x_row + offs, mask=mask, other=0.0).to(tl.float32) - mean) * rstd
            g = dy
            if HAS_WEIGHT:
                g *= tl.load(weight_ptr + offs, mask=offs < N, other=0.0).to(tl.float32)
            gradients += g
            products += g * n
        shift = (tl.sum(gradients, axis=1) / N)[:, None]
        pull = (tl.sum(products, axis=1) / N)[:, None]

        for start in tl.static_range(0, N, BLOCK_N):
            offs = (start + offs_n)[None, :]
            mask = mask_m[:, None] & (offs < N)
            if BLOCK_N < N:
                dy = tl.load(dy_row + offs, mask=mask, other=0.0).to(tl.float32)
                n = (tl.load(x_row + offs, mask=mask, other=0.0).to(tl.float32) - mean) * rstd
                g = dy
                if HAS_WEIGHT:
                    g *= tl.load(weight_ptr + offs, mask=offs < N, other=0.0).to(tl.float32)
            # Fused by hand, so that no gradient's bits depend on the other flags.
            dx = rstd * tl.fma(-n, pull, g - shift)
            tl.store(dx_row + offs, dx.to(dx_ptr.dtype.element_ty), mask=mask)
            if HAS_DW and BLOCK_N < N:
                so_far = tl.load(dweight_ptr + offs, mask=offs < N, other=0.0)
                tl.store(dweight_ptr + offs, so_far + dy * n, mask=offs < N)
            elif HAS_DW:
                dweight += dy * n
            if HAS_DB and BLOCK_N < N:
                so_far = tl.load(dbias_ptr + offs, mask=offs < N, other=0.0)
                tl.store(dbias_ptr + offs, so_far + dy, mask=offs < N)
            elif HAS_DB:
                dbias += dy
    if HAS_DW and BLOCK_N >= N:
        tl.store(dweight_ptr + offs_n, tl.sum(dweight, axis=0), mask=offs_n < N)
    if HAS_DB and BLOCK_N >= N:
        tl.store(dbias_ptr + offs_n, tl.sum(dbias, axis=0), mask=offs_n < N)


def layer_norm_fwd(
    x: Tensor,  # [rows, cols]
    weight: Tensor | None,  # [cols]
    bias: Tensor | None,  # [cols]
    y: Tensor,  # [rows, cols]
    mean: Tensor,  # [rows] float32
    rstd: Tensor,  # [rows] float32
    eps: float,
) -> None:
    """Writes y, mean and rstd. Launch size: bytes of a row."""
    if not x.numel():
        return
    config, _ = tile_of("layer_norm_fwd", x, y)
    _layer_norm_fwd_kernel[(launch.cdiv(x.shape[0], config["BLOCK_M"]),)](
        x,
        weight,
        bias,
        y,
        mean,
        rstd,
        x.shape[0],
        x.stride(0),
        y.stride(0),
        eps,
        HAS_WEIGHT=weight is not None,
        HAS_BIAS=bias is not None,
        **config,
    )


def layer_norm_bwd(
    dy: Tensor,  # [rows, cols]
    x: Tensor,  # [rows, cols]
    weight: Tensor | None,  # [cols]
    mean: Tensor,  # [rows] float32
    rstd: Tensor,  # [rows] float32
    dx: Tensor,  # [rows, cols]
    dweight: Tensor | None,  # [cols] float32
    dbias: Tensor | None,  # [cols] float32
) -> None:
    """Writes dx, and dweight and dbias if given. Launch size: bytes of a row."""
    rows, cols = x.shape
    sums = [total for total in (dweight, dbias) if total is not None]
    if not x.numel():
        for total in sums:
            total.zero_()
        return
    config, programs = tile_of("layer_norm_bwd_dw" if sums else "layer_norm_bwd", x, dy, dx)
    share = config["BLOCK_M"]
    if sums:
        share = rows_per_program(rows, share, programs)
    grid = launch.cdiv(rows, share)
    partial_dw, partial_db = (
        None if total is None else torch.empty(grid, cols, dtype=torch.float32, device=x.device)
        for total in (dweight, dbias)
    )
    _layer_norm_bwd_kernel[(grid,)](
        dy,
        x,
        weight,
        mean,
        rstd,
        dx,
        partial_dw,
        partial_db,
        rows,
        share,
        dy.stride(0),
        x.stride(0),
        dx.stride(0),
        HAS_WEIGHT=weight is not None,
        HAS_DW=dweight is not None,
        HAS_DB=dbias is not None,
        # Contracted by the compiler, a sum's products have other bits in each variant.
        **{**config, "enable_fp_fusion": False},
    )
    for partial, total in ((partial_dw, dweight), (partial_db, dbias)):
        if partial is not None:
            torch.sum(partial, 0, out=total)
