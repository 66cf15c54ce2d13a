import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from oracle import check
from torch import Tensor

from lora_engine import ops, reference
from lora_engine.errors import UnavailableError

EPS = 1e-5


def peer(x: Tensor, weight: Tensor) -> Tensor:
    return torch.nn.functional.rms_norm(x, x.shape[-1:], weight, EPS)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("shape", [(1, 1), (3, 63), (2, 5, 576), (65, 1000), (0, 8)], ids=str)
def test_matches_oracle(isa: str, poisoned: None, dtype: torch.dtype, shape: tuple) -> None:
    torch.manual_seed(0)
    x, weight = torch.randn(shape).to(dtype), torch.randn(shape[-1]).to(dtype)
    check(lambda x, w: ops.rms_norm(x, w, EPS), peer, [x, weight], floor=0.1)


def test_rows_need_not_be_contiguous(isa: str) -> None:
    x = torch.randn(7, 40)[:, 3:35]
    check(lambda x, w: ops.rms_norm(x, w, EPS), peer, [x, torch.randn(32)])
    y = ops.rms_norm(x, torch.ones(32), EPS)
    assert torch.allclose(y, reference.rms_norm(x, torch.ones(32), EPS), atol=1e-6)


def test_frozen_weight_gets_no_gradient() -> None:
    x = torch.randn(4, 8, requires_grad=True)
    weight = torch.ones(8)
    ops.rms_norm(x, weight, EPS).sum().backward()
    assert weight.grad is None and x.grad is not None


@pytest.mark.parametrize("value", [1e4, -1e4, 1e-30, 1e-42], ids=str)
def test_extreme_values(isa: str, value: float) -> None:
    x = torch.full((2, 64), value)
    x[:, ::3] *= -0.5
    y = ops.rms_norm(x, torch.ones(64), EPS)
    exact = reference.rms_norm(x.double(), torch.ones(64).double(), EPS)
    assert torch.allclose(y.double(), exact, rtol=1e-5, atol=1e-44)


def test_weight_gradient_is_the_same_for_any_number_of_threads(isa: str) -> None:
    x, weight = torch.randn(300, 48), torch.randn(48, requires_grad=True)
    grads = []
    for threads in (1, 2):
        torch.set_num_threads(threads)
        grads.append(torch.autograd.grad(ops.rms_norm(x, weight, EPS).sum(), weight)[0])
    assert torch.equal(*grads)


@settings(max_examples=25, deadline=None)
@given(rows=st.integers(0, 70), cols=st.integers(1, 130), tail=st.integers(0, 9))
def test_any_shape(rows: int, cols: int, tail: int) -> None:
    x, weight = torch.randn(rows, cols), torch.randn(cols)
    y = ops.rms_norm(x, weight, EPS, tail=tail)
    assert torch.allclose(y, reference.rms_norm(x, weight, EPS), rtol=1e-5, atol=1e-5)
    assert y.shape == x.shape and (rows < 2 or y.stride(0) == cols + tail)


@pytest.mark.parametrize("impl", ["reference", "cpu"])
def test_gradcheck(impl: str) -> None:
    x = torch.randn(3, 6, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(6, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x, w: ops.rms_norm(x, w, EPS, impl=impl), (x, weight))


def test_errors_name_the_shapes() -> None:
    with pytest.raises(ValueError, match=r"weight \[4\] float32 does not fit x \[2, 3\] float32"):
        ops.rms_norm(torch.randn(2, 3), torch.ones(4), EPS)
    with pytest.raises(ValueError, match="differ in dtype"):
        ops.rms_norm(torch.randn(2, 3), torch.ones(3).bfloat16(), EPS)
    with pytest.raises(ValueError, match="impl='fast': expected one of"):
        ops.rms_norm(torch.randn(2, 3), torch.ones(3), EPS, impl="fast")
    with pytest.raises(UnavailableError, match="float16"):
        ops.rms_norm(torch.randn(2, 3).half(), torch.ones(3).half(), EPS, impl="cpu")
