import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from oracle import check
from torch import Tensor

from lora_engine import ops


def peer(target: Tensor, reduction: str):
    def loss(hidden: Tensor, weight: Tensor) -> Tensor:
        logits = hidden @ weight.T
        logits = logits if logits.dtype == torch.float64 else logits.float()
        return torch.nn.functional.cross_entropy(logits, target, reduction=reduction)

    return loss


def ours(target: Tensor, reduction: str, chunk_rows: int | None = None):
    return lambda h, w: (
        ops.linear_cross_entropy(h, w, target, reduction=reduction, chunk_rows=chunk_rows).loss
    )


@pytest.mark.parametrize("reduction", ["none", "sum", "mean"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("rows,classes", [(1, 5), (63, 1000), (130, 97)], ids=str)
def test_matches_oracle(
    isa: str, poisoned: None, reduction: str, dtype: torch.dtype, rows: int, classes: int
) -> None:
    torch.manual_seed(0)
    target = torch.randint(0, classes, (rows,))
    target[2:10] = -100
    hidden, weight = torch.randn(rows, 24).to(dtype), torch.randn(classes, 24).to(dtype)
    check(ours(target, reduction, chunk_rows=50), peer(target, reduction), [hidden, weight])


def test_reports_logprobs_and_correctness(isa: str) -> None:
    hidden, weight = torch.randn(40, 16), torch.randn(30, 16)
    target = torch.randint(0, 30, (40,))
    target[:20] = (hidden @ weight.T).argmax(-1)[:20]
    target[5] = -100
    out = ops.linear_cross_entropy(hidden, weight, target, chunk_rows=7)
    logits = hidden @ weight.T
    expected = logits.log_softmax(-1).gather(1, target.clamp(min=0)[:, None])[:, 0]
    expected[5] = 0
    assert torch.allclose(out.logprobs, expected, atol=1e-5)
    assert torch.equal(out.correct, (logits.argmax(-1) == target) & (target != -100))


@pytest.mark.parametrize("impl", ["reference", "cpu"])
def test_nothing_supervised_is_zero_with_zero_gradient(impl: str) -> None:
    for rows in (0, 3):
        hidden = torch.randn(rows, 4, requires_grad=True)
        target = torch.full((rows,), -100)
        loss = ops.linear_cross_entropy(hidden, torch.randn(9, 4), target, impl=impl).loss
        (grad,) = torch.autograd.grad(loss, hidden)
        assert loss.item() == 0 and not grad.any()


def test_no_gradient_is_made_when_none_is_wanted() -> None:
    hidden, weight = torch.randn(4, 8, requires_grad=True), torch.randn(9, 8)
    with torch.no_grad():
        loss = ops.linear_cross_entropy(hidden, weight, torch.arange(4)).loss
    assert not loss.requires_grad


def test_extra_memory_is_one_chunk(isa: str) -> None:
    """Logits of all rows would be 40 MB; a chunk of 64 rows is 1.3 MB."""
    rows, classes, width = 2048, 5000, 8
    hidden = torch.randn(rows, width, requires_grad=True)
    weight, target = torch.randn(classes, width), torch.randint(0, classes, (rows,))
    made: list[int] = []

    class Recorder(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
            out = func(*args, **(kwargs or {}))
            made.extend(x.numel() for x in [out] if isinstance(x, Tensor))
            return out

    with Recorder():
        ops.linear_cross_entropy(hidden, weight, target, chunk_rows=64).loss.backward()
    assert max(made) == 64 * classes


@settings(max_examples=25, deadline=None)
@given(
    rows=st.integers(0, 40),
    classes=st.integers(1, 60),
    chunk=st.integers(1, 50),
    seed=st.integers(0, 9),
)
def test_the_chunk_does_not_matter(rows: int, classes: int, chunk: int, seed: int) -> None:
    torch.manual_seed(seed)
    hidden, weight = torch.randn(rows, 6, requires_grad=True), torch.randn(classes, 6)
    target = torch.randint(0, classes, (rows,))
    a = ops.linear_cross_entropy(hidden, weight, target, reduction="sum", chunk_rows=chunk).loss
    b = ops.linear_cross_entropy(hidden, weight, target, reduction="sum", impl="reference").loss
    assert torch.allclose(a, b, rtol=1e-5, atol=1e-5)
    grads = [torch.autograd.grad(loss, hidden)[0] for loss in (a, b)]
    assert torch.allclose(*grads, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("impl", ["reference", "cpu"])
@pytest.mark.parametrize("reduction", ["none", "mean"])
def test_gradcheck(impl: str, reduction: str) -> None:
    hidden = torch.randn(5, 4, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(7, 4, dtype=torch.float64, requires_grad=True)
    target = torch.tensor([0, 6, -100, 3, 3])

    def loss(hidden: Tensor, weight: Tensor) -> Tensor:
        return ops.linear_cross_entropy(
            hidden, weight, target, reduction=reduction, chunk_rows=2, impl=impl
        ).loss

    assert torch.autograd.gradcheck(loss, (hidden, weight))


def test_errors_name_what_does_not_fit() -> None:
    hidden, weight, target = torch.randn(3, 4), torch.randn(9, 4), torch.zeros(3, dtype=torch.int64)
    with pytest.raises(ValueError, match=r"hidden \[3, 4\] float32 does not fit weight \[9, 5\]"):
        ops.linear_cross_entropy(hidden, torch.randn(9, 5), target)
    with pytest.raises(ValueError, match=r"target \[2\] int64 is not \[3\] int64"):
        ops.linear_cross_entropy(hidden, weight, target[:2])
    with pytest.raises(ValueError, match="reduction='total'"):
        ops.linear_cross_entropy(hidden, weight, target, reduction="total")
    with pytest.raises(ValueError, match="differ in dtype"):
        ops.linear_cross_entropy(hidden.bfloat16(), weight, target)
