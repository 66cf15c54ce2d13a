"""Whoever follows a batch from file to loss meets types and names: no `Any`, no lookup by string.

The files on the way are those in which a function runs while a step is made from a file of records.
"""

import ast
import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType

import pytest

import lora_engine
from lora_engine.data.dataset import prepare
from lora_engine.evaluation.heldout import evaluate
from lora_engine.models.attach.accelerate import accelerate
from lora_engine.objectives.sft import SFT
from lora_engine.testing import byte_tokenizer, tiny_llama, with_lora
from lora_engine.training.batches import BatchSource
from lora_engine.training.config import TrainConfig
from lora_engine.training.optimizer.adamw import FlatAdamW
from lora_engine.training.optimizer.flat import FlatParameters
from lora_engine.training.state import Position
from lora_engine.training.step import TrainStep

PACKAGE = Path(lora_engine.__file__).parent

# Rooms of which other models and calls run other files.
ROOMS = ("objectives", "ops", "backends", "backends/cpu", "models/families")
# Files of the way that this step, of SFT on an accelerated model, passes by.
BESIDE = ("models/attach/embedding.py", "training/callbacks.py", "training/loop.py")

# A file that compares what stands under names with what stood there, and hands none of it on.
COMPARES_NAMES = "models/peft/watch.py"

# All else that has an Any, a room or a file, and what it meets there that has no type of ours.
UNTYPED = {
    "__init__.py": "names that are imported when they are asked for",
    "app": "values of YAML files and command lines, which a schema checks, and JSON for people",
    "config_schema.py": "annotations of models, and values that are no configuration's yet",
    "evaluation/harness.py": "tokenizers of any class, and what tasks of others say",
    "export": "models and tokenizers of any class, and what other programs write",
    "generation/engine.py": "states of a decoder's own kind, which go back to it unread",
    "models/load": "configurations and checkpoints as files have them, models of any class",
    "report": "the JSON of a run's files, which may be another version's",
    "testing.py": "models and tokenizers that are made for a test",
    "training/online/vllm.py": "settings of PEFT's and transformers' own classes",
    "training/online/vllm_server.py": "what another program answers, which is checked",
    "training/trackers.py": "packages that may not be installed",
}

RECORDS = [
    {
        "messages": [
            {"role": "user", "content": "spells <end>"},
            {"role": "assistant", "content": "an answer"},
        ]
    },
    {"prompt": "a prompt", "completion": "and what follows"},
    {"text": "text"},
]


def files_running(action: Callable[[], object]) -> set[Path]:
    """The package's files of which a function is called by `action`."""
    called: set[str] = set()

    def note(frame: FrameType, event: str, argument: object) -> None:
        if event == "call":
            called.add(frame.f_code.co_filename)

    before = sys.getprofile()
    sys.setprofile(note)
    try:
        action()
    finally:
        sys.setprofile(before)
    return {path for path in map(Path, called) if PACKAGE in path.parents}


@pytest.fixture(scope="module")
def passed(tmp_path_factory: pytest.TempPathFactory) -> set[Path]:
    """The files that a batch passes through, from the file it stands in to its loss."""
    folder = tmp_path_factory.mktemp("run")
    file = folder / "data.jsonl"
    file.write_text("\n".join(map(json.dumps, RECORDS)))
    tokenizer = byte_tokenizer()
    model = with_lora(tiny_llama(vocab_size=len(tokenizer)), lora_dropout=0.5)
    accelerate(model, strict=True)
    flat = FlatParameters(model.named_parameters(), lambda name: 1.0)
    config = TrainConfig(output_dir=folder / "out", max_steps=1)
    step = TrainStep(model, SFT(), FlatAdamW(flat, config))

    def file_to_loss() -> None:
        source = BatchSource(prepare(file, tokenizer), 128)
        batches, _ = source.take(Position(), 1)
        assert step(1, batches, 1e-3, lambda: None).loss > 0
        assert evaluate(model, batches, SFT()).loss > 0

    return files_running(file_to_loss)


def files_of(rooms: tuple[str, ...]) -> set[Path]:
    return {path for room in rooms for path in (PACKAGE / room).glob("**/*.py")}


def is_in(name: str, place: str) -> bool:
    """Whether the file is `place`, or in that room."""
    return name == place or name.startswith(f"{place}/")


def constants(tree: ast.Module) -> set[str]:
    """The names that the module gives to strings."""
    return {
        target.id
        for node in tree.body
        if isinstance(node, ast.Assign) and isinstance(node.value, ast.Constant)
        for target in node.targets
        if isinstance(target, ast.Name)
    }


def dead_ends(source: str) -> Iterator[str]:
    """Where a reader of the source, and a type checker, cannot go on."""
    tree = ast.parse(source)
    known = constants(tree)
    around = {inner: node for node in ast.walk(tree) for inner in ast.iter_child_nodes(node)}

    def is_spelled_out(name: ast.expr) -> bool:
        return isinstance(name, ast.Constant) or (isinstance(name, ast.Name) and name.id in known)

    def asks_for_one_name(names: ast.Call) -> bool:
        """Whether of all names, as `vars` gives them, one is read that is spelled out."""
        use = around[names]
        if isinstance(use, ast.Subscript):
            return is_spelled_out(use.slice)
        if isinstance(use, ast.Compare):
            return is_spelled_out(use.left)
        call = around[use]
        return (
            isinstance(use, ast.Attribute)
            and use.attr == "get"
            and isinstance(call, ast.Call)
            and is_spelled_out(call.args[0])
        )

    for node in ast.walk(tree):
        if isinstance(node, ast.Name | ast.Attribute) and ast.unparse(node) in (
            "Any",
            "typing.Any",
        ):
            yield f"line {node.lineno}: Any"
        if isinstance(node, ast.Attribute) and node.attr == "__dict__":
            yield f"line {node.lineno}: __dict__"
        if not isinstance(node, ast.Call):
            continue
        called = ast.unparse(node.func)
        if called in ("getattr", "setattr", "hasattr") and not is_spelled_out(node.args[1]):
            yield f"line {node.lineno}: an attribute by a name that is computed"
        if called in ("vars", "globals", "locals") and not asks_for_one_name(node):
            yield f"line {node.lineno}: {called}"
        if (
            isinstance(node.func, ast.Subscript)
            and not is_a_type(ast.unparse(node.func.value))
            and not is_spelled_out(node.func.slice)
        ):
            yield f"line {node.lineno}: what is called is looked up"
    for node in ast.walk(tree):
        if isinstance(node, ast.Subscript):
            table, key = node.value, node.slice
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.args:
            if node.func.attr != "get":
                continue
            table, key = node.func.value, node.args[0]
        else:
            continue
        if ast.unparse(table) in tables(tree) and not is_spelled_out(key):
            yield f"line {node.lineno}: a table of what is defined elsewhere"


def is_a_type(name: str) -> bool:
    """Whether `name[T]` is a generic type, by how names are written: Joined, _OfGroup, list."""
    last = name.split(".")[-1].lstrip("_")
    return last in ("dict", "list", "set") or (last[:1].isupper() and not last.isupper())


def tables(tree: ast.Module) -> set[str]:
    """The module's dictionaries of functions, classes and objects, none of them written there."""
    found = set()
    for node in tree.body:
        if isinstance(node, ast.Assign | ast.AnnAssign):
            target = node.targets[0] if isinstance(node, ast.Assign) else node.target
            value = node.value
            named = isinstance(value, ast.Dict) and any(
                isinstance(each, ast.Name | ast.Attribute | ast.Lambda)
                and not ast.unparse(each).startswith("torch.")  # dtypes
                for each in value.values
            )
            if named or isinstance(value, ast.DictComp):
                found.add(ast.unparse(target))
    return found


def test_a_batch_passes_through_typed_code_without_lookups_by_string(passed: set[Path]) -> None:
    way = passed | files_of(ROOMS) | {PACKAGE / name for name in BESIDE}
    found = {
        str(path.relative_to(PACKAGE)): list(dead_ends(path.read_text())) for path in sorted(way)
    }
    assert len(found.pop(COMPARES_NAMES)) == 1
    assert {name: ends for name, ends in found.items() if ends} == {}


def test_what_stands_beside_the_way_is_typed_too_or_meets_what_has_no_type() -> None:
    untyped = {
        str(path.relative_to(PACKAGE))
        for path in PACKAGE.glob("**/*.py")
        if any(end.endswith(": Any") for end in dead_ends(path.read_text()))
    }
    known = {place: {name for name in untyped if is_in(name, place)} for place in UNTYPED}
    assert untyped - set().union(*known.values()) == set()
    assert [place for place, names in known.items() if not names] == []


def test_the_whole_way_is_seen(passed: set[Path]) -> None:
    names = {str(path.relative_to(PACKAGE)) for path in passed}
    assert names >= {
        "data/readers.py",
        "data/records.py",
        "data/template.py",
        "data/encode.py",
        "data/batch.py",
        "training/batches.py",
        "training/step.py",
        "evaluation/batch_loss.py",
        "objectives/sft.py",
        "models/attach/packed.py",
        "models/attach/decoder_layer.py",
        "models/peft/lora_state.py",
        "ops/layer/attention_block.py",
        "ops/lora/product.py",
        "ops/head/linear_cross_entropy.py",
        "backends/cpu/lora_linear.py",
    }


@pytest.mark.parametrize(
    "source",
    [
        "def f(x: Any) -> None: ...",
        "x: dict[str, typing.Any] = {}",
        "getattr(kernels, name)()",
        "setattr(module, f'{name}_fwd', 1)",
        "launchers[name](x)",
        "_READERS[kind](path)",
        "{'a': f}[name]()",
        "FORMATS = {f.name: f for f in ALL}\nformat = FORMATS[name]",
        "READERS = {'a': read_a}\nreader = READERS.get(name)",
        "vars(module)[name]",
        "vars(module).get(name)",
        "own = vars(module)",
        "module.__dict__[name]",
    ],
)
def test_a_dead_end_is_seen(source: str) -> None:
    assert list(dead_ends(source))


def test_names_that_are_spelled_out_are_none() -> None:
    assert not list(dead_ends("_KEY = 'key'\ngetattr(x, _KEY)\nhasattr(x, 'p')\nforwards[0](x)"))
    assert not list(dead_ends("_CODES = {'int8': 0}\n_CODES[kind]\n_READERS['.json'](path)"))
    assert not list(
        dead_ends("vars(x).get('p')\nvars(x)['p']\n'p' in vars(x)\nOfGroup[bool]()\nlist[int]()")
    )
