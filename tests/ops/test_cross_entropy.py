import pytest
import torch
from oracle import check
from torch import Tensor

from lora_engine import ops


def peer(target: Tensor):
    return lambda z: torch.nn.functional.cross_entropy(
        z if z.dtype == torch.float64 else z.float(), target, reduction="none"
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("shape", [(1, 1), (3, 63), (17, 1000), (2, 49152)], ids=str)
def test_matches_oracle(isa: str, poisoned: None, dtype: torch.dtype, shape: tuple) -> None:
    torch.manual_seed(0)
    target = torch.randint(0, shape[1], shape[:1])
    target[0] = -100
    logits = (torch.randn(shape) * 4).to(dtype)
    check(lambda z: ops.cross_entropy(z, target), peer(target), [logits])


def test_extreme_logits(isa: str) -> None:
    logits = torch.tensor([[1e4, -1e4, 0.0, 5.0], [-1e4, 1e4, float("-inf"), 1e-42]])
    target = torch.tensor([0, 0])
    check(lambda z: ops.cross_entropy(z, target), peer(target), [logits])


def test_a_column_of_minus_infinity_gets_no_gradient(isa: str) -> None:
    logits = torch.randn(3, 50)
    logits[:, 7] = float("-inf")
    logits.requires_grad_()
    loss = ops.cross_entropy(logits, torch.tensor([1, 2, 3]))
    (grad,) = torch.autograd.grad(loss.sum(), logits)
    assert loss.isfinite().all() and (grad[:, 7] == 0).all() and grad.isfinite().all()


@pytest.mark.parametrize("impl", ["reference", "cpu"])
def test_gradcheck(impl: str) -> None:
    logits = torch.randn(4, 7, dtype=torch.float64, requires_grad=True)
    target = torch.tensor([0, 6, -100, 3])
    assert torch.autograd.gradcheck(lambda z: ops.cross_entropy(z, target, impl=impl), (logits,))


@pytest.mark.parametrize("bad", [7, -1], ids=str)
def test_a_target_outside_the_classes_is_an_error(bad: int) -> None:
    with pytest.raises(ValueError, match=r"outside \[0, 7\)"):
        ops.cross_entropy(torch.randn(2, 7), torch.tensor([0, bad]))
