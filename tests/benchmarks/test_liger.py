"""Liger-Kernel's functions compute what our cases ask; here in Triton's interpreter."""

import liger
import pytest
import torch
from registry import CASES, SIZES, Problem, Work
from verify import verify

from lora_engine import backends

pytest.importorskip("liger_kernel")
if not backends.triton_interpreted():
    pytest.skip("Triton's interpreter is not in use", allow_module_level=True)

CPU = torch.device("cpu")


@pytest.mark.parametrize("name", sorted(set(liger.CONTENDERS) & set(CASES)))
def test_agrees_with_the_reference(name: str) -> None:
    problem = CASES[name](SIZES["tiny"], torch.float32, CPU)
    contender = liger.contender(name, problem)
    if contender is None:
        pytest.skip("Liger-Kernel has nothing for these inputs")
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
