"""Triton kernels compiled for a GPU and executed on the CPU, on the tensors that they are given.

In place of Triton's interpreter, while `executed_ptx` is entered: kernels/src keeps its launchers,
the launch table's lines for that capability are taken, and the machine in tests/support/ptx runs
the PTX. What was compiled is kept under build/.
"""

import hashlib
import inspect
import os
import pickle
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any
from unittest import mock

import ptx
import triton
import triton_compiler
from built_once import built_once
from compiled_module import ROOT
from torch import Tensor
from triton.runtime.interpreter import InterpretedFunction
from triton.tools.tensor_descriptor import TensorDescriptor
from triton_compiler import Compiled, Descriptor, Pointer, Request

CACHE = ROOT / "build" / "compiled-tests" / "triton-ptx"
SWIZZLES = (0, 32, 64, 128)  # by Triton's numbers
# Before 3.7 Triton puts no fence between cp.async and wgmma, only between stores and wgmma.
FENCES_COPIES = tuple(map(int, triton.__version__.split(".")[:2])) >= (3, 7)
SCRATCH = 2  # pointers that Triton adds to a kernel's parameters

# (capability, kernel) of all that ran in this process.
executed: set[tuple[int, str]] = set()


@contextmanager
def executed_ptx(
    capability: int,
    *,
    completion: ptx.Completion = "late",
    seed: int = 0,
    change: Callable[[str], str] = str,
) -> Iterator[None]:
    """Within, launches of Triton kernels run as PTX for a GPU of `capability`.

    change: what the PTX is passed through before, to plant a fault.
    """
    from lora_engine.backends.triton import launch

    launches = 0

    def run(function: Any, *args: Any, grid: Any, warmup: bool, **options: Any) -> None:
        nonlocal launches
        launches += 1
        name, compiled, values = _prepared(function.fn, args, options, capability)
        kernel = _kernel(change(compiled.ptx))
        missing = len(kernel.parsed.parameters) - len(values)
        assert 0 <= missing <= SCRATCH, f"{name} has other parameters than were packed"
        kernel.launch(
            grid,
            32 * compiled.warps,
            [*values, *[None] * missing],
            shared=compiled.shared,
            completion=completion,
            seed=seed + launches,
            copies_need_fence=FENCES_COPIES,
        )
        executed.add((capability, name))

    with (
        mock.patch.object(InterpretedFunction, "run", run),
        mock.patch.object(launch, "capability", lambda device: capability),
    ):
        yield


def _prepared(
    function: Any, args: Sequence[Any], options: dict[str, Any], capability: int
) -> tuple[str, Compiled, list[ptx.Argument]]:
    """The kernel's name, what it was compiled to, and its arguments."""
    names = list(inspect.signature(function).parameters)
    given = {**dict(zip(names, args, strict=False)), **options}
    constants = {
        name
        for name, parameter in inspect.signature(function).parameters.items()
        if "constexpr" in str(parameter.annotation)
    }
    known = tuple(
        (name, value if name in constants or name not in names else _kind(value))
        for name, value in given.items()
    )
    request = Request(function.__module__, function.__name__, capability, known)
    compiled = _compiled(request)
    descriptors = iter(compiled.descriptors or [None] * len(given))
    values: list[ptx.Argument] = []
    for name in names:
        values += _arguments(
            compiled.signature.get(name, "constexpr"), given.get(name), descriptors
        )
    return function.__name__, compiled, values


def _kind(value: Any) -> object:
    """An argument as far as Triton compiles another kernel for it."""
    if isinstance(value, Tensor):
        return Pointer(str(value.dtype).removeprefix("torch."), value.data_ptr() % 16 == 0)
    if isinstance(value, TensorDescriptor):
        dtype = str(value.base.dtype).removeprefix("torch.")
        # Any shape will do.
        shape = tuple(16 for _ in value.shape)
        return Descriptor(dtype, shape, (16,) * (len(shape) - 1) + (1,), tuple(value.block_shape))
    if isinstance(value, tuple):
        return tuple(map(_kind, value))
    if type(value) is int and value != 1:
        # One of the same divisibility and width.
        wide = 2**40 if not -(2**31) <= value < 2**31 else 0
        return wide + (32 if value % 16 == 0 else 33)
    return 0.5 if isinstance(value, float) else value


def _arguments(kind: Any, value: Any, descriptors: Iterator[Any]) -> list[ptx.Argument]:
    """The kernel's parameters that stand for one argument."""
    if isinstance(kind, tuple):
        pairs = zip(kind, value, strict=True)
        return [x for k, v in pairs for x in _arguments(k, v, descriptors)]
    if kind == "constexpr":
        return []
    if isinstance(value, TensorDescriptor):
        known = next(descriptors)
        sizes = [*map(int, value.shape), *map(int, value.strides)]
        base = value.base.detach()
        if known is None:  # without TMA: its parts, and the sizes a second time
            flags = [False, False] if FENCES_COPIES else [False]
            return [base, *sizes, *flags, *sizes]
        box = tuple(reversed(known["block_size"]))
        return [ptx.TensorMap(base, box, SWIZZLES[known["swizzle"]]), *sizes]
    if isinstance(value, Tensor):
        return [value.detach()]
    return [float(value) if str(kind).startswith("fp") else value]


@cache
def _kernel(text: str) -> ptx.Kernel:
    return ptx.Kernel(text)


@cache
def _sources() -> bytes:
    """What PTX depends on beside the request."""
    content = hashlib.sha256(f"{triton.__version__} {sys.version_info[:2]}".encode())
    for path in [Path(triton_compiler.__file__), *sorted((ROOT / "kernels" / "src").glob("*.py"))]:
        content.update(path.read_bytes())
    return content.digest()


@cache
def _compiled(request: Request) -> Compiled:
    name = hashlib.sha256(_sources() + repr(request).encode()).hexdigest()[:24]
    kept = CACHE / f"{request.kernel}-{request.capability}-{name}.pickle"

    def build(unfinished: Path) -> None:
        reply = _ask(request)
        if isinstance(reply, str):
            raise RuntimeError(f"{request.kernel}, capability {request.capability}: {reply}")
        unfinished.write_bytes(pickle.dumps(reply))

    compiled: Compiled = pickle.loads(built_once(kept, build).read_bytes())
    return compiled


@cache
def _compiler() -> subprocess.Popen[bytes]:
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    # Triton's own cache is for whole kernels, these lack the machine code.
    environment["TRITON_CACHE_DIR"] = str(CACHE / "triton")
    return subprocess.Popen(
        [sys.executable, triton_compiler.__file__],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        env=environment,
    )


def _ask(request: Request) -> Compiled | str:
    process = _compiler()
    assert process.stdin is not None and process.stdout is not None
    pickle.dump(request, process.stdin)
    process.stdin.flush()
    reply: Compiled | str = pickle.load(process.stdout)
    return reply
