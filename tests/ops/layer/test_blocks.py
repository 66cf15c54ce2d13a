"""The halves of a decoder layer on every implementation, against their formulas in float64."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from adapted_linears import Linears, group_of
from implementations import CPU, Backend, implementations
from oracle import TOLERANCE, check
from torch import Tensor

from lora_engine import ops, reference
from lora_engine.ops.layer.attention_block import attention_block
from lora_engine.ops.layer.blocks import Branch
from lora_engine.ops.layer.mlp_block import mlp_block
from lora_engine.testing import cu_seqlens, error
from lora_engine.values import PreNorm

HIDDEN, WIDTH, HEAD_DIM, EPS = 32, 48, 8, 1e-5
LENGTHS = (5, 9, 3)
TOKENS = sum(LENGTHS)
VARIANTS = ("lora", "dora", "bias", "lora_bias", "partial", "several", "routes", "dropout")


class Mlp:
    """The MLP half, as a function of its leaves: x, the norm's weight, then all factors'."""

    operation = "mlp_block"
    inner, outer = (WIDTH, WIDTH), WIDTH

    def __init__(self, backend: Backend, dtype: torch.dtype, variant: str) -> None:
        torch.manual_seed(0)
        self.backend, self.options = backend, {}
        kind = {"dropout": "lora", "routes": "several"}.get(variant, variant)
        self.groups = [
            Linears.make(backend, self.inner, HIDDEN, dtype, kind),
            Linears.make(backend, (HIDDEN,), self.outer, dtype, kind),
        ]
        norms = torch.randn(TOKENS, HIDDEN), torch.randn(HIDDEN), *self.more_norms()
        self.leaves = [*backend.put(*(x.to(dtype) for x in norms))]
        self.leaves += [*self.groups[0].leaves, *self.groups[1].leaves]
        if variant == "dropout":
            self.options["dropouts"] = ops.Dropout(0.3, 77), ops.Dropout(0.2, 78)
        if variant == "routes":
            self.options["routes"] = torch.arange(TOKENS, device=backend.device) % 3 - 1

    def more_norms(self) -> Sequence[Tensor]:
        return ()

    def parts(self, leaves: Sequence[Tensor]) -> Any:
        x, weight, *rest = leaves
        taken = iter(rest[len(self.more_norms()) :])
        inner, outer = (group.take(taken, x.dtype) for group in self.groups)
        return x, PreNorm(weight, EPS), inner, outer, rest

    def branch(self, inner: Any, outer: Any, grad_padding_columns: int) -> Branch:
        return Branch(
            group_of(inner),
            group_of(outer),
            grad_padding_columns=grad_padding_columns,
            **self.options,
        )

    def ours(self, *leaves: Tensor, grad_padding_columns: int = 4) -> Tensor:
        x, norm, inner, outer, _ = self.parts(leaves)
        branch = self.branch(inner, outer, grad_padding_columns)
        return mlp_block(x, norm, branch, impl=self.backend.impl)

    def formula(self, *leaves: Tensor) -> Tensor:
        x, norm, inner, (outer,), _ = self.parts(leaves)
        return reference.mlp_block(x, norm, inner, outer, **self.options)


class Attention(Mlp):
    """The attention half, likewise."""

    operation = "attention_block"
    inner, outer = (HIDDEN, 16, 16), HIDDEN

    def __init__(self, backend: Backend, dtype: torch.dtype, variant: str) -> None:
        super().__init__(backend, dtype, variant)
        angles = torch.cat([torch.randn(TOKENS, HEAD_DIM // 2)] * 2, dim=-1)
        # Kernels read the tables in float32, so that others gain nothing by more.
        self.bounds, self.cos, self.sin = backend.put(
            cu_seqlens(LENGTHS), angles.cos(), angles.sin()
        )

    def head_norms(self, rest: Sequence[Tensor]) -> dict[str, Any]:
        return {}

    def ours(self, *leaves: Tensor, grad_padding_columns: int = 4) -> Tensor:
        x, norm, inner, outer, rest = self.parts(leaves)
        return attention_block(
            x,
            norm,
            self.branch(inner, outer, grad_padding_columns),
            self.bounds,
            self.cos,
            self.sin,
            head_dim=HEAD_DIM,
            impl=self.backend.impl,
            **self.head_norms(rest),
        )

    def formula(self, *leaves: Tensor) -> Tensor:
        x, norm, inner, (outer,), rest = self.parts(leaves)
        more = {"head_dim": HEAD_DIM, **self.head_norms(rest), **self.options}
        tables = self.bounds, self.cos, self.sin
        return reference.attention_block(x, norm, inner, outer, *tables, **more)


class NormedHeads(Attention):
    """The attention half with a norm for q's heads and one for k's, as Qwen3 has them."""

    def more_norms(self) -> Sequence[Tensor]:
        return torch.ones(HEAD_DIM) * 0.7, torch.linspace(-0.5, 1.5, HEAD_DIM)

    def head_norms(self, rest: Sequence[Tensor]) -> dict[str, Any]:
        return {"head_norms": (PreNorm(rest[0], EPS), PreNorm(rest[1], EPS, offset=1.0))}


HALVES = {"mlp": Mlp, "attention": Attention, "normed_heads": NormedHeads}
every_half = pytest.mark.parametrize("name", HALVES)


def half_of(name: str, backend: Backend, dtype: torch.dtype, variant: str = "lora") -> Mlp:
    half = HALVES[name]
    if backend.impl not in (*implementations(half.operation), "reference"):
        pytest.skip(f"{backend.impl} has no kernels for all of it")
    return half(backend, dtype, variant)


OPERATION = "lora_linear"  # whose implementations may make a half's products


@pytest.mark.reference
@pytest.mark.parametrize("variant", VARIANTS)
@every_half
def test_result_and_gradients(
    backend: Backend, dtype: torch.dtype, poisoned: None, name: str, variant: str
) -> None:
    half = half_of(name, backend, dtype, variant)
    # One operation's rounding is the next one's input: more than one operation alone may differ.
    check(half.ours, half.formula, half.leaves, alone=False, tolerance=3 * TOLERANCE[dtype])


@pytest.mark.reference
@every_half
def test_without_gradients(backend: Backend, name: str) -> None:
    half = half_of(name, backend, torch.float32)
    leaves = [x.requires_grad_() for x in half.leaves]
    with torch.no_grad():
        y, exact = half.ours(*leaves), half.formula(*(x.double() for x in leaves))
    assert not y.requires_grad
    assert error(y, exact) < 1e-5


@every_half
def test_gradients_alone_are_the_same(backend: Backend, name: str) -> None:
    """A frozen norm, an input without a gradient (the first layer), single factors."""
    half = half_of(name, backend, torch.float32)
    leaves = [x.requires_grad_() for x in half.leaves]
    dy = torch.randn(leaves[0].shape).to(leaves[0])
    together = torch.autograd.grad(half.ours(*leaves), leaves, dy)
    for i, leaf in enumerate(leaves):
        for other in leaves:
            other.requires_grad_(other is leaf)
        (alone,) = torch.autograd.grad(half.ours(*leaves), leaf, dy)
        # Without a gradient of x the norm's output is made by another pass: equal but for rounding.
        assert error(alone, together[i]) < 1e-5, f"gradient {i}"


@every_half
def test_two_runs_give_the_same_bits(backend: Backend, name: str) -> None:
    half = half_of(name, backend, torch.bfloat16)
    leaves = [x.requires_grad_() for x in half.leaves]
    runs = [torch.autograd.grad(half.ours(*leaves).float().sum(), leaves) for _ in range(2)]
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


def test_errors_name_what_does_not_fit() -> None:
    cpu = Backend("cpu", CPU)
    half = Mlp(cpu, torch.float32, "lora")
    with pytest.raises(ValueError, match="norm"):
        half.ours(half.leaves[0], torch.randn(HIDDEN + 1), *half.leaves[2:])
    with pytest.raises(ValueError, match=r"output \(32,\) does not fit x"):
        half.ours(torch.randn(TOKENS, 16), torch.randn(16), *half.leaves[2:])
    attention = Attention(cpu, torch.float32, "lora")
    x, norm, inner, outer, _ = attention.parts(attention.leaves)
    given = x, norm, attention.branch(inner, outer, 0), attention.bounds
    tables = attention.cos, attention.sin
    with pytest.raises(ValueError, match="heads of 7"):
        attention_block(*given, *tables, head_dim=7)
    wide = PreNorm(torch.randn(HEAD_DIM + 1), EPS)
    with pytest.raises(ValueError, match=r"the heads' norm \[9\] float32 does not fit heads of 8"):
        attention_block(*given, *tables, head_dim=HEAD_DIM, head_norms=(wide, replace(wide)))
    for short in (slice(TOKENS - 1), (slice(None), slice(HEAD_DIM - 2))):
        cut = [table[short] for table in tables]
        with pytest.raises(ValueError, match="do not fit 17 tokens and heads of 8"):
            attention_block(*given, *cut, head_dim=HEAD_DIM)
