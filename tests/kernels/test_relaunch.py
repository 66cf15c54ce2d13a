"""A compiled kernel is launched again for what it was compiled for, and for nothing else."""

from typing import Any

import pytest
import torch
from torch import Tensor

from lora_engine import backends

if not backends.triton_interpreted():
    pytest.skip("the kernels are compiled in this process", allow_module_level=True)

from lora_engine.backends.triton import relaunch
from lora_engine.backends.triton.relaunch import Relaunched

WIDE = torch.zeros(64)
ALIGNED, ODD = WIDE[:32], WIDE[1:33]
assert ALIGNED.data_ptr() % 16 == 0


class Compiled:
    def __init__(self, launches: list[tuple[Any, ...]]) -> None:
        self.launches = launches

    def __getitem__(self, grid: tuple[int, ...]) -> Any:
        return lambda *args: self.launches.append((grid, *args))


class Jit:
    """As much of a JITFunction as is used: kernel(x, n, f, CONSTANT, BLOCK)."""

    arg_names = ("x", "n", "f", "CONSTANT", "BLOCK")
    constexprs = (3, 4)

    def __init__(self) -> None:
        self.compilations: list[tuple[Any, ...]] = []
        self.launches: list[tuple[Any, ...]] = []

    def __getitem__(self, grid: tuple[int, ...]) -> Any:
        def run(*args: Any, **constants: Any) -> Compiled:
            self.compilations.append((grid, *args, constants))
            return Compiled(self.launches)

        return run


@pytest.fixture
def jit(monkeypatch: pytest.MonkeyPatch) -> Jit:
    monkeypatch.setattr(relaunch, "_device", lambda args: 0)
    return Jit()


def test_the_second_launch_is_of_the_compiled_kernel(jit: Jit) -> None:
    kernel = Relaunched(jit)
    kernel[(7,)](ALIGNED, 5, 0.5, CONSTANT=3, BLOCK=16, num_warps=4)
    kernel[(8, 2)](ALIGNED[16:], 6, 0.25, CONSTANT=3, BLOCK=16, num_warps=4)
    assert len(jit.compilations) == 1
    ((grid, x, *rest),) = jit.launches
    assert grid == (8, 2, 1) and x.data_ptr() == ALIGNED[16:].data_ptr()
    assert rest == [6, 0.25, 3, 16]


@pytest.mark.parametrize(
    "x,n,f,constants",
    [
        (ODD, 5, 0.5, {}),
        (ALIGNED.bfloat16(), 5, 0.5, {}),
        (None, 5, 0.5, {}),
        (ALIGNED, 1, 0.5, {}),
        (ALIGNED, 32, 0.5, {}),
        (ALIGNED, 2**31 + 1, 0.5, {}),
        (ALIGNED, 5, 0.5, {"CONSTANT": 4}),
        (ALIGNED, 5, 0.5, {"num_warps": 8}),
    ],
    ids=["odd", "dtype", "none", "one", "multiple", "long", "constant", "option"],
)
def test_what_triton_compiles_for(
    jit: Jit, x: Tensor | None, n: int, f: float, constants: dict[str, int]
) -> None:
    kernel = Relaunched(jit)
    known = {"CONSTANT": 3, "BLOCK": 16, "num_warps": 4}
    kernel[(7,)](ALIGNED, 5, 0.5, **known)
    kernel[(7,)](x, n, f, **{**known, **constants})
    assert len(jit.compilations) == 2 and not jit.launches


def test_a_constant_by_position(jit: Jit) -> None:
    kernel = Relaunched(jit)
    for constant in (3, 5, 3):
        kernel[(7,)](ALIGNED, 5, 0.5, constant, BLOCK=16)
    assert len(jit.compilations) == 2
    assert [launch[-2:] for launch in jit.launches] == [(3, 16)]


def test_another_gpu(jit: Jit, monkeypatch: pytest.MonkeyPatch) -> None:
    kernel = Relaunched(jit)
    for device in (0, 1, 0):
        monkeypatch.setattr(relaunch, "_device", lambda args, device=device: device)
        kernel[(7,)](ALIGNED, 5, 0.5, CONSTANT=3, BLOCK=16)
    assert len(jit.compilations) == 2 and len(jit.launches) == 1


def test_nothing_is_kept_off_a_gpu_or_of_other_arguments(jit: Jit, monkeypatch: Any) -> None:
    kernel = Relaunched(jit)
    for _ in range(2):
        kernel[(7,)](ALIGNED, True, 0.5, CONSTANT=3, BLOCK=16)
        kernel[(7,)](ALIGNED, 5, 0.5, CONSTANT=3)  # BLOCK by the kernel's default
    monkeypatch.undo()
    for _ in range(2):
        kernel[(7,)](ALIGNED, 5, 0.5, CONSTANT=3, BLOCK=16)
    assert len(jit.compilations) == 6 and not jit.launches
