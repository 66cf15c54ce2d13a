"""What this machine's processor and GPUs are, asked of the system or of torch once.

A GPU's compute capability is one number everywhere: 90 for 9.0, 120 for 12.0.
"""

import importlib
import importlib.util
import os
import platform
import sys
from functools import cache

import torch
from torch import Tensor

OLDEST_CAPABILITY = 80


@cache
def capability(device: torch.device) -> int | None:
    """A CUDA device's compute capability; None for any other device."""
    if device.type != "cuda":
        return None
    major, minor = torch.cuda.get_device_capability(device)
    return 10 * major + minor


def capability_text(capability: int) -> str:
    """As NVIDIA writes it: "9.0"."""
    return f"{capability // 10}.{capability % 10}"


@cache
def multiprocessors(device: torch.device) -> int:
    """How many the GPU has; a few where Triton is interpreted."""
    if device.type != "cuda":
        return 4
    return torch.cuda.get_device_properties(device).multi_processor_count


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


@cache
def triton_installed() -> bool:
    """Whether Triton can be imported."""
    return importlib.util.find_spec("triton") is not None


def has_cudnn_attention() -> bool:
    """Whether this build of PyTorch has cuDNN's attention."""
    return torch.backends.cudnn.is_available() and hasattr(
        torch.ops.aten, "_scaled_dot_product_cudnn_attention_backward"
    )


def triton_interpreted() -> bool:
    """Whether Triton kernels are interpreted in this process, on CPU tensors."""
    if not triton_installed():
        return False
    if "triton" not in sys.modules and not os.environ.get("TRITON_INTERPRET"):
        return False  # nothing else makes it interpret from its import on, which takes a while
    return bool(importlib.import_module("triton").knobs.runtime.interpret)


def runs_on(architecture: str, capability: int) -> bool:
    """Whether machine code for `architecture` runs on a GPU of `capability`.

    It does on later minor versions too, but for code that uses what one alone has ("90a").
    """
    built_for = int(architecture.rstrip("a"))
    if architecture.endswith("a"):
        return capability == built_for
    return capability // 10 == built_for // 10 and capability >= built_for


def computes_bfloat16(device: torch.device) -> bool | None:
    """Whether a GPU computes in bfloat16; None for a CPU, where it is to be timed."""
    if device.type == "cpu":
        return None
    own = capability(device)
    return own is not None and own >= OLDEST_CAPABILITY


def reads_at_once(x: Tensor) -> bool:
    """Whether the host reads x's values without waiting for a GPU."""
    return x.device.type == "cpu"


def is_current(device: torch.device) -> bool:
    """Whether what is launched now runs on `device`; of CPUs there is one."""
    if device.type != "cuda" or device.index is None:
        return True
    return device.index == torch.cuda.current_device()


def keeps_scalars(device: torch.device) -> bool:
    """Whether `x * scalar` takes a 0-dim tensor in its own precision; a GPU rounds it to x's."""
    return device.type == "cpu"
