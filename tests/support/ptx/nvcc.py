"""CUDA C++ as PTX, by nvcc alone: neither a GPU nor ptxas is needed."""

import hashlib
import os
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path

import pytest
from built_once import built_once
from compiled_module import ROOT

CACHE = ROOT / "build" / "compiled-tests" / "ptx"


def find_nvcc() -> str | None:
    """nvcc of CUDA_HOME if that is set, else the one on the PATH, else /usr/local/cuda's."""
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
    if home:
        return shutil.which("nvcc", path=os.path.join(home, "bin"))
    return shutil.which("nvcc") or shutil.which("nvcc", path="/usr/local/cuda/bin")


def compile_cuda(source: Path, architecture: str, flags: Sequence[str] = ()) -> str:
    """The PTX of a .cu file for "80" or "90a", kept until a file in its folder changes.

    Skips the test where nvcc is missing.
    """
    nvcc = find_nvcc()
    if nvcc is None:
        pytest.skip("needs nvcc (set CUDA_HOME) to make PTX of CUDA C++")
    command = [nvcc, "-std=c++17", "-O3", "-ptx", *flags]
    command += [f"-gencode=arch=compute_{architecture},code=compute_{architecture}"]
    content = hashlib.sha256(repr(command).encode())
    headers = [*source.parent.glob("*.*h*"), *(ROOT / "csrc" / "common").iterdir()]
    for path in [source, *sorted(headers)]:
        content.update(path.read_bytes())
    kept = CACHE / f"{source.stem}-{architecture}-{content.hexdigest()[:16]}.ptx"

    def build(unfinished: Path) -> None:
        whole = [*command, str(source), "-o", str(unfinished)]
        done = subprocess.run(whole, capture_output=True, text=True)
        assert done.returncode == 0, f"{' '.join(whole)}\n{done.stderr}"

    return built_once(kept, build).read_text()
