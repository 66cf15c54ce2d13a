"""The halves of a decoder layer against the same in plain PyTorch: results, gradients, cost."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from oracle import TOLERANCE
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
BOUNDS = cu_seqlens(LENGTHS)


def make_group(outs: tuple[int, ...], features: int, dtype: torch.dtype, kind: str) -> Any:
    def leaf(*shape: int) -> Tensor:
        return torch.randn(shape).to(dtype).requires_grad_()

    adapters = [
        ops.LoraFactors(leaf(3, features), leaf(n, 3), 0.5, leaf(n).abs().detach().requires_grad_())
        if kind == "dora"
        else ops.LoraFactors(leaf(3, features), leaf(n, 3), 0.5)
        for n in outs
    ]
    if kind == "partial":
        adapters[0] = None  # type: ignore[call-overload]
    weights = [(torch.randn(n, features) * features**-0.5).to(dtype) for n in outs]
    biases = [leaf(n) for n in outs] if kind == "bias" else None
    return ops.LoraGroup.dense(weights, adapters, biases)


def rotation(dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    half = torch.randn(TOKENS, HEAD_DIM // 2)
    angles = torch.cat((half, half), dim=-1).to(dtype)
    return angles.cos(), angles.sin()


class Mlp:
    """The MLP half: fused, and in plain PyTorch on the dtype that the leaves have."""

    head_norms = None

    def __init__(self, dtype: torch.dtype, kind: str) -> None:
        self.inner = make_group((WIDTH, WIDTH), HIDDEN, dtype, kind)
        self.outer = make_group((HIDDEN,), WIDTH, dtype, kind)

    def fused(self, x: Tensor, weight: Tensor, grad_tail: int = 0) -> Tensor:
        branch = Branch(self.inner, self.outer, grad_tail=grad_tail)
        return mlp_block(x, PreNorm(weight, EPS), branch)

    def plain(self, x: Tensor, weight: Tensor) -> Tensor:
        normed = reference.rms_norm(x, weight, EPS)
        gate, up = ops.lora_linear(normed, self.inner, impl="reference")
        hidden = reference.glu(gate, up)
        return x + ops.lora_linear(hidden, self.outer, impl="reference")[0]


class Attention:
    """The attention half, likewise."""

    head_norms: tuple[PreNorm, PreNorm] | None = None

    def __init__(self, dtype: torch.dtype, kind: str) -> None:
        self.inner = make_group((HIDDEN, 16, 16), HIDDEN, dtype, kind)
        self.outer = make_group((HIDDEN,), HIDDEN, dtype, kind)
        self.cos, self.sin = rotation(torch.float64 if dtype == torch.float64 else torch.float32)

    def fused(self, x: Tensor, weight: Tensor, grad_tail: int = 0) -> Tensor:
        branch = Branch(self.inner, self.outer, grad_tail=grad_tail)
        return attention_block(
            x,
            PreNorm(weight, EPS),
            branch,
            BOUNDS,
            self.cos,
            self.sin,
            head_dim=HEAD_DIM,
            head_norms=self.head_norms,
        )

    def plain(self, x: Tensor, weight: Tensor) -> Tensor:
        normed = reference.rms_norm(x, weight, EPS)
        qkv = ops.lora_linear(normed, self.inner, impl="reference")
        heads = [part.reshape(TOKENS, -1, HEAD_DIM) for part in qkv]
        for i, norm in enumerate(self.head_norms or ()):
            heads[i] = reference.rms_norm(heads[i], norm.weight, norm.eps, offset=norm.offset)
        out = reference.attention(*heads, BOUNDS, cos=self.cos, sin=self.sin)
        return x + ops.lora_linear(out.reshape(x.shape), self.outer, impl="reference")[0]


class NormedHeads(Attention):
    """The attention half with a norm for q's heads and one for k's, as Qwen3 has them."""

    def __init__(self, dtype: torch.dtype, kind: str) -> None:
        super().__init__(dtype, kind)
        weights = [torch.randn(HEAD_DIM).to(dtype).requires_grad_() for _ in range(2)]
        self.head_norms = PreNorm(weights[0], EPS), PreNorm(weights[1], EPS, offset=1.0)


BLOCKS: dict[str, Callable[..., Any]] = {
    "mlp": Mlp,
    "attention": Attention,
    "normed_heads": NormedHeads,
}


def leaves_of(block: Any, x: Tensor, weight: Tensor) -> list[Tensor]:
    factors = [*block.inner.tensors(), *block.outer.tensors()]
    norms = block.head_norms or ()
    return [x, weight, *(n.weight for n in norms), *(f for f in factors if f is not None)]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kind", ["lora", "dora", "bias", "partial"])
@pytest.mark.parametrize("name", BLOCKS)
def test_result_and_gradients(poisoned: None, name: str, kind: str, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    block = BLOCKS[name](dtype, kind)
    x = torch.randn(1, TOKENS, HIDDEN).to(dtype).requires_grad_()
    weight = torch.randn(HIDDEN).to(dtype).requires_grad_()
    leaves = leaves_of(block, x, weight)
    ours, theirs = block.fused(x, weight, grad_tail=4), block.plain(x, weight)
    tolerance = 10 * TOLERANCE[dtype]
    assert ours.shape == x.shape and error(ours, theirs) < tolerance
    dy = torch.randn(x.shape).to(dtype)
    grads = torch.autograd.grad(ours, leaves, dy)
    for i, (mine, plain) in enumerate(
        zip(grads, torch.autograd.grad(theirs, leaves, dy), strict=True)
    ):
        assert error(mine, plain) < tolerance, f"gradient {i}"


@pytest.mark.parametrize("name", BLOCKS)
def test_gradients_alone_are_the_same(name: str) -> None:
    """A frozen norm, an input without a gradient (the first layer), single factors."""
    torch.manual_seed(0)
    block = BLOCKS[name](torch.float32, "lora")
    x, weight = torch.randn(TOKENS, HIDDEN), torch.randn(HIDDEN)
    leaves = leaves_of(block, x.requires_grad_(), weight.requires_grad_())
    dy = torch.randn(x.shape)
    together = torch.autograd.grad(block.fused(x, weight), leaves, dy)
    for i, leaf in enumerate(leaves):
        for other in leaves:
            other.requires_grad_(other is leaf)
        (alone,) = torch.autograd.grad(block.fused(x, weight), leaf, dy)
        # Without a gradient of x the norm's output is made by another pass: equal but for rounding.
        assert error(alone, together[i]) < 1e-5, f"gradient {i}"


@pytest.mark.parametrize("name", BLOCKS)
def test_two_runs_give_the_same_bits(name: str) -> None:
    torch.manual_seed(0)
    block = BLOCKS[name](torch.bfloat16, "lora")
    x = torch.randn(TOKENS, HIDDEN).bfloat16().requires_grad_()
    weight = torch.randn(HIDDEN).bfloat16().requires_grad_()
    leaves = leaves_of(block, x, weight)
    runs = [torch.autograd.grad(block.fused(x, weight).float().sum(), leaves) for _ in range(2)]
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


def test_errors_name_what_does_not_fit() -> None:
    block = Mlp(torch.float32, "lora")
    with pytest.raises(ValueError, match="norm"):
        block.fused(torch.randn(TOKENS, HIDDEN), torch.randn(HIDDEN + 1))
    with pytest.raises(ValueError, match=r"output \(32,\) does not fit x"):
        block.fused(torch.randn(TOKENS, 16), torch.randn(16))
    attention = Attention(torch.float32, "lora")
    with pytest.raises(ValueError, match="heads of 7"):
        attention_block(
            torch.randn(TOKENS, HIDDEN),
            PreNorm(torch.randn(HIDDEN), EPS),
            Branch(attention.inner, attention.outer),
            BOUNDS,
            attention.cos,
            attention.sin,
            head_dim=7,
        )
    normed = NormedHeads(torch.float32, "lora")
    wide = PreNorm(torch.randn(HEAD_DIM + 1), EPS)
    normed.head_norms = wide, wide
    with pytest.raises(ValueError, match=r"the heads' norm \[9\] float32 does not fit heads of 8"):
        normed.fused(torch.randn(TOKENS, HIDDEN), torch.randn(HIDDEN))
