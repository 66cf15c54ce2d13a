"""The rows of attention.py as a table. Needs nothing but Python."""

from collections.abc import Mapping, Sequence
from typing import Any

from benchmarks.common.text_table import table


def render(rows: Sequence[Mapping[str, Any]]) -> str:
    """One line per size and contender."""
    columns = ("size", "contender", "forward us", "TFLOP/s", "both us", "TFLOP/s")
    lines: dict[tuple[str, str], list[str]] = {}
    for row in rows:
        cells = lines.setdefault((row["size"], row["contender"]), [])
        cells += [f"{row['microseconds']:.0f}", f"{row['tflops']:.0f}"]
    return table(columns, [[*key, *cells] for key, cells in lines.items()], left=2)
