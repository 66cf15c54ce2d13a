"""A compiled kernel is launched again for what it was compiled for, and for nothing else."""

import ctypes
import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from lora_engine import backends

if not backends.triton_interpreted():
    pytest.skip("the kernels are compiled in this process", allow_module_level=True)
if not backends.extension_available():
    pytest.skip("needs the C++ extension", allow_module_level=True)

from lora_engine.backends.triton import relaunch
from lora_engine.backends.triton.relaunch import Relaunched, passed_arguments

from lora_engine.backends import extension

ROOT = Path(__file__).resolve().parents[2]
WIDE = torch.zeros(64)
ALIGNED, ODD = WIDE[:32], WIDE[1:33]
assert ALIGNED.data_ptr() % 16 == 0
FUNCTION, STREAM = 0xF00D, 0x5EED
LAUNCH = ctypes.CFUNCTYPE(
    ctypes.c_int,
    ctypes.c_void_p,
    *[ctypes.c_uint] * 7,
    ctypes.c_void_p,
    ctypes.POINTER(ctypes.c_void_p),
    ctypes.c_void_p,
)
TYPES = (ctypes.c_uint64, ctypes.c_int32, ctypes.c_float, ctypes.c_uint64, ctypes.c_uint64)


class Hooks:
    """Of launches, as triton.knobs.runtime has them."""

    def __init__(self) -> None:
        self.launch_enter_hook: Any = SimpleNamespace(calls=[])
        self.launch_exit_hook: Any = None


class Driver:
    """The launches of kernel(x, n, f) that the extension asked for."""

    def __init__(self) -> None:
        self.launches: list[tuple[Any, ...]] = []
        self.error, self.device, self.hooks = 0, 0, Hooks()
        self.entry = LAUNCH(self.launch)  # keeps the address alive
        self.native = extension.native().triton.Driver(
            launch=ctypes.cast(self.entry, ctypes.c_void_p).value,
            current_device=lambda: self.device,
            current_stream=lambda device: STREAM + device,
            allocate=self.allocate,
            hooks=self.hooks,
            tensors=[Tensor],
            data_ptr=Tensor.data_ptr,
            dtype=Tensor.dtype,
            on_device=Tensor.is_cpu,
        )

    def allocate(self, size: int, alignment: int, stream: int) -> Tensor:
        self.asked = size, alignment, stream
        return WIDE

    def launch(self, function: int, *rest: Any) -> int:
        *shape, stream, parameters, _extra = rest
        values = [
            ctypes.cast(address, ctypes.POINTER(kind))[0]
            for address, kind in zip(parameters[: len(TYPES)], TYPES, strict=True)
        ]
        if not self.error:
            self.launches.append((function, *shape, stream, *values))
        return self.error


def compiled(**metadata: Any) -> Any:
    """As much of a CompiledKernel as is read: kernel(x, n, f, CONSTANT, BLOCK)."""
    plain = {"num_warps": 4, "num_ctas": 1, "shared": 99, "launch_cooperative_grid": False}
    plain |= {"launch_pdl": False, "global_scratch_size": 0, "profile_scratch_size": 0}
    plain |= {"global_scratch_align": 1}
    types = ["*fp32", "i32", "fp32", "constexpr", "constexpr"]
    parameters = ["u64 .ptr .global .align 1 a", "u32 b", "f32 c", "u64 .ptr d", "u64 .ptr e"]
    ptx = ",\n".join(f".param .{parameter}" for parameter in parameters)
    return SimpleNamespace(
        hash="a hash",
        function=FUNCTION,
        metadata=SimpleNamespace(**{**plain, **metadata}),
        src=SimpleNamespace(signature=dict(zip(Jit.arg_names, types, strict=True))),
        asm={"ptx": f".visible .entry kernel(\n{ptx}\n)"},
    )


class Jit:
    """As much of a JITFunction as is used."""

    arg_names = ("x", "n", "f", "CONSTANT", "BLOCK")
    constexprs = (3, 4)

    def __init__(self) -> None:
        self.launches: list[tuple[Any, ...]] = []
        self.compiled = compiled()

    def __getitem__(self, grid: tuple[int, ...]) -> Any:
        def run(*args: Any, **constants: Any) -> Any:
            self.launches.append((grid, *args, constants))
            return self.compiled

        return run


@pytest.fixture
def driver(monkeypatch: pytest.MonkeyPatch) -> Driver:
    made = Driver()
    monkeypatch.setattr(relaunch, "_driver_of", lambda args: made.native)
    return made


@pytest.fixture
def jit() -> Jit:
    return Jit()


KNOWN = {"CONSTANT": 3, "BLOCK": 16, "num_warps": 4}


def test_the_second_launch_is_of_the_compiled_kernel(driver: Driver, jit: Jit) -> None:
    kernel = Relaunched(jit)
    kernel[(7,)](ALIGNED, 5, 0.5, **KNOWN)
    kernel[(8, 2)](ALIGNED[16:], -6, 0.25, **KNOWN)
    assert len(jit.launches) == 1
    grid, block = (8, 2, 1), (128, 1, 1)
    parameters = ALIGNED[16:].data_ptr(), -6, 0.25, 0, 0
    assert driver.launches == [(FUNCTION, *grid, *block, 99, STREAM, *parameters)]


def test_a_number_is_rounded_as_float32(driver: Driver, jit: Jit) -> None:
    kernel = Relaunched(jit)
    for _ in range(2):
        kernel[(7,)](ALIGNED, 5, 0.1, **KNOWN)
    assert driver.launches[0][-3] == torch.tensor(0.1).item() != 0.1


def test_an_empty_grid_launches_nothing(driver: Driver, jit: Jit) -> None:
    kernel = Relaunched(jit)
    for grid in ((7,), (0,), (2, 0)):
        kernel[grid](ALIGNED, 5, 0.5, **KNOWN)
    assert len(jit.launches) == 1 and not driver.launches


@pytest.mark.parametrize(
    "x,n,f,constants",
    [
        (ODD, 5, 0.5, {}),
        (ALIGNED.bfloat16(), 5, 0.5, {}),
        (None, 5, 0.5, {}),
        (ALIGNED, 1, 0.5, {}),
        (ALIGNED, 32, 0.5, {}),
        (ALIGNED, 2**31 + 1, 0.5, {}),
        (ALIGNED, -(2**31) - 1, 0.5, {}),
        (ALIGNED, 5, 5, {}),
        (ALIGNED, 5, 0.5, {"CONSTANT": 4}),
        (ALIGNED, 5, 0.5, {"CONSTANT": 3.0}),
        (ALIGNED, 5, 0.5, {"CONSTANT": ((1, 2), (3, 5))}),
        (ALIGNED, 5, 0.5, {"num_warps": 8}),
        (ALIGNED, 5, 0.5, {"num_stages": 2}),
    ],
)
def test_what_triton_compiles_for(
    driver: Driver, jit: Jit, x: Tensor | None, n: int, f: float, constants: dict[str, Any]
) -> None:
    kernel = Relaunched(jit)
    kernel[(7,)](ALIGNED, 5, 0.5, **KNOWN)
    kernel[(7,)](ALIGNED, 5, 0.5, **{**KNOWN, "CONSTANT": ((1, 2), (3, 4))})
    kernel[(7,)](x, n, f, **{**KNOWN, **constants})
    assert len(jit.launches) == 3 and not driver.launches


def test_constants_that_are_equal_are_the_same(driver: Driver, jit: Jit) -> None:
    kernel = Relaunched(jit)
    for i in (4, 4, 5, 4):
        kernel[(7,)](ALIGNED, 5, 0.5, **{**KNOWN, "CONSTANT": ((1, 2), (3, i))})
    assert len(jit.launches) == 2 and len(driver.launches) == 2


def test_names_are_compared_by_their_text(driver: Driver, jit: Jit) -> None:
    kernel = Relaunched(jit)
    for _ in range(2):
        kernel[(7,)](ALIGNED, 5, 0.5, **{"".join([*name]): value for name, value in KNOWN.items()})
    assert len(jit.launches) == 1 and len(driver.launches) == 1


def test_a_constant_by_position(driver: Driver, jit: Jit) -> None:
    kernel = Relaunched(jit)
    for constant in (3, 5, 3):
        kernel[(7,)](ALIGNED, 5, 0.5, constant, BLOCK=16)
    assert len(jit.launches) == 2 and len(driver.launches) == 1


def test_another_gpu(driver: Driver, jit: Jit) -> None:
    kernel = Relaunched(jit)
    for driver.device in (0, 1, 1):
        kernel[(7,)](ALIGNED, 5, 0.5, **KNOWN)
    assert len(jit.launches) == 2
    assert [launch[8] for launch in driver.launches] == [STREAM + 1]


def test_triton_launches_what_is_observed(driver: Driver, jit: Jit) -> None:
    kernel = Relaunched(jit)
    kernel[(7,)](ALIGNED, 5, 0.5, **KNOWN)
    driver.hooks.launch_enter_hook.calls.append(print)
    kernel[(7,)](ALIGNED, 5, 0.5, **KNOWN)
    driver.hooks.launch_enter_hook.calls.clear()
    driver.hooks.launch_exit_hook = print
    kernel[(7,)](ALIGNED, 5, 0.5, **KNOWN)
    assert len(jit.launches) == 3 and not driver.launches
    driver.hooks.launch_exit_hook = None
    kernel[(7,)](ALIGNED, 5, 0.5, **KNOWN)
    assert len(jit.launches) == 3 and len(driver.launches) == 1
    assert len(kernel.launcher) == 1


def test_triton_launches_what_the_driver_refuses(driver: Driver, jit: Jit) -> None:
    kernel = Relaunched(jit)
    for driver.error in (0, 201, 0):
        kernel[(7,)](ALIGNED, 5, 0.5, **KNOWN)
    assert len(jit.launches) == 2 and len(driver.launches) == 1


class Subclass(Tensor):
    pass


@pytest.mark.parametrize(
    "args",
    [(ALIGNED, True, 0.5), (ALIGNED, 2**63, 0.5), (ALIGNED.as_subclass(Subclass), 5, 0.5)],
    ids=["bool", "too long", "subclass"],
)
def test_triton_launches_arguments_that_are_not_known(
    driver: Driver, jit: Jit, args: tuple[Any, ...]
) -> None:
    kernel = Relaunched(jit)
    for _ in range(3):
        kernel[(7,)](*args, **KNOWN)
    assert len(jit.launches) == 3 and not driver.launches


@pytest.mark.parametrize(
    "metadata",
    [
        {"num_ctas": 2},
        {"launch_cooperative_grid": True},
        {"launch_pdl": True},
        {"profile_scratch_size": 128},
        {"tensordesc_meta": [{"swizzle": 3}]},
        {"instrumentation_mode": "gsan"},
    ],
    ids=lambda metadata: next(iter(metadata)),
)
def test_triton_launches_kernels_that_need_more(
    driver: Driver, jit: Jit, metadata: dict[str, Any]
) -> None:
    jit.compiled = compiled(**metadata)
    kernel = Relaunched(jit)
    for _ in range(2):
        kernel[(7,)](ALIGNED, 5, 0.5, **KNOWN)
    assert len(jit.launches) == 2 and not driver.launches


def test_scratch_memory_is_that_of_the_whole_grid(driver: Driver, jit: Jit) -> None:
    jit.compiled = compiled(global_scratch_size=384, global_scratch_align=128)
    kernel = Relaunched(jit)
    for _ in range(2):
        kernel[(7, 2)](ALIGNED, 5, 0.5, **KNOWN)
    assert driver.asked == (7 * 2 * 384, 128, STREAM)
    assert [launch[-2:] for launch in driver.launches] == [(WIDE.data_ptr(), 0)]


@pytest.mark.parametrize(
    "old,new",
    [("u32 b", "u64 b"), ("u64 .ptr e", "align 64 .b8 e[128]"), (",\n.param .u32 b", "")],
    ids=["width", "struct", "missing"],
)
def test_triton_launches_kernels_with_other_parameters(old: str, new: str) -> None:
    kernel = compiled()
    assert passed_arguments(kernel, Jit.arg_names, 3) == (["pointer", "i32", "fp32"], 2)
    kernel.asm["ptx"] = kernel.asm["ptx"].replace(old, new)
    assert passed_arguments(kernel, Jit.arg_names, 3) is None


def test_nothing_is_kept_off_a_gpu(jit: Jit) -> None:
    kernel = Relaunched(jit)
    for _ in range(2):
        kernel[(7,)](ALIGNED, 5, 0.5, **KNOWN)
    assert len(jit.launches) == 2 and kernel.launcher is None


def test_parameters_are_those_that_triton_passes() -> None:
    program = [sys.executable, str(ROOT / "tests/support/triton_launches.py")]
    compiling = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run(program, capture_output=True, text=True, check=False, env=compiling)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["compared"] >= 26
    # Its tensor descriptors are the host's.
    assert found["different"] == ["_two_segment_kernel: by Triton"]
