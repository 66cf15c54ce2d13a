"""Results of `lora-engine bench` as files: what a row is known by, and reading them back.

A run has hardware, software, date, load_average, rows, and others_cores where that was measured. A
row has case, size, dtype, pass and implementation; seconds (median, fastest, slowest, lower and
upper quartile, samples); rate and unit; ceiling and share_of_ceiling where there is one;
extra_bytes of a kernel or peak_bytes of a whole step; calls. Needs nothing but Python.
"""

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeAlias

from lora_engine.errors import UserError

Row: TypeAlias = Mapping[str, Any]
Key: TypeAlias = tuple[str, str, str, str, str]
# Settings of whole steps that are in a row already, or that make it only more certain.
OF_ROWS = ("dtype", "lengths", "rounds")
# Those that say which batches are drawn, and how many: a rate is that of others of the same kind.
OF_BATCHES = ("seed", "steps", "warmup")
BUSY_CORES = 0.2  # that other programs had on average
BUSY_LOAD = 0.5  # the same, where only the load before the run is known


def key_of(row: Row) -> Key:
    """What makes two rows of two files the same measurement."""
    names = ("case", "size", "dtype", "pass", "implementation")
    case, size, dtype, what, implementation = (str(row[name]) for name in names)
    return case, size, dtype, what, implementation


def read(path: str | Path) -> dict[str, Any]:
    """A result file with its rows. UserError if it is none."""
    file = Path(path)
    if file.is_dir():
        raise UserError(f"{path}: is a folder; name the .json file that bench wrote")
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{path}: no such file; bench writes NAME.json with --out NAME") from None
    except ValueError:
        raise UserError(f"{path}: is not JSON; name the .json file that bench wrote") from None
    if isinstance(found, dict) and "rows" not in found and "summary" in found:
        found = {**found, "rows": _step_rows(found)}
    if not _is_run(found):
        raise UserError(f"{path}: has no rows of a benchmark; name a file that bench wrote")
    checked: dict[str, Any] = found
    return checked


def _is_run(found: object) -> bool:
    """Whether it has what is read of every run and row."""
    if not isinstance(found, dict) or not isinstance(found.get("rows"), list):
        return False
    kinds = {"hardware": dict, "date": str, "load_average": int | float}
    return all(isinstance(found.get(k), kind) for k, kind in kinds.items()) and all(
        map(_is_row, found["rows"])
    )


def _is_row(row: object) -> bool:
    needed = {"case", "size", "dtype", "pass", "implementation", "seconds"}
    if not isinstance(row, dict) or not needed <= row.keys():
        return False
    seconds = row["seconds"]
    if not isinstance(seconds, dict) or not 0 < _number(seconds.get("median")) < math.inf:
        return False
    spread = ("lower", "upper", "samples") if "upper" in seconds else ("fastest", "slowest")
    sizes = [row[name] for name in ("peak_bytes", "extra_bytes") if name in row]
    values = [*(seconds.get(name) for name in spread), *sizes]
    return all(math.isfinite(_number(value)) for value in values)


def _number(value: object) -> float:
    return float(value) if isinstance(value, int | float) else math.nan


def _step_rows(found: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Rows of a training step's results from before there was one form for all."""
    workload = found.get("workload")
    if not isinstance(workload, dict):
        return []
    rows = []
    for dtype, summary in found["summary"].items():
        for name, figures in summary.items():
            results = found["dtypes"][dtype]["contenders"][name]
            seconds = [s["seconds"] for r in results for s in r["steps"][workload["warmup"] :]]
            row = {
                "case": "sft",
                "size": workload["model"],
                "dtype": dtype,
                "pass": "step",
                "implementation": name,
                "seconds": {
                    "median": figures["seconds_per_step"],
                    "fastest": min(seconds),
                    "slowest": max(seconds),
                    "samples": len(seconds),
                },
                "rate": figures["tokens_per_second"]["median"],
                "unit": "tokens/s",
                "share_of_ceiling": figures["matmul_share"],
                "peak_bytes": figures["peak_bytes"],
            }
            if "ours_times_faster" in figures:
                row["compared"] = {
                    "times_as_long": figures["ours_times_faster"],
                    "our_share_of_memory": figures["ours_memory_share"],
                }
            rows.append(row)
    return rows


def work_of(run: Mapping[str, Any], case: str) -> dict[str, Any]:
    """The settings that say what a case's rows measure, beside what makes them the same row."""
    job = run.get("jobs", {}).get(case)
    if job is not None:
        return {name: x for name, x in job.get("options", {}).items() if name not in OF_ROWS}
    if "workload" in run:
        return {"batch_size": len(run["workload"]["lengths"][0]), "device": "cpu"}
    options = run.get("options", run)
    return {"device": options["device"]} if "device" in options else {}


def other_settings(
    first: Mapping[str, Any], second: Mapping[str, Any], case: str, ignored: tuple[str, ...] = ()
) -> str:
    """In what the second run's work differs from the first's, in words; "" if in nothing.

    A setting that only one of the two knows counts as the same.
    """
    one, other = work_of(first, case), work_of(second, case)
    names = [n for n in one if n in other and n not in ignored and one[n] != other[n]]
    return ", ".join(f"{name} {one[name]} and {other[name]}" for name in names)


def machine(run: Mapping[str, Any]) -> str:
    """The machine of a result in a few words."""
    hardware = run["hardware"]
    cores = hardware.get("cores used", "?").split(" of ")[0]
    names = [hardware.get("processor", "unknown processor"), f"{cores} cores"]
    if hardware.get("instructions"):
        names.append(hardware["instructions"])
    if hardware.get("GPU", "none") != "none":
        names.append(hardware["GPU"])
    return ", ".join(names)


def is_of_gpu(run: Mapping[str, Any]) -> bool:
    """Whether something of it was measured on a GPU, not only beside one."""
    works = [run, *run.get("jobs", {}).values()]
    return any(each.get("options", {}).get("device") == "cuda" for each in works)


def load(run: Mapping[str, Any]) -> str:
    """What else the machine did, in words: while it ran, else before it."""
    if "others_cores" in run:
        return f"other programs had {run['others_cores']:.1f} of its cores"
    return f"load average at the start {run['load_average']:.1f}"


def is_busy(run: Mapping[str, Any]) -> bool:
    """Whether other programs took so much of the cores that times are not the machine's own."""
    if "others_cores" in run:
        return float(run["others_cores"]) >= BUSY_CORES
    return float(run["load_average"]) >= BUSY_LOAD
