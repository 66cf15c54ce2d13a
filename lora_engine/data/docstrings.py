"""Data that ships with every Python: the standard library's functions and their docstrings.

Each function or method with a docstring becomes a chat: the user shows the function without its
docstring and asks for one line, the assistant answers with the docstring's first line.
"""

import ast
import inspect
import os
import sysconfig
import textwrap
import tokenize
from collections.abc import Iterator
from pathlib import Path

from lora_engine.data.records import Record
from lora_engine.errors import UserError

QUESTION = "Write a one-line docstring for this Python function.\n\n```python\n{source}\n```"

# Tests, programs, generated code and what is installed beside the standard library.
_SKIPPED = frozenset(
    (
        *("test", "tests", "idle_test", "idlelib", "lib2to3", "turtledemo", "ensurepip"),
        *("site-packages", "dist-packages", "__pycache__"),
    )
)
MAX_SOURCE_CHARS = 800  # examples of about 100 to 300 tokens
MAX_ANSWER_CHARS = 160

_Function = ast.FunctionDef | ast.AsyncFunctionDef


def docstring_records(root: Path | None = None) -> list[Record]:
    """One "messages" record per distinct function under `root`, in a fixed order.

    root: a folder of Python files; the running interpreter's standard library if None.

    Sources longer than MAX_SOURCE_CHARS are cut after a line and end in "...". Functions whose
    first docstring line is longer than MAX_ANSWER_CHARS are left out. Functions with the same
    source appear once. A record's group is its top-level module, so that `split_heldout` keeps
    every module on one side. Raises UserError if there are no sources.
    """
    root = root or Path(sysconfig.get_path("stdlib"))
    records: list[Record] = []
    seen: set[str] = set()
    for path in _python_files(root):
        for line, source, answer in documented_functions(path):
            shown = shorten(source, MAX_SOURCE_CHARS)
            if len(answer) <= MAX_ANSWER_CHARS and shown not in seen:
                seen.add(shown)
                records.append(_record(path.relative_to(root), line, shown, answer))
    if not records:
        raise UserError(f"{root}: has no Python sources with docstrings; use a data file instead")
    return records


def documented_functions(path: Path) -> Iterator[tuple[int, str, str]]:
    """(line, source without docstring, docstring's first line) of the functions in a file.

    Docstrings whose first line is not a sentence of its own are skipped: the line ends in the
    middle of one, or is code or markup. So are files that are not valid Python.
    """
    try:
        with tokenize.open(path) as file:
            lines = file.readlines()
        tree = ast.parse("".join(lines))
    except (SyntaxError, ValueError):
        return
    for node in _functions(tree):
        docstring = ast.get_docstring(node, clean=False)
        answer = summary(docstring) if docstring else None
        if answer:
            yield node.lineno, source_without_docstring(node, lines), answer


def summary(docstring: str) -> str | None:
    """The first line of a docstring, or None where it does not stand by itself."""
    lines = inspect.cleandoc(docstring).strip().split("\n")
    first = lines[0].strip()
    continues = len(lines) > 1 and lines[1].strip() and first[-1:] not in ".!?"
    is_prose = first[:1].isalpha() and " " in first and not first.endswith((",", ":"))
    return first if is_prose and not continues else None


def source_without_docstring(node: _Function, lines: list[str]) -> str:
    """The function as it is written, dedented, comments and decorators included."""
    docstring, rest = node.body[0], node.body[1:]
    above = docstring.lineno == node.lineno or (
        "".join(lines[docstring.lineno - 1]).lstrip()[:1] not in "\"'rRuU"
    )
    beside = bool(rest) and rest[0].lineno <= (docstring.end_lineno or docstring.lineno)
    if above or beside:  # the docstring shares a line with code: write the function anew
        node.body = rest or [ast.Pass()]
        return ast.unparse(node)
    first = min([node.lineno, *(d.lineno for d in node.decorator_list)])
    head = lines[first - 1 : docstring.lineno - 1]
    body = lines[docstring.end_lineno : node.end_lineno] if rest else []
    kept = body or [" " * docstring.col_offset + "pass\n"]
    return textwrap.dedent("".join([*head, *_without_leading_blank(kept)])).rstrip()


def shorten(source: str, max_chars: int) -> str:
    """`source`, cut after a line so that it has at most `max_chars` characters."""
    if len(source) <= max_chars:
        return source
    cut = source.rfind("\n", 0, max_chars - len("\n    ...") + 1)
    kept = source[: cut if cut > 0 else max_chars]
    return kept + "\n    ..."


def _python_files(root: Path) -> Iterator[Path]:
    for folder, folders, files in os.walk(root):
        folders[:] = sorted(name for name in folders if name not in _SKIPPED)
        yield from (Path(folder, name) for name in sorted(files) if name.endswith(".py"))


def _functions(node: ast.AST) -> Iterator[_Function]:
    """Functions in `node`, nested ones too, by line. Only statements can hold one."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, _Function):
            yield child
        if isinstance(child, ast.stmt | ast.excepthandler | ast.match_case):
            yield from _functions(child)


def _without_leading_blank(lines: list[str]) -> list[str]:
    start = next((i for i, line in enumerate(lines) if line.strip()), len(lines))
    return lines[start:]


def _record(relative: Path, line: int, source: str, answer: str) -> Record:
    return Record(
        "messages",
        messages=(
            {"role": "user", "content": QUESTION.format(source=source)},
            {"role": "assistant", "content": answer},
        ),
        origin=f"{relative.as_posix()}:{line}",
        group=relative.parts[0].removesuffix(".py"),
    )
