"""How much of the processor other programs took while something was measured."""

import os
import time

import psutil

BUSY = ("user", "nice", "system", "irq", "softirq", "steal")  # the rest of a core's time is idle


class OtherPrograms:
    """Watches, from its creation on, the cores that this process may run on."""

    def __init__(self) -> None:
        self._start = _times()

    def cores(self) -> float:
        """Cores that other programs had on average.

        Time of processes that this one started is its own once they have ended.
        """
        seconds, busy, own = (b - a for a, b in zip(self._start, _times(), strict=True))
        return max(0.0, busy - own) / max(seconds, 1e-9)


def _times() -> tuple[float, float, float]:
    """Seconds: of the clock, of these cores at work, of this process and those it started."""
    every = psutil.cpu_times(percpu=True)
    usable = os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else range(len(every))
    mine = [every[core] for core in usable if core < len(every)]
    busy = sum(getattr(core, kind, 0.0) for core in mine for kind in BUSY)
    return time.monotonic(), busy, sum(os.times()[:4])
