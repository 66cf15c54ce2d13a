"""dA of a block's first products comes from the block's input, not from the norm's output."""

from typing import Any

import pytest
import torch
from implementations import Backend
from test_blocks import HIDDEN, TOKENS, Mlp
from torch import Tensor

from lora_engine.backends import launchers
from lora_engine.testing import error

OPERATION = "lora_linear"


@pytest.fixture
def norms(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The norm's launches, forward and backward."""
    found: list[str] = []
    before = launchers.rms_norm

    class Counting:
        def __init__(self, impl: str) -> None:
            self.kernels = before(impl)

        def __getattr__(self, name: str) -> Any:
            found.append(name)
            return getattr(self.kernels, name)

    monkeypatch.setattr(launchers, "rms_norm", Counting)
    return found


def factor_gradients(half: Mlp, dy: Tensor) -> list[Tensor]:
    leaves = [x.requires_grad_() for x in half.leaves]
    return list(torch.autograd.grad(half.ours(*leaves), leaves, dy))


def test_the_norm_runs_once_in_each_direction(backend: Backend, norms: list[str]) -> None:
    half = Mlp(backend, torch.bfloat16, "lora")
    factor_gradients(half, torch.ones_like(half.leaves[0]))
    assert norms == ["rms_norm_fwd", "rms_norm_bwd"]


def test_without_gradients_of_a_it_runs_forward_alone(backend: Backend, norms: list[str]) -> None:
    half = Mlp(backend, torch.bfloat16, "lora")
    lora_b = half.leaves[3].requires_grad_()
    torch.autograd.grad(half.ours(*half.leaves).sum(), lora_b)
    assert norms == ["rms_norm_fwd"]


def test_float16_holds_small_gradients_of_large_activations(backend: Backend) -> None:
    """dS of 1e-5 over an rms of 1e4 is below all of float16's numbers."""
    if torch.float16 not in backend.dtypes:
        pytest.skip("no float16")

    def lora_a_gradient(size: float, dtype: torch.dtype) -> Tensor:
        half = Mlp(backend, dtype, "lora")
        with torch.no_grad():
            half.leaves[0].mul_(size)
        dy = torch.full((TOKENS, HIDDEN), 2**-17.0, device=backend.device, dtype=dtype)
        return factor_gradients(half, dy)[2]

    # The norm takes the size out again, up to its epsilon.
    small = lora_a_gradient(2**13.0, torch.float16)
    assert error(small, lora_a_gradient(1.0, torch.float32)) < 0.05
