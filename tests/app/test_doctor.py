"""The doctor tells what is here, what is missing and how to get it."""

import io
import json
import subprocess
from types import SimpleNamespace

import pytest
import torch
from packaging.requirements import Requirement
from rich.console import Console

from lora_engine import backends, machine
from lora_engine.app import doctor


@pytest.fixture(scope="module")
def sections():
    return doctor.examine()


def facts(sections, title):
    [section] = [section for section in sections if section.title == title]
    return {fact.name: fact for fact in section.facts}


def test_every_fact_is_shown(sections):
    console = Console(width=200, record=True, file=io.StringIO())
    console.print(doctor.render(sections))
    text = console.export_text()
    for section in sections:
        assert section.title in text
        for fact in section.facts:
            assert fact.name in text
            assert fact.value.split()[0] in text


def test_report_is_json(sections):
    report = doctor.as_json(sections)
    assert json.loads(json.dumps(report)) == report
    assert [fact["name"] for fact in report["Processor"]][:2] == ["model", "memory"]


def test_torch_and_processor(sections):
    assert torch.__version__ in facts(sections, "Python and torch")["torch"].value
    processor = facts(sections, "Processor")
    for name in ("avx2", "avx512f", "avx512_bf16", "amx_bf16"):
        if name in processor:
            assert (processor[name].status == "ok") == (name in backends.cpu_features())


def test_kernels_say_what_explain_says(sections):
    kernels = facts(sections, "Kernels on this machine")
    for operation in backends.OPERATIONS:
        choice = backends.explain(operation, "cpu", torch.bfloat16)
        fact = kernels.get(operation) or kernels[f"{operation} (cpu)"]
        assert (fact.status == "ok") == (choice.impl != "reference")


def test_missing_extension_is_a_problem_with_a_way_out(monkeypatch):
    missing = backends.Extension(None, "No module named 'lora_engine._C'")
    monkeypatch.setattr(backends.extension, "loaded", lambda: missing)
    [fact] = doctor._extension_facts()
    assert fact.status == "problem"
    assert fact.value == "No module named 'lora_engine._C'"
    assert "pip install -e ." in fact.hint
    assert doctor.has_problem([doctor.Section("C++ extension", (fact,))])
    kernels = doctor._kernel_facts()
    assert {kernel.value for kernel in kernels} == {"PyTorch reference"}
    assert all("No module named" in kernel.hint for kernel in kernels)


def test_extension_names_what_is_built_and_used(monkeypatch):
    module = SimpleNamespace(
        __file__="/x/_C.so",
        isa=lambda: "avx2",
        built_isas=lambda: [("avx512", False), ("avx2", True)],
        cuda_architectures=list,
    )
    monkeypatch.setattr(backends.extension, "loaded", lambda: backends.Extension(module, None))
    found = {fact.name: fact.value for fact in doctor._extension_facts()}
    assert found["built for"] == "avx512 (not on this processor), avx2"
    assert found["in use"] == "avx2"
    assert found["CUDA kernels"] == "not built"


@pytest.mark.parametrize(
    ("capability", "status", "value"),
    [
        (None, "ok", "built for sm_80, sm_90a"),
        (89, "ok", "built for sm_80, sm_90a"),
        (90, "ok", "built for sm_80, sm_90a"),
        (120, "absent", "built for sm_80, sm_90a, not 12.0"),
    ],
)
def test_cuda_kernels_and_the_gpu_they_meet(monkeypatch, capability, status, value):
    gpus = [machine.Gpu("GPU", 1, capability)] if capability else []
    monkeypatch.setattr(machine, "gpus", lambda: gpus)
    monkeypatch.setattr(backends, "cuda_architectures", lambda: ("80", "90a"))
    fact = doctor._cuda_kernels_fact()
    assert (fact.status, fact.value) == (status, value)


@pytest.mark.parametrize(
    ("text", "extra", "status", "hint"),
    [
        ("torch>=1", "", "ok", ""),
        ("torch>=999", "", "problem", "needs >=999: pip install lora-engine"),
        ("no-such-package", "train", "problem", "pip install 'lora-engine[train]'"),
        ("no-such-package", "bench", "absent", "pip install 'lora-engine[bench]'"),
    ],
)
def test_requirement(text, extra, status, hint):
    fact = doctor._requirement_fact(Requirement(text), extra)
    assert (fact.status, fact.hint) == (status, hint)


@pytest.mark.parametrize(
    ("text", "extra", "belongs"),
    [
        ("numpy", "", True),
        ("numpy", "train", False),
        ("peft; extra == 'train'", "train", True),
        ("peft; extra == 'train'", "", False),
        ("peft; extra == 'train'", "test", False),
        ("colorama; platform_system == 'Plan9'", "", False),
    ],
)
def test_requirement_belongs_to_extra(text, extra, belongs):
    assert doctor._belongs(Requirement(text), extra) is belongs


def test_driver_without_cuda_in_torch_is_a_problem(monkeypatch):
    monkeypatch.setattr(machine, "gpus", list)
    monkeypatch.setattr(torch.version, "cuda", None)
    monkeypatch.setattr(
        doctor, "_output_lines", lambda program, *_: ["570.1"] if program == "nvidia-smi" else []
    )
    found = {fact.name: fact for fact in doctor._gpu_facts()}
    assert found["GPU"].status == "problem"
    assert "install a CUDA build" in found["GPU"].hint
    assert found["driver"].value == "570.1"


def test_gpus_are_listed(monkeypatch):
    gpu = machine.Gpu("NVIDIA H200", 141_000_000_000, 90)
    monkeypatch.setattr(machine, "gpus", lambda: [gpu])
    found = {fact.name: fact.value for fact in doctor._gpu_facts()}
    assert found["GPU 0"] == "NVIDIA H200, 141 GB, capability 9.0"
    operations = {fact.name for fact in doctor._kernel_facts()}
    assert {"rms_norm (cpu)", "rms_norm (cuda)"} <= operations


def test_a_program_that_hangs_or_fails_says_nothing(monkeypatch):
    assert doctor._output_lines("false") == []
    assert doctor._output_lines("no-such-program-here") == []

    def hangs(*args, **kwargs):
        raise subprocess.TimeoutExpired("nvidia-smi", 20)

    monkeypatch.setattr(subprocess, "run", hangs)
    assert doctor._output_lines("true") == []


def test_machine_facts_are_text():
    found = machine.machine_facts()
    assert list(found) == ["hardware", "software"]
    assert all(isinstance(value, str) for part in found.values() for value in part.values())
    assert found["software"]["torch"] == torch.__version__
    assert machine.memory_bytes() > 1e8
