import time

import pytest
import torch

from benchmarks.common import measure
from benchmarks.gpu import gpu_timing


class Event:
    def __init__(self, now: float) -> None:
        self.now = now

    def elapsed_time(self, later: "Event") -> float:
        return 1e3 * (later.now - self.now)


class FakeGpu:
    """Runs take the seconds that they say; what is done to it is kept in order."""

    def __init__(self) -> None:
        self.clock = 0.0
        self.done: list[object] = []

    def synchronize(self) -> None:
        self.done.append("synchronize")

    def flush(self) -> None:
        self.clock += 1.0
        self.done.append("flush")

    def wait(self, seconds: float) -> None:
        self.clock += seconds
        self.done.append(("wait", seconds))

    def event(self) -> Event:
        self.done.append("event")
        return Event(self.clock)

    def kernel(self, name: str, seconds: float, queueing: float = 0.0):
        def run() -> None:
            time.sleep(queueing)
            self.clock += seconds
            self.done.append(name)

        return run


def test_the_cache_is_flushed_and_only_the_call_is_timed() -> None:
    gpu = FakeGpu()
    runs = {"slow": gpu.kernel("slow", 0.05), "fast": gpu.kernel("fast", 5e-6, queueing=0.002)}
    timings = gpu_timing.time_alternating(runs, gpu, samples=3)
    assert timings["slow"][0] == pytest.approx([0.05] * 3)
    assert timings["fast"][0] == pytest.approx([5e-6] * 3 * gpu_timing.MOST_REPEATS)
    assert timings["fast"][1] >= 0.002
    kinds = [x[0] if isinstance(x, tuple) else x for x in gpu.done]
    last = kinds[-6 * (1 + gpu_timing.MOST_REPEATS) :]
    one = ["flush", "wait", "event", "{}", "event", "synchronize"]
    expected = [x.format(name) for name in ("slow", *["fast"] * 10) for x in one]
    assert last == expected


def test_the_gpu_waits_until_a_call_is_queued() -> None:
    gpu = FakeGpu()
    gpu_timing.time_alternating({"x": gpu.kernel("x", 1e-5, queueing=0.003)}, gpu, samples=1)
    waits = [x[1] for x in gpu.done if isinstance(x, tuple)]
    assert min(waits) >= 0.003


def test_inputs_are_restored_before_the_flush() -> None:
    gpu = FakeGpu()
    run = measure.Restored(gpu.kernel("x", 0.1), [])
    run.restore = lambda: gpu.done.append("restore")
    gpu_timing.time_alternating({"x": run}, gpu, samples=1)
    order = [x[0] if isinstance(x, tuple) else x for x in gpu.done][-7:]
    assert order == ["restore", "flush", "wait", "event", "x", "event", "synchronize"]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_copy_is_timed_as_memory_allows() -> None:
    """Not faster than any memory, though the copy fits the cache; nor as slow as its launch."""
    device = torch.device("cuda", 0)
    moved = 64 * 2**20
    runs = {"copy": measure.copy_run(moved, device)}
    timing = measure.time_alternating(runs, device, samples=15)["copy"]
    assert timing.queued is not None
    assert 1e11 < moved / timing.median < 1.2e13


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_the_wait_lasts_as_long_as_asked() -> None:
    gpu = gpu_timing.CudaGpu(torch.device("cuda", 0))
    begin = gpu.event()
    gpu.wait(0.002)
    end = gpu.event()
    gpu.synchronize()
    assert 0.001 < begin.elapsed_time(end) * 1e-3 < 0.006
