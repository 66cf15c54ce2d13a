"""Time on the GPU itself: events around one call, the cache flushed before it.

Three things would flatter or blur a kernel of a few microseconds, and each has its remedy here.
A call right after another finds its inputs in the level-2 cache: a large buffer is written before
every call. A call is queued slower than it runs: the GPU first waits in a kernel that does nothing
until the whole call is queued, so gaps between launches are no part of the time (the time that the
processor takes to queue a call is reported apart). A clock that rises while one contender is timed
helps that one: contenders take turns.
"""

import time
from collections.abc import Callable, Mapping
from statistics import median
from typing import Any, Protocol

import torch

# The cache's size is not known to every torch; this is several times that of any GPU so far.
FLUSH_BYTES = 512 * 2**20
# How much longer than the processor needs the GPU waits, and at least how long.
WAIT_MARGIN = 1.5
LEAST_WAIT = 100e-6
# Short calls are timed more often, within about this time.
SAMPLE_SECONDS = 0.02
MOST_REPEATS = 10


class Gpu(Protocol):
    """What timing needs of a device; a test has one without a GPU."""

    def synchronize(self) -> None: ...
    def flush(self) -> None: ...
    def wait(self, seconds: float) -> None: ...
    def event(self) -> Any: ...


class CudaGpu:
    """A CUDA device."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.buffer = torch.empty(FLUSH_BYTES, dtype=torch.int8, device=device)
        self.cycles_per_second = self._measure_clock()

    def synchronize(self) -> None:
        torch.cuda.synchronize(self.device)

    def flush(self) -> None:
        self.buffer.zero_()

    def wait(self, seconds: float) -> None:
        torch.cuda._sleep(int(seconds * self.cycles_per_second))

    def event(self) -> torch.cuda.Event:
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def _measure_clock(self) -> float:
        cycles = 2_000_000
        torch.cuda._sleep(cycles)
        begin = self.event()
        torch.cuda._sleep(cycles)
        end = self.event()
        self.synchronize()
        return cycles / (begin.elapsed_time(end) * 1e-3)


def time_alternating(
    runs: Mapping[str, Callable[[], object]], gpu: Gpu, *, samples: int
) -> dict[str, tuple[list[float], float]]:
    """For each run the GPU's seconds, sample by sample, and the processor's to queue one call."""
    host = {name: _host_seconds(run, gpu) for name, run in runs.items()}
    repeats = {name: _repeats(run, gpu, host[name]) for name, run in runs.items()}
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(samples):
        for name, run in runs.items():
            for _ in range(repeats[name]):
                seconds[name].append(_time_once(run, gpu, host[name]))
    return {name: (values, host[name]) for name, values in seconds.items()}


def _host_seconds(run: Callable[[], object], gpu: Gpu) -> float:
    """Time to queue one call, the GPU being idle; the first calls also compile and allocate."""
    for _ in range(2):
        run()
    taken = []
    for _ in range(3):
        gpu.synchronize()
        start = time.perf_counter()
        run()
        taken.append(time.perf_counter() - start)
    gpu.synchronize()
    return median(taken)


def _repeats(run: Callable[[], object], gpu: Gpu, host: float) -> int:
    expected = _time_once(run, gpu, host)
    return max(1, min(MOST_REPEATS, int(SAMPLE_SECONDS / max(expected, 1e-9))))


def _time_once(run: Callable[[], object], gpu: Gpu, host: float) -> float:
    restore = getattr(run, "restore", None)
    if restore is not None:
        restore()
    gpu.flush()
    gpu.wait(max(LEAST_WAIT, WAIT_MARGIN * host))
    begin = gpu.event()
    run()
    end = gpu.event()
    gpu.synchronize()
    return float(begin.elapsed_time(end)) * 1e-3
