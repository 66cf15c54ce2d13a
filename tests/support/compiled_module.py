"""C++ of the tests' own as Python modules, built once and kept under build/."""

import hashlib
import importlib.util
import os
import platform
import shutil
import subprocess
import sysconfig
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import ModuleType

import pytest
from built_once import built_once

ROOT = Path(__file__).parents[2]


def build(
    name: str,
    sources: Sequence[Path],
    headers: Iterable[Path],
    includes: Iterable[Path],
    flags: Sequence[str],
    objects: Sequence[Path] = (),
) -> ModuleType:
    """The pybind11 module `name` made of `sources`, built anew when one of the files changes.

    `objects` are linked too.

    Skips the test that asks for it where there is no compiler or no pybind11.
    """
    compiler = os.environ.get("CXX") or shutil.which("c++") or shutil.which("g++")
    if compiler is None or importlib.util.find_spec("pybind11") is None:
        pytest.skip("needs a C++ compiler and pybind11")
    import pybind11

    machine = _processor() if "-march=native" in flags else ""
    content = hashlib.sha256(
        repr((compiler, list(flags), sysconfig.get_config_var("SOABI"), machine)).encode()
    )
    for path in sorted([*sources, *headers, *objects]):
        content.update(path.read_bytes())
    folder = ROOT / "build" / "compiled-tests" / f"{name}-{content.hexdigest()[:16]}"
    library = folder / f"{name}.so"

    def compile_all(unfinished: Path) -> None:
        folders = [pybind11.get_include(), sysconfig.get_path("include"), *includes]
        options = [*flags, "-fPIC", "-fvisibility=hidden", *(f"-I{folder}" for folder in folders)]

        def compile_one(source: Path) -> str:
            output = str(folder / f"{source.stem}.o")
            _run([compiler, *options, "-x", "c++", "-c", str(source), "-o", output])
            return output

        with ThreadPoolExecutor(os.cpu_count()) as pool:
            made = list(pool.map(compile_one, sources))
        _run([compiler, "-shared", *made, *map(str, objects), "-o", str(unfinished)])
        for path in made:
            os.remove(path)

    built_once(library, compile_all)
    spec = importlib.util.spec_from_file_location(name, library)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _processor() -> str:
    """What -march=native depends on."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((line for line in lines if line.startswith(("flags", "Features"))), "")


def _run(command: list[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, f"{' '.join(command)}\n{done.stderr}"
