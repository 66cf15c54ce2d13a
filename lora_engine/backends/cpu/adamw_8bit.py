"""One AdamW step with moments of eight bits."""

from torch import Tensor

from lora_engine.backends.contracts import AdamWHyper
from lora_engine.backends.cpu.address import pointer
from lora_engine.backends.extension import native


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
    """Updates params, exp_avg, exp_avg_sq and both absmax."""
    native().adamw_8bit(
        params.data_ptr(),
        grads.data_ptr(),
        exp_avg.data_ptr(),
        exp_avg_sq.data_ptr(),
        exp_avg_absmax.data_ptr(),
        exp_avg_sq_absmax.data_ptr(),
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
