"""csrc/cuda as a module that runs on the CPU, compiled with tests/cuda/emulation.hpp."""

from functools import cache
from pathlib import Path
from types import ModuleType

import compiled_module
from compiled_module import ROOT

CUDA = ROOT / "csrc" / "cuda"
TESTS = ROOT / "tests" / "cuda"
FLAGS = ["-std=c++17", "-O1", "-g0", "-Wall", "-Wextra", "-Werror"]
FLAGS += ["-Wno-unknown-pragmas"]  # unroll


def build(name: str, sources: list[Path]) -> ModuleType:
    """The pybind11 module `name` made of `sources`."""
    headers = [*CUDA.glob("*.*h*"), *TESTS.glob("*.hpp"), *(ROOT / "csrc/common").iterdir()]
    headers.append(ROOT / "csrc" / "fields.hpp")
    return compiled_module.build(name, sources, headers, [CUDA, TESTS], FLAGS)


@cache
def emulated_kernels() -> ModuleType:
    """All of csrc/cuda, as lora_engine._C.cuda offers it."""
    return build(
        "emulated_cuda",
        [TESTS / "emulated_module.cpp", CUDA / "bindings.cpp", *sorted(CUDA.glob("*.cu"))],
    )
