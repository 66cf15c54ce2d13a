"""Results line by line: what was measured before a time-out or a crash is not lost.

Each line is a JSON object with an `event`: "context" (machine and versions), "start" of an item,
"row" (a result), "failure" or "skipped" with a `message`, "end" of an item. Needs nothing but
Python.
"""

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any


class Journal:
    """Appends to a file; without one it only forgets."""

    def __init__(self, path: Path | None) -> None:
        self.path = path
        if path is not None:
            path.parent.mkdir(parents=True, exist_ok=True)

    def add(self, event: str, **fields: Any) -> None:
        """One line, on the disk before this returns."""
        if self.path is None:
            return
        line = json.dumps({"event": event, **fields}, ensure_ascii=False)
        # A line that a killed process left unfinished must not swallow this one.
        torn = self.path.exists() and not self.path.read_bytes().endswith(b"\n")
        torn = torn and self.path.stat().st_size > 0
        with self.path.open("a", encoding="utf-8") as file:
            file.write(("\n" if torn else "") + line + "\n")
            file.flush()
            os.fsync(file.fileno())


def read(path: Path) -> list[dict[str, Any]]:
    """The journal's lines that are whole; none if there is no file."""
    if not path.is_file():
        return []
    lines = []
    for text in path.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            line = json.loads(text)
        except ValueError:
            continue
        if isinstance(line, dict) and "event" in line:
            lines.append(line)
    return lines


def started(path: Path | None) -> list[Mapping[str, Any]]:
    """The items that were begun, finished or not: a second run does not run into them again."""
    lines = [] if path is None else read(path)
    return [line["item"] for line in lines if line["event"] == "start"]
