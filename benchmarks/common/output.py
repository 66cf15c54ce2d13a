"""What a result carries besides its numbers, and how it is printed and written."""

import json
import os
import shlex
import sys
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from benchmarks.common.text_table import table as table
from lora_engine.files import write_text
from lora_engine.machine import installed_version, machine_facts


def command() -> list[str]:
    """What follows `python` in the command line of this run."""
    spec = sys.modules["__main__"].__spec__
    return ["-m", spec.name, *sys.argv[1:]] if spec else sys.argv


def context() -> dict[str, Any]:
    """Command, date, machine and versions of this run, and how busy the machine was before it."""
    facts = machine_facts()
    facts["software"] |= {p: v for p in ("trl", "numpy") if (v := installed_version(p))}
    return {
        "command": shlex.join(["python", *command()]),
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        **facts,
        "load_average": os.getloadavg()[0],
    }


def header(run: dict[str, Any]) -> str:
    """`context` as lines of text."""
    lines = [f"`{run['command']}`, {run['date']}"]
    for part in ("hardware", "software"):
        lines.append(", ".join(f"{name} {value}" for name, value in run[part].items()))
    lines.append(f"load average at the start {run['load_average']:.1f}")
    return "\n".join(f"- {line}" for line in lines)


def write(out: Path, result: dict[str, Any], text: str) -> tuple[Path, Path]:
    """Write `result` to OUT.json and `text` to OUT.md, each complete or not at all."""
    paths = Path(f"{out}.json"), Path(f"{out}.md")
    contents = json.dumps(result, indent=1, ensure_ascii=False), text
    for path, content in zip(paths, contents, strict=True):
        write_text(path, content + "\n")
    return paths
