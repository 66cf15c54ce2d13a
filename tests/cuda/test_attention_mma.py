"""Attention by mma.sync, executed as PTX for capability 8.0, against float64."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import cuda_ptx
import ptx
import pytest
import torch
from torch import Tensor

from lora_engine import backends, ops, reference
from lora_engine.testing import cu_seqlens

TOLERANCE = {torch.bfloat16: 1e-2, torch.float16: 2e-3}
TREE = [40, 3, 140, 33, 0, 70], [-1, 0, 1, 1, 0, -1]


class Case(NamedTuple):
    """heads: of queries, and of keys. parents: as of `ops.attention`."""

    lengths: list[int]
    head_dim: int
    heads: tuple[int, int] = (2, 1)
    causal: bool = True
    window: int = 0
    parents: list[int] | None = None
    dtype: torch.dtype = torch.bfloat16

    def options(self) -> dict[str, Any]:
        parents = self.parents
        continued = None if parents is None else torch.tensor(parents, dtype=torch.int32)
        return {"causal": self.causal, "window": self.window, "parents": continued}

    def inputs(self) -> list[Tensor]:
        """q, k and v, and a gradient of the output."""
        torch.manual_seed(0)
        tokens, (q_heads, kv_heads) = sum(self.lengths), self.heads
        counts = (q_heads, kv_heads, kv_heads, q_heads)
        return [torch.randn(tokens, n, self.head_dim).to(self.dtype) for n in counts]


def results(case: Case, inputs: list[Tensor]) -> list[Tensor]:
    """The output, and the gradients of q, k and v."""
    *qkv, d_o = inputs
    leaves = [x.clone().requires_grad_() for x in qkv]
    o = ops.attention(*leaves, cu_seqlens(case.lengths), impl="cuda", **case.options())
    return [o.detach(), *torch.autograd.grad(o, leaves, d_o)]


def exact(case: Case, inputs: list[Tensor]) -> list[Tensor]:
    *qkv, d_o = (x.double() for x in inputs)
    leaves = [x.requires_grad_() for x in qkv]
    o = reference.attention(*leaves, cu_seqlens(case.lengths), **case.options())
    return [o.detach(), *torch.autograd.grad(o, leaves, d_o)]


@contextmanager
def executed(**options: Any) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch, cuda_ptx.executed_cuda(80, **options) as kernels:
        patch.setattr(backends.extension, "cuda_emulation", kernels)
        yield


CASES = {
    "ragged": Case([1, 63, 200, 0, 64, 65], 128),
    "ragged_64": Case([1, 63, 200, 0, 64, 65], 64),
    "padded_columns": Case([130, 5], 96, (3, 3)),
    "whole": Case([65, 200], 128, causal=False, dtype=torch.float16),
    "whole_64": Case([65, 0, 200], 64, (2, 2), causal=False),
    "window": Case([5, 300], 128, window=70),
    "window_64": Case([5, 300], 64, window=150, dtype=torch.float16),
    "tree": Case(TREE[0], 128, parents=TREE[1]),
    "tree_64": Case(TREE[0], 64, (3, 1), parents=TREE[1], window=50),
    "many": Case([0] * 130 + [140, 1] + [0] * 130, 64, (1, 1)),
}


@pytest.mark.parametrize(
    ("name", "completion"),
    [*((name, "late") for name in CASES), ("ragged", "early"), ("ragged_64", "early")],
)
def test_is_that_of_float64(poisoned: None, name: str, completion: ptx.Completion) -> None:
    case = CASES[name]
    inputs = case.inputs()
    with executed(completion=completion, seed=1):
        found = results(case, inputs)
    for x, expected in zip(found, exact(case, inputs), strict=True):
        error = (x.double() - expected).abs().max() / expected.abs().max()
        assert error < TOLERANCE[case.dtype]


@pytest.mark.parametrize("case", [CASES["ragged"], CASES["tree_64"]], ids=["ragged", "tree_64"])
def test_two_schedules_give_the_same_bits(case: Case) -> None:
    inputs = case.inputs()
    with executed(seed=2):
        late = results(case, inputs)
    with executed(seed=3, completion="early"):
        early = results(case, inputs)
    assert all(torch.equal(x, y) for x, y in zip(late, early, strict=True))


@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize("causal", [True, False])
def test_rows_of_other_sequences_are_not_touched(head_dim: int, causal: bool) -> None:
    case = Case([40, 1, 130, 64, 3], head_dim, causal=causal)
    clean, broken = case.inputs(), case.inputs()
    rows = torch.zeros(sum(case.lengths), dtype=torch.bool)
    rows[40:41] = rows[171:235] = True
    for x in broken:
        x[rows] = torch.nan
    with executed():
        found = results(case, broken)
        for x, expected in zip(found, results(case, clean), strict=True):
            assert torch.equal(x[~rows], expected[~rows])
            assert x[rows].isnan().any()


# Rows of a warp and columns of a tile, as the shapes of csrc/cuda/attention_mma_*.
FORWARD, BACKWARD = {64: (32, 64), 128: (32, 32)}, {64: (16, 64), 128: (16, 32)}


def tiles_seen(seen: Tensor, rows: int, columns: int) -> int:
    """Of seen [queries, keys], how many tiles hold a pair that is."""
    count = 0
    for part in seen.split(rows):
        count += sum(bool(tile.any()) for tile in part.split(columns, 1))
    return count


@pytest.mark.parametrize("window", [0, 100])
@pytest.mark.parametrize("head_dim", [64, 128])
def test_tiles_that_no_query_sees_are_not_multiplied(head_dim: int, window: int) -> None:
    length, heads = 515, 2
    case = Case([length], head_dim, (heads, 1), window=window)
    behind = torch.arange(length)[:, None] - torch.arange(length)
    seen = (behind >= 0) & (behind < (window or length))
    with executed():
        results(one := Case([1], head_dim, (heads, 1)), one.inputs())  # among the executed from now
        before = products()
        results(case, case.inputs())
        counted = {name: count - before.get(name, 0) for name, count in products().items()}
    for name, part, shape, products_of_tile in (
        ("attention_mma_fwd_kernel", seen, FORWARD[head_dim], 2),
        ("attention_mma_dq_kernel", seen, BACKWARD[head_dim], 3),
        ("attention_mma_dkv_kernel", seen.T, BACKWARD[head_dim], 4),
    ):
        rows, columns = shape
        each = rows * columns * head_dim // (16 * 8 * 16)
        wanted = heads * tiles_seen(part, rows, columns) * products_of_tile * each
        assert counted[name] == wanted, name


def products() -> dict[str, int]:
    """How many mma instructions warps have executed, by the kernel."""
    found: dict[str, int] = {}
    for capability, name in cuda_ptx.executed:
        counts = cuda_ptx.kernel(name, capability, str).counts()
        multiplied = sum(n for opcode, n in counts.items() if opcode.startswith("mma.sync"))
        plain = cuda_ptx.plain_name(name)
        found[plain] = found.get(plain, 0) + multiplied
    return found
