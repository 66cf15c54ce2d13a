"""What runs is chosen in backends: nothing else asks for devices, capabilities or sizes for it."""

import ast
import inspect
from pathlib import Path

import pytest
import torch
from torch import Tensor

import lora_engine
from lora_engine import backends

PACKAGE = Path(lora_engine.__file__).parent
# Attributes that tell a device, or what a GPU can do.
ASKING = {
    "is_cpu",
    "is_cuda",
    "is_available",
    "device_count",
    "get_device_capability",
    "get_device_name",
    "get_device_properties",
    "get_cpu_capability",
    "mem_get_info",
}
DEVICES = ("cpu", "cuda", "mps", "xpu")
# Where backends keeps its numbers and facts. The rest of it answers requests.
PRIVATE = ("lora_engine.backends.hardware", "lora_engine.backends.tables")
SIZES = {
    "FEW_ROWS",
    "UNIT_FEW_ROWS",
    "CHUNK_BYTES",
    "CHUNK_ROW_STEP",
    "DECODED_ROWS",
    "TEXTS_AT_ONCE",
    "PROMPT_BY_ROWS",
    "PROMPT_TOKENS",
    "UPDATED_VALUES",
    "OLDEST_CAPABILITY",
}


def facts() -> set[str]:
    """What backends tells of a device by yes or no: whoever asks may choose by it."""
    found = set()
    for name in backends.__all__:
        function = getattr(backends, name)
        if not inspect.isfunction(function):
            continue
        signature = inspect.signature(function)
        asked = [parameter.annotation for parameter in signature.parameters.values()]
        if signature.return_annotation is bool and asked in ([torch.device], [Tensor]):
            found.add(name)
    return found


FACTS = facts()
# Who asks for one, and why that is no choice of what runs. Such a choice is a plan of backends
# (`factors_plan`), or a function of backends that does it (`scratch_matrix`).
ANSWERED = {
    # Where bytes are decides whether they are copied, and what a run's memory is.
    "has_own_memory": {
        "ops/stored_weight.py": "a thread reads a file into the host's memory, not a GPU's",
        "distributed/world.py": "the processes of a machine share the memory of its CPU",
        "memory/plan.py": "a budget is less what is no tensor's in that memory",
        "memory/timeline.py": "predicts what a run takes: nothing runs",
        "app/plan.py": "tells which machine's speed a plan is of",
    },
    "reads_beside_operands": {
        "ops/augmented.py": "what a product may read has to be finite",
    },
    # A value that the host cannot see without waiting is not checked.
    "reads_at_once": {
        "ops/attention.py": "checks sequences",
        "ops/attention_decode.py": "checks spans",
        "ops/cross_entropy.py": "checks targets",
        "ops/rope.py": "checks positions",
    },
    "keeps_scalars": {
        "ops/head/head_gradients.py": "a factor is not to be rounded before it is multiplied",
    },
}
# Files that tell people what the machine has, and choose nothing by it.
REPORTS = {"machine.py", "app/doctor.py", "report/page.py"}

FILES = [
    path
    for path in sorted(PACKAGE.rglob("*.py"))
    if path.relative_to(PACKAGE).parts[0] != "backends"
    and str(path.relative_to(PACKAGE)) not in REPORTS
]


def questions(source: str) -> list[str]:
    """The lines that ask for a device, a capability or a size that choices are made by."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Attribute | ast.Name):
            name = node.attr if isinstance(node, ast.Attribute) else node.id
            asks = name in ASKING | SIZES
        elif isinstance(node, ast.Compare):
            asks = _compares_a_device(node)
        elif isinstance(node, ast.Subscript):
            asks = _is_a_device_type(node.slice)
        elif isinstance(node, ast.Call):
            looked_up = isinstance(node.func, ast.Attribute) and node.func.attr == "get"
            asks = looked_up and bool(node.args) and _is_a_device_type(node.args[0])
        elif isinstance(node, ast.IfExp):
            asks = _is_of_facts(node.test) and _is_number(node.body) and _is_number(node.orelse)
        elif isinstance(node, ast.ImportFrom) and node.module:
            names = {f"{node.module}.{alias.name}" for alias in node.names}
            asks = any(name.startswith(PRIVATE) or name.split(".")[-1] in SIZES for name in names)
        else:
            asks = False
        if asks:
            found.append(f"{node.lineno}: {ast.unparse(node)}")
    return found


def _is_a_device_type(node: ast.expr) -> bool:
    return ast.unparse(node).endswith("device.type")


def _is_of_facts(test: ast.expr) -> bool:
    names = (n.attr if isinstance(n, ast.Attribute) else n for n in ast.walk(test))
    return any((n.id if isinstance(n, ast.Name) else n) in FACTS for n in names)


def _is_number(node: ast.expr) -> bool:
    """A number that is written there, or a constant's name, or what is reckoned of such."""
    if isinstance(node, ast.BinOp):
        return _is_number(node.left) and _is_number(node.right)
    if isinstance(node, ast.Constant):
        return type(node.value) in (int, float)
    return isinstance(node, ast.Name) and node.id.isupper()


def _compares_a_device(comparison: ast.Compare) -> bool:
    parts = list(ast.walk(comparison))
    values = [part.value for part in parts if isinstance(part, ast.Constant)]
    if any(isinstance(v, str) and v.partition(":")[0] in DEVICES for v in values):
        return True
    return any(isinstance(p, ast.Attribute) and p.attr == "capability" for p in parts)


def of_facts(source: str) -> set[str]:
    """The facts of FACTS that a file names."""
    nodes = list(ast.walk(ast.parse(source)))
    names = {node.attr for node in nodes if isinstance(node, ast.Attribute)}
    return FACTS & (names | {node.id for node in nodes if isinstance(node, ast.Name)})


def of_dtypes(source: str) -> list[str]:
    """The lines that ask for one of torch's floating dtypes, but to refuse another."""
    tree = ast.parse(source)
    checks = [n for n in ast.walk(tree) if isinstance(n, ast.Call) and _refuses(n)]
    refusals = {node for check in checks for node in ast.walk(check)}
    return [
        f"{node.lineno}: {ast.unparse(node)}"
        for node in ast.walk(tree)
        if isinstance(node, ast.Compare) and node not in refusals
        if any(map(_is_floating, ast.walk(node)))
    ]


def _refuses(call: ast.Call) -> bool:
    return ast.unparse(call.func) == "check"


def _is_floating(node: ast.AST) -> bool:
    return isinstance(node, ast.Attribute) and node.attr in ("float16", "bfloat16", "float64")


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_nothing_else_asks(path: Path) -> None:
    assert not questions(path.read_text())


def test_who_asks_for_a_fact_says_why() -> None:
    """None asks unsaid, and none is said to ask that does not."""
    asking: dict[str, set[str]] = {}
    for path in FILES:
        for fact in of_facts(path.read_text()):
            asking.setdefault(fact, set()).add(str(path.relative_to(PACKAGE)))
    assert asking == {fact: set(files) for fact, files in ANSWERED.items()}


OPERATIONS = [path for path in FILES if path.relative_to(PACKAGE).parts[0] == "ops"]


@pytest.mark.parametrize("path", OPERATIONS, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_operations_choose_by_no_dtype(path: Path) -> None:
    assert not of_dtypes(path.read_text())


@pytest.mark.parametrize(
    "line",
    [
        "if x.dtype == torch.float16: pass",
        "scaled = None if base.dtype != torch.float64 else 1",
        "exact = dtype in (torch.float16, torch.bfloat16)",
    ],
)
def test_questions_for_dtypes_are_found(line: str) -> None:
    assert of_dtypes(line)
    assert not of_dtypes('check(x.dtype in (torch.float64, torch.bfloat16), "expected those")')
    assert not of_dtypes("x.dtype == weight.dtype")


def test_facts_are_found() -> None:
    assert {"has_own_memory", "reads_beside_operands", "reads_at_once", "keeps_scalars"} <= FACTS
    assert of_facts("if backends.has_own_memory(x.device): pass") == {"has_own_memory"}


@pytest.mark.parametrize(
    "line",
    [
        'x.device.type == "cpu"',
        'x.device == torch.device("cuda:0")',
        'device.type not in ("cpu", "cuda")',
        "x.is_cuda",
        "torch.cuda.is_available()",
        "gpu.capability >= 90",
        "torch.cuda.get_device_capability()",
        "from lora_engine.backends.plans import FEW_ROWS",
        "from lora_engine.backends import hardware",
        "rows <= plans.FEW_ROWS",
        "MAX_BATCH[self.device.type]",
        "TABLE.get(device.type, 32)",
        "LARGE if backends.has_own_memory(flat.device) else SMALL",
        "2**24 if has_own_memory(device) else 2**18",
    ],
)
def test_questions_are_found(line: str) -> None:
    assert questions(line)


@pytest.mark.parametrize(
    "line",
    [
        'backends.select("rope", x.device, x.dtype) == "reference"',
        "a.device == b.device",
        "torch.is_autocast_enabled(x.device.type)",
        'p.device.type == "meta"',
        "TYPES[self.type]",
        "gpu_of(memory) if backends.has_own_memory(device) else measured_cpu(dtype)",
    ],
)
def test_others_are_let_through(line: str) -> None:
    assert not questions(line)
