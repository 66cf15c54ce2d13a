"""What this machine is said to run, and when that is told."""

from types import ModuleType

import pytest
import torch

from lora_engine import backends
from lora_engine.backends import plans, selection
from lora_engine.backends.choice import Choice
from lora_engine.backends.extension import Extension
from lora_engine.errors import UnavailableError, UserError

CPU = torch.device("cpu")


def test_a_launch_s_parameters_are_those_of_its_line() -> None:
    found = selection.launch_parameters("rms_norm_bwd", 90, torch.bfloat16, 3000)
    assert found["enable_fp_fusion"] is True and found["BLOCK_M"] == 1


def test_this_machine_is_asked() -> None:
    found = backends.explain("rms_norm")
    assert found.impl == "cpu" and backends.native().isa() in found.reason
    assert backends.explain("rms_norm", "cpu", torch.float16).impl == "reference"
    if not torch.cuda.is_available():
        assert backends.explain("rms_norm", "cuda").reason == "torch finds no CUDA device"


def test_the_reference_is_never_silent() -> None:
    selection._warn_once.cache_clear()
    with pytest.warns(UserWarning, match="rope runs as the PyTorch reference: .*float16"):
        assert backends.select("rope", CPU, torch.float16) == "reference"


def test_emulated_kernels_count_as_soon_as_they_are_there(monkeypatch) -> None:
    with pytest.raises(UnavailableError, match="impl='cuda' is not available"):
        backends.select("adamw", CPU, torch.float32, "cuda")
    monkeypatch.setattr(backends.extension, "cuda_emulation", object())
    assert backends.select("adamw", CPU, torch.float32, "cuda") == "cuda"
    monkeypatch.undo()
    with pytest.raises(UnavailableError, match="impl='cuda' is not available"):
        backends.select("adamw", CPU, torch.float32, "cuda")


def test_answers_follow_the_instruction_set(monkeypatch: pytest.MonkeyPatch) -> None:
    """`select_isa` changes it in a process that has asked before."""
    module, isa = ModuleType("with a matrix unit"), ["unit"]
    vars(module).update(isa=lambda: isa[0], cuda_architectures=lambda: ())
    monkeypatch.setattr(backends.extension, "loaded", lambda: Extension(module, None))
    monkeypatch.setitem(plans.MATRIX_UNITS, "unit", (torch.bfloat16,))

    def answers() -> tuple[bool, bool]:
        most = plans.UNIT_FEW_ROWS
        few = backends.few_rows_impl(most, CPU, torch.bfloat16)
        return selection.multiplies(CPU, torch.bfloat16), few is not None

    assert answers() == (True, True)
    isa[0] = "plain"
    assert answers() == (False, False)
    isa[0] = "unit"
    assert answers() == (True, True)


def test_a_dtype_by_its_name_is_refused() -> None:
    """It is none of the kernels' dtypes: the answer would be that they do not take it."""
    with pytest.raises(TypeError, match="dtype is 'float32', expected"):
        backends.explain("glu", "cpu", "float32")  # type: ignore[arg-type]


def test_a_gpu_has_to_be_the_current_one(monkeypatch: pytest.MonkeyPatch) -> None:
    found = Choice("glu", "triton", "a kernel")
    monkeypatch.setattr(selection, "_choose_here", lambda *_: found)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 1)
    for device in ("cuda:1", "cuda", "cpu"):
        assert backends.select("glu", torch.device(device), torch.float32) == "triton"
    message = "glu: the tensors are on cuda:0, which .*: call torch.cuda.set_device.0."
    with pytest.raises(UserError, match=message):
        backends.select("glu", torch.device("cuda:0"), torch.float32)
