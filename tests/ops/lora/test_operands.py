"""Nothing but finite values stands beside what the operations hand out or multiply.

The guard that every test here runs under (tests/support/operand_guard.py) fails a product that
breaks this.
"""

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from lora_groups import view
from operand_guard import beside
from torch import Tensor

from lora_engine import backends, ops, reference
from lora_engine.ops import LoraFactors
from lora_engine.testing import assert_as_good_as, cu_seqlens, error

ROWS, COLS, TAIL = 9, 8, 3
BOUNDS = cu_seqlens([4, 5])


def leaf(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape).to(dtype).requires_grad_()


def ones() -> Tensor:
    return torch.ones(COLS)


def attention(x: Tensor, padding_columns: int) -> Tensor:
    return ops.attention(
        x,
        x * 2,
        x * 3,
        BOUNDS,
        head_dim=4,
        padding_columns=padding_columns,
        grad_padding_columns=padding_columns,
    )


MAKERS: dict[str, Callable[..., Tensor]] = {
    "rms_norm": lambda x, padding_columns: ops.rms_norm(
        x, ones(), 1e-5, padding_columns=padding_columns
    ),
    "layer_norm": lambda x, padding_columns: ops.layer_norm(
        x, ones(), ones(), 1e-5, padding_columns=padding_columns
    ),
    "glu": lambda x, padding_columns: ops.glu(
        x, x * 2, padding_columns=padding_columns, grad_padding_columns=padding_columns
    ),
    "attention": attention,
}


@pytest.mark.parametrize("name", MAKERS)
def test_results_with_room_can_be_multiplied_by_anyone(name: str) -> None:
    """A module that ignores the padding columns, and its gradient, give what they would without."""
    x = leaf(ROWS, COLS)
    linear = torch.nn.Linear(COLS, 5)
    with_room, without = (MAKERS[name](x, padding_columns) for padding_columns in (TAIL, 0))
    assert with_room.stride(0) == COLS + TAIL and (beside(with_room) == 0).all()
    ours, plain = linear(with_room), linear(without)
    assert error(ours, plain) < 1e-5
    (dx,), (expected,) = (torch.autograd.grad(y.square().sum(), x) for y in (ours, plain))
    assert error(dx, expected) < 1e-5


def test_gradients_of_a_gated_activation_can_be_multiplied_by_anyone() -> None:
    x, gate, up = leaf(ROWS, 5), torch.nn.Linear(5, COLS), torch.nn.Linear(5, COLS)
    ops.glu(gate(x), up(x), grad_padding_columns=TAIL).square().sum().backward()
    theirs = x.detach().clone().requires_grad_()
    reference.glu(gate(theirs), up(theirs)).square().sum().backward()
    assert x.grad is not None and theirs.grad is not None
    assert error(x.grad, theirs.grad) < 1e-5


def strangers(x: Tensor) -> Tensor:
    """x as somebody else's columns: beside them is what is theirs, here NaN."""
    return view(x.detach(), 3).requires_grad_()


@pytest.mark.parametrize("impl", ["cpu", "reference"])
@pytest.mark.parametrize("strategy", backends.STRATEGIES)
@pytest.mark.parametrize("rank", [0, 2])
def test_lora_linear_of_a_strangers_columns(
    monkeypatch: pytest.MonkeyPatch, rank: int, strategy: str, impl: str
) -> None:
    """Input and incoming gradient are parts of wider tensors."""
    monkeypatch.setattr(backends, "product_strategy", lambda *args: strategy)
    factors = LoraFactors(leaf(rank, COLS), leaf(6, rank), 0.5) if rank else None
    weight = ops.LoraGroup.dense([torch.randn(6, COLS)], [factors])
    x, dy = torch.randn(ROWS, COLS), torch.randn(ROWS, 6)
    results = []
    for given, grad in ((strangers(x), view(dy, 3)), (x.clone().requires_grad_(), dy)):
        (y,) = ops.lora_linear(given, weight, impl=impl)
        found = [] if factors is None else [factors.lora_a, factors.lora_b]
        results.append([y, *torch.autograd.grad(y, [given, *found], grad)])
    for ours, plain in zip(*results, strict=True):
        assert error(ours, plain) < 1e-5


@pytest.mark.parametrize("impl", ["cpu", "reference"])
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_cross_entropy_of_a_strangers_columns(reduction: str, impl: str) -> None:
    tensors = [torch.randn(ROWS, 6), torch.randn(13, 6), torch.randn(2, 6), torch.randn(13, 2)]
    target = torch.arange(ROWS)
    results = []
    for make in (strangers, lambda x: x.clone().requires_grad_()):
        given = [make(x) for x in tensors]
        lora = LoraFactors(given[2], given[3], 0.5)
        loss = ops.linear_cross_entropy(
            given[0], given[1], target, lora=lora, reduction=reduction, impl=impl
        ).loss
        results.append([loss, *torch.autograd.grad(loss.sum(), given)])
    for ours, plain in zip(*results, strict=True):
        assert error(ours, plain) < 1e-5


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("classes", [256, 260, 261, 264, 288])
def test_rows_of_logits_end_in_zeros(dtype: torch.dtype, classes: int) -> None:
    """Vocabularies that fill no whole block of a matrix unit: a gradient of a trained head too."""
    hidden, weight = leaf(70, 12, dtype=dtype), leaf(classes, 12, dtype=dtype)
    target = torch.arange(70) % classes
    ops.linear_cross_entropy(hidden, weight, target, chunk_rows=32).loss.backward()
    others = []
    for given in (dtype, torch.float64):
        pair = [x.detach().to(given).requires_grad_() for x in (hidden, weight)]
        loss = F.cross_entropy((pair[0] @ pair[1].T).to(torch.float64), target)
        others.append(torch.autograd.grad(loss, pair))
    for x, peer, oracle in zip((hidden, weight), *others, strict=True):
        assert x.grad is not None
        tolerance = 1e-5 if dtype == torch.float32 else 2e-2
        assert_as_good_as(x.grad, peer, oracle, tolerance=tolerance)


def test_dora_of_a_strangers_factors() -> None:
    lora_a, lora_b = strangers(torch.randn(3, COLS)), strangers(torch.randn(6, 3))
    factors = LoraFactors(lora_a, lora_b, 0.5, torch.ones(6))
    weight, x = ops.LoraGroup.dense([torch.randn(6, COLS)], [factors]), torch.randn(ROWS, COLS)
    (ours,) = ops.lora_linear(x, weight)
    whole = (
        weight.base.read(slice(0, 6))
        + 0.5 * lora_b.detach().contiguous() @ lora_a.detach().contiguous()
    )
    assert error(ours, x @ (whole / whole.norm(dim=1, keepdim=True)).T) < 1e-5


def test_an_embedding_of_a_strangers_factors() -> None:
    lora_a, lora_b = strangers(torch.randn(3, 10)), strangers(torch.randn(6, 3))
    weight, ids = torch.randn(10, 6), torch.arange(7)
    ours = ops.lora_embedding(ids, weight, [LoraFactors(lora_a, lora_b, 0.5)])
    a, b = lora_a.detach().contiguous(), lora_b.detach().contiguous()
    assert error(ours, weight[ids] + 0.5 * a.T[ids] @ b.T) < 1e-5


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_attention_reads_nothing_beside_its_operands(isa: str, dtype: torch.dtype) -> None:
    """Kernels of ours get addresses, where no guard looks: NaN beside changes no bit."""
    lengths = [1, 37, 64]
    bounds, tokens = cu_seqlens(lengths), sum(lengths)
    q, k, v, do = (torch.randn(tokens, heads * 10).to(dtype) for heads in (4, 2, 2, 4))
    results = []
    for make in (strangers, lambda x: x.clone().requires_grad_()):
        given = [make(x) for x in (q, k, v)]
        out = ops.attention(*given, bounds, head_dim=10, padding_columns=5, grad_padding_columns=7)
        results.append([out, *torch.autograd.grad(out, given, make(do).detach())])
    for ours, plain in zip(*results, strict=True):
        assert plain.isfinite().all() and torch.equal(ours, plain)
