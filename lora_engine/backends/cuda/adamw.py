"""One AdamW step over flat buffers, and the norm of one."""

import torch
from torch import Tensor

from lora_engine import values
from lora_engine.backends.cuda.launch import AdamWArgs, AdamWHyper, GradNormArgs, kernels, stream_on

NORM_PARTIALS = 1024  # as csrc/cuda/adamw.cu


def adamw(
    params: Tensor,  # [P] float32, as the others
    grads: Tensor,  # [P]
    exp_avg: Tensor,  # [P]
    exp_avg_sq: Tensor,  # [P]
    hyper: values.AdamWHyper,
    grad_norm: Tensor | None,  # []
) -> None:
    """Updates params, exp_avg and exp_avg_sq."""
    with stream_on(params.device) as stream:
        kernels().adamw(
            AdamWArgs(
                params=params.data_ptr(),
                grads=grads.data_ptr(),
                exp_avg=exp_avg.data_ptr(),
                exp_avg_sq=exp_avg_sq.data_ptr(),
                size=params.numel(),
                hyper=AdamWHyper.of(hyper, grad_norm),
            ),
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
            GradNormArgs(
                grads=grads.data_ptr(),
                partials=partials.data_ptr(),
                norm=norm.data_ptr(),
                size=grads.numel(),
            ),
            stream,
        )
