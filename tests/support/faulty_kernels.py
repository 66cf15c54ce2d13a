"""Kernels and cases with faults that kernels/check.py must find, each planted on purpose.

Run as a script: prints the check's exit status and output for each planted fault as JSON. It is not
imported by the tests, whose process interprets Triton kernels.
"""

import contextlib
import importlib
import io
import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "kernels"))

import check
import check_cases
import check_compile
import torch
import triton
import triton.language as tl
from check_cases import Call, call, empty

launch = check_compile.load_kernels()
tables = importlib.import_module("lora_engine.backends.tables")
BFLOAT16 = (torch.bfloat16,)


@triton.jit
def _scaled_kernel(x_ptr, BLOCK: tl.constexpr):
    """Holds a whole row in registers until its sum is known."""
    offs = tl.arange(0, BLOCK)
    x = tl.load(x_ptr + offs)
    tl.store(x_ptr + offs, x / tl.sum(x))


@triton.jit
def _product_kernel(x_ptr, y_ptr, z_ptr, stride, K, BLOCK: tl.constexpr, BLOCK_K: tl.constexpr):
    offs, offs_k = tl.arange(0, BLOCK), tl.arange(0, BLOCK_K)
    acc = tl.zeros((BLOCK, BLOCK), dtype=tl.float32)
    for k in range(0, K, BLOCK_K):
        x = tl.load(x_ptr + offs[:, None] * stride + (k + offs_k)[None, :])
        y = tl.load(y_ptr + (k + offs_k)[:, None] * stride + offs[None, :])
        acc = tl.dot(x, y, acc)
    tl.store(z_ptr + offs[:, None] * stride + offs[None, :], acc.to(z_ptr.dtype.element_ty))


def spilling(dtype: torch.dtype) -> Iterator[Call]:
    def launcher(x: torch.Tensor) -> None:
        _scaled_kernel[(1,)](x, BLOCK=16384, num_warps=1, enable_fp_fusion=True)

    yield call(launcher, empty(16384, dtype=torch.float32))


def product(x: torch.Tensor) -> None:
    config = launch.config("product", x.device, x.dtype, x.shape[0])
    _product_kernel[(1,)](x, x, x, x.stride(0), x.shape[1], **config)


def products(dtype: torch.dtype) -> Iterator[Call]:
    yield call(product, empty(128, 4096, dtype=dtype), matrix=("_product_kernel",))


def small_product(dtype: torch.dtype) -> Iterator[Call]:
    yield call(product, empty(16, 4096, dtype=dtype), matrix=("_product_kernel",))


def glu_with_matrix(dtype: torch.dtype) -> Iterator[Call]:
    from lora_engine.backends.triton import glu

    x = empty(64, 576, dtype=dtype)
    yield call(glu.glu_fwd, x, x, x, activation="silu", any_matrix=("_glu_fwd_kernel",))


def wide_grid(dtype: torch.dtype) -> Iterator[Call]:
    def launcher(x: torch.Tensor) -> None:
        _scaled_kernel[(1, 65536)](x, BLOCK=32, num_warps=1, enable_fp_fusion=True)

    yield call(launcher, empty(32, dtype=torch.float32))


def raising(dtype: torch.dtype) -> Iterator[Call]:
    yield call(product, empty(300, 4096, dtype=dtype))


def product_table(stages: int) -> dict[str, Any]:
    tile = {"BLOCK": 128, "BLOCK_K": 64, "num_warps": 8, "num_stages": stages}
    small = {"BLOCK": 16, "BLOCK_K": 64, "num_warps": 1, "num_stages": 3}
    return {"product": {"*": {"*": [[16, small], [128, tile]]}}}


def outcome(
    cases: dict[str, Callable[..., Iterator[Call]]], table: dict[str, Any], *options: str
) -> dict[str, Any]:
    """Exit status and output of the check with these cases and the table's lines added."""
    both = {**tables.launch_table(), **table}
    printed = io.StringIO()
    with (
        mock.patch.object(tables, "launch_table", lambda: both),
        mock.patch.object(check_cases, "OPERATIONS", cases),
        mock.patch.object(check_cases, "DTYPES", BFLOAT16),
        contextlib.redirect_stdout(printed),
    ):
        status = check.main(options)
    return {"status": status, "output": printed.getvalue()}


def main() -> None:
    glu = check_cases.OPERATIONS["glu"]
    lines = [*tables.launch_table()["glu_fwd"]["*"]["*"], [96, {"BLOCK_N": 128}]]
    dead_line = {"glu_fwd": {"*": {"*": lines}}}
    forward = {"glu": lambda dtype: (c for c in glu(dtype) if "fwd" in str(c))}
    hopper = ("--capability", "90")
    ampere = ("--capability", "86")
    results = {
        "fits": outcome({"p": products}, product_table(5), "--kernel", "p", *hopper),
        "shared": outcome({"p": products}, product_table(5), "--kernel", "p", *ampere),
        "spill": outcome({"s": spilling}, {}, "--kernel", "s", *hopper),
        "no matrix": outcome({"g": glu_with_matrix}, {}, "--kernel", "g", *hopper),
        "no wgmma": outcome({"p": small_product}, product_table(3), "--kernel", "p", *hopper),
        "dead line": outcome({"glu": glu}, dead_line, "--quick", *hopper),
        "uncompiled": outcome(forward, {}, "--quick", *hopper),
        "grid": outcome({"w": wide_grid}, {}, "--kernel", "w", *hopper),
        "raises": outcome({"r": raising}, product_table(3), *hopper),
    }
    print(json.dumps(results))


if __name__ == "__main__":
    main()
