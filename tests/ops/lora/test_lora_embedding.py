"""An embedding with LoRA against its formula in float64, and that against plain indexing."""

import pytest
import torch
from implementations import Backend
from oracle import check
from torch import Tensor

from lora_engine import ops, reference

OPERATION = "lora_embedding"
SCALING, VOCABULARY, WIDTH = 0.5, 11, 6
KINDS = ("one", "several", "routes", "padding")


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", [(7,), (2, 5), (0,)], ids=str)
def test_result_and_gradients(
    backend: Backend, dtype: torch.dtype, shape: tuple[int, ...], kind: str
) -> None:
    torch.manual_seed(0)
    ranks = (3,) if kind == "one" else (3, 2)
    ids = torch.randint(0, VOCABULARY, shape, device=backend.device)
    pairs = [x for r in ranks for x in (torch.randn(r, VOCABULARY), torch.randn(WIDTH, r))]
    weight, *leaves = backend.put(*(x.to(dtype) for x in (torch.randn(VOCABULARY, WIDTH), *pairs)))
    options: dict[str, object] = {}
    if kind == "routes":
        options["routes"] = torch.arange(ids.numel(), device=backend.device).view(shape) % 3 - 1
    if kind == "padding":
        options["padding_idx"] = 4

    def adapters(leaves: tuple[Tensor, ...]) -> list[ops.LoraFactors]:
        pairs = zip(leaves[::2], leaves[1::2], strict=True)
        return [ops.LoraFactors(a, b, SCALING, None, i) for i, (a, b) in enumerate(pairs)]

    check(
        lambda *given: ops.lora_embedding(ids, weight, adapters(given), **options),
        lambda *given: reference.lora_embedding(
            ids, weight.to(given[0].dtype), adapters(given), **options
        ),
        leaves,
        tolerance=2e-2 if dtype in (torch.bfloat16, torch.float16) else None,
    )


def test_the_formula_is_plain_indexing() -> None:
    ids, weight = torch.tensor([[3, 0], [4, 3]]), torch.randn(VOCABULARY, WIDTH)
    pairs = [(torch.randn(r, VOCABULARY), torch.randn(WIDTH, r)) for r in (2, 5)]
    adapters = [ops.LoraFactors(a, b, SCALING, None, i) for i, (a, b) in enumerate(pairs)]
    shares = [SCALING * a.T[ids] @ b.T for a, b in pairs]
    both = reference.lora_embedding(ids, weight, adapters)
    assert torch.allclose(both, weight[ids] + shares[0] + shares[1], atol=1e-5)
    routes = torch.tensor([[0, 1], [-1, 0]])
    routed = reference.lora_embedding(ids, weight, adapters, routes=routes)
    for place, share in {(0, 0): shares[0], (0, 1): shares[1], (1, 0): 0 * shares[0]}.items():
        expected = (weight[ids] + share)[place]
        assert torch.allclose(routed[place], expected, atol=1e-5)


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
