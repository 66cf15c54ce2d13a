"""A backend is tested by being added: kernels that an operation gets are run by its tests."""

import ast
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import test_glu
import torch
from implementations import CPU, Backend, implementations, parameters
from torch import Tensor

from lora_engine import backends, reference
from lora_engine.backends import launchers

ADDED = Backend("cuda", CPU)


class BorrowedGlu:
    """Keeps the contract of `contracts.Glu` by asking the reference; `factor` makes it wrong."""

    def __init__(self, factor: float = 1.0) -> None:
        self.factor = factor

    def glu_fwd(self, gate: Tensor, up: Tensor, y: Tensor, *, activation: str) -> None:
        y.copy_(reference.glu(gate, up, activation=activation) * self.factor)

    def glu_bwd(
        self,
        dy: Tensor,
        gate: Tensor,
        up: Tensor,
        dgate: Tensor,
        dup: Tensor,
        h: Tensor | None = None,
        *,
        activation: str,
    ) -> None:
        pair = [x.detach().clone().requires_grad_() for x in (gate, up)]
        with torch.enable_grad():
            y = reference.glu(*pair, activation=activation)
        grads = torch.autograd.grad(y, pair, dy.clone())
        for out, grad in zip((dgate, dup), grads, strict=True):
            out.copy_(grad)
        if h is not None:
            h.copy_(y.detach())


@pytest.fixture
def added(monkeypatch: pytest.MonkeyPatch) -> Iterator[BorrowedGlu]:
    """glu has CUDA kernels too, which take tensors of the CPU as emulated ones do."""
    kernels, before = BorrowedGlu(), launchers.glu
    operations = {**backends.OPERATIONS, "glu": (*backends.OPERATIONS["glu"], "cuda")}
    for module in (backends, backends.choice):
        monkeypatch.setattr(module, "OPERATIONS", operations)
    monkeypatch.setattr(backends.extension, "cuda_emulation", ModuleType("borrowed"))
    monkeypatch.setattr(launchers, "glu", lambda impl: kernels if impl == "cuda" else before(impl))
    yield kernels


def labels(operation: str) -> set[str]:
    params: list[Any] = parameters(operation, with_dtype=True)
    return {param.id for param in params}


def test_the_tests_of_its_operations_run_on_it(added: BorrowedGlu) -> None:
    assert "cuda" in implementations("glu") and "cuda" not in implementations("rope")
    assert {"cuda-emulated-float32", "cuda-emulated-float16", "cuda-bfloat16"} <= labels("glu")
    assert not any("cuda" in label for label in labels("mlp_block"))  # its norm has no kernel there


def test_they_pass_for_the_right_results_alone(added: BorrowedGlu) -> None:
    case = (3, 63), "silu"
    test_glu.test_matches_oracle(ADDED, torch.float32, None, *case)
    added.factor = 1.001
    with pytest.raises(AssertionError, match=r"error 0\.001"):
        test_glu.test_matches_oracle(ADDED, torch.float32, None, *case)


def test_without_it_they_do_not() -> None:
    assert not any("cuda" in label for label in labels("glu"))


def test_all_that_has_kernels_is_tested_over_every_backend() -> None:
    named = set()
    for path in Path(__file__).parent.rglob("test_*.py"):
        tree = ast.parse(path.read_text())
        takes = any(isinstance(node, ast.arg) and node.arg == "backend" for node in ast.walk(tree))
        operations = [
            ast.literal_eval(node.value)
            for node in tree.body
            if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "OPERATION"
        ]
        assert takes == bool(operations), path.name
        named.update(operations)
    assert named >= {*backends.OPERATIONS, *backends.PASSES}
