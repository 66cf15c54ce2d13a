"""Launches of a kernel that is compiled already, without Triton's work for every call.

`kernel[grid](...)` binds and specialises the arguments anew at each launch and looks the compiled
kernel up by them: 25 to 55 µs of the processor's time on the machine of an H100 or H200, where a
training step makes hundreds of launches and waits for them. What Triton compiles for depends on
little: dtype and alignment of a tensor, whether an integer is 1 or a multiple of 16, and on the
constants. The extension keeps the compiled kernels by that, packs the arguments as Triton would,
and calls the driver (csrc/triton/launcher.cpp).
"""

import ctypes
import re
from collections.abc import Sequence
from functools import cache, partial
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import Parameter
from triton import knobs
from triton.runtime import _allocation

from lora_engine.backends import extension

# A kernel's parameters in PTX, by the types that Triton's signature gives them.
PTX_TYPES = {"pointer": "u64", "i32": "u32", "i64": "u64", "fp32": "f32"}
SCRATCHES = 2  # the most pointers to scratch memory that follow a kernel's own parameters
THREADS = 32  # in a warp


class Relaunched:
    """A @triton.jit function that keeps what it was compiled to.

    On a GPU `self[grid](*args, **constants)`: `args` are the kernel's first parameters, numbers and
    tensors; `constants` its constexpr parameters and Triton's options. Elsewhere, interpreted or
    compiled for a GPU that is not there, it is Triton's own.
    """

    def __init__(self, jit: Any) -> None:
        self.jit = jit
        self.launch = self._by_triton
        self.launcher: Any = None  # of the extension, once there is something to keep
        self.refused: set[str] = set()  # hashes of kernels that only Triton launches

    def __getattr__(self, name: str) -> Any:
        return getattr(self.jit, name)

    def __getitem__(self, grid: tuple[int, ...]) -> Any:
        return partial(self.launch, grid)

    def _by_triton(self, grid: tuple[int, ...], *args: Any, **constants: Any) -> None:
        """Launches by Triton, which gives back what it compiled."""
        compiled = self.jit[grid](*args, **constants)
        driver = _driver_of(args)
        if driver is not None and compiled.hash not in self.refused:
            self._keep(driver, compiled, args, constants)

    def _keep(
        self, driver: Any, compiled: Any, args: tuple[Any, ...], constants: dict[str, Any]
    ) -> None:
        passed = passed_arguments(compiled, self.jit.arg_names, len(args))
        if passed is not None:
            if self.launcher is None:
                constant = [i for i in self.jit.constexprs if i < len(self.jit.arg_names)]
                self.launcher = extension.native().triton.Launcher(self._by_triton, constant)
            kept = self.launcher.keep(
                driver=driver,
                arguments=args,
                constants=constants,
                owner=compiled,
                function=compiled.function,
                threads=THREADS * compiled.metadata.num_warps,
                shared=compiled.metadata.shared,
                kinds=passed.kinds,
                scratches=passed.scratches,
                scratch_bytes=compiled.metadata.global_scratch_size,
                scratch_alignment=compiled.metadata.global_scratch_align,
            )
            if kept:
                self.launch = self.launcher.entry()
                return
        self.refused.add(compiled.hash)


class Passed(NamedTuple):
    """What a compiled kernel is passed.

    kinds: how it takes each of the arguments by position: of PTX_TYPES, or "constexpr" for those
    that are not passed. scratches: pointers to scratch memory after them.
    """

    kinds: list[str]
    scratches: int


def passed_arguments(compiled: Any, names: Sequence[str], positional: int) -> Passed | None:
    """What is passed for the first `positional` of its arguments, if no others are.

    None for a kernel that takes more than that, or needs more than a grid of blocks.
    """
    metadata, signature = compiled.metadata, compiled.src.signature
    asked = (
        metadata.num_ctas != 1,
        metadata.launch_cooperative_grid,
        metadata.launch_pdl,
        metadata.profile_scratch_size,
        getattr(metadata, "tensordesc_meta", None),
        getattr(metadata, "instrumentation_mode", ""),
    )
    if any(asked) or any(signature.get(name) != "constexpr" for name in names[positional:]):
        return None
    types = [signature[name] for name in names[:positional]]
    kinds = ["pointer" if str(kind).startswith("*") else kind for kind in types]
    expected = [PTX_TYPES.get(kind) for kind in kinds if kind != "constexpr"]
    entry = re.search(r"\.entry \w+\(([^)]*)\)", compiled.asm["ptx"])
    if entry is None:
        return None
    found = re.findall(r"\.param \.(\w+)", entry[1])
    scratches = found[len(expected) :]
    if found[: len(expected)] != expected or scratches != ["u64"] * len(scratches):
        return None
    return Passed(kinds, len(scratches)) if len(scratches) <= SCRATCHES else None


def _driver_of(args: Sequence[Any]) -> Any:
    """What launches for these arguments: None off a GPU, and without the extension."""
    tensor = next((arg for arg in args if isinstance(arg, Tensor)), None)
    return _driver() if tensor is not None and tensor.is_cuda else None


@cache
def _driver() -> Any:
    if not extension.extension_available():
        return None
    cuda = ctypes.CDLL("libcuda.so.1")
    return extension.native().triton.Driver(
        launch=ctypes.cast(cuda.cuLaunchKernel, ctypes.c_void_p).value,
        current_device=torch._C._cuda_getDevice,
        current_stream=torch._C._cuda_getCurrentRawStream,
        allocate=_allocate,
        hooks=knobs.runtime,
        tensors=[Tensor, Parameter],
        data_ptr=Tensor.data_ptr,
        dtype=Tensor.dtype,
        on_device=Tensor.is_cuda,
    )


def _allocate(size: int, alignment: int, stream: int) -> Tensor:
    """By the allocator that Triton was given in this context."""
    scratch: Tensor = _allocation._allocator.get()(size, alignment, stream)
    return scratch
