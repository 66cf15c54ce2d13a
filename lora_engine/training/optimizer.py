"""AdamW over flat parameters."""

import torch

from lora_engine import ops
from lora_engine.training.config import TrainConfig
from lora_engine.training.flat import FlatParameters


class FlatAdamW:
    """AdamW (Loshchilov & Hutter 2019) with clipping by global norm, one launch per step.

    exp_avg, exp_avg_sq [P] float32: the moments, laid out as `flat.data`.
    updates: steps applied so far, which the bias correction counts.
    Weight decay applies to all parameters alike. The step is deterministic.
    """

    def __init__(self, flat: FlatParameters, config: TrainConfig) -> None:
        self.flat = flat
        self.exp_avg = torch.zeros_like(flat.data)
        self.exp_avg_sq = torch.zeros_like(flat.data)
        self.updates = 0
        self._config = config

    def grad_norm(self) -> torch.Tensor:
        """Euclidean norm of all gradients, [] float32, on the parameters' device."""
        return torch.linalg.vector_norm(self.flat.grad)

    def step(self, learning_rate: float, grad_norm: float) -> None:
        """Apply the gradients in `flat.grad`, whose norm is `grad_norm`, and publish."""
        config, flat = self._config, self.flat
        self.updates += 1
        ops.adamw_(
            flat.data,
            flat.grad,
            self.exp_avg,
            self.exp_avg_sq,
            step=self.updates,
            lr=learning_rate,
            beta1=config.beta1,
            beta2=config.beta2,
            eps=config.eps,
            weight_decay=config.weight_decay,
            grad_scale=clip_factor(grad_norm, config.max_grad_norm),
        )
        flat.publish()


def clip_factor(grad_norm: float, max_grad_norm: float | None) -> float:
    """What gradients of norm `grad_norm` are multiplied by so that it is at most the maximum."""
    if max_grad_norm is None or grad_norm <= max_grad_norm:
        return 1.0
    return max_grad_norm / grad_norm
