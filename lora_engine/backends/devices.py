"""The devices that tensors may be on: which there are, and their memory."""

import ctypes
import os
import sys
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor


class Memory(NamedTuple):
    """A device's memory: all of it, and whose that is, as a message says it."""

    nbytes: int
    owner: str


def gpu_count() -> int:
    """The CUDA devices torch can use."""
    return torch.cuda.device_count() if torch.cuda.is_available() else 0


def preferred_device() -> torch.device:
    """The GPU if there is one."""
    return torch.device("cuda" if gpu_count() else "cpu")


def reads_beside_operands(device: torch.device) -> bool:
    """Whether products of torch's may read what stands between an operand's rows.

    oneDNN's do (`ops.tensors.front_columns`); those of a GPU load no element that is not the
    operand's.
    """
    return device.type != "cuda"


def why_absent(device: torch.device) -> str | None:
    """Why no tensor can be on `device`, and what can be done; None where one can."""
    if device.type == "cuda":
        count = gpu_count()
        here = (device.index or 0) < count
        return None if here else f"torch sees {count} GPU(s); use auto"
    if device.type != "cpu":
        try:
            torch.empty(1, device=device)
        except Exception:  # each of torch's backends has errors of its own
            return "use auto or cpu"
    return None


def moved(x: Tensor, device: torch.device | str) -> Tensor:
    """`x` on `device`, without the host's waiting for what a GPU was given to do before."""
    to_gpu = torch.device(device).type == "cuda" and x.device.type == "cpu"
    # Only a copy from pinned memory is queued; torch keeps that memory until the copy is done.
    return x.pin_memory().to(device, non_blocking=True) if to_gpu else x.to(device)


def memory(device: torch.device) -> Memory:
    """A GPU's own memory, else the computer's."""
    if device.type == "cuda":
        return Memory(torch.cuda.mem_get_info(device)[1], "the GPU")
    return Memory(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"), "this machine")


def has_own_memory(device: torch.device) -> bool:
    """Whether tensors on it are in memory of its own, beside the computer's."""
    return device.type != "cpu"


def keeps_freed_memory(device: torch.device) -> bool:
    """Whether torch keeps what one tensor freed for the next.

    It does so for each CUDA stream, whose kernels run one after the other, so that no tensor
    is made where an earlier kernel still reads. Memory of a CPU goes back to the system.
    """
    return device.type != "cpu"


def release_freed_memory(device: torch.device) -> None:
    """Gives back what was freed and is kept for reuse: torch's cache on a GPU, else the C library's
    (glibc's alone can)."""
    if device.type == "cuda":
        torch.cuda.empty_cache()
        return
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if sys.platform == "linux" else None
    if trim is not None:
        trim(0)


def peak_memory_bytes(device: torch.device) -> int:
    """Since `reset_peak_memory`: on a GPU torch's peak allocation, else the peak resident size."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return _peak_resident_bytes()


def reset_peak_memory(device: torch.device) -> None:
    """Starts the peak anew, so that loading and converting a model do not count as training.

    On a CPU this needs Linux (see proc_pid_clear_refs(5)); elsewhere the peak is the process's.
    """
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    elif os.access("/proc/self/clear_refs", os.W_OK):
        Path("/proc/self/clear_refs").write_text("5")


def resident_bytes() -> int:
    """The memory that this process holds now; where the system does not say, the most so far."""
    return _status_bytes("VmRSS:") or _peak_resident_bytes()


def _status_bytes(field: str) -> int:
    """A size in /proc/self/status; 0 where there is none."""
    status = Path("/proc/self/status")
    if status.exists():
        for line in status.read_text().splitlines():
            if line.startswith(field):
                return int(line.split()[1]) * 1024
    return 0


def _peak_resident_bytes() -> int:
    # Not ru_maxrss where it can be helped: a forked process begins with its parent's size.
    if peak := _status_bytes("VmHWM:"):
        return peak
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
