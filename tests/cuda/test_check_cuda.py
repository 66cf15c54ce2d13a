"""The check of what CUDA kernels take of a GPU passes ours and finds what should not ship."""

import ast
import importlib.util
import sys
from pathlib import Path

import pytest

from lora_engine import backends

ROOT = Path(__file__).parents[2]
SPILLING = Path(__file__).parent / "spilling.cu"


def load():
    spec = importlib.util.spec_from_file_location("check_cuda", ROOT / "kernels" / "check_cuda.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules["check_cuda"] = module  # where dataclasses look it up
    spec.loader.exec_module(module)
    return module


check_cuda = load()
needs_nvcc = pytest.mark.skipif(check_cuda.find_nvcc() is None, reason="needs nvcc")


@pytest.mark.slow
@needs_nvcc
def test_our_kernels_fit_hopper():
    found = check_cuda.rows(["90a"])
    names = {row.kernel for row in found}
    assert {"adamw_kernel<true>", "adamw_8bit_kernel", "norm_kernel"} <= names
    assert [row for row in found if row.problem] == []
    assert all(0 < row.registers <= 255 and row.stack == row.spilled == 0 for row in found)
    [quantised] = [row for row in found if row.kernel == "adamw_8bit_kernel"]
    assert quantised.shared == 2 * 256 * 4


@needs_nvcc
def test_a_kernel_that_spills_is_found(monkeypatch, capsys):
    real = check_cuda.rows
    spilled = real(["90a"], [SPILLING], ["-maxrregcount=16"])
    [row] = [row for row in spilled if row.kernel == "spilling_kernel"]
    assert row.spilled > 0
    assert row.problem == f"spills {row.spilled} bytes"
    monkeypatch.setattr(check_cuda, "rows", lambda: spilled)
    assert check_cuda.main() == 1
    assert f"spills {row.spilled} bytes" in capsys.readouterr().out
    monkeypatch.setattr(check_cuda, "rows", lambda: real(["90a"], [SPILLING]))
    assert check_cuda.main() == 0


@needs_nvcc
def test_a_file_that_does_not_compile_is_named(tmp_path):
    broken = tmp_path / "broken.cu"
    broken.write_text("__global__ void kernel() { nonsense; }")
    with pytest.raises(check_cuda.CompileError, match=r"broken.cu, 90a:(.|\n)*nonsense"):
        check_cuda.rows(["90a"], [broken])


def test_serialised_products_are_found():
    printed = (
        "ptxas info    : (C7512) Potential Performance Loss: wgmma.mma_async instructions are "
        "serialized due to insufficient register resources for the function '_Z4slowPf'\n"
    )
    for name in ("_Z4slowPf", "_Z4fastPf"):
        printed += (
            f"ptxas info    : Compiling entry function '{name}' for 'sm_90a'\n"
            "    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads\n"
            "ptxas info    : Used 168 registers, used 1 barriers\n"
        )
    slow, fast = check_cuda.parse(printed, "90a")
    assert slow.problem == "has wgmma instructions that wait for each other"
    assert fast.problem is None


@pytest.mark.parametrize(
    ("line", "problem"),
    [
        ("0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads", None),
        ("8 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads", "keeps 8 bytes on"),
        ("8 bytes stack frame, 4 bytes spill stores, 8 bytes spill loads", "spills 12 bytes"),
    ],
)
@pytest.mark.parametrize(("shared", "fits"), [(101376, True), (101377, False)])
def test_what_ptxas_says(line, problem, shared, fits):
    printed = (
        "ptxas info    : Compiling entry function '_Z6kernelPf' for 'sm_86'\n"
        f"ptxas info    : Function properties for _Z6kernelPf\n    {line}\n"
        f"ptxas info    : Used 24 registers, used 1 barriers, {shared} bytes smem\n"
    )
    [row] = check_cuda.parse(printed, "86")
    assert (row.registers, row.shared) == (24, shared)
    expected = problem if problem or fits else "101377 bytes of shared memory"
    assert row.problem is None if expected is None else expected in row.problem
    assert check_cuda.parse(printed, "90a")[0].problem == row.problem or not fits


def test_the_build_makes_what_is_checked():
    source = ast.parse((ROOT / "setup.py").read_text())
    [built] = [
        ast.literal_eval(node.value)
        for node in source.body
        if isinstance(node, ast.Assign) and node.targets[0].id == "CUDA_ARCHITECTURES"
    ]
    assert built == tuple(check_cuda.SHARED_LIMIT)
    assert set(backends.cuda_architectures()) <= set(built)
