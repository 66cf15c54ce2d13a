"""One mistake or refusal, and what the command line has to make of it."""

import hashlib
import json
import logging
import os
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from lora_engine.app import cli

MISTAKE, FAILED, INTERRUPTED = 2, 1, 130

RECORDS = "".join(
    json.dumps({"prompt": f"say {i}", "completion": f"it is {i}"}) + "\n" for i in range(12)
)
CONFIG = """\
model: {path: tiny, dtype: float32, device: cpu}
data: {train: rows.jsonl, eval_fraction: 0.2}
lora: {r: 2}
train: {output_dir: run, max_steps: 2, tokens_per_batch: 64}
samples: {count: 1, max_new_tokens: 2}
evaluation: {probe: null}
"""

# A line says how to mend it in one of these ways.
MEND = re.compile(
    r"[Dd]id you mean|Possible options|Missing (argument|option)|Input should be|not in the range"
    r"|requires an argument|expected|shipped configs|; (?!this is)|\bget the|\bgive\b|\buse\b"
    r"|change it back|bring it back|move it away|choose another|mend or remove|get it anew"
    r"|\btakes\b|\bmust be\b|\brun:|indent|first in line|needs at least"
)


@dataclass(frozen=True)
class Try:
    """arguments: of the command. words: what its line must name. files: written before, by path.

    prepare: does to the folder what `files` cannot. status: of exit. listed: many records may be
    named, each in a line of its own, indented.
    """

    name: str
    arguments: Sequence[str]
    words: Sequence[str]
    files: Mapping[str, str | bytes] = field(default_factory=dict)
    prepare: Callable[[Path], object] = lambda folder: None
    status: int = MISTAKE
    listed: bool = False


def tries(table: Sequence[Try]) -> pytest.MarkDecorator:
    """Parametrises a test over `table`."""
    names = [entry.name for entry in table]
    assert len(set(names)) == len(names), "two tries have one name"
    return pytest.mark.parametrize("entry", table, ids=names)


def run(capfd: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str, str]:
    """(exit status, standard output, standard error) of the command."""
    warned = _Warnings()
    transformers = logging.getLogger("transformers")
    transformers.addHandler(warned)
    capfd.readouterr()
    try:
        with pytest.raises(SystemExit) as caught:
            cli.main(arguments)
    finally:
        transformers.removeHandler(warned)
    printed = capfd.readouterr()
    assert isinstance(caught.value.code, int)
    return caught.value.code, printed.out, "".join(warned.lines) + printed.err


def check(
    capfd: pytest.CaptureFixture[str], folder: Path, entry: Try, *, untouched: bool = True
) -> str:
    """Runs `entry` in `folder`, the working folder, and returns the line it ends with.

    untouched: all that stood there stands there still.
    """
    for name, content in entry.files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
    entry.prepare(folder)
    before = snapshot(folder)
    status, out, err = run(capfd, *entry.arguments)
    check_line(entry, status, out, err)
    if untouched:
        after = snapshot(folder)
        assert {path: after.get(path) for path in before} == before
    return err


def check_line(entry: Try, status: int, out: str, err: str) -> None:
    """One line, no traceback, the status and the words of `entry`, and how to mend it."""
    assert status == entry.status, err
    assert "Traceback" not in out + err
    form = r"lora-engine: [^\n]+(\n  [^\n]+)*\n" if entry.listed else r"lora-engine: [^\n]+\n"
    assert re.fullmatch(form, err), err
    for word in entry.words:
        assert word in err
    assert MEND.search(err), f"no way to mend it: {err}"


def snapshot(folder: Path) -> dict[str, str]:
    """Every path under `folder` and a digest of its content; links are not followed."""
    found = {}
    for parent, folders, files in os.walk(folder):
        for name in (*folders, *files):
            path = Path(parent, name)
            if path.is_symlink():
                content = f"link to {os.readlink(path)}".encode()
            else:
                content = path.read_bytes() if path.is_file() else b"not a file"
            found[str(path.relative_to(folder))] = hashlib.sha256(content).hexdigest()
    return found


class _Warnings(logging.Handler):
    """What a logger would print: its own handler may hold an earlier test's standard error."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.lines: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        if logging.getLogger("transformers").isEnabledFor(record.levelno):
            self.lines.append(f"{record.getMessage()}\n")
