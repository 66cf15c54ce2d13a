"""One AdamW step with moments of eight bits."""

from torch import Tensor

from lora_engine.backends.extension import native
from lora_engine.cpu.address import pointer


def adamw_8bit(
    params: Tensor,  # [P] float32
    grads: Tensor,  # [P] float32
    exp_avg: Tensor,  # [P] uint8
    exp_avg_sq: Tensor,  # [P] uint8
    exp_avg_absmax: Tensor,  # [ceil(P / 256)] float32
    exp_avg_sq_absmax: Tensor,  # [ceil(P / 256)] float32
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
    """Updates params, exp_avg, exp_avg_sq and both absmax."""
    native().adamw_8bit(
        params.data_ptr(),
        grads.data_ptr(),
        exp_avg.data_ptr(),
        exp_avg_sq.data_ptr(),
        exp_avg_absmax.data_ptr(),
        exp_avg_sq_absmax.data_ptr(),
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
    )
