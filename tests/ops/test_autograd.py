"""What of autograd the operations take part in: first derivatives, whatever autocast says."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from lora_engine import ops
from lora_engine.errors import UserError
from lora_engine.ops import LoraFactors
from lora_engine.testing import cu_seqlens, error

ROWS, COLS = 6, 8
A, B, WEIGHT = torch.randn(2, COLS), torch.randn(COLS, 2), torch.randn(COLS, COLS)
BOUNDS, IDS = cu_seqlens([2, 4]), torch.arange(ROWS)


def linear(x: Tensor) -> Tensor:
    factors = LoraFactors(A, B, 0.5, torch.ones(COLS))
    return ops.lora_linear(x, ops.LoraGroup.dense([WEIGHT], [factors]))[0]


def head(x: Tensor) -> Tensor:
    return ops.linear_cross_entropy(x, WEIGHT, IDS, lora=LoraFactors(A, B, 0.5)).loss


def embedding(x: Tensor) -> Tensor:
    return ops.lora_embedding(IDS, WEIGHT, [LoraFactors(x[:2], B, 0.5)])


OPERATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "rms_norm": lambda x: ops.rms_norm(x, x[0], 1e-5),
    "layer_norm": lambda x: ops.layer_norm(x, x[0], x[1], 1e-5),
    "glu": lambda x: ops.glu(x, x * 2),
    "attention": lambda x: ops.attention(x, x * 2, x * 3, BOUNDS, head_dim=4),
    "lora_linear": linear,
    "linear_cross_entropy": head,
}


@pytest.mark.parametrize("loss", [torch.square, torch.clone])
@pytest.mark.parametrize("name", OPERATIONS)
def test_second_derivatives_are_refused(name: str, loss: Callable[[Tensor], Tensor]) -> None:
    """Beside a way through torch's own operations, too, where they would be a part of the sum.

    The gradient that a sum gives to the operation is a constant.
    """
    x = torch.randn(ROWS, COLS, requires_grad=True)
    y = loss(OPERATIONS[name](x)).sum() + x.pow(3).sum()
    with pytest.raises(UserError, match="no second derivatives; if the model is accelerated"):
        torch.autograd.grad(y, x, create_graph=True)


@pytest.mark.parametrize("name", OPERATIONS)
def test_batched_gradients_are_refused(name: str) -> None:
    x = torch.randn(ROWS, COLS, requires_grad=True)
    y = OPERATIONS[name](x)
    each = torch.ones(2, *y.shape)
    with pytest.raises(UserError, match="no batch of gradients"):
        torch.autograd.grad(y, x, each, is_grads_batched=True)


@pytest.mark.parametrize("name", [*OPERATIONS, "lora_embedding"])
def test_autocast_changes_nothing(name: str) -> None:
    operation = {**OPERATIONS, "lora_embedding": embedding}[name]
    results = []
    for enabled in (True, False):
        x = torch.linspace(-2, 3, ROWS * COLS).view(ROWS, COLS).requires_grad_()
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            y = operation(x)
        results.append((y, *torch.autograd.grad(y.square().sum(), x)))
    for ours, expected in zip(*results, strict=True):
        assert ours.dtype == expected.dtype == torch.float32
        assert error(ours, expected) < 1e-6
