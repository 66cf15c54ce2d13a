"""Halves of a decoder layer over any base weight are those over a dense one."""

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from base_weights import BASES, group_over, kept
from oracle import TOLERANCE
from torch import Tensor

from lora_engine import backends, ops
from lora_engine.ops.layer.attention_block import attention_block
from lora_engine.ops.layer.blocks import Branch
from lora_engine.ops.layer.mlp_block import mlp_block
from lora_engine.testing import cu_seqlens, error

pytestmark = pytest.mark.skipif(
    not backends.extension_available(), reason="the C++ kernels cannot run here"
)

HIDDEN, HEAD_DIM = 16, 8
LENGTHS = (5, 9, 3)
TOKENS = sum(LENGTHS)
# The inner linears' outputs, and how many inputs the outer one has.
HALVES = {"mlp": ((24, 24), 24), "attention": ((HIDDEN, HEAD_DIM, HEAD_DIM), HIDDEN)}
VARIANTS = ("lora", "dora", "bias", "partial", "dropout", "routes")


def leaf(dtype: torch.dtype, *shape: int) -> Tensor:
    return (torch.randn(shape) * shape[-1] ** -0.5).to(dtype).requires_grad_()


def parts(outs: Sequence[int], features: int, dtype: torch.dtype, variant: str) -> Any:
    """Weights, adapters and biases of a group."""
    adapters: list[Any] = []
    for n in outs:
        magnitude = leaf(dtype, n) if variant == "dora" else None
        one = ops.LoraFactors(leaf(dtype, 3, features), leaf(dtype, n, 3), 0.5, magnitude)
        two = ops.LoraFactors(leaf(dtype, 2, features), leaf(dtype, n, 2), 0.5, adapter=1)
        adapters.append([one, two] if variant == "routes" else one)
    if variant == "partial":
        adapters[0] = None
    biases = [leaf(dtype, n) for n in outs] if variant == "bias" else None
    return [leaf(dtype, n, features).detach() for n in outs], adapters, biases


@pytest.mark.parametrize("base", [kind for kind in BASES if kind != "dense"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("half", HALVES)
def test_results_and_gradients(
    poisoned: None, half: str, variant: str, dtype: torch.dtype, base: str
) -> None:
    torch.manual_seed(0)
    outs, width = HALVES[half]
    inner, outer = parts(outs, HIDDEN, dtype, variant), parts((HIDDEN,), width, dtype, variant)
    for weights, *_ in (inner, outer):
        weights[:] = kept(base, weights)
    x, weight = leaf(dtype, TOKENS, HIDDEN), leaf(dtype, HIDDEN)
    angles = torch.randn(TOKENS, HEAD_DIM // 2).repeat(1, 2)
    options: dict[str, Any] = {}
    if variant == "dropout":
        options["dropouts"] = ops.Dropout(0.3, 77), ops.Dropout(0.2, 78)
    if variant == "routes":
        options["routes"] = torch.arange(TOKENS) % 3 - 1
    dy = torch.randn(x.shape).to(dtype)
    both = []
    for kind in (base, "dense"):
        branch = Branch(group_over(kind, *inner), group_over(kind, *outer), **options)
        norm = ops.PreNorm(weight, 1e-5)
        if half == "mlp":
            y = mlp_block(x, norm, branch)
        else:
            tables = cu_seqlens(LENGTHS), angles.cos(), angles.sin()
            y = attention_block(x, norm, branch, *tables, head_dim=HEAD_DIM)
        leaves = [x, weight, *branch.inner.tensors(), *branch.outer.tensors()]
        given = [t for t in leaves if t is not None]
        both.append([y.detach(), *torch.autograd.grad(y, given, dy)])
    for i, (mine, expected) in enumerate(zip(*both, strict=True)):
        assert error(mine, expected) < 10 * TOLERANCE[dtype], f"tensor {i}"
