import pytest
import torch
from torch import Tensor

from lora_engine import ops

SCALING = 0.5


def plain(ids: Tensor, weight: Tensor, lora_a: Tensor, lora_b: Tensor) -> Tensor:
    return weight[ids] + SCALING * lora_a.T[ids] @ lora_b.T


@pytest.mark.parametrize("shape", [(7,), (2, 5), (0,)], ids=str)
def test_result_and_gradients(shape: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    ids = torch.randint(0, 11, shape)
    weight = torch.randn(11, 6)
    pair = [torch.randn(3, 11, requires_grad=True), torch.randn(6, 3, requires_grad=True)]
    y = ops.lora_embedding(ids, weight, [ops.LoraFactors(pair[0], pair[1], SCALING)])
    expected = plain(ids, weight, *pair)
    assert torch.allclose(y, expected, atol=1e-6)
    dy = torch.randn(y.shape)
    grads = zip(
        torch.autograd.grad(y, pair, dy), torch.autograd.grad(expected, pair, dy), strict=True
    )
    assert all(torch.allclose(ours, theirs, atol=1e-5) for ours, theirs in grads)


def test_rows_are_routed() -> None:
    ids, weight = torch.arange(4), torch.randn(11, 6)
    pairs = [(torch.randn(r, 11), torch.randn(6, r)) for r in (2, 5)]
    adapters = [ops.LoraFactors(a, b, SCALING, None, i) for i, (a, b) in enumerate(pairs)]
    y = ops.lora_embedding(ids, weight, adapters, routes=torch.tensor([0, 1, -1, 1]))
    for row, adapter in enumerate((0, 1, None, 1)):
        expected = weight[row] if adapter is None else plain(ids, weight, *pairs[adapter])[row]
        assert torch.allclose(y[row], expected, atol=1e-6)


def test_gradcheck() -> None:
    ids, weight = torch.tensor([0, 2, 2]), torch.randn(4, 5, dtype=torch.float64)
    pair = [
        torch.randn(shape, dtype=torch.float64, requires_grad=True) for shape in ((2, 4), (5, 2))
    ]
    assert torch.autograd.gradcheck(
        lambda a, b: ops.lora_embedding(ids, weight, [ops.LoraFactors(a, b, SCALING)]), pair
    )


def test_errors_name_the_shapes() -> None:
    factors = ops.LoraFactors(torch.randn(2, 4), torch.randn(5, 2), 1.0)
    with pytest.raises(ValueError, match=r"lora_a \[2, 4\] float32 .* weight \[9, 5\] float32"):
        ops.lora_embedding(torch.tensor([0]), torch.randn(9, 5), [factors])
