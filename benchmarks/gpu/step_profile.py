"""What one step does on a GPU: its kernels, the time of each, and when nothing runs.

But for `intervals` this needs nothing but Python.
"""

from collections import defaultdict
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

from benchmarks.common.text_table import table

TOP = 25
NAME_WIDTH = 90


class Interval(NamedTuple):
    """A kernel's or copy's name, start and end in seconds."""

    name: str
    start: float
    end: float


def intervals(step: Callable[[], object]) -> list[Interval]:
    """What ran on the GPU in one call of `step`."""
    import torch
    from torch.autograd import DeviceType
    from torch.profiler import ProfilerActivity, profile

    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CUDA], acc_events=True) as profiler:
        step()
        torch.cuda.synchronize()
    return [
        Interval(event.name, event.time_range.start / 1e6, event.time_range.end / 1e6)
        for event in profiler.events()
        if event.device_type == DeviceType.CUDA and not event.is_user_annotation
    ]


def summarise(found: Iterable[Interval]) -> dict[str, Any]:
    """Launches, seconds from the first to the last, seconds without any, kernels by time."""
    ordered = sorted(found, key=lambda x: x.start)
    if not ordered:
        return {"launches": 0, "span": 0.0, "idle": 0.0, "longest_gap": 0.0, "kernels": []}
    total: dict[str, list[float]] = defaultdict(list)
    idle, longest, end = 0.0, 0.0, ordered[0].start
    for each in ordered:
        gap = each.start - end
        if gap > 0:
            idle, longest = idle + gap, max(longest, gap)
        end = max(end, each.end)
        total[each.name].append(each.end - each.start)
    kernels = sorted(total.items(), key=lambda item: -sum(item[1]))
    return {
        "launches": len(ordered),
        "span": end - ordered[0].start,
        "idle": idle,
        "longest_gap": longest,
        "kernels": [
            {"name": name, "seconds": sum(times), "launches": len(times)}
            for name, times in kernels[:TOP]
        ],
    }


def render(summary: dict[str, Any]) -> str:
    """The kernels as a table."""
    span = summary["span"] or 1.0
    lines = [
        [
            kernel["name"][:NAME_WIDTH].replace("|", "/"),
            f"{kernel['seconds'] * 1e3:.3f}",
            f"{kernel['seconds'] / span:.1%}",
            str(kernel["launches"]),
        ]
        for kernel in summary["kernels"]
    ]
    head = (
        f"{summary['launches']} launches in {summary['span'] * 1e3:.1f} ms, nothing runs for "
        f"{summary['idle'] * 1e3:.2f} ms ({summary['idle'] / span:.1%}), at most "
        f"{summary['longest_gap'] * 1e3:.2f} ms at a time."
    )
    return "\n\n".join([head, table(("kernel", "ms", "of the step", "launches"), lines)])
