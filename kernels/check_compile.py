"""Compiles what the launchers launch, for a GPU that is not there.

The launchers run as they are, with tensors on the device "meta", which have shapes and strides and
no memory. A stand-in for the driver names the capability, and `JITFunction.run` compiles instead of
launching: what is examined is the kernel that a GPU would be given, with the launch table's
parameters and Triton's own specialisation on strides and alignment.
"""

import importlib.util
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any
from unittest import mock

# Decides at import whether triton compiles or interprets.
os.environ.pop("TRITON_INTERPRET", None)

import triton
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.runtime.jit import JITFunction

ROOT = Path(__file__).resolve().parents[1]
SOURCES = ROOT / "kernels" / "src"

# Bytes of shared memory that one program may have, by capability. CUDA C++ Programming Guide,
# table "Technical Specifications per Compute Capability".
SHARED_LIMITS = {80: 166912, 86: 101376, 89: 101376, 90: 232448, 100: 232448, 120: 101376}
LARGEST_GRID = (2**31 - 1, 65535, 65535)

# The matrix instruction of a capability in PTX; older and smaller ones are `mma.sync` everywhere.
NATIVE_MATRIX = {90: "wgmma.mma_async", 100: "tcgen05.mma"}
SYNC_MATRIX = "mma.sync"

# Types of arguments, numbers aside, of whose every value Triton makes another kernel.
CONSTANTS = (bool, str, tuple, type(None))

# Triton's options that the launch table never sets; they would only widen the printed table.
UNPRINTED = {"enable_fp_fusion"}


def load_kernels() -> Any:
    """`lora_engine.backends.triton` of this tree, whatever is installed: its launch parameters.

    The package is found where pyproject.toml maps it, so that no installation is needed.
    """
    if knobs.runtime.interpret:
        raise RuntimeError("triton is interpreting in this process; kernels are compiled here")
    name = "lora_engine.backends.triton"
    if str(ROOT) not in sys.path:
        sys.path.insert(0, str(ROOT))
    if name not in sys.modules:
        spec = importlib.util.spec_from_file_location(
            name, SOURCES / "__init__.py", submodule_search_locations=[str(SOURCES)]
        )
        assert spec is not None and spec.loader is not None
        sys.modules[name] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(sys.modules[name])
        setattr(importlib.import_module("lora_engine"), "kernels", sys.modules[name])  # noqa: B010
    return importlib.import_module(f"{name}.launch")


@dataclass(frozen=True)
class Launch:
    """A kernel as it was launched.

    configuration: what the launch table says of it. flags: its arguments of whose every value
    Triton makes another kernel: those of CONSTANTS, and numbers named in capitals. unaligned: its
    numbers that are not multiples of 16, which make another kernel too.
    """

    module: str
    kernel: str
    configuration: str
    flags: frozenset[tuple[str, object]]
    unaligned: frozenset[str]
    grid: tuple[int, ...]
    compiled: Any


@dataclass
class Recording:
    """What one call of a launcher did."""

    entries: list[Any]
    launches: list[Launch]
    parameters: dict[str, Any]


class FakeDriver:
    """As much of a driver as compiling needs. Its device number keeps the caches apart."""

    def __init__(self, capability: int) -> None:
        self.capability = capability

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self.capability, 32)

    def get_current_device(self) -> int:
        return self.capability

    def get_current_stream(self, device: int) -> int:
        return 0


@contextmanager
def recorded(capability: int, *, compile: bool) -> Iterator[Recording]:
    """Launches within only compile for `capability` (or not even that) and are recorded."""
    launch = load_kernels()
    from lora_engine.backends import tables

    recording = Recording([], [], {})
    run = JITFunction.run

    def record_entry(kernel: str, capability: int, dtype: Any, size: int) -> dict[str, Any]:
        name = str(dtype).removeprefix("torch.")
        key = tables.launch_key(kernel, capability, name, size)
        recording.entries.append(key)
        recording.parameters = tables.launch_parameters(key)
        return recording.parameters

    def record_launch(
        function: JITFunction, *args: Any, grid: Any, warmup: bool = False, **options: Any
    ) -> Any:
        compiled = None
        if compile:
            compiled = run(function, *args, grid=grid, warmup=True, **options)
        parameters = recording.parameters
        recording.launches.append(_launch(function, args, grid, options, parameters, compiled))
        return compiled

    triton.runtime.driver.set_active(FakeDriver(capability))
    with (
        mock.patch.object(launch, "launch_parameters", record_entry),
        mock.patch.object(launch, "capability", lambda device: capability),
        mock.patch.object(JITFunction, "run", record_launch),
    ):
        yield recording


def _launch(
    function: JITFunction,
    args: tuple[Any, ...],
    grid: Any,
    options: dict[str, Any],
    parameters: dict[str, Any],
    compiled: Any,
) -> Launch:
    names = [parameter.name for parameter in function.params]
    bound = {**dict(zip(names, args, strict=False)), **options}
    sizes = tuple(grid(bound)) if callable(grid) else tuple(grid)
    shown = {k: options[k] for k in parameters if k in options and k not in UNPRINTED}
    configuration = " ".join(f"{name}={value}" for name, value in shown.items())
    flags = frozenset(
        (k, v)
        for k, v in bound.items()
        if isinstance(v, CONSTANTS) or (k.isupper() and k not in parameters and type(v) is int)
    )
    numbers = {k: v for k, v in bound.items() if type(v) is int and k not in parameters}
    unaligned = frozenset(k for k, v in numbers.items() if v % 16)
    module, name = function.fn.__module__, function.fn.__name__
    return Launch(module, name, configuration, flags, unaligned, sizes, compiled)


@dataclass(frozen=True)
class Row:
    """A compiled kernel. key: of the machine code. load_bytes: a thread's widest global load."""

    module: str
    kernel: str
    capability: int
    configuration: str
    key: str
    registers: int
    stack: int
    shared: int
    matrix: bool
    load_bytes: int
    problems: tuple[str, ...] = ()


def examine(launch: Launch, capability: int, *, matrix: str | None) -> Row:
    """The row of a compiled launch. matrix: "native" or "any" instruction that it must have."""
    compiled = launch.compiled
    ptx = compiled.asm["ptx"]
    used = resource_usage(compiled.asm["cubin"])
    shared = compiled.metadata.shared + used["SHARED"]
    stack = used["STACK"] + used["LOCAL"]
    if stack and not touches_local_memory(compiled.asm["cubin"]):
        stack = 0  # ptxas reserves a frame now and then that no instruction uses
    native = NATIVE_MATRIX.get(capability, SYNC_MATRIX)
    has_native, has_any = native in ptx, native in ptx or SYNC_MATRIX in ptx
    problems = []
    if stack:
        problems.append(f"{stack} bytes of stack: registers are spilled")
    if shared > SHARED_LIMITS[capability]:
        limit = SHARED_LIMITS[capability]
        problems.append(f"{shared} bytes of shared memory, the limit is {limit}")
    if (matrix == "native" and not has_native) or (matrix == "any" and not has_any):
        wanted = native if matrix == "native" else f"{native} or {SYNC_MATRIX}"
        problems.append(f"no matrix instructions ({wanted})")
    problems += [
        f"grid dimension {i} is {size}, the limit is {limit}"
        for i, (size, limit) in enumerate(zip(launch.grid, LARGEST_GRID, strict=False))
        if not 0 < size <= limit
    ]
    return Row(
        launch.module,
        launch.kernel,
        capability,
        launch.configuration,
        compiled.hash,
        used["REG"],
        stack,
        shared,
        has_any,
        widest_load(ptx),
        tuple(problems),
    )


@cache
def resource_usage(cubin: bytes) -> dict[str, int]:
    """REG, STACK, SHARED and LOCAL of the machine code, as ptxas settled them."""
    output = _cuobjdump(cubin, "--dump-resource-usage")
    used = {name: int(value) for name, value in re.findall(r"\b([A-Z]+):(\d+)", output)}
    missing = {"REG", "STACK", "SHARED", "LOCAL"} - set(used)
    if missing:
        raise RuntimeError(f"cuobjdump does not say {', '.join(sorted(missing))}: {output!r}")
    return used


def touches_local_memory(cubin: bytes) -> bool:
    """Whether the machine code loads or stores local memory, or calls what may.

    What it calls by a relative address, such as the slow path of a division, is part of it.
    """
    return re.search(r"\b(LDL|STL|CALL(?!\.REL))\b", _cuobjdump(cubin, "-sass")) is not None


def _cuobjdump(cubin: bytes, option: str) -> str:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [knobs.nvidia.cuobjdump.path, option, file.name]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def widest_load(ptx: str) -> int:
    """Bytes of the widest load of a thread from global memory; asynchronous copies count too."""
    loads = [
        int(count or 1) * int(bits) // 8
        for count, bits in re.findall(r"\bld\.global\S*?(?:\.v(\d))?\.[bsuf](\d+)\b", ptx)
    ]
    copies = re.findall(r"\bcp\.async\.c[ag]\.shared\.global\S*\s[^;]*?,\s*(0x[0-9a-f]+|\d+)", ptx)
    return max([*loads, *(int(size, 0) for size in copies)], default=0)
