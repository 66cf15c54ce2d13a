"""Results of `lora-engine bench` as files: what a row is known by, and reading them back.

A row has case, size, dtype, pass and implementation; seconds (median, fastest, slowest, lower and
upper quartile); rate and unit; ceiling and share_of_ceiling where there is one; extra_bytes of a
kernel or peak_bytes of a whole step; calls. Needs nothing but Python.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeAlias

from lora_engine.errors import UserError

Row: TypeAlias = Mapping[str, Any]
Key: TypeAlias = tuple[str, str, str, str, str]


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
    except (ValueError, UnicodeDecodeError):
        raise UserError(f"{path}: is not JSON; name the .json file that bench wrote") from None
    if isinstance(found, dict) and "rows" not in found and "summary" in found:
        found = {**found, "rows": _step_rows(found)}
    rows = found.get("rows") if isinstance(found, dict) else None
    if not isinstance(rows, list) or not all(_is_row(row) for row in rows):
        raise UserError(f"{path}: has no rows of a benchmark; name a file that bench wrote")
    return found


def _is_row(row: object) -> bool:
    needed = {"case", "size", "dtype", "pass", "implementation", "seconds"}
    return isinstance(row, dict) and needed <= row.keys() and "median" in row["seconds"]


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


def is_busy(run: Mapping[str, Any]) -> bool:
    """Whether other programs had as much as half a core when the run began."""
    return float(run["load_average"]) >= 0.5
