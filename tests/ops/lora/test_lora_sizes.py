"""The CPU's products of few ranks: every size of tile, several blocks of rows, any thread count."""

import math
from collections.abc import Iterator

import pytest
import torch
from implementations import CPU, Backend
from lora_groups import Group, Inputs, agree, make, untouched, wide_nan
from torch import Tensor

from lora_engine.backends import DTYPES
from lora_engine.backends.cpu import lora_linear
from lora_engine.backends.lora_parts import split_parts

BACKEND = Backend("cpu", CPU)
RANKS = (1, 3, 8, 16, 17, 64, 256)
GROUPS = [
    *(Group(63, 70, (45,), (rank,)) for rank in RANKS),
    *(Group(rows, 33, (31,), (9,)) for rows in (1, 2, 11, 24, 25)),
    Group(1000, 129, (64, 7, 32), (16, 17, 3), gap=5),
    Group(1000, 96, (96, 32), (16, 16)),
    Group(5, 2, (1,), (2,)),
    Group(30, 2041, (1017,), (4,)),  # with the buffers' 7 spare columns, rows of whole KiB
]


@pytest.fixture
def any_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def accumulator(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def products(group: Group, inputs: Inputs) -> list[Tensor]:
    """s, ds, d_lora_b and d_lora_a, in buffers whose last columns are not theirs."""
    dtype = inputs.x.dtype
    s, ds = (wide_nan(group.rows, group.total, dtype, BACKEND) for _ in range(2))
    d_b = torch.full((group.size_of_b,), math.nan, dtype=accumulator(dtype))
    d_a = wide_nan(group.total, group.cols, accumulator(dtype), BACKEND)
    lora_linear.lora_a_fwd(inputs.x, inputs.lora_a, s, group.spans)
    lora_linear.lora_b_bwd(inputs.dy, inputs.lora_b, inputs.s, ds, d_b, group.spans, group.parts)
    lora_linear.lora_a_bwd(inputs.ds, inputs.x, d_a, group.spans)
    return [s, ds, d_b, d_a]


@pytest.mark.parametrize("dtype", DTYPES["cpu"], ids=lambda dtype: str(dtype).split(".")[1])
@pytest.mark.parametrize("group", GROUPS, ids=str)
def test_sizes(isa: str, poisoned: None, group: Group, dtype: torch.dtype) -> None:
    inputs = make(group, BACKEND, dtype, spare=7)
    results = products(group, inputs)
    s, ds, d_b, d_a = results
    assert all(untouched(result) for result in (s, ds, d_a))
    gaps = torch.ones(group.total, dtype=torch.bool)
    for (rows, cols, scale), part in zip(group.parts, split_parts(d_b, group.parts), strict=True):
        gaps[cols] = False
        dy, b = inputs.dy[:, rows], inputs.lora_b[rows, cols]
        agree(s[:, cols], lambda x, a: x @ a.T, [inputs.x, inputs.lora_a[cols]], "s")
        agree(ds[:, cols], lambda dy, b: dy @ b, [dy, b], "ds")
        operands = [dy, inputs.s[:, cols]]
        agree(part, lambda dy, s, scale=scale: dy.T @ s * scale, operands, "d_lora_b")
        agree(d_a[cols], lambda ds, x: ds.T @ x, [inputs.ds[:, cols], inputs.x], "d_lora_a")
    assert (s[:, gaps] == 0).all() and (ds[:, gaps] == 0).all() and (d_a[gaps] == 0).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_the_same_bits_on_any_number_of_threads(
    isa: str, any_threads: None, dtype: torch.dtype
) -> None:
    group = Group(500, 200, (150, 40), (16, 5))
    inputs = make(group, BACKEND, dtype)
    found = []
    for threads in (1, 2, 5):
        torch.set_num_threads(threads)
        found.append([result.nan_to_num(7.0) for result in products(group, inputs)])
    for others in found[1:]:
        assert all(torch.equal(one, other) for one, other in zip(found[0], others, strict=True))


def test_infinite_inputs_stay_in_their_rows(isa: str) -> None:
    """Neighbouring rows are multiplied in pairs, and padding with zeros: inf * 0 is no number."""
    x = torch.randn(7, 35).bfloat16()
    x[3, 34] = float("inf")
    a, s = torch.randn(4, 35).bfloat16(), torch.empty(7, 4, dtype=torch.bfloat16)
    lora_linear.lora_a_fwd(x, a, s, [(slice(0, 1), slice(0, 4))])
    assert s[3].isinf().all() and s[[0, 1, 2, 4, 5, 6]].isfinite().all()
