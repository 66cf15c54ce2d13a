"""One AdamW step over flat buffers, and the norm it clips by."""

import torch
from torch import Tensor

from lora_engine import backends, reference
from lora_engine.backends import launchers
from lora_engine.ops.tensors import check, shape_of
from lora_engine.values import AdamWHyper


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
    grad_norm: Tensor | None = None,  # []
    max_grad_norm: float | None = None,
    impl: str | None = None,
) -> None:
    """AdamW with decoupled weight decay (arXiv:1711.05101), in place, as torch.optim.AdamW.

    All four buffers are contiguous, of one length, and all float32 (or all float64). `step` counts
    from 1. With `grad_norm`, the norm of `grads`, and `max_grad_norm`, the gradients are multiplied
    by min(1, max_grad_norm / grad_norm) first; the kernel reads the norm where it lies, so that a
    GPU need not wait for the host. The caller bumps the version counters of parameters that
    are views of `params`.

    Raises ValueError where the buffers do not fit or step < 1.
    """
    for name, buffer in (("grads", grads), ("exp_avg", exp_avg), ("exp_avg_sq", exp_avg_sq)):
        check(
            buffer.shape == params.shape and buffer.dtype == params.dtype,
            f"adamw_: {name} {shape_of(buffer)} does not fit params {shape_of(params)}",
        )
        check(buffer.is_contiguous(), f"adamw_: {name} is not contiguous")
    check(not params.dtype.itemsize < 4, f"adamw_: params are {params.dtype}, expected float32")
    check_step("adamw_", params, step, grad_norm, max_grad_norm)
    impl = backends.select("adamw", params.device, params.dtype, impl)
    if impl == "reference":
        reference.adamw_(
            params,
            grads,
            exp_avg,
            exp_avg_sq,
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
    launchers.adamw(impl).adamw(
        params,
        grads,
        exp_avg,
        exp_avg_sq,
        hyper,
        grad_norm,
    )


def grad_norm(
    grads: Tensor,  # [P]
    *,
    impl: str | None = None,
) -> Tensor:
    """Euclidean norm of a flat buffer, [] in its dtype, float32 or float64, on its device.

    Summed in two stages of fixed order: the same bits every time, for any number of threads.

    Raises ValueError for another dtype or a buffer that is not flat.
    """
    check(grads.dim() == 1 and grads.is_contiguous(), "grad_norm: grads is not a flat buffer")
    check(not grads.dtype.itemsize < 4, f"grad_norm: grads are {grads.dtype}, expected float32")
    impl = backends.select("adamw", grads.device, grads.dtype, impl)
    if impl == "reference":
        return reference.grad_norm(grads)
    norm = torch.empty((), dtype=grads.dtype, device=grads.device)
    launchers.adamw(impl).grad_norm(grads, norm)
    return norm


def check_step(
    what: str, params: Tensor, step: int, grad_norm: Tensor | None, max_grad_norm: float | None
) -> None:
    """What every AdamW asks of its arguments."""
    check(params.dim() == 1 and params.is_contiguous(), f"{what}: params is not a flat buffer")
    check(step >= 1, f"{what}: step {step} must count from 1")
    check(
        (grad_norm is None) == (max_grad_norm is None),
        f"{what}: grad_norm and max_grad_norm need each other",
    )
    if grad_norm is not None:
        check(
            grad_norm.numel() == 1
            and grad_norm.dtype == params.dtype
            and grad_norm.device == params.device,
            f"{what}: grad_norm {shape_of(grad_norm)} on {grad_norm.device}, expected one "
            f"{str(params.dtype).removeprefix('torch.')} on {params.device}",
        )
