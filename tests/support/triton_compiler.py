"""Compiles Triton kernels to PTX on request, in a process of its own: the tests' interprets them.

Reads pickled `Request`s from standard input and writes pickled `Compiled`s, or the text of an
error, to standard output. Neither a GPU nor ptxas is needed.
"""

import os
import pickle
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

KERNELS = Path(__file__).resolve().parents[2] / "kernels"


@dataclass(frozen=True)
class Pointer:
    """What matters of a tensor: torch's name of its dtype, and whether 16 divides its address."""

    dtype: str
    is_aligned: bool


@dataclass(frozen=True)
class Descriptor:
    """A host-side tensor descriptor."""

    dtype: str
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    block: tuple[int, ...]


@dataclass(frozen=True)
class Request:
    """A launch of a kernel of kernels/src: its arguments by name, and options such as num_warps."""

    module: str
    kernel: str
    capability: int
    arguments: tuple[tuple[str, object], ...]


@dataclass(frozen=True)
class Compiled:
    """signature: the type of each argument by name. descriptors: what is known of each, if any."""

    ptx: str
    shared: int
    warps: int
    signature: dict[str, Any]
    descriptors: list[dict[str, Any]]


def main() -> None:
    replies = os.fdopen(os.dup(sys.stdout.fileno()), "wb")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())  # what others print is no reply
    sys.path.insert(0, str(KERNELS))
    import check_compile
    from triton.backends.nvidia.compiler import CUDABackend

    check_compile.load_kernels()
    make, add_stages = CUDABackend.__init__, CUDABackend.add_stages

    def ends_in_ptx(self: Any, *args: Any) -> None:
        make(self, *args)
        self.binary_ext = "ptx"

    def without_cubin(self: Any, stages: dict[str, Any], *rest: Any) -> None:
        add_stages(self, stages, *rest)
        del stages["cubin"]

    CUDABackend.__init__, CUDABackend.add_stages = ends_in_ptx, without_cubin
    while True:
        try:
            request = pickle.load(sys.stdin.buffer)
        except EOFError:
            return
        try:
            reply: object = compile_kernel(request)
        except Exception as error:
            reply = f"{type(error).__name__}: {error}"
        pickle.dump(reply, replies)
        replies.flush()


def compile_kernel(request: Request) -> Compiled:
    """The kernel for a GPU of the request's capability."""
    import importlib

    import check_compile
    import torch
    import triton
    from triton.runtime.jit import JITFunction, MockTensor
    from triton.tools.tensor_descriptor import TensorDescriptor

    class Tensor(MockTensor):
        def __init__(self, pointer: Pointer) -> None:
            super().__init__(getattr(torch, pointer.dtype))
            self.address = 0 if pointer.is_aligned else 8

        def data_ptr(self) -> int:
            return self.address

    def argument(value: object) -> object:
        if isinstance(value, Pointer):
            return Tensor(value)
        if isinstance(value, Descriptor):
            base = torch.empty(value.shape, dtype=getattr(torch, value.dtype), device="meta")
            return TensorDescriptor(base, list(value.shape), list(value.strides), list(value.block))
        return tuple(argument(v) for v in value) if isinstance(value, tuple) else value

    triton.runtime.driver.set_active(check_compile.FakeDriver(request.capability))
    function = getattr(importlib.import_module(request.module), request.kernel)
    jit: JITFunction = getattr(function, "jit", function)
    arguments = {name: argument(value) for name, value in request.arguments}
    compiled = jit.run(grid=(1,), warmup=True, **arguments)
    return Compiled(
        bytes(compiled.asm["ptx"]).decode(),
        compiled.metadata.shared,
        compiled.metadata.num_warps,
        dict(compiled.src.signature),
        list(getattr(compiled.metadata, "tensordesc_meta", None) or []),
    )


if __name__ == "__main__":
    # Pickles name the module, not the script.
    import triton_compiler

    triton_compiler.main()
