"""One AdamW step over flat buffers, and the norm of one."""

import torch
from torch import Tensor

from lora_engine.backends.contracts import AdamWHyper
from lora_engine.backends.cuda.launch import kernels, pointer, stream_on

NORM_PARTIALS = 1024  # as csrc/cuda/adamw.cu


def adamw(
    params: Tensor,  # [P] float32, as the others
    grads: Tensor,  # [P]
    exp_avg: Tensor,  # [P]
    exp_avg_sq: Tensor,  # [P]
    hyper: AdamWHyper,
    grad_norm: Tensor | None,  # []
) -> None:
    """Updates params, exp_avg and exp_avg_sq."""
    with stream_on(params.device) as stream:
        kernels().adamw(
            params.data_ptr(),
            grads.data_ptr(),
            exp_avg.data_ptr(),
            exp_avg_sq.data_ptr(),
            params.numel(),
            hyper.lr,
            hyper.beta1,
            hyper.beta2,
            hyper.eps,
            hyper.weight_decay,
            hyper.bias_correction1,
            hyper.bias_correction2,
            hyper.grad_scale,
            pointer(grad_norm),
            hyper.max_grad_norm or 0.0,
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
