"""One AdamW step with moments of eight bits."""

import torch
from torch import Tensor

from lora_engine import backends, reference
from lora_engine.backends import launchers
from lora_engine.ops.adamw import check_step
from lora_engine.ops.tensors import check, shape_of
from lora_engine.quantization import dynamic_code
from lora_engine.values import AdamWHyper

ADAMW_8BIT_BLOCK = dynamic_code.BLOCK  # values that share an absmax


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
    impl: str | None = None,
) -> None:
    """`adamw_` with both moments in block-wise 8-bit dynamic codes (arXiv:2110.02861), in place.

    Each 256 consecutive values share an absmax; exp_avg is in the signed code, exp_avg_sq in the
    unsigned one. All four at 0 are moments of 0. The step itself is float32; then each moment takes
    the nearest code, but a positive exp_avg_sq never the code of 0, by whose root an update would
    be divided. That root is thus at least 0.06 % of its block's largest, and elements whose
    gradients are smaller than that take smaller steps than AdamW's. params, grads and both
    absmax are float32, all buffers contiguous. The other arguments are those of `adamw_`.

    Raises ValueError where the buffers do not fit or step < 1.
    """
    blocks = -(-params.numel() // ADAMW_8BIT_BLOCK)
    for name, buffer, shape, dtype in (
        ("params", params, params.shape, torch.float32),
        ("grads", grads, params.shape, torch.float32),
        ("exp_avg", exp_avg, params.shape, torch.uint8),
        ("exp_avg_sq", exp_avg_sq, params.shape, torch.uint8),
        ("exp_avg_absmax", exp_avg_absmax, (blocks,), torch.float32),
        ("exp_avg_sq_absmax", exp_avg_sq_absmax, (blocks,), torch.float32),
    ):
        check(
            buffer.shape == shape and buffer.dtype == dtype,
            f"adamw_8bit_: {name} {shape_of(buffer)}, expected {list(shape)} "
            f"{str(dtype).removeprefix('torch.')}",
        )
        check(buffer.is_contiguous(), f"adamw_8bit_: {name} is not contiguous")
    check_step("adamw_8bit_", params, step, grad_norm, max_grad_norm)
    impl = backends.select("adamw_8bit", params.device, params.dtype, impl)
    if impl == "reference":
        reference.adamw_8bit_(
            params,
            grads,
            exp_avg,
            exp_avg_sq,
            exp_avg_absmax,
            exp_avg_sq_absmax,
            step=step,
            lr=lr,
            beta1=beta1,
            beta2=beta2,
            eps=eps,
            weight_decay=weight_decay,
            grad_norm=grad_norm,
            max_grad_norm=max_grad_norm,
        )
        return
    hyper = AdamWHyper.of_step(step, lr, (beta1, beta2), eps, weight_decay, max_grad_norm)
    launchers.adamw_8bit(impl).adamw_8bit(
        params,
        grads,
        exp_avg,
        exp_avg_sq,
        exp_avg_absmax,
        exp_avg_sq_absmax,
        hyper,
        grad_norm,
    )
