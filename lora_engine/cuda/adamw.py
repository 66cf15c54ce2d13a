"""One AdamW step over flat buffers, and the norm of one."""

import torch
from torch import Tensor

from lora_engine.cuda.launch import kernels, pointer, stream_on

NORM_PARTIALS = 1024  # as csrc/cuda/adamw.cu


def adamw(
    params: Tensor,  # [P] float32, as the others
    grads: Tensor,  # [P]
    exp_avg: Tensor,  # [P]
    exp_avg_sq: Tensor,  # [P]
    *,
    lr: float,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
    bias_correction1: float,
    bias_correction2: float,
    grad_scale: float,
    grad_norm: Tensor | None,  # []
    max_grad_norm: float | None,
) -> None:
    """Updates params, exp_avg and exp_avg_sq."""
    with stream_on(params.device) as stream:
        kernels().adamw(
            params.data_ptr(),
            grads.data_ptr(),
            exp_avg.data_ptr(),
            exp_avg_sq.data_ptr(),
            params.numel(),
            lr,
            beta1,
            beta2,
            eps,
            weight_decay,
            bias_correction1,
            bias_correction2,
            grad_scale,
            pointer(grad_norm),
            max_grad_norm or 0.0,
            stream,
        )


def grad_norm(
    grads: Tensor,  # [P] float32
    norm: Tensor,  # [] float32
) -> None:
    """Writes norm."""
    partials = torch.empty(NORM_PARTIALS, dtype=torch.float32, device=grads.device)
    with stream_on(grads.device) as stream:
        kernels().grad_norm(
            grads.data_ptr(), partials.data_ptr(), norm.data_ptr(), grads.numel(), stream
        )
