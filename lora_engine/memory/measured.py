"""How much memory a piece of work took, as torch's allocator saw it."""

import gc
from collections.abc import Callable

import torch
from torch.autograd.profiler import profile, record_function

_BEGINS = "lora_engine: the measured work begins"


class _Unparsed(profile):
    """A profile whose events stay as they were recorded: making Python's of them takes longer than
    the work."""

    def _parse_kineto_results(self, *_: object, **__: object) -> list[object]:
        return []


def peak_cpu_bytes(work: Callable[[], object], before: Callable[[], object] | None = None) -> int:
    """The most bytes of tensors alive on the CPU within `work`, of those made in it or `before`.

    before: is called first. What it makes counts for as long as it is alive, its own peak does not.

    Counted by torch's allocator, which tells its profiler of every allocation and of every end of
    one. Memory that libraries take past it (oneDNN's scratch, Python's objects) does not count.
    Work under it takes longer, by some microseconds an allocation. Raises RuntimeError where the
    profiler recorded nothing, as a second one in a process sometimes does.
    """
    gc.collect()  # the end of what was made before would count as less of what is made here
    with _Unparsed(use_kineto=True, profile_memory=True) as profiled:
        if before is not None:
            before()
        with record_function(_BEGINS):
            pass
        work()
    begin, events = None, []
    assert profiled.kineto_results is not None
    for event in profiled.kineto_results.events():
        if event.name() == _BEGINS:
            begin = event.start_ns()
        elif event.name() == "[memory]" and event.device_type() == torch.autograd.DeviceType.CPU:
            events.append((event.start_ns(), event.nbytes()))
    if begin is None or not events:
        raise RuntimeError("torch's profiler recorded nothing; measure in a process of its own")
    peak = alive = 0
    for at, size in sorted(events, key=lambda event: event[0]):
        if at >= begin:
            peak = max(peak, alive)
        alive += size
    return max(peak, alive)
