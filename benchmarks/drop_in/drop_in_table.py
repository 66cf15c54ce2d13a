"""The table of docs/drop-in.md, made of what `drop_in_grid.py` found."""

import json
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "benchmarks/results/drop_in_grid.json"
PAGE = ROOT / "docs/drop-in.md"
BEGIN = "<!-- begin: made by benchmarks/drop_in/drop_in_grid.py -->"
END = "<!-- end: made by benchmarks/drop_in/drop_in_grid.py -->"
_UNKNOWN = "not recognised: runs as transformers has it"


def section(result: dict[str, Any]) -> str:
    """What stands between BEGIN and END."""
    rows, versions = result["rows"], result["run"]["software"]
    asked = [row for row in rows if "cells" in row]
    cells = [cell["outcome"] for row in asked for cell in row["cells"].values()]
    counts = {outcome: cells.count(outcome) for outcome in dict.fromkeys(cells)}
    names = dict.fromkeys(row["name"] for row in asked)
    lines = [
        f"{len(names)} configurations, {len(asked)} models, {len(cells)} cells: "
        + ", ".join(f"{count} {outcome}" for outcome, count in counts.items())
        + f" (transformers {versions['transformers']}, PEFT {versions['peft']}, "
        f"torch {versions['torch']}).",
        "",
        *_unpadded(
            ["configuration", "LoRA", "experts", "full", "FLOPs", "left to transformers with LoRA"],
            [_line(name, [row for row in asked if row["name"] == name]) for name in names],
        ),
        "",
        "No small form was built, and nothing tried, of "
        + ", ".join(row["name"] for row in rows if "skipped" in row)
        + ".",
    ]
    return "\n".join(lines)


def _unpadded(columns: list[str], lines: list[list[str]]) -> list[str]:
    """A Markdown table without padding: some of its cells are long."""
    rule = ["---"] * len(columns)
    return [f"| {' | '.join(cells)} |" for cells in (columns, rule, *lines)]


def _line(name: str, rows: list[dict[str, Any]]) -> list[str]:
    by = {row["adaptation"]: row for row in rows}
    first = by.get("LoRA", rows[0])
    verdicts = [_verdict(by[kind]) if kind in by else "" for kind in ("LoRA", "experts", "full")]
    return [name, *verdicts, f"{first.get('flops', 0):.0%}", _left(first.get("left", []))]


def _verdict(row: dict[str, Any]) -> str:
    """`right`, or what is not, by outcome; `12 right` where some cells could not be compared."""
    cells = row["cells"]
    right = sum(cell["outcome"] == "right" for cell in cells.values())
    others = [
        f"{n}: {c['outcome']}" for n, c in cells.items() if c["outcome"] in ("wrong", "crash")
    ]
    return "; ".join(([f"{right} right"] if right else ["transformers' own raises"]) + others)


def _left(entries: list[str]) -> str:
    """Reasons in a line; modules that are not recognised by their class names alone."""
    unknown = [e.partition(":")[0] for e in entries if e.endswith(_UNKNOWN)]
    known = [e.partition(" (")[0] for e in entries if not e.endswith(_UNKNOWN)]
    told = [e.replace("|", "/").replace(": call lora_engine.restore(model)", "") for e in known]
    return "; ".join(told + ([f"unknown: {', '.join(unknown)}"] if unknown else []))


def write_results(result: dict[str, Any]) -> None:
    """Writes the results, a row a line, and puts the section they make into the page."""
    rows = ",\n".join(json.dumps(row, ensure_ascii=False) for row in result["rows"])
    run = json.dumps(result["run"], ensure_ascii=False)
    RESULTS.write_text(f'{{"run": {run},\n"rows": [\n{rows}\n]}}\n')
    PAGE.write_text(with_section(PAGE.read_text(), section(result)))


def with_section(page: str, made: str) -> str:
    """The page with `made` between its marks."""
    before, _, rest = page.partition(BEGIN)
    _, _, after = rest.partition(END)
    return f"{before}{BEGIN}\n{made}\n{END}{after}"
