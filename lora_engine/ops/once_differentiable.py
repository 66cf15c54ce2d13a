"""Backward passes that have no derivative of their own."""

from collections.abc import Callable
from functools import wraps
from typing import TypeVar

import torch
from torch import Tensor

from lora_engine.errors import UserError

R = TypeVar("R", bound=tuple[Tensor | None, ...])

_MEND = "if the model is accelerated, call lora_engine.restore(model) first"


def once_differentiable(backward: Callable[..., R]) -> Callable[..., R]:
    """`backward` of an autograd function, which raises UserError where its results would be
    differentiated (`create_graph=True`), or are asked for many gradients at once.

    PyTorch's decorator of this name lets gradients pass as constants where it is given constants,
    as of a sum, or where `torch.autograd.grad` names tensors: a gradient penalty has no effect.
    """

    @wraps(backward)
    def once(ctx: object, *grads: Tensor | None) -> R:
        if torch.is_grad_enabled():
            raise UserError(f"lora_engine's operations have no second derivatives; {_MEND}")
        for grad in grads:
            _check_memory(grad)
        return backward(ctx, *grads)

    return once


def _check_memory(grad: Tensor | None) -> None:
    if grad is not None:
        try:
            grad.data_ptr()
        except RuntimeError as error:
            raise UserError(
                "lora_engine's operations take no batch of gradients (vmap, is_grads_batched); "
                + _MEND
            ) from error
