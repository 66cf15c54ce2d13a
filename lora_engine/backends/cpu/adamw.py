"""One AdamW step over flat buffers, and the norm of one."""

from torch import Tensor

from lora_engine.backends.cpu.launch import dtype_code, kernels, pointer
from lora_engine.backends.cpu.structs import AdamWArgs, GradNormArgs
from lora_engine.values import AdamWHyper


def adamw(
    params: Tensor,  # [P] float32 or float64, as the others
    grads: Tensor,  # [P]
    exp_avg: Tensor,  # [P]
    exp_avg_sq: Tensor,  # [P]
    hyper: AdamWHyper,
    grad_norm: Tensor | None,  # []
) -> None:
    """Updates params, exp_avg and exp_avg_sq."""
    kernels().adamw(
        dtype_code(params.dtype),
        arguments(params, grads, exp_avg, exp_avg_sq, hyper, grad_norm),
    )


def grad_norm(
    grads: Tensor,  # [P] float32 or float64
    norm: Tensor,  # [], as grads
) -> None:
    """Writes norm."""
    kernels().grad_norm(
        dtype_code(grads.dtype),
        GradNormArgs(
            grads=grads.data_ptr(),
            norm=norm.data_ptr(),
            size=grads.numel(),
        ),
    )


def arguments(
    params: Tensor,
    grads: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    hyper: AdamWHyper,
    grad_norm: Tensor | None,
) -> AdamWArgs:
    """The struct of `adamw`, and the part of `adamw_8bit`'s that it shares."""
    return AdamWArgs(
        params=params.data_ptr(),
        grads=grads.data_ptr(),
        exp_avg=exp_avg.data_ptr(),
        exp_avg_sq=exp_avg_sq.data_ptr(),
        size=params.numel(),
        lr=hyper.lr,
        beta1=hyper.beta1,
        beta2=hyper.beta2,
        eps=hyper.eps,
        weight_decay=hyper.weight_decay,
        bias_correction1=hyper.bias_correction1,
        bias_correction2=hyper.bias_correction2,
        grad_norm=pointer(grad_norm),
        max_grad_norm=hyper.max_grad_norm or 0.0,
    )
