"""The report of gpu_check.py, from whatever it left. Needs nothing but Python."""

import json
import xml.etree.ElementTree as ElementTree
from pathlib import Path
from typing import Any

from benchmarks.common import journal
from benchmarks.common.text_table import table
from benchmarks.gpu import attention_report, step_report
from benchmarks.kernels import kernel_report

LOG_LINES = 15


def render(out: Path) -> str:
    """report.md for a folder with environment.json, tests.xml, journals and check.log."""
    environment = _environment(out / "environment.json")
    stages = environment.get("stages", [])
    parts = ["# GPU check", _facts(environment)]
    lines = [[s["name"], s["outcome"], f"{s['seconds']:.0f}"] for s in stages]
    parts.append(table(("stage", "outcome", "seconds"), lines, left=2))
    parts += ["## Ceilings", _ceilings(out / "ceilings.jsonl")]
    parts += ["## Tests", _tests(out / "tests.xml")]
    parts += ["## Kernels", _results(out / "kernels.jsonl")]
    linears = out / "lora_linear.jsonl"
    if linears.is_file():
        parts += ["## LoRA linear", _linears(linears)]
    attended = [x for x in journal.read(out / "attention.jsonl") if x["event"] == "row"]
    if attended:
        parts += ["## Attention", attention_report.render(attended)]
    if (out / "four_bit.md").is_file():
        parts += ["## 4-bit weights", (out / "four_bit.md").read_text(encoding="utf-8").strip()]
    steps = out / "train_step.jsonl"
    if steps.is_file():
        parts += step_report.parts(journal.read(steps))
    if any(stage["outcome"] != "passed" for stage in stages):
        parts += ["## End of check.log", _tail(out / "check.log")]
    return "\n\n".join(parts) + "\n"


def _environment(path: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(path.read_text()) if path.is_file() else {}
    return found


def _facts(environment: dict[str, Any]) -> str:
    lines = [f"- commit: {environment.get('commit') or 'unknown'}"]
    lines += [f"- {name}: {value}" for name, value in environment.get("versions", {}).items()]
    for moment, values in environment.get("nvidia-smi", {}).items():
        if values:
            text = ", ".join(f"{name} {value}" for name, value in values.items())
            lines.append(f"- nvidia-smi {moment}: {text}")
    return "\n".join(lines)


def _tests(path: Path) -> str:
    try:
        cases = list(ElementTree.parse(path).getroot().iter("testcase"))
    except (OSError, ElementTree.ParseError) as error:
        return f"No results: {error}; check.log has what ran."
    kinds = {"failed": ("failure", "error"), "skipped": ("skipped",)}
    found = {
        kind: [case for case in cases if any(case.find(tag) is not None for tag in tags)]
        for kind, tags in kinds.items()
    }
    passed = len(cases) - sum(map(len, found.values()))
    lines = [f"{passed} passed, {len(found['failed'])} failed, {len(found['skipped'])} skipped."]
    for case in found["failed"]:
        problem = next(x for tag in kinds["failed"] if (x := case.find(tag)) is not None)
        message = " ".join((problem.get("message") or "").split())[:200]
        lines.append(f"- {case.get('classname')}::{case.get('name')}: {message}")
    return "\n".join(lines)


def _results(path: Path) -> str:
    lines = journal.read(path)
    rows = [line for line in lines if line["event"] == "row"]
    parts = [kernel_report.rows_table(rows), kernel_report.choices(rows)] if rows else ["None."]
    notes = [line for line in lines if line["event"] in ("failure", "skipped", "note")]
    if notes:
        parts.append("\n".join(dict.fromkeys(f"- {x['event']}: {x['message']}" for x in notes)))
    ended = [line["item"] for line in lines if line["event"] in ("end", "failure")]
    torn = [x["item"] for x in lines if x["event"] == "start" and x["item"] not in ended]
    if torn:
        names = "\n".join(f"- {x['case']}, {x['size']}, {x['dtype']}" for x in torn)
        parts.append("Begun and not finished:\n" + names)
    return "\n\n".join(parts)


def _ceilings(path: Path) -> str:
    rows = [x for x in journal.read(path) if x["event"] == "row"]
    lines = [[" ".join(map(str, x["item"].values())), f"{x['rate'] / 1e12:.3f}"] for x in rows]
    return table(("ceiling", "TB/s or TFLOP/s"), lines) if lines else "None."


def _linears(path: Path) -> str:
    lines = journal.read(path)
    rows = [
        [
            f"{x['model']} {x['linear']}",
            f"{x['tokens']} r {x['rank']}",
            x["pass"],
            x["strategy"],
            f"{x['seconds']['median'] * 1e6:.0f}",
            f"{x['ratio_to_base']:.3f}",
        ]
        for x in lines
        if x["event"] == "row"
    ]
    columns = ("linear", "tokens", "pass", "strategy", "µs", "of base")
    notes = [f"- {x['event']}: {x['message']}" for x in lines if x["event"] in ("failure", "note")]
    return "\n\n".join([table(columns, rows, left=4) if rows else "None.", *notes])


def _tail(path: Path) -> str:
    if not path.is_file():
        return "There is none."
    lines = path.read_text(encoding="utf-8", errors="replace").splitlines()[-LOG_LINES:]
    return "```\n" + "\n".join(lines) + "\n```"
