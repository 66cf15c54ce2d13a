"""A gated activation that makes its neighbours' thin products: its kernels, and who takes them."""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from implementations import Backend
from lora_groups import agree, view, wide_nan
from test_blocks import Mlp
from torch import Tensor

from lora_engine import backends
from lora_engine.backends import launchers, plans, selection
from lora_engine.backends.choice import choose
from lora_engine.backends.lora_parts import AdapterPart, DyGradients, XGradient, split_parts
from lora_engine.backends.plans import Strategy
from lora_engine.backends.request import Activation, Present, Request
from lora_engine.testing import error

OPERATION = "glu_lora"
# (rows, columns, ranks of gate, up and down, columns after each rank)
SIZES = [
    (150, 272, (16, 16, 16), 0),
    (70, 130, (1, 8, 3), 2),
    (1, 33, (8, 0, 1), 1),
    (65, 48, (0, 5, 16), 0),
    (40, 64, (4, 4, 0), 4),
    (40, 64, (0, 0, 8), 0),
    (0, 64, (4, 4, 4), 0),
]
by_sizes = pytest.mark.parametrize("sizes", SIZES, ids=str)
Sizes = tuple[int, int, tuple[int, int, int], int]
ROUNDING = {torch.float32: 1e-5, torch.bfloat16: 2**-8, torch.float16: 2**-10}


class Operands:
    """Of the activation and its neighbours, in wider buffers of NaN."""

    def __init__(self, backend: Backend, dtype: torch.dtype, sizes: Sizes) -> None:
        self.backend, self.dtype = backend, dtype
        self.rows, self.cols, ranks, gap = sizes
        generator = torch.Generator().manual_seed(0)

        def normal(rows: int, cols: int) -> Tensor:
            whole = torch.randn(rows, cols, generator=generator).to(dtype)
            wide = view(whole, 3)._base
            assert wide is not None
            return backend.put(wide)[0][:, :cols]

        self.gate, self.up, self.dy = (normal(self.rows, self.cols) for _ in range(3))
        first = slice(0, ranks[0])
        second = slice(ranks[0] + gap, ranks[0] + gap + ranks[1])
        self.inner_spans = [
            (slice(0, self.cols), first),
            (slice(self.cols, 2 * self.cols), second),
        ]
        self.outer_spans = [(slice(0, 24), slice(0, ranks[2]))]
        self.ranks, self.outer_rank = second.stop + gap, ranks[2] + gap
        self.lora_b, self.s = normal(2 * self.cols, self.ranks), normal(self.rows, self.ranks)
        self.lora_a = normal(self.outer_rank, self.cols)
        self.outer_ds = normal(self.rows, self.outer_rank)

    def new(self, rows: int, cols: int, dtype: torch.dtype | None = None) -> Tensor:
        return wide_nan(rows, cols, dtype or self.dtype, self.backend)

    def new_b(self, parts: Sequence[AdapterPart]) -> Tensor:
        size = sum((n.stop - n.start) * (r.stop - r.start) for n, r, _ in parts)
        return torch.full((size,), float("nan"), device=self.backend.device)

    def results(self, count: int) -> list[Tensor]:
        return [self.new(self.rows, self.cols) for _ in range(count)]


@pytest.mark.parametrize("activation", ["silu", "gelu"])
@by_sizes
def test_forward(
    backend: Backend, dtype: torch.dtype, poisoned: None, sizes: Sizes, activation: str
) -> None:
    x = Operands(backend, dtype, sizes)
    if not sizes[2][2]:
        pytest.skip("nothing to make of h")
    h, alone = x.results(2)
    s, copy = (x.new(x.rows, x.outer_rank) for _ in range(2))
    launchers.glu(backend.impl).glu_fwd(x.gate, x.up, alone, activation=activation)
    launchers.glu_lora(backend.impl).glu_lora_fwd(
        x.gate, x.up, h, x.lora_a, s, x.outer_spans, copy, activation=activation
    )
    assert torch.equal(s, copy)
    assert error(h, alone) <= ROUNDING[dtype]
    rank = sizes[2][2]
    agree(s[:, :rank], lambda h, a: h @ a.T, [h, x.lora_a[:rank]])
    assert (s[:, rank:] == 0).all()


@pytest.mark.parametrize("activation", ["silu", "gelu_tanh"])
@by_sizes
def test_backward(
    backend: Backend, dtype: torch.dtype, poisoned: None, sizes: Sizes, activation: str
) -> None:
    x = Operands(backend, dtype, sizes)
    dgate, dup, *alone = x.results(5)
    ds = x.new(x.rows, x.ranks)
    parts = [AdapterPart(*span, 2.5) for span in x.inner_spans]
    d_b = x.new_b(parts)
    d_a = x.new(x.outer_rank, x.cols, torch.float32)
    launchers.glu(backend.impl).glu_bwd(x.dy, x.gate, x.up, *alone, activation=activation)
    h = alone[2]
    rank = sizes[2][2]
    launchers.glu_lora(backend.impl).glu_lora_bwd(
        x.dy,
        x.gate,
        x.up,
        dgate,
        dup,
        DyGradients(x.lora_b, x.s, ds, d_b, x.inner_spans, parts),
        XGradient(x.outer_ds, d_a, x.outer_spans) if rank else None,
        activation=activation,
    )
    outside = torch.ones(x.ranks, dtype=torch.bool)
    each = zip((dgate, dup), alone, x.inner_spans, split_parts(d_b, parts), strict=False)
    for dy, expected, (rows, columns), gradient in each:
        assert error(dy, expected) <= ROUNDING[dtype]
        outside[columns] = False
        if columns.stop > columns.start:
            agree(ds[:, columns], lambda dy, b: dy @ b, [dy, x.lora_b[rows, columns]], "ds")
            s = x.s[:, columns]
            agree(gradient, lambda dy, s: dy.T @ s * 2.5, [dy, s], "d_lora_b")
    assert (ds[:, outside] == 0).all()
    if rank:
        agree(d_a[:rank], lambda ds, h: ds.T @ h, [x.outer_ds[:, :rank], h], "d_lora_a")
        assert (d_a[rank:] == 0).all()
    else:
        assert d_a.isnan().all()


def test_two_runs_are_bitwise_equal(backend: Backend) -> None:
    x = Operands(backend, torch.float32, SIZES[0])

    def run() -> list[Tensor]:
        h, dgate, dup = x.results(3)
        s, ds = x.new(x.rows, x.outer_rank), x.new(x.rows, x.ranks)
        parts = [AdapterPart(*span, 0.5) for span in x.inner_spans]
        d_b = x.new_b(parts)
        d_a = x.new(x.outer_rank, x.cols)
        kernels = launchers.glu_lora(backend.impl)
        kernels.glu_lora_fwd(x.gate, x.up, h, x.lora_a, s, x.outer_spans, activation="silu")
        inner = DyGradients(x.lora_b, x.s, ds, d_b, x.inner_spans, parts)
        outer = XGradient(x.outer_ds, d_a, x.outer_spans)
        kernels.glu_lora_bwd(x.dy, x.gate, x.up, dgate, dup, inner, outer, activation="silu")
        return [h, dgate, dup, s, ds, d_b, d_a]

    assert all(torch.equal(a, b) for a, b in zip(run(), run(), strict=True))


@pytest.fixture
def taken(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The functions of one pass that a block launches, in their order."""
    found: list[str] = []
    before = launchers.glu_lora

    class Counting:
        def __init__(self, impl: str) -> None:
            self.kernels = before(impl)

        def __getattr__(self, name: str) -> Any:
            found.append(name)
            return getattr(self.kernels, name)

    monkeypatch.setattr(launchers, "glu_lora", Counting)
    return found


@pytest.fixture
def choices() -> Iterator[None]:
    """What a test changes of the choice's numbers is asked for anew, before and after."""
    selection._choose_once.cache_clear()
    yield
    selection._choose_once.cache_clear()


def gradients(half: Mlp) -> list[Tensor]:
    leaves = [x.requires_grad_() for x in half.leaves]
    y = half.ours(*leaves)
    dy = torch.randn(y.shape, generator=torch.Generator().manual_seed(2)).to(y)
    return [y.detach(), *torch.autograd.grad(y, leaves, dy)]


FORWARD, BACKWARD = "glu_lora_fwd", "glu_lora_bwd"


@pytest.mark.parametrize(
    ("variant", "expected"),
    [
        ("lora", [FORWARD, BACKWARD]),
        ("bias", [FORWARD, BACKWARD]),
        ("lora_bias", [FORWARD, BACKWARD]),
        ("several", [FORWARD, BACKWARD]),
        ("routes", [FORWARD, BACKWARD]),
        ("partial", [BACKWARD]),  # down has no adapter, so the forward pass has nothing to make
        ("dora", [FORWARD]),  # gate's and up's scale comes between
        ("dropout", []),
    ],
)
def test_a_block_takes_it_and_its_results_are_the_same(
    backend: Backend,
    monkeypatch: pytest.MonkeyPatch,
    choices: None,
    taken: list[str],
    variant: str,
    expected: list[str],
) -> None:
    half = Mlp(backend, torch.float32, variant)
    together = gradients(half)
    assert taken == expected
    monkeypatch.setattr(plans, "FORWARD_PASS_RANKS", 0)
    monkeypatch.setattr(plans, "BACKWARD_PASS_RANKS", 0)
    selection._choose_once.cache_clear()
    apart = gradients(half)
    assert taken == expected
    for i, (a, b) in enumerate(zip(together, apart, strict=True)):
        assert error(a, b) < 1e-5, f"result {i}"


def test_what_nobody_asks_for_is_not_made(backend: Backend, taken: list[str]) -> None:
    """Frozen adapters of down leave its dA out; without any gradient of B dB is not summed."""
    half = Mlp(backend, torch.float32, "lora")
    x, weight, *factors = half.leaves
    x.requires_grad_()
    together = gradients(Mlp(backend, torch.float32, "lora"))
    y = half.ours(x, weight, *factors)
    dy = torch.randn(y.shape, generator=torch.Generator().manual_seed(2)).to(y)
    (dx,) = torch.autograd.grad(y, x, dy)
    assert taken[-2:] == [FORWARD, BACKWARD]
    assert error(dx, together[1]) < 1e-5


def test_the_choice_says_why() -> None:
    """By ranks, alignment and what comes between; only where there are kernels."""
    gpu = Request("glu", "cuda", 90, torch.bfloat16)
    present = Present("avx2", None, True, False, (), False, True)

    def plan(sizes: Activation, request: Request = gpu) -> Strategy:
        found = choose(replace(request, sizes=sizes), present).plan
        assert isinstance(found, Strategy)
        return found

    suited = Activation(14336, 16, backward=True, apart=False)
    assert plan(suited).name == "one_pass"
    assert plan(suited._replace(backward=False)).name == "one_pass"
    others = [
        (suited._replace(rank=17), "16 ranks fit the registers, not those of 17"),
        (suited._replace(rank=0), "not those of 0"),
        (suited._replace(apart=True), "dropout or DoRA"),
        (suited._replace(cols=1000), "rows of 1000 columns are not aligned"),
    ]
    for sizes, reason in others:
        assert plan(sizes).name == "one_by_one"
        assert reason in plan(sizes).reason
    cpu = Request("glu", "cpu", None, torch.bfloat16)
    assert plan(suited, cpu).name == "one_by_one"
    assert not backends.takes_one_pass(suited, torch.device("cpu"), torch.float32)
