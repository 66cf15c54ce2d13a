"""Each Triton or CUDA kernel has its formula: in its docstring, or in the comment above it."""

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


def triton_kernels() -> dict[str, str]:
    """The docstring of each jitted function of kernels/src named as a kernel, by file and name."""
    kernels = {}
    for path in sorted((ROOT / "kernels/src").rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.FunctionDef) and node.name.endswith("_kernel"):
                kernels[f"{path.name}:{node.name}"] = ast.get_docstring(node) or ""
    return kernels


def cuda_kernels() -> dict[str, str]:
    """The comment lines right above each `__global__` function of csrc/cuda, by file and name."""
    kernels = {}
    for path in sorted((ROOT / "csrc/cuda").glob("*.cu")):
        text = path.read_text()
        for found in re.finditer(r"^(?:template.*\n)?__global__[^;{]*?(\w+_kernel)\(", text, re.M):
            above = text[: found.start()].rstrip("\n").split("\n")
            comment: list[str] = []
            while above and above[-1].startswith("//"):
                comment.insert(0, above.pop())
            kernels[f"{path.name}:{found[1]}"] = "\n".join(comment)
    return kernels


KERNELS = {**triton_kernels(), **cuda_kernels()}


def test_kernels_of_both_languages_are_found() -> None:
    assert {"glu.py:_glu_fwd_kernel", "adamw.cu:adamw_kernel", "adamw.cu:norm_kernel"} <= set(
        KERNELS
    )


@pytest.mark.parametrize("kernel", sorted(KERNELS))
def test_a_kernel_has_its_formula(kernel: str) -> None:
    assert re.search(r"\w\S* = \S", KERNELS[kernel]), f"{kernel}: no formula, as in `y = x + bias`"
