"""csrc/cuda as nvcc makes it, host code and all, with its kernels executed as PTX on the CPU."""

import ctypes
import hashlib
import os
import re
import subprocess
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from types import ModuleType
from unittest import mock

import compiled_module
import ptx
import pytest
import torch
from built_once import built_once
from compiled_module import ROOT
from ptx.nvcc import find_nvcc
from torch import Tensor

CUDA = ROOT / "csrc" / "cuda"
RUNTIME = Path(ptx.__file__).parent / "host" / "cuda_runtime.cpp"
ARCHITECTURES = {80: "80", 90: "90a"}

# (capability, mangled name) of all that ran in this process.
executed: set[tuple[int, str]] = set()


def architectures(stem: str) -> dict[int, str]:
    """What a file of csrc/cuda is compiled for, by capability."""
    return {90: ARCHITECTURES[90]} if stem.endswith("_sm90") else ARCHITECTURES


def headers() -> list[Path]:
    return [*CUDA.glob("*.*h*"), *(ROOT / "csrc/common").iterdir(), ROOT / "csrc" / "fields.hpp"]


@cache
def compiled() -> dict[str, Path]:
    """The folder with the object and the PTX of each file of csrc/cuda, by its stem."""
    nvcc = find_nvcc()
    if nvcc is None:
        pytest.skip("needs nvcc (set CUDA_HOME) to make PTX of CUDA C++")
    options = [nvcc, "-std=c++17", "-O3", "-Xcompiler", "-fPIC,-fvisibility=hidden"]
    common = b"".join(path.read_bytes() for path in sorted(headers()))

    def make(source: Path) -> Path:
        targets = architectures(source.stem).values()
        command = [*options, *(f"-gencode=arch=compute_{t},code=compute_{t}" for t in targets)]
        content = hashlib.sha256(repr(command).encode() + common + source.read_bytes())
        folder = ROOT / "build" / "compiled-tests" / "cuda-ptx"
        folder = folder / f"{source.stem}-{content.hexdigest()[:16]}"

        def build(unfinished: Path) -> None:
            unfinished.mkdir()
            keep = ["--keep", f"--keep-dir={unfinished}", "-c", str(source)]
            _run([*command, *keep, "-o", str(unfinished / f"{source.stem}.o")])

        return built_once(folder, build)

    sources = sorted(CUDA.glob("*.cu"))
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        return {s.stem: folder for s, folder in zip(sources, pool.map(make, sources), strict=True)}


def texts(capability: int) -> Iterator[str]:
    """The PTX of every file that is compiled for the capability."""
    for stem, folder in compiled().items():
        names = architectures(stem)
        if capability in names:
            part = f".compute_{names[capability]}" if len(names) > 1 else ""  # as nvcc names it
            yield (folder / f"{stem}{part}.ptx").read_text()


@cache
def module() -> ModuleType:
    """csrc/cuda's launchers, which call `set_launcher`'s function in place of a GPU."""
    objects = [folder / f"{stem}.o" for stem, folder in compiled().items()]
    flags = ["-std=c++17", "-O1", "-g0"]
    return compiled_module.build(
        "cuda_on_ptx", [RUNTIME, CUDA / "bindings.cpp"], headers(), [CUDA], flags, objects
    )


@cache
def kernel(name: str, capability: int, change: Callable[[str], str]) -> ptx.Kernel:
    """The kernel of this mangled name, of PTX that is changed."""
    for text in texts(capability):
        if name in ptx.entries(text):
            return ptx.Kernel(change(text), name)
    raise LookupError(f"no PTX for {capability} has a kernel {name}")


def plain_name(mangled: str) -> str:
    """`adamw_kernel` of what the compiler made of it: names follow the number of their letters."""
    for digits in re.finditer(r"\d+", mangled):
        for i in range(len(digits[0])):
            length = int(digits[0][i:])
            name = mangled[digits.end() : digits.end() + length]
            if len(name) == length and name.endswith("_kernel"):
                return name
    return mangled


def kernel_names(capability: int) -> set[str]:
    """The plain names of all kernels that csrc/cuda has for the capability."""
    return {plain_name(name) for text in texts(capability) for name in ptx.entries(text)}


@contextmanager
def executed_cuda(
    capability: int,
    *,
    completion: ptx.Completion = "late",
    seed: int = 0,
    change: Callable[[str], str] = str,
) -> Iterator[ModuleType]:
    """csrc/cuda's launchers, as lora_engine._C.cuda offers them, on PTX for `capability`.

    A kernel may touch what lies between the first and the last element of the tensors whose
    addresses were asked for since the launcher before. change: what the PTX is passed through
    before, to plant a fault.
    """
    known: list[Tensor] = []
    launches = 0
    address = Tensor.data_ptr

    def data_ptr(tensor: Tensor) -> int:
        known.append(tensor.detach())
        return address(tensor)

    def launch(
        name: str, grid: tuple[int, ...], block: tuple[int, ...], shared: int, args: int
    ) -> None:
        nonlocal launches
        launches += 1
        called = kernel(name, capability, change)
        pointers = ctypes.cast(args, ctypes.POINTER(ctypes.c_void_p))
        packed = [
            ctypes.string_at(pointers[i], parameter.size)
            for i, parameter in enumerate(called.parsed.parameters)
        ]
        with mock.patch.object(Tensor, "data_ptr", address):
            called.launch(
                grid,
                block,
                packed,
                shared=shared,
                completion=completion,
                seed=seed + launches,
                memory=known,
            )
        executed.add((capability, name))

    def forgetting(function: Callable[..., None]) -> Callable[..., None]:
        def call(*args: object) -> None:
            try:
                function(*args)
            finally:
                known.clear()

        return call

    made = module()
    made.set_launcher(launch)
    offered = ModuleType("executed_cuda")
    for name in dir(made):
        if name != "set_launcher" and callable(getattr(made, name)):
            setattr(offered, name, forgetting(getattr(made, name)))
    with mock.patch.object(torch.Tensor, "data_ptr", data_ptr):
        yield offered


def _run(command: list[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, f"{' '.join(command)}\n{done.stderr}"
