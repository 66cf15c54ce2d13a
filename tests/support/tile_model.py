"""The CPU kernels with a model of a matrix unit's tiles, for processors that have none."""

import platform
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from types import ModuleType
from typing import Any

import compiled_module
import pytest
import torch
from compiled_module import ROOT

from lora_engine import backends
from lora_engine.backends import extension, plans

NAME = "tile_model"
CPU = ROOT / "csrc" / "cpu"
OPERATIONS = ("attention", "lora_linear", "few_rows")  # that have kernels with tiles
MODELLED = {"attention_fwd", "attention_bwd", "matmul", "lora_a_fwd", "lora_b_bwd", "lora_a_bwd"}
MODELLED |= {"lora_linear_few_rows"}
SOURCES = [CPU / f"{stem}.cpp" for stem in ("attention_fwd", "attention_bwd", "matmul")]
SOURCES += [
    CPU / "lora_linear.cpp",
    CPU / "few_rows.cpp",
    CPU / "memory.cpp",
    CPU / "bindings.cpp",
    ROOT / "tests" / "cpu" / f"{NAME}.cpp",
]
FLAGS = ["-std=c++17", "-O1", "-g0", "-fopenmp", "-Wall", "-Wextra", "-Werror"]
FLAGS += [f"-DLORA_ENGINE_ISA={NAME}", "-DLORA_ENGINE_TILE_MODEL"]
# pybind11 shares its registered types among modules of one ABI; lora_engine._C has the same ones.
FLAGS += [f'-DPYBIND11_COMPILER_TYPE="_{NAME}"']
if platform.machine().lower() in ("x86_64", "amd64"):
    FLAGS.append("-march=x86-64-v3")


@cache
def model() -> ModuleType:
    """The kernels of MODELLED."""
    headers = [*CPU.rglob("*.hpp"), *(ROOT / "csrc/common").iterdir(), ROOT / "csrc/fields.hpp"]
    return compiled_module.build(NAME, SOURCES, headers, [CPU], FLAGS)


def stands_in(operation: str) -> bool:
    """Whether an operation's tests run on the model: where no matrix unit runs its kernels."""
    if operation not in OPERATIONS or not backends.extension_available():
        return False
    return ("amx_bf16", True) not in backends.native().built_isas()


class WithTiles:
    """The extension, but for kernels of MODELLED on bfloat16."""

    def __init__(self, native: ModuleType, tiles: ModuleType) -> None:
        self._native, self._tiles = native, tiles

    def isa(self) -> str:
        return NAME

    def __getattr__(self, name: str) -> Any:
        own = getattr(self._native, name)
        if name not in MODELLED:
            return own
        modelled: Callable[[Any, Any], None] = getattr(self._tiles, name)
        bfloat16 = self._native.DType.bfloat16
        code = self._tiles.DType.bfloat16

        def call(dtype: Any, args: Any) -> None:
            modelled(code, self._of_tiles(args)) if dtype == bfloat16 else own(dtype, args)

        return call

    def _of_tiles(self, args: Any) -> Any:
        """Arguments with the model's own values for dtypes."""
        if isinstance(args, self._native.DType):
            return getattr(self._tiles.DType, args.name)
        if isinstance(args, list):
            return [self._of_tiles(value) for value in args]
        if isinstance(args, tuple) and not hasattr(args, "_asdict"):
            return tuple(self._of_tiles(value) for value in args)
        if isinstance(args, tuple):
            return args._replace(**{n: self._of_tiles(v) for n, v in args._asdict().items()})  # type: ignore[attr-defined]
        return args


@contextmanager
def tiles_modelled(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The CPU's kernels are those with the model, and products of large matrices too."""
    together: Any = WithTiles(extension.native(), model())
    found = extension.Extension(together, None)
    with monkeypatch.context() as patched:
        patched.setattr(extension, "loaded", lambda: found)
        patched.setitem(plans.MATRIX_UNITS, NAME, (torch.bfloat16,))
        yield
