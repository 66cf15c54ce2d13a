"""Liger-Kernel's functions compute what our cases ask; here in Triton's interpreter."""

import pytest
import torch

from benchmarks.common.registry import CASES, SIZES, Problem, Work
from benchmarks.common.verify import verify
from benchmarks.kernels import (
    cases,  # noqa: F401  (registers the cases)
    liger,
)
from lora_engine import backends

pytest.importorskip("liger_kernel")
if not backends.triton_interpreted():
    pytest.skip("Triton's interpreter is not in use", allow_module_level=True)

import numpy as np
import triton.language as tl
from triton.runtime import interpreter

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def scalars_as_tensors(monkeypatch: pytest.MonkeyPatch) -> None:
    """Liger-Kernel casts scalar arguments, which the interpreter leaves plain numbers."""
    convert = interpreter._implicit_cvt

    def converted(x):
        if type(x) is not float:
            return convert(x)
        handle = interpreter.TensorHandle(np.array([x], dtype=np.float32), tl.float32)
        return tl.tensor(handle, tl.float32)

    monkeypatch.setattr(interpreter, "_implicit_cvt", converted)


@pytest.mark.parametrize("name", sorted(set(liger.CONTENDERS) & set(CASES)))
def test_agrees_with_the_reference(name: str) -> None:
    problem = CASES[name](SIZES["tiny"], torch.float32, CPU)
    contender = liger.contender(name, problem)
    if contender is None:
        pytest.skip("Liger-Kernel has nothing for these inputs")
    if name == "rms_norm":
        pytest.skip("the interpreter does not take its casts to no dtype")
    before = [x.clone() for x in problem.inputs]
    verify(problem, contender.function, in_place=contender.in_place)
    assert all(torch.equal(x, y) for x, y in zip(problem.inputs, before, strict=True))


def rotated(q, k, cos, sin):
    def one(x):
        first, second = x.chunk(2, dim=-1)
        return x * cos[:, None] + torch.cat((-second, first), dim=-1) * sin[:, None]

    return one(q), one(k)


def test_rope_of_queries_and_keys() -> None:
    torch.manual_seed(0)
    q, k = (torch.randn(13, heads, 8, requires_grad=True) for heads in (4, 2))
    angles = torch.randn(13, 4).repeat(1, 2)
    inputs = (q, k, angles.cos(), angles.sin())
    problem = Problem(inputs, rotated, rotated, rotated, Work(1), Work(1))
    contender = liger.contender("rope", problem)
    assert contender is not None
    verify(problem, contender.function, in_place=contender.in_place)


def test_nothing_for_other_cases() -> None:
    problem = CASES["adamw"](SIZES["tiny"], torch.float32, CPU)
    assert liger.contender("adamw", problem) is None
