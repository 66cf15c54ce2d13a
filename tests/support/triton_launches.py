"""What Triton's own launcher and the extension's pass to the driver, for this tree's kernels.

Run as a program: prints what differs, as JSON, and how many launches were compared. The driver is a
library made here that records launches; no kernel runs. `--all`: every launch of check_cases, not
one of each kernel.
"""

import ctypes
import importlib
import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "kernels"))

import check_cases
import check_compile
import torch
import triton
from torch import Tensor
from triton import knobs
from triton.backends.nvidia import driver as nvidia
from triton.runtime.jit import JITFunction

check_compile.load_kernels()
extension = importlib.import_module("lora_engine.backends.extension")
relaunch = importlib.import_module("lora_engine.backends.triton.relaunch")

SCRATCH = torch.empty(2**22, dtype=torch.int8)
CAPABILITY, STREAM, FUNCTION = 90, 0x5EED, 0xF00D
LAUNCHES = r"""
#include <string.h>
typedef struct {
  unsigned grid[3], block[3], shared;
  unsigned attributes;
  void *stream, *function;
  unsigned char parameters[1024];
} Record;
typedef struct {
  unsigned grid[3], block[3], shared;
  void *stream, *attributes;
  unsigned count;
} Config;
Record record;
int count, sizes[128];
static void keep(void** parameters) {
  unsigned char* out = record.parameters;
  for (int i = 0; i < count; out += sizes[i++]) memcpy(out, parameters[i], sizes[i]);
}
int cuLaunchKernelEx(const Config* c, void* function, void** parameters, void** extra) {
  memcpy(&record, c, 7 * sizeof(unsigned));
  record.attributes = c->count;
  record.stream = c->stream;
  record.function = function;
  keep(parameters);
  return 0;
}
int cuLaunchKernel(void* function, unsigned gx, unsigned gy, unsigned gz, unsigned bx, unsigned by,
                   unsigned bz, unsigned shared, void* stream, void** parameters, void** extra) {
  unsigned shape[] = {gx, gy, gz, bx, by, bz, shared};
  memcpy(&record, shape, sizeof shape);
  record.attributes = 0;
  record.stream = stream;
  record.function = function;
  keep(parameters);
  return 0;
}
int cuPointerGetAttribute(void** out, int attribute, void* pointer) { *out = pointer; return 0; }
int cuCtxGetCurrent(void** context) { *context = &record; return 0; }
"""


class Record(ctypes.Structure):
    _fields_ = (
        ("shape", ctypes.c_uint * 7),
        ("attributes", ctypes.c_uint),
        ("stream", ctypes.c_void_p),
        ("function", ctypes.c_void_p),
        ("parameters", ctypes.c_ubyte * 1024),
    )

    def values(self) -> tuple[object, ...]:
        return (*self.shape, self.attributes, self.stream, self.function, bytes(self.parameters))


class RecordingDriver:
    """libcuda.so.1 as Triton loads it: every function fails but those that launch."""

    def __init__(self, folder: Path) -> None:
        source = Path(nvidia.__file__).with_name("driver.c").read_text()
        source += Path(nvidia.__file__).read_text()
        used = set(re.findall(r"\bcu[A-Z]\w*(?=\()", source)) - set(
            re.findall(r"\bcu[A-Z]\w*(?=\()", LAUNCHES)
        )
        others = "".join(f"int {name}(void) {{ return 1; }}\n" for name in sorted(used))
        (folder / "driver.c").write_text(LAUNCHES + others)
        library = folder / "libcuda.so.1"
        options = ["-shared", "-fPIC", "-w", "-Wl,-soname,libcuda.so.1"]
        command = ["cc", *options, str(folder / "driver.c"), "-o", str(library)]
        subprocess.run(command, check=True)
        self.library = ctypes.CDLL(str(library), mode=ctypes.RTLD_GLOBAL)

    def expect(self, sizes: list[int]) -> None:
        """The sizes of the next launch's parameters, in bytes."""
        ctypes.c_int.in_dll(self.library, "count").value = len(sizes)
        (ctypes.c_int * 128).in_dll(self.library, "sizes")[: len(sizes)] = sizes
        ctypes.memset(ctypes.addressof(self.record()), 0, ctypes.sizeof(Record))

    def record(self) -> Record:
        return Record.in_dll(self.library, "record")

    def address(self) -> int:
        found = ctypes.cast(self.library.cuLaunchKernel, ctypes.c_void_p).value
        assert found is not None
        return found


class Active(check_compile.FakeDriver):
    """A driver that compiles, and has what Triton's launcher asks for."""

    def __init__(self) -> None:
        super().__init__(CAPABILITY)
        self.utils = nvidia.CudaUtils()


def launches(whole: bool) -> Iterator[tuple[JITFunction, tuple[Any, ...], Any, dict[str, Any]]]:
    """(kernel, arguments, grid, constants) of launches.

    Unless `whole`, one of each kernel, with and without tensor descriptors.
    """
    found: dict[object, tuple[JITFunction, tuple[Any, ...], Any, dict[str, Any]]] = {}

    def record(
        function: JITFunction, *args: Any, grid: Any, warmup: bool = False, **constants: Any
    ) -> None:
        key = function.fn.__name__, constants.get("TMA"), len(found) if whole else None
        found.setdefault(key, (function, args, grid, constants))

    dtypes = check_cases.DTYPES if whole else (torch.bfloat16,)
    recorded = check_compile.recorded(CAPABILITY, compile=False)
    with recorded, mock.patch.object(JITFunction, "run", record):
        for cases in check_cases.OPERATIONS.values():
            for call in (call for dtype in dtypes for call in cases(dtype)):
                call.launcher(*call.args, **call.kwargs)
    yield from found.values()


def solid(x: Any, i: int) -> Any:
    """A tensor in the place of one without memory: aligned, at an address of its own."""
    return torch.empty(64, dtype=x.dtype)[: 48 - i] if isinstance(x, Tensor) else x


def allocate(size: int, alignment: int, stream: int) -> Tensor:
    """Scratch memory whose address is what was asked for."""
    made: Tensor = SCRATCH[size + alignment + stream % 16 :]
    return made


def differences(folder: Path, whole: bool) -> Iterator[str | None]:
    """For each launch what differs, or None."""
    recording = RecordingDriver(folder)
    triton.set_allocator(allocate)
    native = extension.native().triton
    driver = native.Driver(
        launch=recording.address(),
        current_device=lambda: 0,
        current_stream=lambda device: STREAM + device,
        allocate=allocate,
        hooks=knobs.runtime,
        tensors=[Tensor],
        data_ptr=Tensor.data_ptr,
        dtype=Tensor.dtype,
        on_device=Tensor.is_cpu,
    )
    active = Active()
    for function, empty, grid, constants in launches(whole):
        triton.runtime.driver.set_active(active)
        compiled = function.run(*empty, grid=grid, warmup=True, **constants)
        args = tuple(solid(x, i) for i, x in enumerate(empty))
        name = function.fn.__name__
        passed = relaunch.passed_arguments(compiled, function.arg_names, len(args))
        if passed is None:
            yield f"{name}: by Triton"
            continue
        types = [relaunch.PTX_TYPES[kind] for kind in passed.kinds if kind != "constexpr"]
        sizes = [int(kind[1:]) // 8 for kind in types] + [8] * passed.scratches
        bound = [*args, *(constants[x] for x in function.arg_names[len(args) :])]
        extents = (*grid, 1, 1)[:3]
        recording.expect(sizes)
        own = nvidia.CudaLauncher(compiled.src, compiled.metadata)
        own(*extents, STREAM, FUNCTION, compiled.packed_metadata, None, None, None, *bound)
        wanted = recording.record().values()

        def by_triton(*args: Any, **constants: Any) -> None:
            raise LookupError("no kernel is kept for this call")

        constant = [i for i in function.constexprs if i < len(args)]
        launcher = native.Launcher(by_triton, constant)
        kept = launcher.keep(
            driver=driver,
            arguments=args,
            constants=constants,
            owner=compiled,
            function=FUNCTION,
            threads=relaunch.THREADS * compiled.metadata.num_warps,
            shared=compiled.metadata.shared,
            kinds=passed.kinds,
            scratches=passed.scratches,
            scratch_bytes=compiled.metadata.global_scratch_size,
            scratch_alignment=compiled.metadata.global_scratch_align,
        )
        recording.expect(sizes)
        if not kept:
            yield f"{name}: not kept"
            continue
        launcher.entry()(grid, *args, **constants)
        found = recording.record().values()
        yield None if found == wanted else f"{name}: {found} is not {wanted}"


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        knobs.nvidia.libcuda_path = folder
        found = list(differences(Path(folder), "--all" in sys.argv))
    print(json.dumps({"compared": len(found), "different": [x for x in found if x is not None]}))


if __name__ == "__main__":
    main()
