"""Time, memory, and the machine's own ceilings."""

import ctypes
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import cycle
from pathlib import Path
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks.gpu import gpu_timing, step_profile

Thunk = Callable[[], object]

_STATUS = Path("/proc/self/status")
_CLEAR_REFS = Path("/proc/self/clear_refs")
_LAST_LEVEL_CACHE = Path("/sys/devices/system/cpu/cpu0/cache/index3/size")
USUAL_CACHE = 32 * 2**20
# Inputs that are taken in turn fill the last level of cache so many times, but no more bytes.
CACHE_FILLS = 2
MOST_INPUT_BYTES = 2**29
MOST_SETS = 32


def resident_bytes() -> int:
    """Bytes of this process that are in physical memory now (VmRSS)."""
    return _status_bytes("VmRSS")


def peak_resident_bytes() -> int:
    """Highest `resident_bytes` since the start or the last `reset_peak` (VmHWM).

    Not getrusage's ru_maxrss: a child inherits that from the process that forked it.
    """
    return _status_bytes("VmHWM")


def held_bytes(device: torch.device) -> int:
    """Bytes held now: the process's on a CPU, those of tensors on a GPU."""
    return torch.cuda.memory_allocated() if device.type == "cuda" else resident_bytes()


def peak_bytes(device: torch.device) -> int:
    """Highest `held_bytes` since the start or the last `reset_peak`."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated()
    return peak_resident_bytes()


def reset_peak(device: torch.device | None = None) -> None:
    """Let `peak_bytes` start again from what is held now."""
    if device is not None and device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    else:
        _CLEAR_REFS.write_text("5")


def release_free_memory() -> None:
    """Return the allocator's free pages to the system, so that a new peak is not hidden by them."""
    ctypes.CDLL(None).malloc_trim(0)


def _status_bytes(field: str) -> int:
    for line in _STATUS.read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"{_STATUS} has no {field}: these benchmarks need Linux's /proc")


def extra_memory(run: Thunk, device: torch.device) -> int:
    """Peak bytes that one call of `run` takes above what is held before it, its results included.

    `run` must have been called before, so that what it caches is there already.
    """
    if device.type == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        held = torch.cuda.memory_allocated()
        run()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - held
    release_free_memory()
    reset_peak()
    held = resident_bytes()
    run()
    return max(0, peak_resident_bytes() - held)


def input_sets(nbytes: int, device: torch.device) -> int:
    """How many inputs of `nbytes` are taken in turn, so that none is in the processor's cache when
    its turn comes. One on a GPU, whose cache is flushed before every call."""
    if device.type == "cuda":
        return 1
    wanted = min(CACHE_FILLS * last_level_cache(), MOST_INPUT_BYTES)
    return max(1, min(MOST_SETS, -(-wanted // max(1, nbytes))))


def last_level_cache() -> int:
    """Bytes of the processor's third cache; USUAL_CACHE where the system does not say."""
    try:
        text = _LAST_LEVEL_CACHE.read_text().strip()
        return int(text.removesuffix("K")) * 1024 if text.endswith("K") else USUAL_CACHE
    except (OSError, ValueError):
        return USUAL_CACHE


def rotated(runs: Sequence[Thunk]) -> Thunk:
    """Calls the runs one after the other, and again from the first."""
    if len(runs) == 1:
        return runs[0]
    turn = cycle(runs)
    return lambda: next(turn)()


class CallCounter(TorchDispatchMode):
    """Within, counts the calls of torch's operators, those of the backward pass included.

    What extensions do without torch's dispatcher is not counted.
    """

    def __init__(self) -> None:
        super().__init__()
        self.calls = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.calls += 1
        return func(*args, **(kwargs or {}))


def count_calls(run: Thunk, device: torch.device) -> int:
    """Kernels and copies that one call launches on a GPU; torch's operators it calls elsewhere."""
    if device.type == "cuda":
        return len(step_profile.intervals(run))
    with CallCounter() as counter:
        run()
    return counter.calls


class Restored:
    """A run whose tensors are what they were once `restore` is called, outside the time."""

    def __init__(self, run: Thunk, tensors: Sequence[torch.Tensor]) -> None:
        self.run, self.tensors = run, tensors
        self.originals = [x.detach().clone() for x in tensors]

    def __call__(self) -> object:
        return self.run()

    def restore(self) -> None:
        with torch.no_grad():
            for x, original in zip(self.tensors, self.originals, strict=True):
                x.copy_(original)


@dataclass(frozen=True)
class Timing:
    """Time of one call, in seconds, over `samples` samples.

    lower, upper: the quartiles; half of the samples are between them.
    queued: on a GPU, where the others are its own time, what the processor takes to queue a call.
    """

    median: float
    fastest: float
    slowest: float
    lower: float
    upper: float
    samples: int
    queued: float | None = None

    @classmethod
    def of(cls, values: Sequence[float], queued: float | None = None) -> "Timing":
        """What samples come to."""
        lower, upper = values[0], values[0]
        if len(values) > 1:
            lower, _, upper = statistics.quantiles(values, n=4, method="inclusive")
        median = statistics.median(values)
        return cls(median, min(values), max(values), lower, upper, len(values), queued)


def time_alternating(
    runs: Mapping[str, Thunk],
    device: torch.device,
    *,
    samples: int = 15,
    sample_seconds: float = 0.02,
) -> dict[str, Timing]:
    """Time several functions turn by turn, so that whatever else the machine does hits them alike.

    On the CPU wall time: a sample is the mean of as many calls as fill `sample_seconds`, at least
    one. On a GPU its own time, as gpu_timing.py says.
    """
    if device.type == "cuda":
        found = gpu_timing.time_alternating(runs, gpu_timing.CudaGpu(device), samples=samples)
        return {name: Timing.of(x, queued) for name, (x, queued) in found.items()}
    calls = {name: _calls_per_sample(run, device, sample_seconds) for name, run in runs.items()}
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(samples):
        for name, run in runs.items():
            seconds[name].append(_time_calls(run, calls[name], device) / calls[name])
    return {name: Timing.of(values) for name, values in seconds.items()}


def _calls_per_sample(run: Thunk, device: torch.device, sample_seconds: float) -> int:
    """By the fastest of three calls: on a busy machine one alone is often interrupted, and a sample
    of few calls would more often than others fit between two interruptions."""
    _time_calls(run, 2, device)
    fastest = min(_time_calls(run, 1, device) for _ in range(3))
    return max(1, round(sample_seconds / fastest))


def _time_calls(run: Thunk, calls: int, device: torch.device) -> float:
    _synchronize(device)
    start = time.perf_counter()
    for _ in range(calls):
        run()
    _synchronize(device)
    return time.perf_counter() - start


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def copy_run(moved_bytes: int, device: torch.device) -> Thunk:
    """A plain copy that reads and writes `moved_bytes` together: the ceiling of a pointwise pass.

    The same number of bytes as the case itself, so that both find the same cache.
    """
    source = torch.ones(max(1, moved_bytes // 8), dtype=torch.float32, device=device)
    target = torch.empty_like(source)
    return lambda: target.copy_(source)


@dataclass(frozen=True)
class Matmul:
    """A product with a weight [N, K]: x [M, K] · weightᵀ, or dy [M, N] · weight."""

    m: int
    n: int
    k: int
    transposed: bool = True

    @property
    def flops(self) -> int:
        """Floating-point operations, a multiply-add as two."""
        return 2 * self.m * self.n * self.k


def linear_matmuls(m: int, n: int, k: int) -> tuple[Matmul, Matmul]:
    """What a frozen linear layer with weight [N, K] needs for M rows: x · Wᵀ and dy · W."""
    return Matmul(m, n, k), Matmul(m, n, k, transposed=False)


def matmul_run(matmuls: Sequence[Matmul], dtype: torch.dtype, device: torch.device) -> Thunk:
    """All products in turn by torch.mm, each into its own buffer: the ceiling of a fused matmul."""
    operands = [_operands(matmul, dtype, device) for matmul in matmuls]

    def run() -> None:
        for left, right, out in operands:
            torch.mm(left, right, out=out)

    return run


def _operands(
    matmul: Matmul, dtype: torch.dtype, device: torch.device
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    weight = torch.randn(matmul.n, matmul.k, device=device).to(dtype)
    rows, columns = (matmul.k, matmul.n) if matmul.transposed else (matmul.n, matmul.k)
    left = torch.randn(matmul.m, rows, device=device).to(dtype)
    out = torch.empty(matmul.m, columns, dtype=dtype, device=device)
    return left, weight.t() if matmul.transposed else weight, out
