"""Facts about this computer: processor, memory, GPUs, versions. For the doctor and reports."""

import os
import platform
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

import torch

from lora_engine import backends, openmp

CPUINFO = Path("/proc/cpuinfo")
VECTOR_FEATURES = ("avx2", "avx512f", "avx512_bf16", "amx_bf16")
REPORTED_PACKAGES = ("torch", "triton", "transformers", "peft", "datasets")


@dataclass(frozen=True)
class Gpu:
    """A CUDA device. memory_bytes: all of it. capability: 90 for 9.0."""

    name: str
    memory_bytes: int
    capability: int


def processor_name() -> str:
    """The processor's model, as the system names it."""
    if CPUINFO.is_file():
        for line in CPUINFO.read_text(errors="replace").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def usable_cores() -> int:
    """Processors this process may run on."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def memory_bytes() -> int:
    """Physical memory of the computer."""
    return backends.memory(torch.device("cpu")).nbytes


def gpus() -> list[Gpu]:
    """The CUDA devices torch can use."""
    devices = map(torch.cuda.get_device_properties, range(backends.gpu_count()))
    return [Gpu(d.name, d.total_memory, 10 * d.major + d.minor) for d in devices]


def installed_version(package: str) -> str | None:
    """Version of a distribution, or None."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def machine_facts() -> dict[str, dict[str, str]]:
    """What a report says about where a run happened: {"hardware": …, "software": …}."""
    from lora_engine import __version__
    from lora_engine.text import bytes_text

    vector = [f for f in VECTOR_FEATURES if f in backends.cpu_features()]
    hardware = {
        "processor": processor_name(),
        "cores used": f"{torch.get_num_threads()} of {usable_cores()}",
        "OpenMP waits": str(openmp.waiting()),
        "instructions": ", ".join(vector) or platform.machine(),
        "memory": bytes_text(memory_bytes()),
        "GPU": ", ".join(f"{g.name} ({bytes_text(g.memory_bytes)})" for g in gpus()) or "none",
    }
    versions = {p: v for p in REPORTED_PACKAGES if (v := installed_version(p))}
    software = {
        "lora_engine": __version__,
        "Python": platform.python_version(),
        **versions,
        "system": f"{platform.system()} {platform.release()}",
    }
    return {"hardware": hardware, "software": software}
