"""Halves of a decoder layer over any base weight are those over a dense one."""

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from base_weights import BASES, group_over, kept
from implementations import CPU, Backend, implementations
from oracle import TOLERANCE
from torch import Tensor

from lora_engine import ops
from lora_engine.ops.layer.attention_block import attention_block
from lora_engine.ops.layer.blocks import Branch
from lora_engine.ops.layer.mlp_block import mlp_block
from lora_engine.testing import cu_seqlens, error

OPERATION = "lora_linear"  # whose implementations may make a half's products
HIDDEN, HEAD_DIM = 16, 8
LENGTHS = (5, 9, 3)
TOKENS = sum(LENGTHS)
# The inner linears' outputs, and how many inputs the outer one has.
HALVES = {"mlp": ((24, 24), 24), "attention": ((HIDDEN, HEAD_DIM, HEAD_DIM), HIDDEN)}
VARIANTS = ("lora", "dora", "bias", "partial", "dropout", "routes")


def leaf(backend: Backend, dtype: torch.dtype, *shape: int) -> Tensor:
    values = (torch.randn(shape) * shape[-1] ** -0.5).to(dtype)
    return backend.put(values)[0].requires_grad_()


def parts(
    backend: Backend, outs: Sequence[int], features: int, dtype: torch.dtype, variant: str
) -> Any:
    """Weights, adapters and biases of a group."""

    def factors(n: int, rank: int, magnitude: Tensor | None = None, number: int = 0) -> Any:
        pair = leaf(backend, dtype, rank, features), leaf(backend, dtype, n, rank)
        return ops.LoraFactors(*pair, 0.5, magnitude, adapter=number)

    adapters: list[Any] = []
    for n in outs:
        one = factors(n, 3, leaf(backend, dtype, n) if variant == "dora" else None)
        adapters.append([one, factors(n, 2, number=1)] if variant == "routes" else one)
    if variant == "partial":
        adapters[0] = None
    biases = [leaf(backend, dtype, n) for n in outs] if variant == "bias" else None
    return [leaf(backend, dtype, n, features).detach() for n in outs], adapters, biases


other_bases = pytest.mark.parametrize("base", [kind for kind in BASES if kind != "dense"])
every_half = pytest.mark.parametrize("half", HALVES)


@other_bases
@pytest.mark.parametrize("variant", VARIANTS)
@every_half
def test_variants(backend: Backend, poisoned: None, half: str, variant: str, base: str) -> None:
    only_compiled(backend)
    check_half(backend, torch.float32, half, variant, base)


@other_bases
@every_half
def test_dtypes(backend: Backend, dtype: torch.dtype, poisoned: None, half: str, base: str) -> None:
    only_compiled(backend)
    check_half(backend, dtype, half, "lora", base)


@pytest.mark.slow
@other_bases
@every_half
def test_kernels_for_a_gpu_without_one(
    backend: Backend, poisoned: None, half: str, base: str
) -> None:
    check_half(backend, torch.float32, half, "lora", base)


def only_compiled(backend: Backend) -> None:
    if backend.device == CPU and backend.impl in ("triton", "cuda"):
        pytest.skip("seconds a case: the slow test is for it")


def check_half(backend: Backend, dtype: torch.dtype, half: str, variant: str, base: str) -> None:
    """Results and gradients over the base are those over a dense one of the same weights."""
    if backend.impl not in implementations(f"{half}_block"):
        pytest.skip(f"{backend.impl} has no kernels for all of it")
    torch.manual_seed(0)
    outs, width = HALVES[half]
    inner = parts(backend, outs, HIDDEN, dtype, variant)
    outer = parts(backend, (HIDDEN,), width, dtype, variant)
    for weights, *_ in (inner, outer):
        weights[:] = kept(base, weights)
    x, weight = leaf(backend, dtype, TOKENS, HIDDEN), leaf(backend, dtype, HIDDEN)
    angles = torch.randn(TOKENS, HEAD_DIM // 2).repeat(1, 2)
    tables = backend.put(cu_seqlens(LENGTHS), angles.cos(), angles.sin())
    options: dict[str, Any] = {}
    if variant == "dropout":
        options["dropouts"] = ops.Dropout(0.3, 77), ops.Dropout(0.2, 78)
    if variant == "routes":
        options["routes"] = torch.arange(TOKENS, device=x.device) % 3 - 1
    dy = leaf(backend, dtype, TOKENS, HIDDEN).detach()
    both = []
    for kind in (base, "dense"):
        branch = Branch(group_over(kind, *inner), group_over(kind, *outer), **options)
        norm, impl = ops.PreNorm(weight, 1e-5), backend.impl
        if half == "mlp":
            y = mlp_block(x, norm, branch, impl=impl)
        else:
            y = attention_block(x, norm, branch, *tables, head_dim=HEAD_DIM, impl=impl)
        leaves = [x, weight, *branch.inner.tensors(), *branch.outer.tensors()]
        given = [t for t in leaves if t is not None]
        both.append([y.detach(), *torch.autograd.grad(y, given, dy)])
    for i, (mine, expected) in enumerate(zip(*both, strict=True)):
        assert error(mine, expected) < 10 * TOLERANCE[dtype], f"tensor {i}"
