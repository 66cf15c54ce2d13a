"""One AdamW step with moments of eight bits, in blocks of 256 values that share an absmax.

The code of a value is found by arithmetic, as csrc/common/dynamic_code.hpp does it and explains it;
the value of a code is looked up in a table that stays in the cache.
"""

from functools import cache

import torch
import triton
import triton.language as tl
from lora_engine.backends.triton import launch
from lora_engine.backends.triton.adamw import adamw_step, clipping_scale
from lora_engine.backends.triton.relaunch import Relaunched
from torch import Tensor

from lora_engine.quantization import dynamic_code
from lora_engine.values import AdamWHyper

QUANT_BLOCK = dynamic_code.BLOCK


@triton.jit
def _dynamic_count(x, PARTS: tl.constexpr):
    """Codes below magnitude x in [0, 1], where the top decade has PARTS parts."""
    y = x
    n = tl.full(x.shape, PARTS, tl.float32)
    four = y < 1e-4
    y = tl.where(four, y * 1e4, y)
    n = tl.where(four, n * 0.0625, n)
    two = y < 1e-2
    y = tl.where(two, y * 1e2, y)
    n = tl.where(two, n * 0.25, n)
    one = y < 1e-1
    y = tl.where(one, y * 10.0, y)
    n = tl.where(one, n * 0.5, n)
    w = (y * (1.0 / 0.9) + 0.8 / 0.9) * n
    lower = n + tl.where(n == 1.0, 7.0 / 36, 0.2)
    count = tl.where(w < lower, n - 1.0, w).to(tl.int32)
    return tl.where(w >= 2 * PARTS - 0.25, 2 * PARTS, count)


@triton.jit
def _signed_code(x):
    count = _dynamic_count(tl.abs(x), 64)
    return (127 + tl.where(x < 0, -tl.minimum(count, 127), count)).to(tl.uint8)


@triton.jit
def _unsigned_code(x):
    code = _dynamic_count(x, 128) - 1
    return tl.maximum(code, tl.where(x > 0, 1, 0)).to(tl.uint8)


@triton.jit
def _block_inverse(absmax):
    return tl.where(absmax > 1e-37, 1.0 / tl.where(absmax > 1e-37, absmax, 1.0), 0.0)


@Relaunched
@triton.jit
def _adamw_8bit_kernel(
    params_ptr,  # [count]
    grads_ptr,  # [count]
    exp_avg_ptr,  # [count]
    exp_avg_sq_ptr,  # [count]
    exp_avg_absmax_ptr,  # [blocks]
    exp_avg_sq_absmax_ptr,  # [blocks]
    codes_ptr,  # [2, QUANT_BLOCK]
    grad_norm_ptr,  # []
    count,
    blocks,
    from_grad1,
    beta2,
    from_grad2,
    eps,
    decay,
    step_size,
    root_correction,
    max_grad_norm,
    CLIP: tl.constexpr,
    QUANT_BLOCK: tl.constexpr,
    BLOCKS: tl.constexpr,
):
    """One AdamW step of BLOCKS blocks of 256 values; moments are codes, with one absmax a block:

    m = code[m_code] * m_absmax                 v likewise
    p, m, v = adamw_step(scale * grad, p, m, v)
    m_absmax = max |m| over the block           m_code = nearest code to m / m_absmax
    """
    block = tl.program_id(0).to(tl.int64) * BLOCKS + tl.arange(0, BLOCKS)
    offs = block[:, None] * QUANT_BLOCK + tl.arange(0, QUANT_BLOCK)[None, :]
    block_mask = block < blocks
    mask = offs < count
    scale = clipping_scale(grad_norm_ptr, max_grad_norm, CLIP)
    g = tl.load(grads_ptr + offs, mask=mask, other=0.0) * scale
    p = tl.load(params_ptr + offs, mask=mask, other=0.0)
    m_code = tl.load(exp_avg_ptr + offs, mask=mask, other=0).to(tl.int32)
    v_code = tl.load(exp_avg_sq_ptr + offs, mask=mask, other=0).to(tl.int32)
    m_scale = tl.load(exp_avg_absmax_ptr + block, mask=block_mask, other=0.0)
    v_scale = tl.load(exp_avg_sq_absmax_ptr + block, mask=block_mask, other=0.0)
    m = tl.load(codes_ptr + m_code) * m_scale[:, None]
    v = tl.load(codes_ptr + QUANT_BLOCK + v_code) * v_scale[:, None]
    p, m, v = adamw_step(
        g, p, m, v, from_grad1, beta2, from_grad2, eps, decay, step_size, root_correction
    )
    m_max = tl.max(tl.where(mask, tl.abs(m), 0.0), axis=1)
    v_max = tl.max(tl.where(mask, v, 0.0), axis=1)
    tl.store(params_ptr + offs, p, mask=mask)
    m_code = _signed_code(m * _block_inverse(m_max)[:, None])
    v_code = _unsigned_code(v * _block_inverse(v_max)[:, None])
    tl.store(exp_avg_ptr + offs, m_code, mask=mask)
    tl.store(exp_avg_sq_ptr + offs, v_code, mask=mask)
    tl.store(exp_avg_absmax_ptr + block, m_max, mask=block_mask)
    tl.store(exp_avg_sq_absmax_ptr + block, v_max, mask=block_mask)


def adamw_8bit(
    params: Tensor,  # [P] float32
    grads: Tensor,  # [P] float32
    exp_avg: Tensor,  # [P] uint8
    exp_avg_sq: Tensor,  # [P] uint8
    exp_avg_absmax: Tensor,  # [ceil(P / 256)] float32
    exp_avg_sq_absmax: Tensor,  # [ceil(P / 256)] float32
    hyper: AdamWHyper,
    grad_norm: Tensor | None,  # []
) -> None:
    """Updates params, exp_avg, exp_avg_sq and both absmax. Launch size: P."""
    count = params.numel()
    if not count:
        return
    blocks = launch.cdiv(count, QUANT_BLOCK)
    config = launch.config("adamw_8bit", params.device, params.dtype, count)
    _adamw_8bit_kernel[(launch.cdiv(blocks, config["BLOCKS"]),)](
        params,
        grads,
        exp_avg,
        exp_avg_sq,
        exp_avg_absmax,
        exp_avg_sq_absmax,
        _codes(params.device),
        grad_norm,
        count,
        blocks,
        1 - hyper.beta1,
        hyper.beta2,
        1 - hyper.beta2,
        hyper.eps,
        1 - hyper.lr * hyper.weight_decay,
        hyper.lr / hyper.bias_correction1,
        hyper.bias_correction2**-0.5,
        hyper.max_grad_norm or 0.0,
        CLIP=grad_norm is not None,
        QUANT_BLOCK=QUANT_BLOCK,
        **config,
    )


@cache
def _codes(device: torch.device) -> Tensor:
    """Values of the signed and of the unsigned code, [2, 256] float32."""
    return torch.stack([dynamic_code.dynamic_code(signed, device) for signed in (True, False)])
