"""AdamW (Loshchilov and Hutter, 2019, arXiv:1711.05101)."""

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
    grad_scale: float = 1.0,
) -> None:
    """One step in place, decoupled weight decay, `step` counted from 1."""
    g = grads * grad_scale
    exp_avg.lerp_(g, 1 - beta1)
    exp_avg_sq.mul_(beta2).addcmul_(g, g, value=1 - beta2)
    denominator = (exp_avg_sq / (1 - beta2**step)).sqrt_().add_(eps)
    params.mul_(1 - lr * weight_decay)
    params.addcdiv_(exp_avg, denominator, value=-lr / (1 - beta1**step))
