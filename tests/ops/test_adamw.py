import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from implementations import Backend
from torch import Tensor

from lora_engine import ops, reference

OPERATION = "adamw"
HYPER = {"lr": 3e-3, "beta1": 0.9, "beta2": 0.98, "eps": 1e-8, "weight_decay": 0.1}
COUNTS = [0, 1, 63, 1000, 1024, 4097]


def steps_of_torch(
    params: Tensor, grads: list[Tensor], max_grad_norm: float | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    leaf = params.clone().requires_grad_()
    optimizer = torch.optim.AdamW(
        [leaf], lr=HYPER["lr"], betas=(0.9, 0.98), eps=1e-8, weight_decay=0.1, foreach=False
    )
    for grad in grads:
        leaf.grad = grad.clone()
        if max_grad_norm is not None:
            torch.nn.utils.clip_grad_norm_([leaf], max_grad_norm)
        optimizer.step()
    state = optimizer.state[leaf]
    return leaf.detach(), state["exp_avg"], state["exp_avg_sq"]


def make(count: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, list[Tensor]]:
    """Parameters, and gradients of three steps of very different size."""
    torch.manual_seed(count)
    params = torch.randn(count, dtype=dtype)
    return params, [torch.randn(count, dtype=dtype) * 10.0**e for e in (0, -3, 2)]


def assert_close(actual: Tensor, expected: Tensor, tolerance: float = 1e-6) -> None:
    torch.testing.assert_close(actual.cpu(), expected, rtol=tolerance, atol=tolerance)


@pytest.mark.reference
@pytest.mark.parametrize("count", COUNTS)
def test_equals_torch(backend: Backend, count: int) -> None:
    params, grads = make(count)
    expected = steps_of_torch(params, grads)
    params, m, v, *grads = backend.put(
        params, torch.zeros(count), torch.zeros(count), *(g.clone() for g in grads)
    )
    for step, grad in enumerate(grads, 1):
        ops.adamw_(params, grad, m, v, step=step, impl=backend.impl, **HYPER)
    for actual, wanted in zip((params, m, v), expected, strict=True):
        assert_close(actual, wanted)


@pytest.mark.parametrize("impl", ["reference", "cpu"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@settings(max_examples=15, deadline=None)
@given(count=st.integers(0, 300), clip=st.sampled_from([None, 1e-2, 5.0]))
def test_equals_torch_in_any_dtype(
    impl: str, dtype: torch.dtype, count: int, clip: float | None
) -> None:
    params, grads = make(count, dtype)
    expected = steps_of_torch(params, grads, clip)
    m, v = torch.zeros_like(params), torch.zeros_like(params)
    for step, grad in enumerate(grads, 1):
        norm = None if clip is None else ops.grad_norm(grad, impl=impl)
        limit = {"grad_norm": norm, "max_grad_norm": clip}
        ops.adamw_(params, grad, m, v, step=step, impl=impl, **limit, **HYPER)
    tolerance = 2e-6 if dtype == torch.float32 else 1e-6 if clip else 1e-14
    assert torch.allclose(params, expected[0], rtol=tolerance, atol=tolerance)


def test_clips_by_a_norm_it_reads_itself(backend: Backend) -> None:
    params, grads = make(300)
    limit = 0.5 * grads[0].norm().item()
    expected = steps_of_torch(params, grads, limit)
    params, m, v, *grads = backend.put(params, torch.zeros(300), torch.zeros(300), *grads)
    for step, grad in enumerate(grads, 1):
        norm = ops.grad_norm(grad, impl=backend.impl)
        limits = {"grad_norm": norm, "max_grad_norm": limit}
        ops.adamw_(params, grad, m, v, step=step, impl=backend.impl, **limits, **HYPER)
    for actual, wanted in zip((params, m, v), expected, strict=True):
        assert_close(actual, wanted, 1e-5)


def test_a_norm_up_to_the_maximum_changes_nothing(backend: Backend) -> None:
    params, m, v, grads = backend.put(*(torch.full((9,), x) for x in (1.0, 0.0, 0.0, 4.0)))
    norm = grads.norm()  # 12
    for limit, clipped in ((6.0, 2.0), (13.0, 4.0)):
        for x in (m, v):
            x.zero_()
        limits = {"grad_norm": norm, "max_grad_norm": limit}
        ops.adamw_(params, grads, m, v, step=1, impl=backend.impl, **limits, **HYPER)
        assert_close(m, torch.full((9,), 0.1 * clipped))


@pytest.mark.parametrize("bad", [float("nan"), float("inf")], ids=str)
def test_a_norm_that_is_no_number_is_not_clipped_away(backend: Backend, bad: float) -> None:
    grads = torch.ones(40)
    grads[17] = bad
    params, m, v, grads = backend.put(torch.ones(40), torch.zeros(40), torch.zeros(40), grads)
    norm = ops.grad_norm(grads, impl=backend.impl)
    assert str(norm.item()) == str(bad)
    limits = {"grad_norm": norm, "max_grad_norm": 1.0}
    ops.adamw_(params, grads, m, v, step=1, impl=backend.impl, **limits, **HYPER)
    assert params[17].isnan()


@pytest.mark.parametrize("start", [3, 4], ids=["unaligned", "aligned"])
def test_views_and_their_neighbours(backend: Backend, start: int) -> None:
    """Buffers that start anywhere; what lies around them stays."""
    count = 1030
    params, grads = make(count)
    expected = steps_of_torch(params, grads[:1])
    around = [torch.full((count + 9,), 7.0) for _ in range(4)]
    values = (params, grads[0], torch.zeros(count), torch.zeros(count))
    for buffer, value in zip(around, values, strict=True):
        buffer[start : start + count] = value
    around = backend.put(*around)
    views = [x[start : start + count] for x in around]
    ops.adamw_(*views, step=1, impl=backend.impl, **HYPER)
    norm = ops.grad_norm(views[1], impl=backend.impl)
    assert_close(norm, grads[0].norm(), 1e-4)
    for x, view, wanted in zip(
        (around[0], *around[2:]), (views[0], *views[2:]), expected, strict=True
    ):
        assert_close(view, wanted)
        assert (x[:start] == 7).all() and (x[start + count :] == 7).all()


@pytest.mark.parametrize("count", [*COUNTS, 70_001])
def test_grad_norm(backend: Backend, poisoned: None, count: int) -> None:
    grads = torch.randn(count) * 3
    norm = ops.grad_norm(*backend.put(grads), impl=backend.impl)
    assert norm.shape == () and norm.dtype == torch.float32
    assert_close(norm, reference.grad_norm(grads.double()).float(), 1e-6 * max(1, count**0.5))


def test_grad_norm_is_the_same_for_any_number_of_threads(isa: str) -> None:
    grads = torch.randn(300_007)
    norms = []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        norms.append(ops.grad_norm(grads, impl="cpu"))
    torch.set_num_threads(2)
    assert norms[0] == norms[1] == norms[2] == ops.grad_norm(grads, impl="cpu")


def test_grad_norm_is_the_same_every_time(backend: Backend) -> None:
    grads = backend.put(torch.randn(40_000))
    first = ops.grad_norm(*grads, impl=backend.impl)
    assert all(first.equal(ops.grad_norm(*grads, impl=backend.impl)) for _ in range(3))


def test_errors() -> None:
    flat = [torch.zeros(4) for _ in range(4)]
    with pytest.raises(ValueError, match=r"grads \[3\] float32 does not fit params \[4\]"):
        ops.adamw_(flat[0], torch.zeros(3), flat[2], flat[3], step=1, **HYPER)
    with pytest.raises(ValueError, match="step 0 must count from 1"):
        ops.adamw_(*flat, step=0, **HYPER)
    with pytest.raises(ValueError, match="expected float32"):
        ops.adamw_(*(x.bfloat16() for x in flat), step=1, **HYPER)
    with pytest.raises(ValueError, match="exp_avg is not contiguous"):
        ops.adamw_(flat[0], flat[1], torch.zeros(8)[::2], flat[3], step=1, **HYPER)
    with pytest.raises(ValueError, match="need each other"):
        ops.adamw_(*flat, step=1, max_grad_norm=1.0, **HYPER)
    with pytest.raises(ValueError, match=r"grad_norm \[2\] float32 on cpu, expected one float32"):
        ops.adamw_(*flat, step=1, grad_norm=torch.ones(2), max_grad_norm=1.0, **HYPER)
    with pytest.raises(ValueError, match="grads is not a flat buffer"):
        ops.grad_norm(torch.zeros(2, 2))
    with pytest.raises(ValueError, match=r"grads are torch.bfloat16, expected float32"):
        ops.grad_norm(torch.zeros(2).bfloat16())
