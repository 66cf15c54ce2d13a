"""Calls of the kernels outside LoRA groups that the tuner measures."""

from collections.abc import Iterable
from typing import Any

import torch

from benchmarks.gpu.tune_cases import (
    Call,
    by_cols,
    by_row_bytes,
    empty,
    grid,
    kernel,
    moved,
    normal,
)

# Rows of a batch, and widths of models from 135M to 70B parameters.
TOKENS = (8192, 2048, 16384)
HIDDEN = (4096, 2048, 8192, 1024, 576)
INTERMEDIATE = (14336, 8192, 4096, 1536)
VOCABULARIES = (128256, 151936, 49152)
PARAMETERS = (41_943_040, 4_194_304, 134_217_728)


@kernel(
    "glu_fwd",
    grid(TOKENS, cols=INTERMEDIATE),
    by_cols,
    tiny={"tokens": 5, "cols": 96},
    float32=grid((8192,), cols=(14336, 1536)),
)
def _glu_fwd(device: torch.device, dtype: torch.dtype, *, tokens: int, cols: int) -> Call:
    from lora_engine.backends.triton import glu

    gate, up = normal(device, dtype, tokens, cols), normal(device, dtype, tokens, cols)
    y = empty(device, dtype, tokens, cols)
    return Call(lambda: glu.glu_fwd(gate, up, y, activation="silu"), (y,), moved(gate, up, y))


@kernel(
    "glu_bwd",
    grid(TOKENS, cols=INTERMEDIATE),
    by_cols,
    tiny={"tokens": 5, "cols": 96},
    float32=grid((8192,), cols=(14336, 1536)),
)
def _glu_bwd(device: torch.device, dtype: torch.dtype, *, tokens: int, cols: int) -> Call:
    from lora_engine.backends.triton import glu

    dy, gate, up = (normal(device, dtype, tokens, cols) for _ in range(3))
    dgate, dup, h = (empty(device, dtype, tokens, cols) for _ in range(3))
    return Call(
        lambda: glu.glu_bwd(dy, gate, up, dgate, dup, h, activation="silu"),
        (dgate, dup, h),
        moved(dy, gate, up, dgate, dup, h),
    )


def _norm_sizes(tokens: Iterable[int], other: str) -> list[dict[str, int]]:
    """Widths with and without the second tensor that a norm may read."""
    both = [{**size, other: 0} for size in grid(tokens, cols=HIDDEN)]
    both += [{**size, other: 1} for size in grid((8192,), cols=HIDDEN)]
    return both


# Norms of each head's 64 or 128 columns.
_HEADS = [
    {"tokens": 8192, "cols": 128, "residual": 0, "heads": 32},
    {"tokens": 2048, "cols": 128, "residual": 0, "heads": 16},
    {"tokens": 8192, "cols": 64, "residual": 0, "heads": 14},
]
_FLOAT32_NORMS = [{**size, "residual": 1} for size in grid((8192,), cols=HIDDEN)]


@kernel(
    "rms_norm_fwd",
    [*_norm_sizes(TOKENS, "residual"), *_HEADS],
    by_row_bytes,
    tiny={"tokens": 5, "cols": 64, "residual": 1},
    float32=_FLOAT32_NORMS,
)
def _rms_norm_fwd(
    device: torch.device,
    dtype: torch.dtype,
    *,
    tokens: int,
    cols: int,
    residual: int,
    heads: int = 0,
) -> Call:
    from lora_engine.backends.triton import rms_norm

    shape = (tokens, heads, cols) if heads else (tokens, cols)
    x = normal(device, dtype, *shape)
    other = normal(device, dtype, *shape) if residual else None
    weight, y = normal(device, dtype, cols), empty(device, dtype, *shape)
    h = empty(device, dtype, *shape) if residual else None
    rstd = empty(device, torch.float32, tokens * max(1, heads))
    written = [t for t in (y, h, rstd) if t is not None]
    read = [t for t in (x, other, weight) if t is not None]
    return Call(
        lambda: rms_norm.rms_norm_fwd(x, other, weight, y, h, rstd, 1e-5, 0.0),
        tuple(written),
        moved(*read, *written),
    )


def _rms_norm_bwd_call(
    device: torch.device,
    dtype: torch.dtype,
    *,
    tokens: int,
    cols: int,
    residual: int,
    heads: int = 0,
    weight_gradient: bool = False,
) -> Call:
    from lora_engine.backends.triton import rms_norm

    shape = (tokens, heads, cols) if heads else (tokens, cols)
    dy, h = normal(device, dtype, *shape), normal(device, dtype, *shape)
    dh = normal(device, dtype, *shape) if residual else None
    weight, dx = normal(device, dtype, cols), empty(device, dtype, *shape)
    rstd = torch.rand(tokens * max(1, heads), device=device) + 0.5
    dw = empty(device, torch.float32, cols) if weight_gradient else None
    outputs = (dx,) if dw is None else (dx, dw)
    read = [t for t in (dy, h, dh, weight, rstd) if t is not None]
    return Call(
        lambda: rms_norm.rms_norm_bwd(dy, dh, h, weight, rstd, dx, dw, 0.0),
        outputs,
        moved(*read, *outputs),
    )


@kernel(
    "rms_norm_bwd",
    [*_norm_sizes(TOKENS, "residual"), *_HEADS],
    by_row_bytes,
    tiny={"tokens": 5, "cols": 64, "residual": 1},
    float32=_FLOAT32_NORMS,
)
def _rms_norm_bwd(device: torch.device, dtype: torch.dtype, **sizes: int) -> Call:
    return _rms_norm_bwd_call(device, dtype, **sizes)


@kernel(
    "rope",
    [
        {"tokens": t, "heads": heads, "kv_heads": kv_heads, "dim": dim}
        for heads, kv_heads, dim in ((32, 8, 128), (16, 8, 128), (64, 8, 128), (9, 3, 64))
        for t in TOKENS
    ],
    lambda itemsize, *, heads, dim, **_: heads * dim,
    tiny={"tokens": 5, "heads": 4, "kv_heads": 2, "dim": 32},
)
def _rope(
    device: torch.device, dtype: torch.dtype, *, tokens: int, heads: int, kv_heads: int, dim: int
) -> Call:
    from lora_engine.backends.triton import rope

    q, k = (normal(device, dtype, tokens, n, dim) for n in (heads, kv_heads))
    outputs = tuple(empty(device, dtype, *x.shape) for x in (q, k))
    cos, sin = (
        normal(device, torch.float32, tokens, dim),
        normal(device, torch.float32, tokens, dim),
    )
    positions = torch.arange(tokens, device=device)
    return Call(
        lambda: rope.rope(q, k, *outputs, cos, sin, positions, interleaved=False, inverse=False),
        outputs,
        moved(q, k, *outputs, cos, sin, positions),
    )


@kernel(
    "cross_entropy",
    [
        *({"tokens": 2048, "cols": cols, "gradient": 1} for cols in VOCABULARIES),
        {"tokens": 2048, "cols": 128256, "gradient": 0},
        {"tokens": 8192, "cols": 49152, "gradient": 1},
    ],
    by_cols,
    tiny={"tokens": 5, "cols": 96, "gradient": 1},
)
def _cross_entropy(
    device: torch.device, dtype: torch.dtype, *, tokens: int, cols: int, gradient: int
) -> Call:
    """With its gradient it is written over the logits, as a head's chunks are."""
    from lora_engine.backends.triton import cross_entropy

    logits = normal(device, dtype, tokens, cols)
    target = torch.randint(cols, (tokens,), device=device)
    loss, logprob, lse = (empty(device, torch.float32, tokens) for _ in range(3))
    correct = torch.zeros(tokens, dtype=torch.bool, device=device)
    grad = logits if gradient else None
    outputs = (loss, logprob, lse, *((logits,) if gradient else ()))
    return Call(
        lambda: cross_entropy.cross_entropy(
            logits, target, loss, logprob, correct, ignore_index=-100, lse=lse, grad=grad
        ),
        outputs,
        moved(logits, target, *outputs),
        inplace=(logits,) if gradient else (),
    )


def _by_count(itemsize: int, *, count: int) -> int:
    return count


def _hyper() -> Any:
    from lora_engine.values import AdamWHyper

    return AdamWHyper(
        lr=1e-4,
        beta1=0.9,
        beta2=0.999,
        eps=1e-8,
        weight_decay=0.01,
        bias_correction1=0.1,
        bias_correction2=0.001,
        max_grad_norm=1.0,
    )


@kernel(
    "adamw", ({"count": n} for n in PARAMETERS), _by_count, tiny={"count": 700}, dtype="float32"
)
def _adamw(device: torch.device, dtype: torch.dtype, *, count: int) -> Call:
    from lora_engine.backends.triton import adamw

    params, grads, exp_avg = (normal(device, dtype, count) for _ in range(3))
    exp_avg_sq, norm = normal(device, dtype, count).square(), torch.ones((), device=device)
    changed = (params, exp_avg, exp_avg_sq)
    return Call(
        lambda: adamw.adamw(params, grads, exp_avg, exp_avg_sq, _hyper(), norm),
        changed,
        moved(grads, *changed, *changed),
        inplace=changed,
    )


@kernel(
    "adamw_8bit",
    ({"count": n} for n in PARAMETERS[:2]),
    _by_count,
    tiny={"count": 700},
    dtype="float32",
)
def _adamw_8bit(device: torch.device, dtype: torch.dtype, *, count: int) -> Call:
    from lora_engine.backends.triton import adamw_8bit

    params, grads = (normal(device, dtype, count) for _ in range(2))
    codes = [torch.randint(256, (count,), dtype=torch.uint8, device=device) for _ in range(2)]
    scales = [torch.rand(-(-count // 256), device=device) for _ in range(2)]
    norm, changed = torch.ones((), device=device), (params, *codes, *scales)
    return Call(
        lambda: adamw_8bit.adamw_8bit(params, grads, *codes, *scales, _hyper(), norm),
        changed,
        moved(grads, *changed, *changed),
        inplace=changed,
    )


@kernel(
    "dequantize_4bit",
    [
        {"rows": rows, "cols": cols}
        for rows, cols in ((4096, 4096), (14336, 4096), (4096, 14336), (2048, 2048))
    ],
    by_cols,
    tiny={"rows": 5, "cols": 64},
)
def _dequantize_4bit(device: torch.device, dtype: torch.dtype, *, rows: int, cols: int) -> Call:
    """Into rows with columns for an adapter's factors behind them."""
    from lora_engine.backends.triton import blockwise_4bit

    from lora_engine.quantization.format import BlockScales

    codes = torch.randint(256, (rows * cols // 2,), dtype=torch.uint8, device=device)
    scales = BlockScales(torch.rand(rows * cols // 64, device=device))
    values = normal(device, torch.float32, 16)
    w = normal(device, dtype, rows, cols, padding=16)
    return Call(
        lambda: blockwise_4bit.dequantize_4bit(codes, scales, values, w, 0, 64),
        (w,),
        moved(codes, scales.absmax, w),
    )


# What training all weights needs.


@kernel(
    "rms_norm_bwd_dw",
    _norm_sizes((8192, 2048), "residual"),
    by_row_bytes,
    tiny={"tokens": 5, "cols": 64, "residual": 1},
    float32=_FLOAT32_NORMS,
)
def _rms_norm_bwd_dw(device: torch.device, dtype: torch.dtype, **sizes: int) -> Call:
    return _rms_norm_bwd_call(device, dtype, weight_gradient=True, **sizes)


@kernel(
    "layer_norm_fwd",
    grid((8192, 2048), cols=HIDDEN),
    by_row_bytes,
    tiny={"tokens": 5, "cols": 64},
    float32=grid((8192,), cols=HIDDEN),
)
def _layer_norm_fwd(device: torch.device, dtype: torch.dtype, *, tokens: int, cols: int) -> Call:
    from lora_engine.backends.triton import layer_norm

    x, y = normal(device, dtype, tokens, cols), empty(device, dtype, tokens, cols)
    weight, bias = normal(device, dtype, cols), normal(device, dtype, cols)
    mean, rstd = (empty(device, torch.float32, tokens) for _ in range(2))
    return Call(
        lambda: layer_norm.layer_norm_fwd(x, weight, bias, y, mean, rstd, 1e-5),
        (y, mean, rstd),
        moved(x, weight, bias, y, mean, rstd),
    )


@kernel(
    "layer_norm_bwd",
    grid((8192, 2048), cols=HIDDEN),
    by_row_bytes,
    tiny={"tokens": 5, "cols": 64},
    float32=grid((8192,), cols=HIDDEN),
)
def _layer_norm_bwd(device: torch.device, dtype: torch.dtype, *, tokens: int, cols: int) -> Call:
    from lora_engine.backends.triton import layer_norm

    dy, x = normal(device, dtype, tokens, cols), normal(device, dtype, tokens, cols)
    weight, dx = normal(device, dtype, cols), empty(device, dtype, tokens, cols)
    mean, rstd = torch.rand(tokens, device=device) - 0.5, torch.rand(tokens, device=device) + 0.5
    return Call(
        lambda: layer_norm.layer_norm_bwd(dy, x, weight, mean, rstd, dx, None, None),
        (dx,),
        moved(dy, x, weight, mean, rstd, dx),
    )
