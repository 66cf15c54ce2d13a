"""A parameter that may be left out is passed by somebody: else there is nothing to choose.

Operations have a test of their own (docs/test_operation_options.py).
"""

import ast
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import lora_engine

PACKAGE = Path(lora_engine.__file__).parent
# ops: see above. reference: formulas are complete. testing: for tests. Commands have options.
APART = ("ops", "reference", "testing.py")
# Whom else they are for.
OFFERED = {
    # Public functions, and what users' code makes: their callers are elsewhere.
    "accelerate": {"verify"},
    "explain": {"impl"},
    "preflight": {"loss"},
    "read_records": {"split", "layout"},
    "split_heldout": {"seed"},
    "report": {"num_samples"},
    "HarnessModel": {"tokens"},
    # Rewards are called by the settings of a config.
    "exact_match": {"column", "ignore_case"},
    "length": {"spread"},
    # Other libraries call them by their own protocols.
    "chat_template": {"chat_template"},
    "loglikelihood": {"disable_tqdm"},
    "loglikelihood_rolling": {"disable_tqdm"},
    "generate_until": {"disable_tqdm"},
    "padding_mask": {"mask_function", "attention_mask", "device"},
    # Commands' bodies, and functions that are called through another name.
    "plan": {"gpu"},
    "evaluate": {"max_new_tokens", "dtype", "device"},
    "write_gguf": {"values_of"},
    "lora_linear_few_rows": {"residual"},
    "GrowingFile": {"written"},
    # Small cases of tests: whole ones take long, or have no such edge.
    "shared_segments": {"min_shared"},
    "length_histogram": {"bins"},
    "docstring_pairs": {"root"},
    "docstring_labels": {"root"},
}


class Passed(NamedTuple):
    """What a call passes. names: None where it passes a mapping."""

    count: int
    names: set[str | None]
    all: bool


def calls_in(folders: tuple[str, ...]) -> dict[str, list[Passed]]:
    found: dict[str, list[Passed]] = {}
    for folder in folders:
        for path in (PACKAGE.parent / folder).rglob("*.py"):
            for node in ast.walk(ast.parse(path.read_text())):
                if isinstance(node, ast.Call):
                    names = {keyword.arg for keyword in node.keywords}
                    starred = any(isinstance(arg, ast.Starred) for arg in node.args)
                    passed = Passed(len(node.args), names, starred or None in names)
                    found.setdefault(name_of(node.func), []).append(passed)
                    if name_of(node.func) in ("partial", "submit") and node.args:
                        apart = Passed(len(node.args) - 1, names, passed.all)
                        found.setdefault(name_of(node.args[0]), []).append(apart)
    return found


def name_of(node: ast.expr) -> str:
    return ast.unparse(node).split(".")[-1]


def optional_of(function: ast.FunctionDef, *, method: bool) -> Iterator[tuple[str, int | None]]:
    """The parameters with a default, and the place of those that have one."""
    places = [*function.args.posonlyargs, *function.args.args]
    first = len(places) - len(function.args.defaults)
    for place, parameter in list(enumerate(places))[first:]:
        yield parameter.arg, place - method
    for parameter, default in zip(function.args.kwonlyargs, function.args.kw_defaults, strict=True):
        if default is not None:
            yield parameter.arg, None


def functions(tree: ast.AST, owner: str = "") -> Iterator[tuple[str, ast.FunctionDef, bool]]:
    """Each function by the name that it is called by, and whether it is a method of an instance."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.ClassDef):
            yield from functions(node, node.name)
        elif isinstance(node, ast.FunctionDef):
            static = any("static" in ast.unparse(mark) for mark in node.decorator_list)
            name = owner if node.name == "__init__" else node.name
            yield name, node, bool(owner) and not static
            yield from functions(node)
        else:
            yield from functions(node, owner)


def never_passed(source: str, calls: dict[str, list[Passed]]) -> dict[str, set[str]]:
    found: dict[str, set[str]] = {}
    for name, function, method in functions(ast.parse(source)):
        of_command = any("command" in ast.unparse(d) for d in function.decorator_list)
        if name.startswith("__") or of_command:
            continue
        for parameter, place in optional_of(function, method=method):
            if not any(
                call.all or parameter in call.names or (place is not None and call.count > place)
                for call in calls.get(name, [])
            ):
                found.setdefault(name, set()).add(parameter)
    return found


def test_what_may_be_left_out_is_passed_by_somebody() -> None:
    calls = calls_in(("lora_engine", "benchmarks", "kernels"))
    found: dict[str, set[str]] = {}
    for path in sorted(PACKAGE.rglob("*.py")):
        place = path.relative_to(PACKAGE)
        if place.parts[0] not in APART and not path.stem.endswith("commands"):
            for name, parameters in never_passed(path.read_text(), calls).items():
                found.setdefault(name, set()).update(parameters)
    assert found == OFFERED


def test_parameters_without_a_caller_are_found() -> None:
    source = "def f(a, b=1, *, c=2): pass\nclass C:\n    def __init__(self, d=1): pass"
    assert never_passed(source, {}) == {"f": {"b", "c"}, "C": {"d"}}
    passing = {"f": [Passed(2, {"c"}, False)], "C": [Passed(1, set(), False)]}
    assert never_passed(source, passing) == {}
