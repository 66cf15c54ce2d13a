"""The layers import one way, `import lora_engine` is cheap, and one OpenMP runtime is loaded."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import lora_engine

PACKAGE = Path(lora_engine.__file__).parent

# The layers from the bottom up: a module imports from its own layer and from the lines before.
LAYERS: list[set[str]] = [
    {"errors", "openmp"},
    {"files", "config_schema"},
    {"config_yaml"},
    {"reference"},
    {"backends"},
    {"cpu", "cuda", "kernels"},
    {"ops"},
    {"models", "testing"},
    {"data"},
    {"training"},
    {"adapters"},
    {"evaluation", "config"},
    {"machine", "config_reference", "failures", "terminal"},
    {"doctor", "finetune"},
    {"progress"},
    {"commands"},
    {"cli"},
]


def layer_of(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imported_layers(path: Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        names = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module == "lora_engine":
            names = [f"lora_engine.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module:
            names = [node.module]
        found |= {n.split(".")[1] for n in names if n.startswith("lora_engine.")}
    return found - {"__version__"}


FILES = [p for p in sorted(PACKAGE.rglob("*.py")) if p != PACKAGE / "__init__.py"]


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_imports_go_one_way(path: Path) -> None:
    layer = layer_of(path)
    if layer == "configs":
        return
    level = next((i for i, names in enumerate(LAYERS) if layer in names), None)
    assert level is not None, f"{layer} has no place in LAYERS; give it one"
    allowed = set().union(*LAYERS[:level]) | {layer}
    assert imported_layers(path) <= allowed


def run_python(code: str) -> str:
    return subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    ).stdout.strip()


def test_import_is_cheap() -> None:
    heavy = run_python(
        "import sys, lora_engine; print([m for m in "
        "('torch', 'transformers', 'peft', 'datasets') if m in sys.modules])"
    )
    assert heavy == "[]"


def test_public_names_exist() -> None:
    for name in lora_engine.__all__:
        assert getattr(lora_engine, name) is not None
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = lora_engine.nothing


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_one_openmp_runtime() -> None:
    """Two runtimes on few cores spin against each other."""
    mapped = run_python(
        "from lora_engine import backends; assert backends.native().isa();"
        "print('\\n'.join({l.split()[-1] for l in open('/proc/self/maps') if 'omp' in l}))"
    )
    assert len(mapped.splitlines()) == 1, mapped
