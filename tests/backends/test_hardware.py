import subprocess
import sys

import pytest
import torch

from lora_engine.backends import hardware

CPU, META = torch.device("cpu"), torch.device("meta")


@pytest.mark.parametrize(
    ("architecture", "capability", "runs"),
    [
        ("80", 80, True),
        ("80", 89, True),
        ("86", 80, False),
        ("90a", 90, True),
        ("100", 103, True),
        ("120", 100, False),
        ("100a", 103, False),
    ],
)
def test_what_machine_code_runs_on(architecture, capability, runs) -> None:
    assert hardware.runs_on(architecture, capability) is runs


def test_a_capability_is_one_number(monkeypatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (12, 0))
    assert hardware.capability.__wrapped__(torch.device("cuda", 0)) == 120
    assert hardware.capability(CPU) is None
    shown = [hardware.capability_text(c) for c in (75, 90, 103, 120)]
    assert shown == ["7.5", "9.0", "10.3", "12.0"]


@pytest.mark.parametrize(("capability", "computes"), [(75, False), (80, True), (120, True)])
def test_gpus_that_compute_in_bfloat16(monkeypatch, capability, computes) -> None:
    monkeypatch.setattr(hardware, "capability", lambda device: capability)
    assert hardware.computes_bfloat16(torch.device("cuda")) is computes


def test_other_devices_and_bfloat16() -> None:
    assert hardware.computes_bfloat16(CPU) is None
    assert hardware.computes_bfloat16(META) is False


@pytest.mark.parametrize(("value", "interpreted"), [(None, False), ("0", False), ("1", True)])
def test_interpretation_is_known_before_triton_is_imported(value, interpreted) -> None:
    code = (
        "import os; os.environ.pop('TRITON_INTERPRET', None)\n"
        f"if {value!r}: os.environ['TRITON_INTERPRET'] = {value!r}\n"
        "from lora_engine.backends import hardware\n"
        "before = hardware.triton_interpreted(); import triton\n"
        "print(before, hardware.triton_interpreted())"
    )
    if not hardware.triton_installed():
        pytest.skip("triton is not installed")
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == [str(interpreted)] * 2
