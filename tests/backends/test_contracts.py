"""Every module that launches an operation's kernels keeps its contract."""

import importlib.util
import inspect
import re
import typing
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

import lora_engine
from lora_engine import backends
from lora_engine.backends import contracts, launchers, lora_contracts

KERNELS = {**backends.OPERATIONS, **backends.PASSES}
# Operations with kernels of their own; a linear head's are those of cross_entropy.
WITH_LAUNCHERS = [name for name in KERNELS if name != "linear_cross_entropy"]
IMPLEMENTED = [(name, impl) for name in WITH_LAUNCHERS for impl in KERNELS[name]]


def contract_of(operation: str) -> Any:
    return typing.get_type_hints(getattr(launchers, operation))["return"]


def module_of(operation: str, impl: str) -> Any:
    if impl == "triton" and importlib.util.find_spec("triton") is None:
        pytest.skip("triton is not installed")
    return getattr(launchers, operation)(impl)


def methods(protocol: Any) -> dict[str, inspect.Signature]:
    found = {}
    for name, function in vars(protocol).items():
        if inspect.isfunction(function) and not name.startswith("_"):
            signature = inspect.signature(function, eval_str=True)
            found[name] = signature.replace(parameters=[*signature.parameters.values()][1:])
    return found


@pytest.mark.parametrize(("operation", "impl"), IMPLEMENTED)
def test_a_module_has_the_functions_of_its_contract(operation: str, impl: str) -> None:
    module = module_of(operation, impl)
    wanted = methods(contract_of(operation))
    assert wanted
    for name, signature in wanted.items():
        assert inspect.signature(getattr(module, name), eval_str=True) == signature, name


@pytest.mark.parametrize("plan", ["hopper", "cudnn"])
def test_other_attentions_keep_the_contract_of_our_kernels(plan: str) -> None:
    pytest.importorskip("triton")
    module = launchers.attention_by_plan(plan)
    for name, signature in methods(contracts.Attention).items():
        assert inspect.signature(getattr(module, name), eval_str=True) == signature, name


@pytest.mark.parametrize(("operation", "impl"), IMPLEMENTED)
def test_what_launches_comes_from_the_package_that_was_asked_for(operation: str, impl: str) -> None:
    module = module_of(operation, impl)
    assert isinstance(module, ModuleType)
    assert module.__name__ == f"lora_engine.backends.{impl}.{operation}"


def test_every_operation_has_a_contract_and_every_contract_an_operation() -> None:
    found = {name for name, value in vars(launchers).items() if hasattr(value, "cache_info")}
    assert found == {*WITH_LAUNCHERS, "attention_by_plan"}
    protocols = {
        value
        for module in (contracts, lora_contracts)
        for value in vars(module).values()
        if inspect.isclass(value) and typing.Protocol in value.__bases__
    }
    assert {contract_of(name) for name in WITH_LAUNCHERS} == protocols


@pytest.mark.parametrize("operation", WITH_LAUNCHERS)
def test_other_implementations_are_refused(operation: str) -> None:
    for impl in {*backends.IMPLEMENTATIONS, "metal"} - {*KERNELS[operation]}:
        with pytest.raises(ValueError, match=f"{operation}: there are no {impl} kernels"):
            getattr(launchers, operation)(impl)


def test_every_operation_has_a_wrong_call_that_mypy_finds() -> None:
    text = (Path(__file__).parent / "followed_calls.py").read_text()
    called = set(re.findall(r"launchers\.(\w+)\(", text))
    assert called == set(WITH_LAUNCHERS)


# They import what a user names: functions of rewards, and packages of tracking services.
NAMED_BY_USERS = ("training/online/named.py", "training/trackers.py")


def test_no_kernels_are_anything() -> None:
    """Nothing that is called kernels is of a type that allows every call, or found by a string.

    But where it only says whether an input needs a gradient, which "= None" marks.
    """
    package = Path(lora_engine.__file__).parent
    for path in sorted(package.rglob("*.py")):
        name, text = str(path.relative_to(package)), path.read_text()
        assert not re.search(r"kernels(\(\))?(: | -> )Any(?! = None)", text), name
        on_the_way = name.startswith(("ops/", "models/", "training/", "data/"))
        if on_the_way and name not in NAMED_BY_USERS:
            assert "import_module" not in text, name
