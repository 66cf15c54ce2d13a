"""Rows of results, of what the rounds of a job measured."""

import statistics
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from benchmarks.common import measure
from benchmarks.common.jobs import Measured


def rows_of(measured: Measured) -> list[dict[str, Any]]:
    """A row of results for each contender and point.

    Rates are medians over all timed steps of all rounds. `compared` has the contender's time, its
    processor's time and its memory over ours of the same step of the same round.
    """
    return [
        _row(measured, name, point, rounds)
        for name, points in measured.rounds.items()
        for point, rounds in points.items()
    ]


def _row(
    measured: Measured, name: str, point: str, rounds: Sequence[dict[str, Any]]
) -> dict[str, Any]:
    options, facts, job = measured.options, measured.facts, measured.job
    warmup = options["warmup"]
    seconds, cpu = (_timed(rounds, warmup, kind) for kind in ("seconds", "cpu_seconds"))
    amounts = facts["amounts"][point][warmup:] * len(rounds)
    row: dict[str, Any] = {
        "case": job.name,
        "size": f"{options['model']} {point}".strip(),
        "dtype": options["dtype"],
        "device": options["device"],
        "pass": "step",
        "implementation": name,
        "seconds": asdict(measure.Timing.of(seconds)),
        "cpu_seconds": asdict(measure.Timing.of(cpu)),
        "rates": spread([a / s for a, s in zip(amounts, seconds, strict=True)]),
        "unit": facts["unit"],
        "loaded_bytes": statistics.median(r["loaded_bytes"] for r in rounds),
        "peak_bytes": _peak(rounds),
        "training_bytes": max(r["peak_training_bytes"] for r in rounds),
        "calls": rounds[0]["calls"],
        "losses": [step["loss"] for step in rounds[0]["steps"]],
    }
    row["rate"] = row["rates"]["median"]
    if point:
        row["x"] = int(point)
    if measured.rates and "flops" in facts:
        flops = facts["flops"][point][warmup:] * len(rounds)
        limit = measure.Timing.of([1 / r["flops_per_second"] for r in measured.rates])
        row["ceiling"], row["ceiling_seconds"] = 1 / limit.median, asdict(limit)
        achieved = statistics.median(f / s for f, s in zip(flops, seconds, strict=True))
        row["share_of_ceiling"] = achieved / row["ceiling"]
    ours = measured.rounds.get("ours", {}).get(point)
    if name != "ours" and ours:
        both = min(len(ours), len(rounds))
        ours, rounds = ours[:both], rounds[:both]
        seconds, cpu = (_timed(rounds, warmup, kind) for kind in ("seconds", "cpu_seconds"))
        our_seconds, our_cpu = (_timed(ours, warmup, k) for k in ("seconds", "cpu_seconds"))
        row["compared"] = {
            "times_as_long": spread([a / b for a, b in zip(seconds, our_seconds, strict=True)]),
            "times_the_cpu": spread([a / b for a, b in zip(cpu, our_cpu, strict=True)]),
            "our_share_of_memory": _peak(ours) / _peak(rounds),
        }
    return row


def _peak(rounds: Sequence[dict[str, Any]]) -> int:
    return max(r["peak_bytes"] for r in rounds)


def _timed(rounds: Sequence[dict[str, Any]], warmup: int, kind: str) -> list[float]:
    return [step[kind] for r in rounds for step in r["steps"][warmup:]]


def spread(values: Sequence[float]) -> dict[str, float]:
    """Median, lowest and highest."""
    return {"median": statistics.median(values), "lowest": min(values), "highest": max(values)}
