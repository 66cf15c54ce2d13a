import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from implementations import Backend
from oracle import check
from torch import Tensor

from lora_engine import ops, reference

OPERATION = "glu"


def peer(gate: Tensor, up: Tensor) -> Tensor:
    return torch.nn.functional.silu(gate) * up


@pytest.mark.parametrize("shape", [(1, 1), (3, 63), (2, 5, 1536), (65, 1000), (0, 8)], ids=str)
def test_matches_oracle(
    backend: Backend, dtype: torch.dtype, poisoned: None, shape: tuple[int, ...]
) -> None:
    torch.manual_seed(0)
    inputs = [torch.randn(shape).to(dtype) * 3, torch.randn(shape).to(dtype)]
    check(lambda g, u: ops.swiglu(g, u, impl=backend.impl), peer, backend.put(*inputs))


@pytest.mark.parametrize("gate", [1e4, -1e4, 88.0, -88.0, -104.0, 1e-42, 0.0], ids=str)
def test_extreme_gates(backend: Backend, gate: float) -> None:
    inputs = [torch.full((2, 33), gate), torch.ones(2, 33)]
    check(lambda g, u: ops.swiglu(g, u, impl=backend.impl), peer, backend.put(*inputs))


def test_nan_stays_nan(backend: Backend) -> None:
    gate = torch.zeros(1, 40)
    gate[0, 17] = float("nan")
    y = ops.swiglu(*backend.put(gate, torch.ones(1, 40)), impl=backend.impl)
    assert y.isnan().nonzero().tolist() == [[0, 17]]


@settings(max_examples=25, deadline=None)
@given(rows=st.integers(0, 70), cols=st.integers(1, 130), tail=st.integers(0, 9))
def test_any_shape(rows: int, cols: int, tail: int) -> None:
    gate_up = torch.randn(rows, 2 * cols)
    gate, up = gate_up[:, :cols], gate_up[:, cols:]
    y = ops.swiglu(gate, up, tail=tail)
    assert torch.allclose(y, reference.swiglu(gate, up), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("impl", ["reference", "cpu"])
def test_gradcheck(impl: str) -> None:
    inputs = [torch.randn(3, 5, dtype=torch.float64, requires_grad=True) for _ in range(2)]
    assert torch.autograd.gradcheck(lambda g, u: ops.swiglu(g, u, impl=impl), inputs)


def test_errors_name_the_shapes() -> None:
    with pytest.raises(ValueError, match=r"gate \[2, 3\] float32 and up \[2, 4\] float32 differ"):
        ops.swiglu(torch.randn(2, 3), torch.randn(2, 4))
