"""Structs of arguments reach the compiled kernels by the names of their fields."""

from collections import namedtuple
from collections.abc import Callable
from inspect import signature
from typing import Any, get_type_hints

import pytest
import torch
from emulated_cuda import emulated_kernels

from lora_engine import backends
from lora_engine.backends.cpu import launch as cpu
from lora_engine.backends.cpu import structs
from lora_engine.backends.cpu.kernels import Kernels
from lora_engine.backends.cuda import launch as cuda

Stranger = namedtuple("Stranger", ["x"])
FLOAT32 = torch.float32


def names_of(protocol: Any) -> list[str]:
    return [name for name in vars(protocol) if name.islower() and not name.startswith("_")]


def struct_of(protocol: Any, kernel: str) -> Any:
    return get_type_hints(getattr(protocol, kernel))["args"]


def refusal(call: Callable[[Any], None], args: Any) -> str:
    with pytest.raises(TypeError) as caught:
        call(args)
    return str(caught.value)


def cpu_call(kernel: str) -> Callable[[Any], None]:
    function = getattr(backends.native(), kernel)
    if "dtype" not in signature(getattr(Kernels, kernel)).parameters:  # of one dtype
        return function
    return lambda args: function(cpu.dtype_code(FLOAT32), args)


@pytest.mark.parametrize("kernel", names_of(Kernels))
def test_cpu_structs_have_the_fields_of_the_extension(kernel: str) -> None:
    struct = struct_of(Kernels, kernel)
    expected = f"{struct.__name__}: expected the fields {struct._fields!r}, got ('x',)"
    assert refusal(cpu_call(kernel), Stranger(0)).startswith(expected)


@pytest.mark.parametrize("kernel", names_of(cuda.Launchers))
def test_cuda_structs_have_the_fields_of_the_extension(kernel: str) -> None:
    struct, function = struct_of(cuda.Launchers, kernel), getattr(emulated_kernels(), kernel)
    expected = f"cuda::{struct.__name__}: expected the fields {struct._fields!r}, got ('x',)"
    said = refusal(lambda args: function(args, 0), Stranger(0))
    assert said.startswith(expected)
    assert said.endswith("build that again: pip install -e .")


def test_every_kernel_of_the_extension_is_in_the_protocol() -> None:
    others = {"isa", "select_isa", "built_isas", "keep_freed_memory", "crowd_openmp"}
    others |= {"cuda", "cuda_architectures", "triton"}
    compiled = {name for name in vars(backends.native()) if name.islower() and name[0] != "_"}
    assert compiled - others == set(names_of(Kernels))


def test_an_order_that_differs_is_refused() -> None:
    swapped: Any = namedtuple("swapped", reversed(structs.GradNormArgs._fields))
    said = refusal(cpu_call("grad_norm"), swapped(0, 0, 0))
    assert "got ('size', 'norm', 'grads')" in said


@pytest.mark.parametrize("args", [(0, 0, 0), [0, 0, 0], None])
def test_values_without_names_are_refused(args: object) -> None:
    assert "got None" in refusal(cpu_call("grad_norm"), args)


@pytest.mark.parametrize("values", [(0, 0), (0, 0, 0, 0)])
def test_a_tuple_of_another_length_is_refused(values: tuple[int, ...]) -> None:
    args = tuple.__new__(structs.GradNormArgs, values)
    assert "GradNormArgs: too few or too many values" in refusal(cpu_call("grad_norm"), args)


@pytest.mark.parametrize(
    ("field", "value", "said"),
    [
        ("size", 1.5, "GradNormArgs.size: "),
        ("size", None, "GradNormArgs.size: "),
        ("size", 2**63, "GradNormArgs.size: "),
        ("grads", None, "GradNormArgs.grads: "),
        ("norm", -1, "GradNormArgs.norm: "),
    ],
)
def test_a_value_of_another_type_is_named(field: str, value: object, said: str) -> None:
    args = structs.GradNormArgs(0, 0, 0)._replace(**{field: value})
    assert refusal(cpu_call("grad_norm"), args).startswith(said)


def test_a_field_of_a_field_is_named() -> None:
    adamw = structs.AdamWArgs(*[0] * len(structs.AdamWArgs._fields))._replace(lr="fast")  # type: ignore
    args = structs.AdamW8bitArgs(adamw, 0, 0)
    assert "AdamW8bitArgs.adamw: " in (said := refusal(cpu_call("adamw_8bit"), args))
    assert "AdamWArgs.lr: " in said


def test_flags_are_bools() -> None:
    args: Any = structs.AttentionArgs(*[0] * len(structs.AttentionArgs._fields))
    said = refusal(cpu_call("attention_fwd"), args)
    assert said == "AttentionArgs.causal: expected True or False"
