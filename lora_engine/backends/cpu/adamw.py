"""One AdamW step over flat buffers, and the norm of one."""

from torch import Tensor

from lora_engine.backends.contracts import AdamWHyper
from lora_engine.backends.cpu.address import dtype_code, pointer
from lora_engine.backends.extension import native


def adamw(
    params: Tensor,  # [P] float32 or float64, as the others
    grads: Tensor,  # [P]
    exp_avg: Tensor,  # [P]
    exp_avg_sq: Tensor,  # [P]
    hyper: AdamWHyper,
    grad_norm: Tensor | None,  # []
) -> None:
    """Updates params, exp_avg and exp_avg_sq."""
    native().adamw(
        dtype_code(params.dtype),
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
    )


def grad_norm(
    grads: Tensor,  # [P] float32 or float64
    norm: Tensor,  # [], as grads
) -> None:
    """Writes norm."""
    native().grad_norm(dtype_code(grads.dtype), grads.data_ptr(), norm.data_ptr(), grads.numel())
