"""The launch table as text, and a copy of it with other lines. Needs nothing but Python."""

import copy
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
TABLE = ROOT / "kernels" / "src" / "launch_table.json"
Table = dict[str, dict[str, dict[str, list[list[Any]]]]]


def read(path: Path = TABLE) -> Table:
    table: Table = json.loads(path.read_text(encoding="utf-8"))
    return table


def text(table: Mapping[str, Any]) -> str:
    """As the table is kept: a line for each set of parameters, or one for a list of one."""
    kernels = [f"{json.dumps(name)}: {_capabilities(table[name])}" for name in table]
    return "{\n  " + ",\n  ".join(kernels) + "\n}\n"


def _capabilities(entries: Mapping[str, Any]) -> str:
    parts = [f"{json.dumps(name)}: {_dtypes(entries[name])}" for name in entries]
    return "{" + ",\n    ".join(parts) + "}"


def _dtypes(entries: Mapping[str, Any]) -> str:
    parts = [f"{json.dumps(name)}: {_lines(entries[name])}" for name in entries]
    return "{" + ",\n    ".join(parts) + "}"


def _lines(lines: list[Any]) -> str:
    written = [json.dumps(line) for line in lines]
    if len(written) == 1:
        return f"[{written[0]}]"
    return "[\n    " + ",\n    ".join(written) + "]"


def changed(
    table: Table, capability: int, lines: Mapping[tuple[str, str, str, int | None], dict[str, int]]
) -> Table:
    """The table with other parameters, for GPUs of this capability alone.

    `lines` are by kernel, capability, dtype and limit as the table has them. Where a line is one
    for any capability, all of its kernel's lines are repeated for this one: a capability that has
    entries uses no others.
    """
    result = copy.deepcopy(table)
    for (kernel, found_under, dtype, limit), parameters in lines.items():
        entries = result[kernel]
        if found_under not in ("*", str(capability)):
            raise ValueError(f"{kernel}: a line of {found_under}, measured on {capability}")
        own = entries.setdefault(str(capability), copy.deepcopy(entries[found_under]))
        place = next((line for line in own[dtype] if line[0] == limit), None)
        if place is None:
            raise ValueError(f"{kernel}, {dtype}: the table has no line up to {limit}")
        place[1] = dict(parameters)
    return result
