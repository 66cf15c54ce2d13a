"""What this machine has, and which implementation of an operation runs on it.

This is the one place that answers either question. `choose` is a pure function of what is asked
and what the machine has; `explain` says in words what it would answer, and why.
"""

import importlib
import importlib.util
import os
import platform
import warnings
from dataclasses import dataclass
from functools import cache
from types import ModuleType

import torch

from lora_engine import openmp
from lora_engine.errors import EngineWarning, UnavailableError

# oneDNN and torch's layer over it each keep up to 1024 compiled matrix products, one per shape.
# Packed batches bring new shapes every step, about 16 MB of them for a 135M model: the process
# would grow by 0.8 GB in fifty steps. A step uses about twenty shapes. Both read their limit at
# their first use.
ONEDNN_CACHE_LIMITS = ("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "LRU_CACHE_CAPACITY")
for _name in ONEDNN_CACHE_LIMITS:
    os.environ.setdefault(_name, "64")

IMPLEMENTATIONS = ("reference", "cpu", "triton", "cuda")

# Which kernels each operation has. On a GPU the first that can run is taken.
OPERATIONS: dict[str, tuple[str, ...]] = {
    "rms_norm": ("cpu", "triton"),
    "layer_norm": ("cpu", "triton"),
    "rope": ("cpu", "triton"),
    "glu": ("cpu", "triton"),
    "lora_linear": ("cpu", "triton"),
    "linear_cross_entropy": ("cpu", "triton"),
    "cross_entropy": ("cpu", "triton"),
    "attention": ("cpu",),
    "adamw": ("cpu", "triton", "cuda"),
    "adamw_8bit": ("cpu", "triton", "cuda"),
}
PACKAGES = {"cpu": "lora_engine.cpu", "triton": "lora_engine.kernels", "cuda": "lora_engine.cuda"}
DTYPES = {
    "cpu": (torch.float32, torch.bfloat16, torch.float64),
    "triton": (torch.float32, torch.bfloat16, torch.float16),
    "cuda": (torch.float32, torch.bfloat16, torch.float16),
}
OLDEST_CAPABILITY = (8, 0)

# csrc/cuda compiled for the host, by tests: the CUDA launchers then take CPU tensors.
cuda_emulation: ModuleType | None = None


@dataclass(frozen=True)
class Choice:
    """The implementation of an operation that runs, and the reason."""

    operation: str
    impl: str
    reason: str


@dataclass(frozen=True)
class Extension:
    """The compiled module lora_engine._C: the module, or why there is none."""

    module: ModuleType | None
    problem: str | None


@cache
def extension() -> Extension:
    """Imports lora_engine._C. torch is imported before it, so both share one OpenMP runtime."""
    try:
        module = importlib.import_module("lora_engine._C")
        module.isa()
    except (ImportError, RuntimeError) as error:
        return Extension(None, str(error))
    openmp.settle_late(module.crowd_openmp)
    return Extension(module, None)


def extension_available() -> bool:
    """Whether the C++ kernels can run here."""
    return extension().module is not None


def native() -> ModuleType:
    """The compiled module; UnavailableError where there is none."""
    found = extension()
    if found.module is None:
        raise UnavailableError(
            f"the C++ extension lora_engine._C cannot run here ({found.problem}); "
            "`pip install -e .` builds it and `lora-engine doctor` says more"
        )
    return found.module


def keep_freed_memory() -> bool:
    """Lets the C library keep freed memory for reuse, for the rest of the process.

    A training step allocates and frees the same tensors again and again; handing them back to the
    system makes it fault in and zero every page anew. False where it cannot be set.
    """
    found = extension()
    return found.module is not None and bool(found.module.keep_freed_memory())


@cache
def cpu_features() -> frozenset[str]:
    """The processor's instruction sets among those that matter here, by Linux's names."""
    wanted = {"avx2", "fma", "avx512f", "avx512bw", "avx512vl", "avx512_bf16", "amx_bf16"}
    if platform.system() != "Linux" or not os.path.exists("/proc/cpuinfo"):
        return frozenset()
    with open("/proc/cpuinfo", encoding="ascii", errors="replace") as file:
        for line in file:
            if line.startswith("flags"):
                return frozenset(wanted & set(line.split(":", 1)[1].split()))
    return frozenset()


def triton_interpreted() -> bool:
    """Whether Triton kernels are interpreted in this process, on CPU tensors."""
    if importlib.util.find_spec("triton") is None:
        return False
    return bool(importlib.import_module("triton").knobs.runtime.interpret)


def cuda_architectures() -> tuple[str, ...]:
    """What the extension's CUDA kernels were compiled for, as "90a"; () without any."""
    module = extension().module
    return () if module is None else tuple(module.cuda_architectures())


def runs_on(architecture: str, capability: tuple[int, int]) -> bool:
    """Whether machine code for `architecture` runs on a GPU of `capability`.

    It does on later minor versions too, but for code that uses what one alone has ("90a").
    """
    major, minor = divmod(int(architecture.rstrip("a")), 10)
    if architecture.endswith("a"):
        return capability == (major, minor)
    return capability[0] == major and capability[1] >= minor


@cache
def capability(device: torch.device) -> tuple[int, int]:
    """A CUDA device's compute capability."""
    return torch.cuda.get_device_capability(device)


@cache
def kernels(module: str, impl: str) -> ModuleType:
    """The module that holds an operation's kernels: `lora_engine.cpu.rms_norm`, say."""
    return importlib.import_module(f"{PACKAGES[impl]}.{module}")


def choose(
    operation: str, device: torch.device, dtype: torch.dtype, impl: str | None = None
) -> Choice:
    """The implementation of `operation` for tensors of `dtype` on `device`.

    `impl` forces one of IMPLEMENTATIONS; UnavailableError where it cannot run. Nothing but force
    chooses Triton's interpreter.
    """
    if operation not in OPERATIONS:
        raise ValueError(f"operation {operation!r}: expected one of {', '.join(OPERATIONS)}")
    if impl == "reference":
        return Choice(operation, "reference", "asked for")
    if impl is not None:
        if impl not in IMPLEMENTATIONS:
            raise ValueError(f"impl={impl!r}: expected one of {', '.join(IMPLEMENTATIONS)}")
        problem = _why_not(operation, impl, device, dtype)
        if problem is not None:
            raise UnavailableError(f"{operation}: impl={impl!r} is not available: {problem}")
        return Choice(operation, impl, _how(impl, device))
    problems = []
    for candidate in ("cpu",) if device.type == "cpu" else ("cuda", "triton"):
        problem = _why_not(operation, candidate, device, dtype)
        if problem is None:
            return Choice(operation, candidate, _how(candidate, device))
        problems.append(problem)
    return Choice(operation, "reference", problems[-1])


def _how(impl: str, device: torch.device) -> str:
    if impl == "cpu":
        return f"C++ kernel, {native().isa()}"
    if device.type == "cpu":
        return "Triton kernel, interpreted" if impl == "triton" else "CUDA C++ kernel, emulated"
    name = "CUDA C++" if impl == "cuda" else "Triton"
    return f"{name} kernel, capability {'.'.join(map(str, capability(device)))}"


def _why_not(operation: str, impl: str, device: torch.device, dtype: torch.dtype) -> str | None:
    """Why `impl` cannot run `operation`; None if it can."""
    if impl not in OPERATIONS[operation]:
        return f"there is no {impl} kernel for it"
    if dtype not in DTYPES[impl]:
        names = ", ".join(str(d).removeprefix("torch.") for d in DTYPES[impl])
        return f"the {impl} kernels take {names}, not {dtype}"
    if impl == "cpu":
        return extension().problem if device.type == "cpu" else f"the tensors are on {device.type}"
    if impl == "triton" and importlib.util.find_spec("triton") is None:
        return "triton is not installed"
    if impl == "triton" and device.type == "cpu" and triton_interpreted():
        return None
    if impl == "cuda" and device.type == "cpu" and cuda_emulation is not None:
        return None
    if impl == "cuda" and not cuda_architectures():
        return extension().problem or "the extension was built without nvcc"
    if device.type != "cuda":
        return f"the tensors are on {device.type}"
    if not torch.cuda.is_available():
        return "torch finds no CUDA device"
    if capability(device) < OLDEST_CAPABILITY:
        found, least = (".".join(map(str, c)) for c in (capability(device), OLDEST_CAPABILITY))
        return f"the GPU has capability {found}, the kernels need {least}"
    if impl == "cuda" and not any(runs_on(a, capability(device)) for a in cuda_architectures()):
        found = ".".join(map(str, capability(device)))
        return f"built for {', '.join(cuda_architectures())}, the GPU has capability {found}"
    return None


def select(
    operation: str, device: torch.device, dtype: torch.dtype, impl: str | None = None
) -> str:
    """What an operation calls: `choose`, with one warning where the reference is not by choice."""
    choice = _choose_once(operation, device, dtype, impl, extension())
    if choice.impl == "reference" and impl is None:
        _warn_once(operation, choice.reason)
    return choice.impl


@cache
def _choose_once(
    operation: str,
    device: torch.device,
    dtype: torch.dtype,
    impl: str | None,
    found: Extension,
) -> Choice:
    """`choose` for operations, which ask at every call: the answer depends on nothing else."""
    return choose(operation, device, dtype, impl)


@cache
def _warn_once(operation: str, reason: str) -> None:
    message = f"lora_engine.{operation} runs as the PyTorch reference: {reason}"
    warnings.warn(message, EngineWarning, stacklevel=4)


def explain(
    operation: str, device: str | torch.device = "cpu", dtype: torch.dtype = torch.float32
) -> Choice:
    """Which implementation `operation` runs with on `device` and `dtype`, and why."""
    return choose(operation, torch.device(device), dtype)
