import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from implementations import Backend
from oracle import check
from torch import Tensor

from lora_engine import ops, reference
from lora_engine.ops import augmented

OPERATION = "layer_norm"
EPS = 1e-5


def peer(x: Tensor, weight: Tensor | None = None, bias: Tensor | None = None) -> Tensor:
    return torch.nn.functional.layer_norm(x, x.shape[-1:], weight, bias, EPS)


def inputs(dtype: torch.dtype, shape: tuple[int, ...]) -> list[Tensor]:
    torch.manual_seed(0)
    x, weight, bias = torch.randn(shape) + 0.5, torch.randn(shape[-1]), torch.randn(shape[-1])
    return [x.to(dtype), weight.to(dtype), bias.to(dtype)]


SHAPES = [(1, 1), (3, 63), (2, 5, 576), (65, 100), (5, 1000), (3, 1025), (0, 8)]


@pytest.mark.reference
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_matches_oracle(
    backend: Backend, dtype: torch.dtype, poisoned: None, shape: tuple[int, ...]
) -> None:
    ours = lambda x, w, b: ops.layer_norm(x, w, b, EPS, impl=backend.impl)  # noqa: E731
    check(ours, peer, backend.put(*inputs(dtype, shape)), floor=0.1)


def test_without_bias_or_weight(backend: Backend, dtype: torch.dtype, poisoned: None) -> None:
    x, weight, bias = backend.put(*inputs(dtype, (3, 63)))
    impl = backend.impl
    check(lambda x, w: ops.layer_norm(x, w, None, EPS, impl=impl), peer, [x, weight], floor=0.1)
    check(lambda x: ops.layer_norm(x, None, None, EPS, impl=impl), peer, [x], floor=0.1)
    check(
        lambda x, b: ops.layer_norm(x, None, b, EPS, impl=impl),
        lambda x, b: peer(x, None, b),
        [x, bias],
        floor=0.1,
    )


@pytest.mark.parametrize("cols", [4097, 20000])
def test_wide_rows(backend: Backend, poisoned: None, cols: int) -> None:
    """20000 columns are more than a Triton program holds: rows and sums are walked in blocks."""
    ours = lambda x, w, b: ops.layer_norm(x, w, b, EPS, impl=backend.impl)  # noqa: E731
    check(ours, peer, backend.put(*inputs(torch.float32, (9, cols))), floor=0.1)


def test_rows_need_not_be_contiguous(backend: Backend) -> None:
    x, weight, bias = backend.put(*inputs(torch.float32, (7, 40)))
    ours = lambda x, w, b: ops.layer_norm(x[:, 3:35], w, b, EPS, impl=backend.impl)  # noqa: E731
    check(ours, lambda x, w, b: peer(x[:, 3:35], w, b), [x, weight[:32], bias[8:]])


@pytest.mark.parametrize("value", [1e4, -1e4, 1e17, 1e-30, 1e-42], ids=str)
def test_extreme_values(backend: Backend, value: float) -> None:
    x = torch.full((2, 64), value)
    x[:, ::3] *= -0.5
    weight, bias = torch.linspace(0.5, 2.0, 64), torch.zeros(64)
    ours = lambda x, w, b: ops.layer_norm(x, w, b, EPS, impl=backend.impl)  # noqa: E731
    check(ours, peer, backend.put(x, weight, bias))


@pytest.mark.parametrize("mean", [1e3, -1e5])
def test_a_mean_far_from_zero_costs_no_accuracy(backend: Backend, mean: float) -> None:
    """The variance is that of centred values: mean(x²) - mean(x)² would lose every digit here."""
    x = torch.randn(4, 256, generator=torch.Generator().manual_seed(0)) + mean
    (x,) = backend.put(x)
    exact = peer(x.double())
    y = ops.layer_norm(x, None, None, EPS, impl=backend.impl).double()
    assert (y - exact).abs().max() < 4e-7 * abs(mean)


def test_nan_stays_in_its_row(backend: Backend) -> None:
    x, weight, bias = inputs(torch.float32, (3, 40))
    x[1, 17] = float("nan")
    y = ops.layer_norm(*backend.put(x, weight, bias), EPS, impl=backend.impl)
    assert y.isnan().any(1).tolist() == [False, True, False]


def test_frozen_parameters_get_no_gradient(backend: Backend) -> None:
    x, weight, bias = backend.put(*inputs(torch.float32, (4, 8)))
    x.requires_grad_()
    ops.layer_norm(x, weight, bias, EPS, impl=backend.impl).sum().backward()
    assert weight.grad is None and bias.grad is None and x.grad is not None


def test_the_same_bits_on_every_run(backend: Backend) -> None:
    leaves = [t.requires_grad_() for t in backend.put(*inputs(torch.float32, (150, 48)))]
    dy = torch.randn(150, 48).to(leaves[0])
    runs = []
    for _ in range(2):
        y = ops.layer_norm(*leaves, EPS, impl=backend.impl)
        runs.append([y, *torch.autograd.grad(y, leaves, dy)])
    assert all(torch.equal(first, second) for first, second in zip(*runs, strict=True))


def test_gradients_are_the_same_for_any_number_of_threads(isa: str) -> None:
    leaves = [t.requires_grad_() for t in inputs(torch.float32, (300, 48))]
    dy = torch.randn(300, 48)
    grads = []
    for threads in (1, 2):
        torch.set_num_threads(threads)
        grads.append(torch.autograd.grad(ops.layer_norm(*leaves, EPS), leaves, dy))
    assert all(torch.equal(one, two) for one, two in zip(*grads, strict=True))


def test_room_behind_the_rows(backend: Backend) -> None:
    x, weight, bias = backend.put(*inputs(torch.float32, (3, 5, 32)))
    y = ops.layer_norm(x, weight, bias, EPS, padding_columns=8, impl=backend.impl)
    buffer = augmented.claim([y], 8)
    assert buffer.shape == (15, 40) and buffer.data_ptr() == y.data_ptr()
    assert torch.equal(y, ops.layer_norm(x, weight, bias, EPS, impl=backend.impl))


@settings(max_examples=40, deadline=None)
@given(
    rows=st.integers(0, 70),
    cols=st.integers(1, 130),
    padding_columns=st.integers(0, 9),
    given_=st.tuples(st.booleans(), st.booleans()),
    trained=st.lists(st.booleans(), min_size=3, max_size=3),
)
def test_any_shape(
    rows: int, cols: int, padding_columns: int, given_: tuple[bool, bool], trained: list[bool]
) -> None:
    tensors = torch.randn(rows, cols), torch.randn(cols), torch.randn(cols)
    x, weight, bias = (t.requires_grad_(on) for t, on in zip(tensors, trained, strict=True))
    parameters = weight if given_[0] else None, bias if given_[1] else None
    ours = [ops.layer_norm(x, *parameters, EPS, padding_columns=padding_columns)]
    theirs = [reference.layer_norm(x, *parameters, EPS)]
    assert rows < 2 or ours[0].stride(0) == cols + padding_columns
    leaves = [t for t in (x, *parameters) if t is not None and t.requires_grad]
    if leaves:
        dy = torch.randn(rows, cols)
        ours += torch.autograd.grad(ours[0], leaves, dy)
        theirs += torch.autograd.grad(theirs[0], leaves, dy)
    # Two columns leave nothing but rounding in x's gradient, and eps sets its scale.
    for a, b in zip(ours, theirs, strict=True):
        scale = max(1.0, b.abs().max().item() if b.numel() else 1.0)
        assert a.shape == b.shape and torch.allclose(a, b, rtol=1e-3, atol=1e-3 * scale)


@pytest.mark.parametrize("impl", ["reference", "cpu"])
def test_gradcheck(impl: str) -> None:
    leaves = [
        torch.randn(shape, dtype=torch.float64, requires_grad=True) for shape in [(3, 6), 6, 6]
    ]
    assert torch.autograd.gradcheck(lambda *a: ops.layer_norm(*a, EPS, impl=impl), leaves)


def test_errors_name_the_shapes() -> None:
    x, ones = torch.randn(2, 3), torch.ones(3)
    with pytest.raises(ValueError, match=r"weight \[4\] float32 does not fit x \[2, 3\] float32"):
        ops.layer_norm(x, torch.ones(4), ones, EPS)
    with pytest.raises(ValueError, match=r"bias \[1\] float32 does not fit"):
        ops.layer_norm(x, ones, torch.ones(1), EPS)
    with pytest.raises(ValueError, match=r"bias .* differ in dtype"):
        ops.layer_norm(x, ones, ones.bfloat16(), EPS)
