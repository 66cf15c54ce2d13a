"""One AdamW step with moments of eight bits."""

from torch import Tensor

from lora_engine.backends.cpu.adamw import arguments
from lora_engine.backends.cpu.launch import kernels
from lora_engine.backends.cpu.structs import AdamW8bitArgs
from lora_engine.values import AdamWHyper


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
    kernels().adamw_8bit(
        AdamW8bitArgs(
            adamw=arguments(params, grads, exp_avg, exp_avg_sq, hyper, grad_norm),
            exp_avg_absmax=exp_avg_absmax.data_ptr(),
            exp_avg_sq_absmax=exp_avg_sq_absmax.data_ptr(),
        )
    )
