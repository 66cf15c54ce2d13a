import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from implementations import Backend
from oracle import TOLERANCE, check
from torch import Tensor

from lora_engine import ops, reference
from lora_engine.backends import launchers
from lora_engine.errors import UserError
from lora_engine.testing import error

OPERATION = "glu"
PEERS = {
    "silu": lambda gate, up: F.silu(gate) * up,
    "gelu": lambda gate, up: F.gelu(gate) * up,
    "gelu_tanh": lambda gate, up: F.gelu(gate, approximate="tanh") * up,
}
activations = pytest.mark.parametrize("activation", PEERS)


def inputs(shape: tuple[int, ...], dtype: torch.dtype = torch.float32) -> list[Tensor]:
    torch.manual_seed(0)
    return [torch.randn(shape).to(dtype) * 3, torch.randn(shape).to(dtype)]


@pytest.mark.reference
@activations
@pytest.mark.parametrize(
    "shape", [(1, 1), (3, 63), (2, 3, 1025), (33, 1000), (2, 4100), (0, 8)], ids=str
)
def test_matches_oracle(
    backend: Backend, dtype: torch.dtype, poisoned: None, shape: tuple[int, ...], activation: str
) -> None:
    check(
        lambda g, u: ops.glu(g, u, activation=activation, impl=backend.impl),
        PEERS[activation],
        backend.put(*inputs(shape, dtype)),
    )


@activations
def test_every_gate_is_accurate(backend: Backend, activation: str) -> None:
    """Each element by itself: a large one beside it hides nothing."""
    gate = torch.cat((torch.linspace(-14, 14, 4001), torch.logspace(-30, 30, 41)))
    (gate,) = backend.put(torch.cat((gate, -gate[-41:])))
    one = torch.ones_like(gate)
    leaf = gate.clone().requires_grad_()
    y = ops.glu(leaf, one, activation=activation, impl=backend.impl)
    (slope,) = torch.autograd.grad(y.sum(), leaf)
    exact = gate.double().requires_grad_()
    y_exact = PEERS[activation](exact, one.double())
    (slope_exact,) = torch.autograd.grad(y_exact.sum(), exact)
    assert ((y - y_exact).abs() <= 4e-7 * gate.abs()).all()
    finite = slope_exact.isfinite()  # PyTorch's own overflows beyond 1e19
    assert ((slope - slope_exact).abs()[finite] <= 2e-6).all() and slope.isfinite().all()


@activations
@pytest.mark.parametrize("gate", [1e4, -1e4, 88.0, -88.0, -104.0, 1e-42, 0.0], ids=str)
def test_extreme_gates(backend: Backend, gate: float, activation: str) -> None:
    given = backend.put(torch.full((2, 33), gate), torch.ones(2, 33))
    call = lambda g, u: ops.glu(g, u, activation=activation, impl=backend.impl)  # noqa: E731
    check(call, PEERS[activation], given)


@activations
def test_infinite_gates(backend: Backend, activation: str) -> None:
    """As PyTorch in float64; in float32 its own gelu(inf) is NaN."""
    given = backend.put(torch.tensor([[torch.inf, -torch.inf, 1.0]]), torch.ones(1, 3))
    y = ops.glu(given[0].requires_grad_(), given[1], activation=activation, impl=backend.impl)
    exact = PEERS[activation](*(x.double() for x in given))
    assert torch.allclose(y.double(), exact, equal_nan=True)
    assert y[0, 0] == torch.inf and y[0, 1].isnan()
    (slope,) = torch.autograd.grad(y.sum(), given[0])
    assert slope.isnan().tolist() == [[True, True, False]]


@activations
def test_nan_stays_nan(backend: Backend, activation: str) -> None:
    gate = torch.zeros(1, 40)
    gate[0, 17] = float("nan")
    gate, up = (x.requires_grad_() for x in backend.put(gate, torch.ones(1, 40)))
    y = ops.glu(gate, up, activation=activation, impl=backend.impl)
    for x in (y, *torch.autograd.grad(y.sum(), (gate, up))):
        assert x.isnan().nonzero().tolist() == [[0, 17]]


@pytest.mark.parametrize("padding_columns", [0, 5, 8])
def test_columns_of_one_buffer(backend: Backend, dtype: torch.dtype, padding_columns: int) -> None:
    torch.manual_seed(0)
    (buffer,) = backend.put(torch.randn(9, 2 * 600 + padding_columns).to(dtype))
    options = {
        "padding_columns": padding_columns,
        "grad_padding_columns": padding_columns,
        "impl": backend.impl,
    }

    def split(x: Tensor) -> tuple[Tensor, Tensor]:
        return x[:, :600], x[:, 600:1200]

    check(
        lambda x: ops.glu(*split(x), activation="gelu_tanh", **options),
        lambda x: PEERS["gelu_tanh"](*split(x)),
        [buffer],
    )


def test_transposed_inputs(backend: Backend) -> None:
    given = [x.T for x in backend.put(*inputs((33, 20)))]
    check(lambda g, u: ops.glu(g, u, impl=backend.impl), PEERS["silu"], given)


@activations
@pytest.mark.parametrize("in_place", [False, True], ids=["apart", "in_place"])
def test_backward_kernel_writes_over_its_inputs_and_h(
    backend: Backend, dtype: torch.dtype, activation: str, in_place: bool
) -> None:
    kernels = launchers.glu(backend.impl)
    gate, up, dy = backend.put(*inputs((6, 1100), dtype), torch.randn(6, 1100).to(dtype))
    exact = [x.double().requires_grad_() for x in (gate, up)]
    y = PEERS[activation](*exact)
    expected = (*torch.autograd.grad(y, exact, dy.double()), y.detach())
    nan = torch.full_like(torch.cat((gate, up, up), 1), torch.nan)
    dgate, dup = (gate, up) if in_place else nan[:, :2200].chunk(2, 1)
    h = nan[:, 2200:]
    kernels.glu_bwd(dy, gate, up, dgate, dup, h, activation=activation)
    for ours, oracle in zip((dgate, dup, h), expected, strict=True):
        assert error(ours, oracle) <= TOLERANCE[dtype]


@settings(max_examples=40, deadline=None)
@given(
    rows=st.integers(0, 70),
    cols=st.integers(1, 300),
    padding_columns=st.integers(0, 9),
    activation=st.sampled_from(sorted(PEERS)),
)
def test_any_shape(rows: int, cols: int, padding_columns: int, activation: str) -> None:
    gate_up = torch.randn(rows, 2 * cols)
    gate, up = gate_up[:, :cols], gate_up[:, cols:]
    y = ops.glu(gate, up, activation=activation, padding_columns=padding_columns)
    expected = reference.glu(gate, up, activation=activation)
    assert torch.allclose(y, expected, rtol=1e-5, atol=1e-6)
    assert rows < 2 or y.stride(0) == cols + padding_columns


@activations
@pytest.mark.parametrize("impl", ["reference", "cpu"])
def test_gradcheck(impl: str, activation: str) -> None:
    given = [torch.randn(3, 5, dtype=torch.float64, requires_grad=True) for _ in range(2)]
    call = lambda g, u: ops.glu(g, u, activation=activation, impl=impl)  # noqa: E731
    assert torch.autograd.gradcheck(call, given)


def test_a_second_derivative_is_refused(backend: Backend) -> None:
    gate, up = (x.requires_grad_() for x in backend.put(*inputs((2, 3))))
    y = ops.glu(gate, up, impl=backend.impl)
    with pytest.raises(UserError, match="no second derivatives"):
        torch.autograd.grad(y.square().sum(), gate, create_graph=True)


def test_errors_say_what_does_not_fit() -> None:
    with pytest.raises(ValueError, match=r"gate \[2, 3\] float32 and up \[2, 4\] float32 differ"):
        ops.glu(torch.randn(2, 3), torch.randn(2, 4))
    with pytest.raises(ValueError, match="activation 'relu': expected one of silu, gelu, gelu_ta"):
        ops.glu(torch.randn(2, 3), torch.randn(2, 3), activation="relu")
    with pytest.raises(ValueError, match="activation 'relu': expected one of"):
        reference.glu(torch.randn(2, 3), torch.randn(2, 3), activation="relu")
