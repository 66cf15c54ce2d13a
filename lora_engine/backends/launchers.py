"""The modules that launch an operation's kernels."""

import importlib
from functools import cache
from types import ModuleType

PACKAGES = {"cpu": "lora_engine.cpu", "triton": "lora_engine.kernels", "cuda": "lora_engine.cuda"}


@cache
def kernels(module: str, impl: str) -> ModuleType:
    """The module that holds an operation's kernels: `lora_engine.cpu.rms_norm`, say."""
    return importlib.import_module(f"{PACKAGES[impl]}.{module}")
