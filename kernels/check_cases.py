"""The launches that check.py compiles: one function for each operation.

A function gets a dtype and yields calls of its launchers, with tensors that have no memory. They
must reach every line of launch_table.json, every flag that makes another kernel, and one shape
whose strides are not multiples of 16, where Triton cannot assume aligned rows. `matrix` names the
kernels that must use the best matrix instructions of the capability (wgmma, tcgen05), `any_matrix`
those whose tiles are too small for them.
"""

import importlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

ROWS = 8192
# Widths of models from 135M to 405B parameters, hidden and intermediate, and an unaligned one.
COLS = (64, 576, 1001, 1536, 4096, 8192, 14336, 28672)
VOCABS = (1001, 32000, 49152, 50257, 128256, 151936, 262144)
# The last is what --quick takes where the dtype makes no other line of the table.
DTYPES = (torch.float32, torch.float16, torch.bfloat16)


@dataclass(frozen=True)
class Call:
    """A launcher, its arguments, and what its kernels must show."""

    launcher: Callable[..., object]
    args: tuple[Any, ...]
    kwargs: dict[str, Any] = field(default_factory=dict)
    matrix: tuple[str, ...] = ()
    any_matrix: tuple[str, ...] = ()

    def __str__(self) -> str:
        arguments = [*self.args, *(f"{k}={_text(v)}" for k, v in self.kwargs.items())]
        return f"{self.launcher.__name__}({', '.join(map(_text, arguments))})"


Cases = Callable[[torch.dtype], Iterator[Call]]
OPERATIONS: dict[str, Cases] = {}


def operation(cases: Cases) -> Cases:
    """Register an operation's calls under its name."""
    OPERATIONS[cases.__name__] = cases
    return cases


def empty(*shape: int, dtype: torch.dtype) -> Tensor:
    """A tensor of this shape without memory."""
    return torch.empty(shape, dtype=dtype, device="meta")


def call(
    launcher: Callable[..., object],
    *args: Any,
    matrix: tuple[str, ...] = (),
    any_matrix: tuple[str, ...] = (),
    **kwargs: Any,
) -> Call:
    """A call with arguments written as they are in a call."""
    return Call(launcher, args, kwargs, matrix, any_matrix)


def sizes(*kernels: str, among: tuple[int, ...] = COLS) -> list[int]:
    """`among`, and launch sizes that reach every other line of the kernels' tables."""
    table = importlib.import_module("lora_engine.kernels.launch").table()
    lines = [line for k in kernels for by in table[k].values() for x in by.values() for line in x]
    limits = {limit for limit, _ in lines if limit is not None}
    beyond = {2 * max(limits)} if limits and max(limits) >= max(among) else set()
    return sorted({*among, *limits, *beyond})


def _text(value: Any) -> str:
    if not isinstance(value, Tensor):
        return str(value)
    return f"{str(value.dtype).removeprefix('torch.')}{list(value.shape)}"


@operation
def glu(dtype: torch.dtype) -> Iterator[Call]:
    from lora_engine.kernels import glu

    for cols in sizes("glu_fwd", "glu_bwd"):
        x = empty(ROWS, cols, dtype=dtype)
        yield call(glu.glu_fwd, x, x, x)
        yield call(glu.glu_bwd, x, x, x, x, x)
