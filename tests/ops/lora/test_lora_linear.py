from collections.abc import Callable
from typing import Any

import pytest
import torch
from base_weights import LOSSLESS, group_over
from hypothesis import given, settings
from hypothesis import strategies as st
from implementations import Backend
from oracle import check
from torch import Tensor

from lora_engine import ops, reference
from lora_engine.ops import augmented
from lora_engine.values import AdaptedLinear

OPERATION = "lora_linear"


def factors(
    out: tuple[int, ...], ranks: tuple[int | None, ...], features: int, dtype: torch.dtype
) -> list[tuple[Tensor, Tensor] | None]:
    return [
        None if r is None else (torch.randn(r, features).to(dtype), torch.randn(n, r).to(dtype))
        for n, r in zip(out, ranks, strict=True)
    ]


Group = Callable[..., ops.LoraGroup]


@pytest.fixture(params=LOSSLESS, scope="module")
def group(request: pytest.FixtureRequest) -> Group:
    """Makes a group of weights and of each one's A and B, over each base that keeps them."""

    def make(weights: list[Tensor], pairs: list[Any], **biases: Any) -> ops.LoraGroup:
        adapters = [None if p is None else ops.LoraFactors(p[0], p[1], 0.5) for p in pairs]
        return group_over(request.param, weights, adapters, **biases)

    return make


def linears(x: Tensor, weights: list[Tensor], pairs: list) -> Tensor:
    """The group's outputs side by side, each linear by itself in plain PyTorch."""
    weights = [w.to(x.dtype) for w in weights]
    outputs = [
        reference.lora_linear(x, AdaptedLinear(w, [] if p is None else [ops.LoraFactors(*p, 0.5)]))
        for w, p in zip(weights, pairs, strict=True)
    ]
    return torch.cat(outputs, -1)


GROUPS = {
    "single": ((24,), (4,)),
    "qkv": ((24, 8, 8), (4, 4, 4)),
    "uneven_ranks": ((24, 8), (3, 9)),
    "partial_targets": ((24, 8, 8), (4, None, 2)),
}


@pytest.mark.parametrize("shape", [(1, 20), (2, 9, 20)], ids=str)
@pytest.mark.parametrize("name", GROUPS)
def test_matches_oracle(
    backend: Backend, dtype: torch.dtype, poisoned: None, shape: tuple, name: str
) -> None:
    torch.manual_seed(0)
    out, ranks = GROUPS[name]
    weights = backend.put(*(torch.randn(n, 20).to(dtype) for n in out))
    pairs = factors(out, ranks, 20, dtype)
    leaves = [x for pair in pairs if pair for x in pair]

    def assemble(given: tuple[Tensor, ...]) -> list:
        rest = iter(given)
        return [None if p is None else (next(rest), next(rest)) for p in pairs]

    def ours(x: Tensor, *given: Tensor) -> Tensor:
        adapters = [None if p is None else ops.LoraFactors(*p, 0.5) for p in assemble(given)]
        group = ops.LoraGroup.dense(weights, adapters)
        return torch.cat(ops.lora_linear(x, group, impl=backend.impl), -1)

    check(
        ours,
        lambda x, *given: linears(x, weights, assemble(given)),
        backend.put(torch.randn(shape).to(dtype), *leaves),
        tolerance=3e-2 if dtype == torch.bfloat16 else None,
    )


def test_float32_adapters_on_a_bfloat16_base_get_float32_gradients(group: Group) -> None:
    pair = (torch.randn(4, 20, requires_grad=True), torch.randn(24, 4, requires_grad=True))
    x = torch.randn(5, 20).bfloat16().requires_grad_()
    (y,) = ops.lora_linear(x, group([torch.randn(24, 20).bfloat16()], [pair]))
    grads = torch.autograd.grad(y.sum(), [x, *pair])
    assert [g.dtype for g in grads] == [torch.bfloat16, torch.float32, torch.float32]


def test_without_adapters_it_is_the_linears(group: Group) -> None:
    weights = [torch.randn(24, 20), torch.randn(8, 20)]
    x = torch.randn(5, 20, requires_grad=True)
    y = torch.cat(ops.lora_linear(x, group(weights, [None, None])), -1)
    assert torch.allclose(y, x @ torch.cat(weights).T, atol=1e-5)
    assert torch.allclose(torch.autograd.grad(y.sum(), x)[0], torch.cat(weights).sum(0), atol=1e-5)


def test_bias_is_added_and_trained(group: Group) -> None:
    bias = torch.randn(24, requires_grad=True)
    weight = group([torch.randn(24, 20)], [None], biases=[bias])
    x = torch.randn(5, 20)
    (y,) = ops.lora_linear(x, weight)
    assert torch.allclose(y, x @ weight.base.read(slice(0, 24)).T + bias, atol=1e-5)
    assert torch.equal(torch.autograd.grad(y.sum(), bias)[0], torch.full((24,), 5.0))


def test_a_step_on_the_adapter_is_seen(group: Group) -> None:
    pair = (torch.randn(4, 20), torch.zeros(24, 4))
    weight = group([torch.randn(24, 20)], [pair])
    x = torch.randn(5, 20)
    before = ops.lora_linear(x, weight)[0]
    pair[1].add_(1.0)
    after = ops.lora_linear(x, weight)[0]
    assert torch.allclose(after - before, 0.5 * x @ pair[0].T @ pair[1].T, atol=1e-4)


def test_changing_the_adapter_between_forward_and_backward_is_an_error(group: Group) -> None:
    pair = (torch.randn(4, 20, requires_grad=True), torch.randn(24, 4, requires_grad=True))
    weight = group([torch.randn(24, 20)], [pair])
    x = torch.randn(5, 20)
    loss = ops.lora_linear(x, weight)[0].sum()
    with torch.no_grad():
        pair[0].add_(1.0)
    ops.lora_linear(x, weight)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@settings(max_examples=25, deadline=None)
@given(
    tokens=st.integers(0, 40),
    features=st.integers(1, 30),
    out=st.lists(st.integers(1, 30), min_size=1, max_size=3),
    rank=st.integers(1, 9),
)
def test_any_shape(tokens: int, features: int, out: list[int], rank: int, group: Group) -> None:
    weights = [torch.randn(n, features) for n in out]
    pairs = factors(tuple(out), (rank,) * len(out), features, torch.float32)
    x = torch.randn(tokens, features)
    y = torch.cat(ops.lora_linear(x, group(weights, pairs)), -1)
    assert torch.allclose(y, linears(x, weights, pairs), rtol=1e-4, atol=1e-4)


@pytest.mark.reference
def test_gradcheck(backend: Backend, group: Group) -> None:
    if torch.float64 not in backend.dtypes:
        pytest.skip("no kernels in float64")
    pairs = factors((3, 2), (2, 1), 5, torch.float64)
    weights = [torch.randn(3, 5).double(), torch.randn(2, 5).double()]
    leaves = [x.requires_grad_() for pair in pairs if pair for x in pair]
    x = torch.randn(4, 5, dtype=torch.float64, requires_grad=True)

    def forward(x: Tensor, *given: Tensor) -> Tensor:
        both = [(given[0], given[1]), (given[2], given[3])]
        return torch.cat(ops.lora_linear(x, group(weights, both), impl=backend.impl), -1)

    assert torch.autograd.gradcheck(forward, [x, *leaves])


def test_errors_name_the_shapes(group: Group) -> None:
    with pytest.raises(ValueError, match=r"x \[2, 3\] float32 does not fit weight \[24, 20\]"):
        ops.lora_linear(torch.randn(2, 3), group([torch.randn(24, 20)], [None]))
    with pytest.raises(ValueError, match=r"lora_a \[4, 19\].*do not fit weight \[24, 20\]"):
        group([torch.randn(24, 20)], [(torch.randn(4, 19), torch.randn(24, 4))])


class TestPaddingColumns:
    """Those behind a producer's rows."""

    def test_is_used_in_place(self) -> None:
        (x,) = augmented.empty(3, [4], 2, dtype=torch.float32, device=torch.device("cpu"))
        assert augmented.claim([x], 2).data_ptr() == x.data_ptr()

    def test_is_given_once(self) -> None:
        (x,) = augmented.empty(3, [4], 2, dtype=torch.float32, device=torch.device("cpu"))
        augmented.claim([x], 2)
        assert augmented.claim([x], 2).data_ptr() != x.data_ptr()

    def test_is_not_used_where_the_width_differs(self) -> None:
        (x,) = augmented.empty(3, [4], 2, dtype=torch.float32, device=torch.device("cpu"))
        x.fill_(1.0)
        other = augmented.claim([x], 3)
        assert other.shape == (3, 7) and torch.equal(other[:, :4], x)

    def test_parts_in_another_order_are_copied(self) -> None:
        a, b = augmented.empty(3, [4, 4], 2, dtype=torch.float32, device=torch.device("cpu"))
        a.fill_(1.0), b.fill_(2.0)
        assert torch.equal(augmented.claim([b, a], 2)[:, :8], torch.cat((b, a), 1))

    def test_a_slice_of_a_strangers_tensor_is_never_written(self, group: Group) -> None:
        wide = torch.randn(5, 28)
        before = wide.clone()
        pairs = factors((24,), (8,), 20, torch.float32)
        ops.lora_linear(wide[:, :20], group([torch.randn(24, 20)], pairs))
        assert torch.equal(wide, before)

    def test_two_groups_reading_one_norm_do_not_disturb_each_other(self, group: Group) -> None:
        x = torch.randn(5, 20, requires_grad=True)
        pairs = [factors((24,), (8,), 20, torch.float32)[0] for _ in range(2)]
        for pair in pairs:
            pair[0].requires_grad_()
        weights = [torch.randn(24, 20), torch.randn(24, 20)]

        def loss(padding_columns: int) -> Tensor:
            h = ops.rms_norm(x, torch.ones(20), 1e-5, padding_columns=padding_columns)
            outputs = [
                ops.lora_linear(h, group([w], [p]))[0] for w, p in zip(weights, pairs, strict=True)
            ]
            return sum(y.square().sum() for y in outputs)

        leaves = [x, pairs[0][0], pairs[1][0]]
        for with_room, without in zip(
            torch.autograd.grad(loss(8), leaves), torch.autograd.grad(loss(0), leaves), strict=True
        ):
            assert torch.allclose(with_room, without, rtol=1e-5, atol=1e-4)
