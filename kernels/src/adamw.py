"""One AdamW step over flat buffers, and the norm of one."""

import torch
import triton
import triton.language as tl
from lora_engine.backends.triton import launch
from lora_engine.backends.triton.relaunch import Relaunched
from torch import Tensor

from lora_engine.values import AdamWHyper

# The number of partial sums does not depend on the GPU, so that the order of the sum does not.
NORM_PARTIALS = 1024


@triton.jit
def clipping_scale(grad_norm_ptr, max_grad_norm, CLIP: tl.constexpr):
    """What gradients are multiplied by: max / norm where the norm is above the maximum, else 1."""
    scale = 1.0
    if CLIP:
        factor = max_grad_norm / tl.load(grad_norm_ptr)
        scale = tl.where(factor >= 1.0, 1.0, factor)  # a NaN stays
    return scale


@triton.jit
def adamw_step(g, p, m, v, from_grad1, beta2, from_grad2, eps, decay, step_size, root_correction):
    """One element's step; m and v are the moments before it, from_grad is 1 - beta in float64."""
    m = m + from_grad1 * (g - m)
    v = beta2 * v + from_grad2 * g * g
    p = p * decay - step_size * m / (tl.sqrt(v) * root_correction + eps)
    return p, m, v


@Relaunched
@triton.jit
def _adamw_kernel(
    params_ptr,  # [count]
    grads_ptr,  # [count]
    exp_avg_ptr,  # [count]
    exp_avg_sq_ptr,  # [count]
    grad_norm_ptr,  # []
    count,
    from_grad1,
    beta2,
    from_grad2,
    eps,
    decay,
    step_size,
    root_correction,
    max_grad_norm,
    CLIP: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One AdamW step of BLOCK elements, with c the gradient's scale after clipping:

    g = c grad    m = m + (1 - beta1) (g - m)    v = beta2 v + (1 - beta2) g^2
    p = (1 - lr weight_decay) p - lr / bias1 * m / (sqrt(v / bias2) + eps)
    """
    offs = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = offs < count
    scale = clipping_scale(grad_norm_ptr, max_grad_norm, CLIP)
    g = tl.load(grads_ptr + offs, mask=mask, other=0.0) * scale
    p = tl.load(params_ptr + offs, mask=mask, other=0.0)
    m = tl.load(exp_avg_ptr + offs, mask=mask, other=0.0)
    v = tl.load(exp_avg_sq_ptr + offs, mask=mask, other=0.0)
    p, m, v = adamw_step(
        g, p, m, v, from_grad1, beta2, from_grad2, eps, decay, step_size, root_correction
    )
    tl.store(params_ptr + offs, p, mask=mask)
    tl.store(exp_avg_ptr + offs, m, mask=mask)
    tl.store(exp_avg_sq_ptr + offs, v, mask=mask)


@Relaunched
@triton.jit
def _square_sum_kernel(
    grads_ptr,  # [count]
    partials_ptr,  # [programs]
    count,
    BLOCK: tl.constexpr,
):
    """partials[pid] = sum of grads^2 over every num_programs-th chunk, in a fixed order."""
    pid = tl.program_id(0).to(tl.int64)
    stride = tl.num_programs(0).to(tl.int64) * BLOCK
    offs = pid * BLOCK + tl.arange(0, BLOCK)
    total = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, count, stride):
        g = tl.load(grads_ptr + start + offs, mask=start + offs < count, other=0.0)
        total += g * g
    tl.store(partials_ptr + pid, tl.sum(total, axis=0))


@Relaunched
@triton.jit
def _norm_kernel(
    partials_ptr,  # [count]
    norm_ptr,  # []
    count,
    BLOCK: tl.constexpr,
):
    """norm = sqrt(sum of partials), in one program."""
    offs = tl.arange(0, BLOCK)
    partials = tl.load(partials_ptr + offs, mask=offs < count, other=0.0)
    tl.store(norm_ptr, tl.sqrt(tl.sum(partials, axis=0)))


def adamw(
    params: Tensor,  # [P] float32, as the others
    grads: Tensor,  # [P]
    exp_avg: Tensor,  # [P]
    exp_avg_sq: Tensor,  # [P]
    hyper: AdamWHyper,
    grad_norm: Tensor | None,  # []
) -> None:
    """Updates params, exp_avg and exp_avg_sq. Launch size: P."""
    count = params.numel()
    if not count:
        return
    config = launch.config("adamw", params.device, params.dtype, count)
    _adamw_kernel[(launch.cdiv(count, config["BLOCK"]),)](
        params,
        grads,
        exp_avg,
        exp_avg_sq,
        grad_norm,
        count,
        1 - hyper.beta1,
        hyper.beta2,
        1 - hyper.beta2,
        hyper.eps,
        1 - hyper.lr * hyper.weight_decay,
        hyper.lr / hyper.bias_correction1,
        hyper.bias_correction2**-0.5,
        hyper.max_grad_norm or 0.0,
        CLIP=grad_norm is not None,
        **config,
    )


def grad_norm(
    grads: Tensor,  # [P] float32
    norm: Tensor,  # [] float32
) -> None:
    """Writes norm. Launch size: P."""
    count = grads.numel()
    config = launch.config("grad_norm", grads.device, grads.dtype, count)
    partials = torch.empty(NORM_PARTIALS, dtype=torch.float32, device=grads.device)
    programs = min(launch.cdiv(count, config["BLOCK"]), NORM_PARTIALS)
    if programs:
        _square_sum_kernel[(programs,)](grads, partials, count, **config)
    _norm_kernel[(1,)](
        partials, norm, programs, BLOCK=NORM_PARTIALS, num_warps=4, enable_fp_fusion=True
    )
