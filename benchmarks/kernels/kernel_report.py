"""The table of kernel results. Needs nothing but Python."""

from collections.abc import Iterable, Mapping
from typing import Any

from benchmarks.common.text_table import table

COLUMNS = ("case", "size", "pass", "implementation", "µs", "rate", "of ceiling", "extra MiB")
QUEUED = "µs queued"


def rows_table(rows: Iterable[Mapping[str, Any]]) -> str:
    """One line for each result; with the time to queue a call where it was measured."""
    rows = list(rows)
    queued = any(row["seconds"].get("queued") is not None for row in rows)
    lines = []
    for row in rows:
        line = [
            row["case"],
            f"{row['size']} {row['dtype']}",
            row["pass"],
            row["implementation"],
            _microseconds(row["seconds"]["median"]),
            f"{row['rate'] / 1e9:.1f} {row['unit']}",
            f"{row['share_of_ceiling']:.0%}",
            f"{row['extra_bytes'] / 2**20:.1f}",
        ]
        lines.append([*line, _microseconds(row["seconds"]["queued"])] if queued else line)
    return table([*COLUMNS, QUEUED] if queued else COLUMNS, lines, left=4)


def choices(rows: Iterable[Mapping[str, Any]]) -> str:
    """What ran as ours in each case."""
    found = {row["case"]: row["choice"] for row in rows}
    lines = [f"- {name}: {c['impl']} ({c['reason']})" for name, c in found.items()]
    return "What ran as ours:\n" + "\n".join(lines)


def _microseconds(seconds: float | None) -> str:
    return "" if seconds is None else f"{seconds * 1e6:.{0 if seconds >= 1e-4 else 1}f}"
