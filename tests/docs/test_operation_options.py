"""An option of an operation is used by lora_engine, or offered to others on the page of support."""

import ast
import inspect
import re
from pathlib import Path

import pytest

import lora_engine
from lora_engine import ops

PACKAGE = Path(lora_engine.__file__).parent
PAGE = PACKAGE.parent / "docs" / "support.md"
OPERATIONS = {
    name: function
    for name in ops.__all__
    if inspect.isfunction(function := inspect.unwrap(getattr(ops, name)))
}


def options_of(operation: str) -> set[str]:
    parameters = inspect.signature(OPERATIONS[operation]).parameters.values()
    return {p.name for p in parameters if p.kind is p.KEYWORD_ONLY}


def used() -> dict[str, set[str | None]]:
    """The keywords that lora_engine calls each operation with, but for its calls of itself."""
    keywords: dict[str, set[str | None]] = {name: set() for name in OPERATIONS}
    launched = [PACKAGE / room for room in ("backends", "reference")]
    for path in PACKAGE.rglob("*.py"):
        if any(room in path.parents for room in launched):
            continue  # where functions of kernels have operations' names
        own = {n for n, f in OPERATIONS.items() if Path(inspect.getfile(f)) == path}
        for call in ast.walk(ast.parse(path.read_text())):
            if isinstance(call, ast.Call):
                name = ast.unparse(call.func).removeprefix("ops.")
                if name in keywords and name not in own:
                    named = {k.arg for k in call.keywords}
                    keywords[name] |= options_of(name) if None in named else named  # **options
    return keywords


def offered() -> dict[str, set[str]]:
    """The options of each operation in the page's table."""
    found: dict[str, set[str]] = {name: set() for name in OPERATIONS}
    for names, option in re.findall(r"^\| (.+?) \| `(\w+)` \|", PAGE.read_text(), re.MULTILINE):
        for name in found if names == "all" else re.findall(r"`(\w+)`", names):
            if name in found:
                found[name].add(option)
    return found


USED, OFFERED = used(), offered()


@pytest.mark.parametrize("operation", OPERATIONS)
def test_an_option_has_a_caller_or_is_offered(operation: str) -> None:
    assert options_of(operation) - USED[operation] - OFFERED[operation] == set()


@pytest.mark.parametrize("operation", OPERATIONS)
def test_what_is_offered_exists_and_is_for_others(operation: str) -> None:
    assert OFFERED[operation] - {"impl"} <= options_of(operation) - USED[operation]
