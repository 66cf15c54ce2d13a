"""csrc/cuda as a module that runs on the CPU, compiled with tests/cuda/emulation.hpp."""

import hashlib
import importlib.util
import os
import shutil
import subprocess
import sysconfig
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).parents[2]
CUDA = ROOT / "csrc" / "cuda"
TESTS = ROOT / "tests" / "cuda"
FLAGS = ["-std=c++17", "-O1", "-g0", "-fPIC", "-fvisibility=hidden", "-Wall", "-Wextra", "-Werror"]
FLAGS += ["-Wno-unknown-pragmas"]  # unroll


def build(name: str, sources: list[Path]) -> ModuleType:
    """The pybind11 module `name` made of `sources`; kept under build/ until one of them changes."""
    compiler = os.environ.get("CXX") or shutil.which("c++") or shutil.which("g++")
    if compiler is None or importlib.util.find_spec("pybind11") is None:
        pytest.skip("needs a C++ compiler and pybind11")
    import pybind11

    content = hashlib.sha256(repr((compiler, FLAGS, sysconfig.get_config_var("SOABI"))).encode())
    headers = [*CUDA.glob("*.*h*"), *TESTS.glob("*.hpp"), *(ROOT / "csrc/common").iterdir()]
    headers.append(ROOT / "csrc" / "fields.hpp")
    for path in sorted([*sources, *headers]):
        content.update(path.read_bytes())
    folder = ROOT / "build" / "emulated-cuda" / f"{name}-{content.hexdigest()[:16]}"
    library = folder / f"{name}.so"
    if not library.exists():
        folder.mkdir(parents=True, exist_ok=True)
        folders = [pybind11.get_include(), sysconfig.get_path("include"), CUDA, TESTS]
        includes = [f"-I{folder}" for folder in folders]

        def compile_one(source: Path) -> str:
            output = str(folder / f"{source.stem}.{os.getpid()}.o")
            command = [compiler, *FLAGS, *includes, "-x", "c++", "-c"]
            _run([*command, str(source), "-o", output])
            return output

        with ThreadPoolExecutor(os.cpu_count()) as pool:
            objects = list(pool.map(compile_one, sources))
        unfinished = folder / f"{name}.{os.getpid()}"
        _run([compiler, "-shared", *objects, "-o", str(unfinished)])
        unfinished.rename(library)
        for path in objects:
            os.remove(path)
    spec = importlib.util.spec_from_file_location(name, library)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@cache
def emulated_kernels() -> ModuleType:
    """All of csrc/cuda, as lora_engine._C.cuda offers it."""
    return build(
        "emulated_cuda",
        [TESTS / "emulated_module.cpp", CUDA / "bindings.cpp", *sorted(CUDA.glob("*.cu"))],
    )


def _run(command: list[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, f"{' '.join(command)}\n{done.stderr}"
