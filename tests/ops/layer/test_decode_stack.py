"""New tokens through prepared layers: what the layers' formulas make of the whole texts."""

import pytest
import torch
from adapted_linears import KINDS, Linears, group_of
from implementations import CPU, Backend
from oracle import TOLERANCE
from torch import Tensor

from lora_engine import ops, reference
from lora_engine.ops.layer.decode_stack import DecodedLayer, DecodeStack
from lora_engine.testing import assert_as_good_as, cu_seqlens
from lora_engine.values import AdaptedLinear, PreNorm

OPERATION = "few_rows"  # whose kernels make a stack's products
HIDDEN, WIDTH, HEADS, KV_HEADS, HEAD_DIM, EPS = 32, 48, 4, 2, 8, 1e-5
KV = KV_HEADS * HEAD_DIM
TEXTS, LENGTH, LAYERS = 2, 5, 2
SHAPES = {
    "qkv": ((HEADS * HEAD_DIM, KV, KV), HIDDEN),
    "output": ((HIDDEN,), HEADS * HEAD_DIM),
    "gate_up": ((WIDTH, WIDTH), HIDDEN),
    "down": ((HIDDEN,), WIDTH),
}


class Layer:
    """A layer's weights, as a stack takes them and as the reference does."""

    def __init__(self, backend: Backend, dtype: torch.dtype, kind: str) -> None:
        self.linears = {
            name: Linears.make(backend, outs, features, dtype, kind)
            for name, (outs, features) in SHAPES.items()
        }
        self.norms = backend.put(*(torch.randn(HIDDEN).to(dtype) for _ in range(2)))
        self.of_heads = backend.put(*(torch.randn(HEAD_DIM).to(dtype) for _ in range(2)))
        self.window = 3 if kind == "bias" else 0
        self.norms_heads = kind in ("lora", "several")

    def parts(self, dtype: torch.dtype) -> dict[str, list[AdaptedLinear]]:
        return {
            name: linears.take((leaf.to(dtype) for leaf in linears.leaves), dtype)
            for name, linears in self.linears.items()
        }

    def pre_norms(self, dtype: torch.dtype) -> list[PreNorm]:
        return [PreNorm(weight.to(dtype), EPS) for weight in self.norms]

    def head_norms(self, dtype: torch.dtype) -> tuple[PreNorm, PreNorm] | None:
        q, k = (PreNorm(weight.to(dtype), EPS, offset=1.0) for weight in self.of_heads)
        return (q, k) if self.norms_heads else None

    def prepared(self, dtype: torch.dtype) -> DecodedLayer:
        before_attention, before_mlp = self.pre_norms(dtype)
        groups = {name: group_of(linears) for name, linears in self.parts(dtype).items()}
        return DecodedLayer(
            attention_norm=before_attention,
            head_norms=self.head_norms(dtype),
            mlp_norm=before_mlp,
            activation="silu",
            head_dim=HEAD_DIM,
            softmax_scale=HEAD_DIM**-0.5,
            window=self.window,
            **groups,
        )

    def formula(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """Of whole texts, packed."""
        parts, (before_attention, before_mlp) = self.parts(x.dtype), self.pre_norms(x.dtype)
        x = reference.attention_block(
            x,
            before_attention,
            parts["qkv"],
            parts["output"][0],
            cu_seqlens([LENGTH] * TEXTS),
            cos,
            sin,
            head_dim=HEAD_DIM,
            window=self.window,
            head_norms=self.head_norms(x.dtype),
        )
        return reference.mlp_block(x, before_mlp, parts["gate_up"], parts["down"][0])


def token_by_token(stack: DecodeStack, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """[texts, length, H]: each token of x with the tokens before it in a cache."""
    rows = TEXTS * LENGTH
    held = [[x.new_full((rows, KV), torch.nan) for _ in range(2)] for _ in range(LAYERS)]
    firsts = torch.arange(TEXTS) * LENGTH
    made = []
    for at in range(LENGTH):
        spans = torch.stack([firsts, torch.full_like(firsts, at + 1)], dim=1)
        bounds = torch.arange(TEXTS + 1, dtype=torch.int32)
        caches = [ops.CacheRows(*kept, firsts + at, spans, bounds) for kept in held]
        turned = (table[at].expand(TEXTS, -1) for table in (cos, sin))
        made.append(stack(x[:, at].clone(), *turned, caches))
    return torch.stack(made, dim=1)


@pytest.mark.parametrize("kind", KINDS)
def test_texts_token_by_token(backend: Backend, dtype: torch.dtype, kind: str) -> None:
    """A cache's rows are NaN until a token is written there: none is read before."""
    torch.manual_seed(0)
    layers = [Layer(backend, dtype, kind) for _ in range(LAYERS)]
    stack = DecodeStack.prepared([layer.prepared(dtype) for layer in layers], TEXTS)
    assert stack is not None
    x = torch.randn(TEXTS, LENGTH, HIDDEN).to(dtype)
    angles = torch.cat([torch.randn(LENGTH, HEAD_DIM // 2)] * 2, dim=-1)
    cos, sin = angles.cos(), angles.sin()

    def formula(dtype: torch.dtype) -> Tensor:
        rows = x.to(dtype).view(-1, HIDDEN)
        for layer in layers:
            rows = layer.formula(rows, cos.repeat(TEXTS, 1), sin.repeat(TEXTS, 1))
        return rows.view(x.shape)

    found = token_by_token(stack, x, cos, sin)
    exact, same = formula(torch.float64), formula(dtype)
    assert_as_good_as(found, same, exact, tolerance=TOLERANCE[dtype])


def test_factors_that_the_kernel_cannot_read_prepare_nothing() -> None:
    layer = Layer(Backend("cpu", CPU), torch.float32, "lora")
    linears = layer.linears["down"]
    linears.leaves[0] = linears.leaves[0].t().contiguous().t()
    assert DecodeStack.prepared([layer.prepared(torch.float32)], TEXTS) is None
