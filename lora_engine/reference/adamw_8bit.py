"""AdamW with block-wise 8-bit moments (Dettmers and others, 2022, arXiv:2110.02861)."""

from torch import Tensor

from lora_engine.reference.adamw import adamw_
from lora_engine.reference.dynamic_code import dequantize_blockwise, quantize_blockwise


def adamw_8bit_(
    params: Tensor,  # [P]
    grads: Tensor,  # [P]
    exp_avg: Tensor,  # [P] uint8
    exp_avg_sq: Tensor,  # [P] uint8
    exp_avg_absmax: Tensor,  # [ceil(P / 256)]
    exp_avg_sq_absmax: Tensor,  # [ceil(P / 256)]
    *,
    step: int,
    lr: float,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
    grad_norm: Tensor | None = None,  # []
    max_grad_norm: float | None = None,
) -> None:
    """`adamw_` with moments that are dequantised before and quantised after it."""
    m = dequantize_blockwise(exp_avg, exp_avg_absmax, signed=True)
    v = dequantize_blockwise(exp_avg_sq, exp_avg_sq_absmax, signed=False)
    adamw_(
        params,
        grads,
        m,
        v,
        step=step,
        lr=lr,
        beta1=beta1,
        beta2=beta2,
        eps=eps,
        weight_decay=weight_decay,
        grad_norm=grad_norm,
        max_grad_norm=max_grad_norm,
    )
    for moment, codes, absmax, signed in (
        (m, exp_avg, exp_avg_absmax, True),
        (v, exp_avg_sq, exp_avg_sq_absmax, False),
    ):
        new_codes, new_absmax = quantize_blockwise(moment, signed=signed)
        codes.copy_(new_codes)
        absmax.copy_(new_absmax)
