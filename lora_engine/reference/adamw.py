"""AdamW (Loshchilov and Hutter, 2019, arXiv:1711.05101), and the norm it clips by."""

import torch
from torch import Tensor


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
) -> None:
    """One step in place, decoupled weight decay, `step` counted from 1."""
    g = grads
    if grad_norm is not None and max_grad_norm is not None:
        g = g * (max_grad_norm / grad_norm).clamp(max=1)
    exp_avg.lerp_(g, 1 - beta1)
    exp_avg_sq.mul_(beta2).addcmul_(g, g, value=1 - beta2)
    denominator = (exp_avg_sq / (1 - beta2**step)).sqrt_().add_(eps)
    params.mul_(1 - lr * weight_decay)
    params.addcdiv_(exp_avg, denominator, value=-lr / (1 - beta1**step))


def grad_norm(grads: Tensor) -> Tensor:
    """Euclidean norm of `grads` [P], [] in its dtype."""
    return torch.linalg.vector_norm(grads, dtype=torch.float64).to(grads.dtype)
