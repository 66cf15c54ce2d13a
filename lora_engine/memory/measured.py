"""How much memory a piece of work took, as torch's allocator saw it."""

from collections.abc import Callable

import torch
from torch.profiler import ProfilerActivity, profile


def peak_cpu_bytes(work: Callable[[], object]) -> int:
    """The most bytes of tensors alive on the CPU within `work`, of those made in it.

    Counted by torch's allocator, which tells its profiler of every allocation and of every end of
    one. Memory that libraries take past it (oneDNN's scratch, Python's objects) does not count.
    Work under it takes longer, by some microseconds an allocation.
    """
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True, acc_events=True) as prof:
        work()
    results = prof.profiler.kineto_results
    events = [
        (event.start_ns(), event.nbytes())
        for event in results.events()
        if event.name() == "[memory]" and event.device_type() == torch.autograd.DeviceType.CPU
    ]
    peak = alive = 0
    for _, size in sorted(events, key=lambda event: event[0]):
        alive += size
        peak = max(peak, alive)
    return peak
