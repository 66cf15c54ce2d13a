"""The guard that other tests run under: what it finds, and what it lets pass."""

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from operand_guard import OperandGuard, beside
from torch import Tensor
from transformers.pytorch_utils import Conv1D

ROWS, COLS = 6, 5


def columns(value: float, rows: int = ROWS, cols: int = COLS) -> Tensor:
    """Ones [rows, cols] with `value` beside them."""
    buffer = torch.full((rows, cols + 3), value)
    buffer[:, :cols] = 1.0
    return buffer[:, :cols]


def backward_of_a_linear(x: Tensor) -> None:
    y = torch.nn.Linear(3, COLS)(torch.ones(ROWS, 3, requires_grad=True))
    y.backward(x)


def out(x: Tensor) -> Tensor:
    return torch.mm(x, torch.ones(COLS, 4), out=torch.zeros(ROWS, 4))


PRODUCTS: dict[str, Callable[[Tensor], object]] = {
    "mm": lambda x: torch.mm(x, torch.ones(COLS, 4)),
    "mm out": out,
    "@": lambda x: x @ torch.ones(COLS, 4),
    "on the right": lambda x: torch.ones(4, ROWS) @ x,
    "transposed": lambda x: x.t() @ torch.ones(ROWS, 4),
    "several dimensions": lambda x: x.unflatten(0, (2, 3)) @ torch.ones(COLS, 4),
    "addmm": lambda x: torch.addmm(torch.ones(4), x, torch.ones(COLS, 4)),
    "addmm in place": lambda x: torch.ones(ROWS, 4).addmm_(x, torch.ones(COLS, 4)),
    "bmm": lambda x: x.unflatten(0, (2, 3)) @ torch.ones(2, COLS, 4),
    "baddbmm": lambda x: torch.baddbmm(
        torch.ones(2, 3, 4), x.unflatten(0, (2, 3)), torch.ones(2, COLS, 4)
    ),
    "mv": lambda x: x.mv(torch.ones(COLS)),
    "addmv": lambda x: torch.addmv(torch.ones(ROWS), x, torch.ones(COLS)),
    "einsum": lambda x: torch.einsum("mk,nk->mn", x, torch.ones(4, COLS)),
    "linear": lambda x: F.linear(x, torch.ones(4, COLS), torch.ones(4)),
    "weight": lambda x: F.linear(torch.ones(4, COLS), x),
    "nn.Linear": lambda x: torch.nn.Linear(COLS, 4)(x),
    "backward of nn.Linear": backward_of_a_linear,
    "transformers' Conv1D": lambda x: Conv1D(4, COLS)(x),
    "attention": lambda x: F.scaled_dot_product_attention(*[x[None, None]] * 3),
}


@pytest.mark.parametrize("name", PRODUCTS)
@pytest.mark.parametrize("value", [float("nan"), float("inf")], ids=str)
def test_a_product_beside_something_not_finite_fails(name: str, value: float) -> None:
    with OperandGuard(), pytest.raises(AssertionError, match=r"not finite beside an operand"):
        PRODUCTS[name](columns(value))


@pytest.mark.parametrize("name", PRODUCTS)
def test_finite_values_beside_pass(name: str) -> None:
    with OperandGuard():
        PRODUCTS[name](columns(1e4))


def test_the_failure_says_which_operand_of_what() -> None:
    with OperandGuard(), pytest.raises(AssertionError, match=r"mm: .* \[6, 5\].*strides \[8, 1\]"):
        columns(float("nan")) @ torch.ones(COLS, 4)


def test_what_is_added_is_no_operand() -> None:
    with OperandGuard():
        torch.addmm(columns(float("nan")), torch.ones(ROWS, 2), torch.ones(2, COLS))


def test_beside_is_what_lies_between_rows() -> None:
    buffer = torch.arange(24.0).view(4, 6)
    assert beside(buffer[:, 1:4]).tolist() == [4, 5, 6, 10, 11, 12, 16, 17, 18]
    assert beside(buffer[:, 1:4].t()).tolist() == beside(buffer[:, 1:4]).tolist()
    assert beside(buffer[::2]).tolist() == [6, 7, 8, 9, 10, 11]
    # Two heads of two columns, with two columns behind them.
    assert beside(buffer[:, :4].unflatten(1, (2, 2)).transpose(0, 1)).tolist() == [
        *(4, 5, 10, 11, 16, 17),
    ]
    # Two heads of one column, one apart, with three columns behind them.
    assert beside(buffer[:2, :4].unflatten(1, (2, 2))[..., 0]).tolist() == [1, 3, 4, 5, 7]


def test_nothing_lies_beside_whole_tensors_and_single_rows() -> None:
    buffer = torch.ones(4, 6)
    heads = buffer.view(4, 2, 3).transpose(0, 1)
    for x in (buffer, buffer.t(), heads, buffer[1:2, :3], buffer[:1].expand(4, 6), buffer[:0, :2]):
        assert beside(x).numel() == 0


def test_new_memory_is_nan() -> None:
    with OperandGuard():
        x = torch.ones(2, 3)
        made = [torch.empty(2, 3), torch.empty_like(x), x.new_empty(4)]
        made.append(torch.empty_strided((2, 3), (4, 1)))
        assert all(y.isnan().all() for y in made)
        assert torch.empty(3, dtype=torch.int64).dtype == torch.int64


def test_a_device_s_context_makes_tensors_there_within_and_afterwards() -> None:
    """A process's first such context may be entered within."""
    code = """
import torch
from operand_guard import OperandGuard
with OperandGuard(), torch.device("meta"):
    assert torch.empty(2).is_meta
with torch.device("meta"):
    assert torch.empty(2).is_meta
"""
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120, cwd=Path(__file__).parent)
