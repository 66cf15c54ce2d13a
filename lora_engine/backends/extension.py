"""The compiled module lora_engine._C: loaded when asked for, and what it was built with."""

import importlib
import os
from dataclasses import dataclass
from functools import cache
from types import ModuleType

import torch

from lora_engine import openmp
from lora_engine.backends.cpu.kernels import Kernels
from lora_engine.errors import UnavailableError

# oneDNN and torch's layer over it each keep up to 1024 compiled matrix products, one per shape.
# Packed batches bring new shapes every step, about 16 MB of them for a 135M model: the process
# would grow by 0.8 GB in fifty steps. A step uses about twenty shapes. Both read their limit at
# their first use.
ONEDNN_CACHE_LIMITS = ("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "LRU_CACHE_CAPACITY")
for _name in ONEDNN_CACHE_LIMITS:
    os.environ.setdefault(_name, "64")

# What it offers beside the CPU kernels.
_OTHERS = {"isa", "select_isa", "built_isas", "keep_freed_memory", "crowd_openmp"}
_OTHERS |= {"cuda_architectures", "triton"}

# csrc/cuda compiled for the host, by tests: the CUDA launchers then take CPU tensors.
cuda_emulation: ModuleType | None = None


@dataclass(frozen=True)
class Extension:
    """The compiled module lora_engine._C: the module, or why there is none."""

    module: ModuleType | None
    problem: str | None


@cache
def loaded() -> Extension:
    """Imports lora_engine._C. torch is imported before it, so both share one OpenMP runtime."""
    try:
        module = importlib.import_module("lora_engine._C")
        if missing := missing_names(module):
            found = f"{missing[0]} and {len(missing) - 1} more" if missing[1:] else missing[0]
            return Extension(None, f"it was built from older sources, without {found}")
        module.isa()
    except (ImportError, RuntimeError) as error:
        return Extension(None, str(error))
    openmp.settle_late(module.crowd_openmp)
    return Extension(module, None)


def missing_names(module: ModuleType) -> list[str]:
    """What the package calls and `module` has not: it was built before that was written."""
    kernels = {name for name in (*dir(Kernels), *Kernels.__annotations__) if name[0] != "_"}
    return sorted((kernels | _OTHERS) - {*dir(module)})


def extension_available() -> bool:
    """Whether the C++ kernels can run here."""
    return loaded().module is not None


def native() -> ModuleType:
    """The compiled module; UnavailableError where there is none."""
    extension = loaded()
    if extension.module is None:
        raise UnavailableError(
            f"the C++ extension lora_engine._C cannot run here ({extension.problem}); "
            "`pip install -e .` builds it and `lora-engine doctor` says more"
        )
    return extension.module


def keep_freed_memory(device: torch.device, expected_bytes: int = 0) -> bool:
    """Lets the C library keep freed memory for reuse, for the rest of the process.

    A training step on a CPU allocates and frees the same tensors again and again; handing them back
    to the system makes it fault in and zero every page anew. What is allocated from then on is in
    huge pages where Linux gives them on request: rows of large matrices are far apart, and with
    pages of 4 KiB a processor spends a fifth of a step on finding them. `expected_bytes` are set
    apart at once, for tensors that are filled before a kernel of ours runs; none where the address
    space is limited. False where it cannot be set, or `device` is no CPU.
    """
    module = loaded().module
    if device.type != "cpu" or module is None:
        return False
    return bool(module.keep_freed_memory(expected_bytes))


def cuda_architectures() -> tuple[str, ...]:
    """What the extension's CUDA kernels were compiled for, as "90a"; () without any."""
    module = loaded().module
    return () if module is None else tuple(module.cuda_architectures())
