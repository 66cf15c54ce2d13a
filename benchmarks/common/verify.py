"""Whether a contender computes what it should; nothing is timed before."""

from collections.abc import Sequence
from typing import TypeAlias

import torch
from torch import Tensor

from benchmarks.common.registry import Function, Problem, as_tuple
from lora_engine.testing import assert_as_good_as

# How much worse than PyTorch's own error in the same dtype, relative to the largest magnitude.
TOLERANCES = {torch.float32: 1e-5, torch.bfloat16: 2**-8}
Named: TypeAlias = list[tuple[str, Tensor]]
References: TypeAlias = tuple[Named, Named]


def references(problem: Problem) -> References:
    """Outputs and gradients of the float64 oracle, and of PyTorch in the inputs' dtype."""
    return (
        _outputs_and_gradients(problem, problem.oracle, torch.float64),
        _outputs_and_gradients(problem, problem.eager, in_place=problem.in_place),
    )


def verify(
    problem: Problem,
    function: Function,
    expected: References | None = None,
    *,
    in_place: bool = False,
) -> None:
    """Raise AssertionError unless results and gradients match the reference.

    They may be as far from the float64 oracle as PyTorch's are in the same dtype, and TOLERANCES
    beyond. `expected` saves computing both again; `in_place` says that `function` changes its
    inputs although the problem's others do not.
    """
    tolerance = TOLERANCES[problem.inputs[0].dtype]
    oracles, peers = expected or references(problem)
    actual = _outputs_and_gradients(problem, function, in_place=in_place or problem.in_place)
    for (what, oracle), (_, peer), (_, mine) in zip(oracles, peers, actual, strict=True):
        assert_as_good_as(mine, peer, oracle, tolerance=tolerance, what=what)


def _outputs_and_gradients(
    problem: Problem,
    function: Function,
    dtype: torch.dtype | None = None,
    *,
    in_place: bool = False,
) -> Named:
    inputs = problem.inputs
    if dtype is not None:
        inputs = tuple(_converted(x, dtype) for x in inputs)
    elif in_place:
        inputs = copies(inputs)
    outputs = as_tuple(function(*inputs))
    # Cloned, because a backward pass in place may write over an output.
    named = [(f"output {i}", output.detach().clone()) for i, output in enumerate(outputs)]
    if problem.both is not None:
        for i, gradient in enumerate(_gradients(inputs, outputs)):
            named.append((f"gradient {i}", gradient))
    return named


def copies(inputs: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """The inputs again, as leaves with memory of their own."""
    return tuple(x.detach().clone().requires_grad_(x.requires_grad) for x in inputs)


def _converted(x: Tensor, dtype: torch.dtype) -> Tensor:
    return (
        x.detach()
        .to(dtype if x.is_floating_point() else x.dtype, copy=True)
        .requires_grad_(x.requires_grad)
    )


def _gradients(inputs: Sequence[Tensor], outputs: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """Gradients of a fixed weighted sum of the outputs."""
    wanted = [x for x in inputs if x.requires_grad]
    return torch.autograd.grad(outputs, wanted, [upstream(output) for output in outputs])


def upstream(output: Tensor) -> Tensor:
    """A gradient of the output: the same values whatever the dtype, none of them special."""
    ramp = torch.arange(output.numel(), device=output.device, dtype=torch.float32)
    return torch.cos(ramp).view(output.shape).to(torch.bfloat16).to(output.dtype)
