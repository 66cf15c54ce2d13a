"""One AdamW step over flat buffers."""

from torch import Tensor

from lora_engine import backends, reference
from lora_engine.ops.tensors import check, shape_of


def adamw_(
    params: Tensor,  # [P]
    grads: Tensor,  # [P]
    exp_avg: Tensor,  # [P]
    exp_avg_sq: Tensor,  # [P]
    *,
    step: int,
    lr: float,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
    grad_scale: float = 1.0,
    impl: str | None = None,
) -> None:
    """AdamW with decoupled weight decay (arXiv:1711.05101), in place, as torch.optim.AdamW.

    All four buffers are contiguous, of one length, and all float32 (or all float64). `step` counts
    from 1. `grad_scale` multiplies the gradients first (clipping, averaging). The caller bumps the
    version counters of parameters that are views of `params`.

    Raises ValueError where the buffers do not fit or step < 1.
    """
    for name, buffer in (("grads", grads), ("exp_avg", exp_avg), ("exp_avg_sq", exp_avg_sq)):
        check(
            buffer.shape == params.shape and buffer.dtype == params.dtype,
            f"adamw_: {name} {shape_of(buffer)} does not fit params {shape_of(params)}",
        )
        check(buffer.is_contiguous(), f"adamw_: {name} is not contiguous")
    check(params.dim() == 1 and params.is_contiguous(), "adamw_: params is not a flat buffer")
    check(not params.dtype.itemsize < 4, f"adamw_: params are {params.dtype}, expected float32")
    check(step >= 1, f"adamw_: step {step} must count from 1")
    hyper = {"lr": lr, "beta1": beta1, "beta2": beta2, "eps": eps, "weight_decay": weight_decay}
    impl = backends.select("adamw", params.device, params.dtype, impl)
    if impl == "reference":
        reference.adamw_(
            params, grads, exp_avg, exp_avg_sq, step=step, grad_scale=grad_scale, **hyper
        )
        return
    backends.kernels("adamw", impl).adamw(
        params,
        grads,
        exp_avg,
        exp_avg_sq,
        **hyper,
        bias_correction1=1 - beta1**step,
        bias_correction2=1 - beta2**step,
        grad_scale=grad_scale,
    )
