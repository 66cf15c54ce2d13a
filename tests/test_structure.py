"""The layers import one way, `import lora_engine` is cheap, and one OpenMP runtime is loaded."""

import ast
import inspect
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest

import lora_engine
from lora_engine import ops
from lora_engine.app.objectives import OBJECTIVES, ONLINE
from lora_engine.objectives.base import Objective
from lora_engine.objectives.online import OnlineObjective

PACKAGE = Path(lora_engine.__file__).parent

# The layers from the bottom up: a module imports from its own layer and from the lines before.
# A part of a package may have a layer of its own; the longest name counts.
LAYERS: list[set[str]] = [
    {"errors", "openmp", "text", "values"},
    {"memory.policy"},
    {"files", "distributed", "user_code", "config_schema"},
    {"scratch_file"},
    {"quantization"},
    {"reference"},
    {  # with what the extension has
        "backends",
        "backends.cpu.kernels",
        "backends.cpu.structs",
        "backends.cpu.lora_structs",
    },
    {"distributed.world", "distributed.replicate", "distributed.token_parts"},
    {"backends.cpu.launch", "backends.cpu.matmul"},
    {"backends.products"},
    {"backends.cpu", "backends.cuda", "backends.triton"},
    {
        "backends.torch_attention",
        "backends.cudnn_attention",
        "backends.cuda.attention",
        "backends.cuda.attention_hopper",
        "backends.cuda.attention_operands",
    },
    {"backends.launchers"},
    {"ops"},
    {"ops.lora", "ops.head"},
    {"ops.layer"},
    {"ops.__init__"},
    {"models.families", "models.quantized", "models.sharded"},
    {"testing", "models", "models.peft", "models.proof", "models.attach", "models.load"},
    {"memory"},
    {"generation"},
    {"data"},
    {"objectives"},
    {"evaluation"},
    {"export.adapter", "export.lint"},
    {"training.config"},
    {"training", "training.run", "training.optimizer", "training.preflight"},
    {"export"},
    {"serving"},
    {"machine"},
    {"report"},
    {"app"},
]
PLACES = {name: level for level, names in enumerate(LAYERS) for name in names}


def module_name(path: Path) -> str:
    """`ops.lora.linear`; a package's own file is `ops.__init__`."""
    return ".".join(path.relative_to(PACKAGE).with_suffix("").parts)


def place_of(name: str) -> int | None:
    """The layer of a module or of a name in it, by the longest part that has one."""
    parts = name.split(".")
    names = (".".join(parts[:count]) for count in range(len(parts), 0, -1))
    return next((PLACES[part] for part in names if part in PLACES), None)


def imported_names(path: Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    prefix = "lora_engine."
    return {n.removeprefix(prefix) for n in found if n.startswith(prefix)} - {"__version__"}


FILES = [p for p in sorted(PACKAGE.rglob("*.py")) if p != PACKAGE / "__init__.py"]


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_imports_go_one_way(path: Path) -> None:
    place = place_of(module_name(path))
    assert place is not None, f"{module_name(path)} has no place in LAYERS; give it one"
    above = {name for name in imported_names(path) if (place_of(name) or 0) > place}
    assert not above


def imported_at_once(path: Path) -> set[str]:
    """The modules that importing this one imports before it is whole: none that a call imports."""
    found = set()
    for node in ast.parse(path.read_text()).body:
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return {name.removeprefix("lora_engine.") for name in found}


def test_every_module_can_be_imported_first() -> None:
    """None waits for itself: in a circle, it depends on the first import whether all succeed."""
    edges = {module_name(path): imported_at_once(path) for path in FILES}
    left = dict(edges)
    while free := [name for name, others in left.items() if not others & set(left)]:
        for name in free:
            del left[name]
    assert not left, "these import each other, or one that does"


def test_a_wheel_has_every_package() -> None:
    tomllib = pytest.importorskip("tomllib")  # of Python 3.11
    root = PACKAGE.parent
    built = tomllib.loads((root / "pyproject.toml").read_text())["tool"]["setuptools"]
    named = set(built["packages"]) - set(built["package-dir"])
    found = {path.parent.relative_to(root) for path in PACKAGE.rglob("__init__.py")}
    assert named == {".".join(path.parts) for path in found}


def test_no_two_test_files_have_one_name() -> None:
    """pytest imports them by their names alone, and leaves out the second."""
    names = [path.name for path in Path(__file__).parent.rglob("test_*.py")]
    assert sorted(set(names)) == sorted(names)


def test_only_operations_call_the_reference() -> None:
    """Others ask an operation, with impl="reference" where they want its arithmetic."""
    callers = {
        module_name(path).split(".")[0]
        for path in FILES
        if any(name.split(".")[0] == "reference" for name in imported_names(path))
    }
    assert callers == {"ops", "reference"}


BESIDE_BACKENDS = [p for p in FILES if module_name(p).split(".")[0] != "backends"]


@pytest.mark.parametrize("path", BESIDE_BACKENDS, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_kernels_are_reached_through_their_contracts(path: Path) -> None:
    """No module of kernels is imported, and whose kernels launch is an answer of the choice."""
    kernels = ("backends.cpu", "backends.cuda", "backends.triton")
    assert not [name for name in imported_names(path) if name.startswith(kernels)]
    calls = (node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Call))
    named = [call for call in calls if ast.unparse(call.func).startswith("launchers.")]
    assert not [call.lineno for call in named if isinstance(call.args[0], ast.Constant)]
    if module_name(path).split(".")[0] != "ops":
        assert not named, "operations launch kernels, others call operations"


@pytest.mark.parametrize("path", sorted((PACKAGE / "ops").rglob("*.py")), ids=lambda p: p.stem)
def test_an_operation_calls_the_reference_where_it_is_asked_for_alone(path: Path) -> None:
    """Every use of the reference stands under `if … == "reference"`: ops holds no oracle."""
    tree = ast.parse(path.read_text())
    asked = {
        node
        for branch in ast.walk(tree)
        if isinstance(branch, ast.If) and ast.unparse(branch.test).endswith("== 'reference'")
        for statement in branch.body
        for node in ast.walk(statement)
    }
    names = (node for node in ast.walk(tree) if isinstance(node, ast.Name))
    assert not [n.lineno for n in names if n.id == "reference" and n not in asked]


@cache
def exported_records(path: Path) -> frozenset[str]:
    """The NamedTuples and dataclasses that a module defines or passes on from another one."""
    found = set()
    for node in ast.parse(path.read_text()).body:
        if isinstance(node, ast.ClassDef):
            if is_record(node):
                found.add(node.name)
        elif isinstance(node, ast.ImportFrom):
            found |= imported_records(node)
    return frozenset(found)


def is_record(node: ast.ClassDef) -> bool:
    marks = [*map(ast.unparse, (*node.bases, *node.decorator_list))]
    return any(word in mark for mark in marks for word in ("NamedTuple", "dataclass"))


def imported_records(node: ast.ImportFrom) -> set[str]:
    """As what they are called: `CacheRows`, or `ops.CacheRows` where the module is imported."""
    module = node.module or ""
    if module.split(".")[0] != PACKAGE.name:
        return set()
    found = set()
    for alias in node.names:
        name = alias.asname or alias.name
        if (file := file_of(f"{module}.{alias.name}")) is not None:
            found |= {f"{name}.{record}" for record in exported_records(file)}
        elif (file := file_of(module)) is not None and alias.name in exported_records(file):
            found.add(name)
    return found


def file_of(module: str) -> Path | None:
    path = PACKAGE.parent / module.replace(".", "/")
    files = (path.with_suffix(".py"), path / "__init__.py")
    return next((file for file in files if file.exists()), None)


def records_of(path: Path) -> set[str]:
    """The records that a file can make, as it calls them."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ClassDef) and is_record(node):
            found.add(node.name)
        elif isinstance(node, ast.ImportFrom):
            found |= imported_records(node)
    return found


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_records_are_made_by_name(path: Path) -> None:
    """No record of four values or more is told by their places, nor spliced out of tuples."""
    records = records_of(path)
    calls = (node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Call))
    made = [call for call in calls if ast.unparse(call.func).split("[")[0] in records]
    assert not [
        f"{call.lineno}: {ast.unparse(call)}"
        for call in made
        if len(call.args) > 3
        or (len(call.args) > 1 and any(isinstance(arg, ast.Starred) for arg in call.args))
    ]


@pytest.mark.parametrize("path", sorted((PACKAGE / "ops").rglob("*.py")), ids=lambda p: p.stem)
def test_autograd_is_asked_and_answered_by_name(path: Path) -> None:
    """No `needs_input_grad[3]` or `[3:]`, nor a gradient or saved tensor told by its place."""
    tree = ast.parse(path.read_text())
    numbered = [
        node.lineno
        for node in ast.walk(tree)
        if isinstance(node, ast.Subscript)
        and ast.unparse(node.value).endswith((".needs_input_grad", ".saved_tensors"))
    ]
    unnamed = [
        node.lineno
        for function in ast.walk(tree)
        if isinstance(function, ast.FunctionDef) and function.name == "backward"
        for node in ast.walk(function)
        if isinstance(node, ast.Return) and isinstance(node.value, ast.Tuple)
        if not all(isinstance(part, ast.Starred) for part in node.value.elts)
    ]
    assert not numbered + unnamed


BESIDE_OBJECTIVES = [p for p in FILES if module_name(p).split(".")[0] != "objectives"]


@pytest.mark.parametrize("path", BESIDE_OBJECTIVES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_an_objective_answers_for_itself(path: Path) -> None:
    """Nobody compares its name or settings, or asks for its class: `reads`, `unit` and what the
    protocols promise say it all."""
    kinds = (*OBJECTIVES.values(), *ONLINE.values(), Objective, OnlineObjective)
    named = {kind.__name__ for kind in kinds}
    imported = (name.split(".") for name in imported_names(path) if name.startswith("objectives."))
    classes = named & {parts[-1] for parts in imported}
    found = []
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Compare):
            parts = [node.left, *node.comparators]
            of_one = any("objective" in ast.unparse(part) for part in parts)
            literal = any(isinstance(p, ast.Constant) and isinstance(p.value, str) for p in parts)
            by_class = any(isinstance(p, ast.Name) and p.id in classes for p in parts)
            of_one = of_one or any(ast.unparse(part).endswith("reads.values") for part in parts)
            asks = of_one and (literal or by_class)
        else:
            asks = (
                isinstance(node, ast.Call)
                and ast.unparse(node.func) == "isinstance"
                and not classes.isdisjoint(ast.unparse(node.args[1]).strip("()").split(" | "))
            )
        if asks:
            found.append(f"{node.lineno}: {ast.unparse(node)}")
    assert not found


def run_python(code: str) -> str:
    return subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    ).stdout.strip()


def test_import_is_cheap() -> None:
    """In the processor's time, of which other programs take none."""
    seconds, heavy = run_python(
        "import sys, time; began = time.process_time(); import lora_engine;"
        "print(time.process_time() - began); print([m for m in "
        "('torch', 'transformers', 'peft', 'datasets', 'pydantic') if m in sys.modules])"
    ).splitlines()
    assert heavy == "[]"
    assert float(seconds) < 0.15


def test_public_names_exist() -> None:
    for name in lora_engine.__all__:
        assert getattr(lora_engine, name) is not None
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = lora_engine.nothing


@pytest.mark.parametrize("name", [name for name in ops.__all__ if not name.isupper()])
def test_a_public_operation_is_documented(name: str) -> None:
    """As help() shows it, overloads too; what Python makes of a record's fields is no text."""
    told = inspect.getdoc(getattr(ops, name))
    assert told and not told.startswith(f"{name}(")
    assert told != inspect.getdoc(object)


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_one_openmp_runtime() -> None:
    """Two runtimes on few cores spin against each other."""
    mapped = run_python(
        "from lora_engine import backends; assert backends.native().isa();"
        "print('\\n'.join({l.split()[-1] for l in open('/proc/self/maps') if 'omp' in l}))"
    )
    assert len(mapped.splitlines()) == 1, mapped


TESTS = sorted((PACKAGE.parent / "tests").rglob("test_*.py"))


@pytest.mark.parametrize("path", TESTS, ids=lambda p: p.stem)
def test_a_test_file_can_be_run_alone(path: Path) -> None:
    """Helpers of tests in several folders stand in tests/support: pytest finds no other folder."""
    elsewhere = {p.stem for p in TESTS if p.parent != path.parent}
    imported = {
        name
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Import | ast.ImportFrom)
        for name in [getattr(node, "module", None), *(alias.name for alias in node.names)]
    }
    assert not imported & elsewhere
