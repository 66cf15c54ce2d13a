"""One AdamW step with moments of eight bits."""

from torch import Tensor

from lora_engine import values
from lora_engine.backends.cuda.launch import AdamW8bitArgs, AdamWHyper, kernels, stream_on


def adamw_8bit(
    params: Tensor,  # [P] float32
    grads: Tensor,  # [P] float32
    exp_avg: Tensor,  # [P] uint8
    exp_avg_sq: Tensor,  # [P] uint8
    exp_avg_absmax: Tensor,  # [ceil(P / 256)] float32
    exp_avg_sq_absmax: Tensor,  # [ceil(P / 256)] float32
    hyper: values.AdamWHyper,
    grad_norm: Tensor | None,  # []
) -> None:
    """Updates params, exp_avg, exp_avg_sq and both absmax."""
    with stream_on(params.device) as stream:
        kernels().adamw_8bit(
            AdamW8bitArgs(
                params=params.data_ptr(),
                grads=grads.data_ptr(),
                exp_avg=exp_avg.data_ptr(),
                exp_avg_sq=exp_avg_sq.data_ptr(),
                exp_avg_absmax=exp_avg_absmax.data_ptr(),
                exp_avg_sq_absmax=exp_avg_sq_absmax.data_ptr(),
                size=params.numel(),
                hyper=AdamWHyper.of(hyper, grad_norm),
            ),
            stream,
        )
