"""What the raw results of train_step.py come to, and how they read."""

import statistics
from collections.abc import Iterable
from itertools import chain
from typing import Any

from benchmarks.common import output
from benchmarks.train import train_flops

GIB = 2**30


def summarise(measured: dict[str, Any]) -> dict[str, Any]:
    """Per dtype and contender the figures of the table; seconds, bytes, ratios.

    Rates are real tokens (no padding) over the time of the same steps; medians over all timed
    steps of all rounds. A ratio to ours is the median over pairs of the same step in the same
    round; its lowest and highest are given as well.
    """
    return {
        dtype: {
            name: _summarise_contender(measured["workload"], runs, name)
            for name in runs["contenders"]
        }
        for dtype, runs in measured["dtypes"].items()
    }


def _summarise_contender(
    workload: dict[str, Any], runs: dict[str, Any], name: str
) -> dict[str, Any]:
    warmup, rounds = workload["warmup"], runs["contenders"][name]
    shape = train_flops.ModelShape(**workload["shape"])
    tokens = [sum(lengths) for lengths in workload["lengths"][warmup:]]
    flops = [
        train_flops.step_flops(shape, workload["rank"], pieces, targets)
        for pieces, targets in zip(
            workload["pieces"][warmup:], workload["targets"][warmup:], strict=True
        )
    ]
    seconds = [_step_seconds(result, warmup) for result in rounds]
    matmul_rate = statistics.median(m["flops_per_second"] for m in runs["matmuls"])
    pairs = list(zip(tokens * len(rounds), flops * len(rounds), chain(*seconds), strict=True))
    rates = [t / s for t, _, s in pairs]
    summary: dict[str, Any] = {
        "seconds_per_step": statistics.median(s for _, _, s in pairs),
        "tokens_per_second": _spread(rates),
        "matmul_share": statistics.median(f / s for _, f, s in pairs) / matmul_rate,
        "cores_used": statistics.median(
            step["cpu_seconds"] / step["seconds"]
            for result in rounds
            for step in result["steps"][warmup:]
        ),
        "loaded_bytes": statistics.median(r["loaded_bytes"] for r in rounds),
        "peak_bytes": max(r["peak_bytes"] for r in rounds),
        "peak_training_bytes": max(r["peak_training_bytes"] for r in rounds),
        "losses": [step["loss"] for step in rounds[0]["steps"]],
    }
    if name != "ours" and "ours" in runs["contenders"]:
        ours = runs["contenders"]["ours"]
        our_seconds = [_step_seconds(result, warmup) for result in ours]
        summary["ours_times_faster"] = _spread(
            theirs / mine
            for their_round, my_round in zip(seconds, our_seconds, strict=True)
            for theirs, mine in zip(their_round, my_round, strict=True)
        )
        summary["ours_memory_share"] = max(r["peak_bytes"] for r in ours) / summary["peak_bytes"]
    return summary


def _step_seconds(result: dict[str, Any], warmup: int) -> list[float]:
    return [step["seconds"] for step in result["steps"][warmup:]]


def _spread(values: Iterable[float]) -> dict[str, float]:
    ordered = sorted(values)
    return {"median": statistics.median(ordered), "lowest": ordered[0], "highest": ordered[-1]}


def render(measured: dict[str, Any]) -> str:
    """The whole result as Markdown that also reads well in a terminal."""
    workload, parts = measured["workload"], ["# Training step", output.header(measured)]
    timed = workload["lengths"][workload["warmup"] :]
    tokens = sum(map(sum, timed)) / len(timed)
    pieces = workload["pieces"][workload["warmup"] :]
    shared = sum(own for step in pieces for _, own in step) / len(pieces)
    padded = sum(len(lengths) * max(lengths) for lengths in timed) / len(timed)
    parts.append(
        f"{workload['model']}, LoRA rank {workload['rank']} on all linears, "
        f"{len(timed[0])} examples a step: {tokens:.0f} tokens a step on average, "
        f"{padded:.0f} if padded to the longest, {shared:.0f} without what examples of a step "
        "begin with in common more than once."
    )
    parts.append("\n".join(f"- {name}: {text}" for name, text in measured["contenders"].items()))
    for dtype, runs in measured["dtypes"].items():
        parts.append(_render_dtype(dtype, runs, measured["summary"][dtype]))
    return "\n\n".join(parts)


def _render_dtype(dtype: str, runs: dict[str, Any], summary: dict[str, Any]) -> str:
    rate = statistics.median(m["flops_per_second"] for m in runs["matmuls"])
    losses = [
        [name, *(f"{loss:.4f}" for loss in figures["losses"])] for name, figures in summary.items()
    ]
    steps = [str(i + 1) for i in range(len(losses[0]) - 1)]
    parts = [
        f"## {dtype}",
        f"torch.mm on the model's own shapes: {rate / 1e9:.0f} GFLOP/s.",
        output.table(
            [
                *("contender", "tokens/s", "(range)", "s/step", "cores used", "of GEMM rate"),
                *("peak GiB", "training GiB", "loaded GiB"),
            ],
            [_row(name, figures) for name, figures in summary.items()],
        ),
    ]
    if comparisons := [_comparison(n, f) for n, f in summary.items() if "ours_times_faster" in f]:
        columns = ["ours against", "times faster", "(range)", "share of its memory"]
        parts.append(output.table(columns, comparisons))
    parts += ["Loss at each step, warm-up included:", output.table(["contender", *steps], losses)]
    return "\n\n".join(parts)


def _row(name: str, figures: dict[str, Any]) -> list[str]:
    rate = figures["tokens_per_second"]
    return [
        name,
        f"{rate['median']:.0f}",
        f"{rate['lowest']:.0f} to {rate['highest']:.0f}",
        f"{figures['seconds_per_step']:.2f}",
        f"{figures['cores_used']:.2f}",
        f"{figures['matmul_share']:.0%}",
        f"{figures['peak_bytes'] / GIB:.2f}",
        f"{figures['peak_training_bytes'] / GIB:.2f}",
        f"{figures['loaded_bytes'] / GIB:.2f}",
    ]


def _comparison(name: str, figures: dict[str, Any]) -> list[str]:
    faster = figures["ours_times_faster"]
    return [
        name,
        f"{faster['median']:.2f}",
        f"{faster['lowest']:.2f} to {faster['highest']:.2f}",
        f"{figures['ours_memory_share']:.2f}",
    ]
