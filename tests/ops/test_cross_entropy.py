from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from implementations import Backend
from oracle import TOLERANCE, check
from torch import Tensor

from lora_engine import ops
from lora_engine.backends import launchers
from lora_engine.reference.cross_entropy import token_losses
from lora_engine.testing import assert_as_good_as

OPERATION = "cross_entropy"

OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "smoothed": {"label_smoothing": 0.1},
    "capped": {"softcap": 5.0},
    "z_loss": {"z_loss": 0.01},
    "all": {"label_smoothing": 0.3, "softcap": 7.5, "z_loss": 0.02},
}
# 2049 is over one block of rows that are not aligned, 3072 three blocks of rows that are.
SHAPES = [(1, 1), (2, 5), (3, 97), (2, 1000), (2, 2049), (2, 3072), (0, 7)]


def upcast(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()


def peer(target: Tensor, label_smoothing: float = 0.0, softcap: Any = None, z_loss: float = 0.0):
    """As people write it in PyTorch."""

    def loss(x: Tensor) -> Tensor:
        z = upcast(x)
        if softcap is not None:
            z = softcap * torch.tanh(z / softcap)
        rows = F.cross_entropy(z, target, reduction="none", label_smoothing=label_smoothing)
        return rows + z_loss * torch.logsumexp(z, -1) ** 2 * (target != -100)

    return loss


def ours(backend: Backend, target: Tensor, **options: Any):
    return lambda z: ops.cross_entropy(z, target, impl=backend.impl, **options)


def case(shape: tuple[int, int], dtype: torch.dtype, seed: int = 0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    target = torch.randint(0, shape[1], shape[:1], generator=generator)
    target[1:2] = -100
    return [(torch.randn(shape, generator=generator) * 4).to(dtype), target]


@pytest.mark.reference
@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_matches_oracle(
    backend: Backend, dtype: torch.dtype, poisoned: None, shape: tuple[int, int], options: str
) -> None:
    logits, target = backend.put(*case(shape, dtype))
    given = OPTIONS[options]
    floor = 1.0 if shape[1] == 1 else 1e-30  # of one class everything cancels to nothing
    check(ours(backend, target, **given), peer(target, **given), [logits], floor=floor)


def test_a_large_vocabulary(backend: Backend) -> None:
    logits, target = backend.put(*case((2, 262144), torch.float32))
    check(ours(backend, target, **OPTIONS["all"]), peer(target, **OPTIONS["all"]), [logits])


@pytest.mark.parametrize("options", OPTIONS)
def test_extreme_logits(backend: Backend, options: str) -> None:
    given = OPTIONS[options]
    rows = [[1e4, -1e4, 0.0, 5.0], [-1e4, 1e4, 3.0, 1e-42], [1e-42, 2e-42, -1e-42, 0.0]]
    logits, target = backend.put(torch.tensor(rows), torch.tensor([0, 0, 1]))
    check(ours(backend, target, **given), peer(target, **given), [logits])


@pytest.mark.parametrize("options", ["plain", "smoothed", "z_loss"])
@pytest.mark.parametrize("absent", [[7], [0, 1, 2], [*range(5), *range(6, 50)]], ids=len)
def test_a_row_with_minus_infinity_is_the_row_without_it(
    backend: Backend, options: str, absent: list[int]
) -> None:
    given, target = OPTIONS[options], torch.tensor([5, 5])
    logits = torch.randn(2, 50)
    present = [i for i in range(50) if i not in absent]
    short = logits[:, present].clone().requires_grad_()
    expected = peer(torch.tensor([present.index(5)] * 2), **given)(short)
    (expected_grad,) = torch.autograd.grad(expected.sum(), short)
    logits[:, absent] = float("-inf")
    logits, target = backend.put(logits, target)
    logits.requires_grad_()
    loss = ours(backend, target, **given)(logits)
    (grad,) = torch.autograd.grad(loss.sum(), logits)
    assert torch.allclose(loss.cpu(), expected, atol=1e-6)
    assert (grad[:, absent] == 0).all()
    assert torch.allclose(grad[:, present].cpu(), expected_grad, atol=1e-6)


def test_a_soft_cap_makes_minus_infinity_finite(backend: Backend) -> None:
    logits, target = backend.put(torch.randn(2, 50), torch.tensor([5, 6]))
    logits[:, 7] = float("-inf")
    for some in (OPTIONS["capped"], OPTIONS["all"]):
        loss = ours(backend, target, **some)(logits)
        assert torch.allclose(loss, peer(target, **some)(logits), atol=1e-6)


@pytest.mark.parametrize("options", ["plain", "all"])
def test_a_nan_stays_in_its_row(backend: Backend, options: str) -> None:
    logits, target = backend.put(torch.randn(3, 40), torch.tensor([1, 2, 3]))
    logits[1, 30] = float("nan")
    logits.requires_grad_()
    loss = ours(backend, target, **OPTIONS[options])(logits)
    (grad,) = torch.autograd.grad(loss.sum(), logits)
    assert loss.isnan().tolist() == [False, True, False]
    assert grad.isnan().any(1).tolist() == [False, True, False]


def run_kernel(
    backend: Backend, logits: Tensor, target: Tensor, options: dict[str, Any], **given: Any
) -> dict[str, Tensor]:
    """The row kernel itself with every output poisoned before."""
    rows = logits.shape[0]
    number = torch.float64 if logits.dtype == torch.float64 else torch.float32
    names = ("loss", "logprob", "entropy", "lse")
    out = {
        name: torch.full((rows,), torch.nan, dtype=number, device=logits.device) for name in names
    }
    out["correct"] = torch.ones(rows, dtype=torch.bool, device=logits.device)
    kernels = launchers.cross_entropy(backend.impl)
    kernels.cross_entropy(logits, target, ignore_index=-100, **out, **options, **given)
    return out


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("cols", [5, 2049, 3072])
def test_statistics_of_each_row(
    backend: Backend, dtype: torch.dtype, options: str, cols: int
) -> None:
    given = OPTIONS[options]
    logits, target = case((5, cols), dtype)
    logits[2, 1:] = float("-inf")  # one class is left, entropy 0
    logits[3, 3] = float("-inf")
    logits[4, 2] = logits[4].amax()  # a tie counts
    target[2:] = torch.tensor([0, 4, 2])
    expected = token_losses(logits.double(), target, **given)
    same = token_losses(upcast(logits), target, **given)
    lse = torch.logsumexp(logits.double(), -1)
    out = run_kernel(backend, *backend.put(logits, target), given)
    assert out["correct"].tolist() == expected.correct.tolist() and out["correct"][4]
    for name in ("loss", "logprob", "entropy"):
        assert_as_good_as(
            out[name].cpu(),
            getattr(same, name),
            getattr(expected, name),
            tolerance=min(TOLERANCE[dtype], 3e-6),
            what=name,
        )
    if given.get("softcap") is None:
        lse[1] = 0
        assert torch.allclose(out["lse"].cpu().double(), lse, rtol=1e-6)
    assert out["loss"][1] == out["logprob"][1] == out["entropy"][1] == 0


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("strides", [(1000, 1000), (1008, 1024), (1001, 1016)], ids=str)
def test_gradient_in_place_elsewhere_and_from_lse(
    backend: Backend, dtype: torch.dtype, options: str, strides: tuple[int, int]
) -> None:
    given = OPTIONS[options]
    logits, target = backend.put(*case((3, 1000), dtype))
    room = [torch.full((3, s), 7.0, dtype=dtype, device=logits.device) for s in strides]
    room[1].fill_(float("nan"))
    x, grad = (r[:, :1000] for r in room)
    x.copy_(logits)
    number = torch.float64 if dtype == torch.float64 else torch.float32
    scale = torch.tensor([2.0, 3.0, -0.5], dtype=number, device=logits.device)
    out = run_kernel(backend, x, target, given, grad=grad)
    assert torch.equal(x, logits)
    again = torch.full_like(logits, float("nan"))
    kernels = launchers.cross_entropy(backend.impl)
    from_lse, one = (x, target, out["lse"]), torch.ones_like(scale)
    kernels.cross_entropy_bwd(*from_lse, one, again, ignore_index=-100, **given)
    assert torch.equal(again, grad)
    kernels.cross_entropy_bwd(*from_lse, scale, grad, ignore_index=-100, **given)
    run_kernel(backend, x, target, given, grad=x)
    assert torch.equal(x, again)
    assert (room[0][:, 1000:] == 7).all() and room[1][:, 1000:].isnan().all()
    exact = logits.double().requires_grad_()
    (oracle,) = torch.autograd.grad(peer(target, **given)(exact), exact, scale.double())
    same = logits.clone().requires_grad_()
    (theirs,) = torch.autograd.grad(peer(target, **given)(same), same, scale)
    assert_as_good_as(grad, theirs, oracle, tolerance=TOLERANCE[dtype])


@settings(max_examples=25, deadline=None)
@given(
    rows=st.integers(0, 9),
    cols=st.integers(1, 130),
    label_smoothing=st.sampled_from([0.0, 0.1, 1.0]),
    softcap=st.sampled_from([None, 0.5, 30.0]),
    z_loss=st.sampled_from([0.0, 1e-3]),
    ignored=st.booleans(),
    seed=st.integers(0, 99),
)
def test_any_shape_and_options(
    rows: int,
    cols: int,
    label_smoothing: float,
    softcap: float | None,
    z_loss: float,
    ignored: bool,
    seed: int,
) -> None:
    options = {"label_smoothing": label_smoothing, "softcap": softcap, "z_loss": z_loss}
    logits, target = case((rows, cols), torch.float64, seed)
    if ignored:
        target.fill_(-100)
    losses, grads = [], []
    for function in (lambda x: ops.cross_entropy(x, target, **options), peer(target, **options)):
        x = logits.clone().requires_grad_()
        losses.append(function(x))
        grads.append(torch.autograd.grad(losses[-1].sum(), x)[0])
    assert torch.allclose(*losses, rtol=1e-10, atol=1e-12)
    assert torch.allclose(*grads, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("impl", ["reference", "cpu"])
def test_gradcheck(impl: str, options: str) -> None:
    logits = torch.randn(4, 7, dtype=torch.float64, requires_grad=True)
    target, given = torch.tensor([0, 6, -100, 3]), OPTIONS[options]
    assert torch.autograd.gradcheck(
        lambda z: ops.cross_entropy(z, target, impl=impl, **given), (logits,)
    )


def test_results_do_not_keep_themselves_alive() -> None:
    import weakref

    logits = torch.randn(3, 7, requires_grad=True)
    loss = ops.cross_entropy(logits, torch.tensor([1, 2, 3]))
    node = weakref.ref(loss.grad_fn)
    del loss
    assert node() is None


@pytest.mark.parametrize("bad", [7, -1], ids=str)
def test_a_target_outside_the_classes_is_an_error(bad: int) -> None:
    with pytest.raises(ValueError, match=r"outside \[0, 7\)"):
        ops.cross_entropy(torch.randn(2, 7), torch.tensor([0, bad]))


@pytest.mark.parametrize(
    "option", [{"label_smoothing": 1.5}, {"softcap": 0.0}, {"z_loss": -1.0}], ids=str
)
def test_an_option_that_makes_no_sense_is_an_error(option: dict[str, float]) -> None:
    with pytest.raises(ValueError, match=next(iter(option))):
        ops.cross_entropy(torch.randn(2, 7), torch.tensor([0, 1]), **option)
