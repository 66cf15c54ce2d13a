"""Loss and gradients of whole models, on every kind of device, beside PEFT's on the same one."""

import pytest
import torch
from whole_models import (
    ADAPTERS,
    MODELS,
    adapted,
    assert_trains_as_well,
    batch_of,
    exact,
    training_results,
)

import lora_engine
from lora_engine.models.attach.coverage import CoverageReport

DTYPES = [torch.float32, torch.bfloat16]


def check(
    name: str,
    adapters: str,
    dtype: torch.dtype,
    kind: str,
    device: torch.device,
    *,
    layers: int = 2,
) -> CoverageReport:
    model = adapted(name, adapters, dtype, layers=layers)
    oracle = training_results(exact(model), batch_of(kind, torch.device("cpu")))
    given = batch_of(kind, device)
    model = model.to(device)
    theirs = training_results(model, given)
    report = lora_engine.accelerate(model)
    ours = training_results(model, given)
    assert all(x.device == device for x in ours.values())
    assert_trains_as_well(ours, theirs, oracle, dtype)
    return report


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", MODELS)
def test_families(name: str, dtype: torch.dtype, device: torch.device) -> None:
    report = check(name, "lora", dtype, "right", device)
    assert not report.left, report
    assert any(entry.operation == "linear_cross_entropy" for entry in report.replaced)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("adapters", [*ADAPTERS, "two"])
def test_adapters(adapters: str, dtype: torch.dtype, device: torch.device) -> None:
    check("llama", adapters, dtype, "whole", device)


@pytest.mark.parametrize("kind", ["whole", "left", "packed"])
@pytest.mark.parametrize("name", ["llama", "qwen3"])
def test_batches(name: str, kind: str, device: torch.device) -> None:
    check(name, "lora", torch.bfloat16, kind, device)


@pytest.mark.parametrize(
    ("name", "adapters", "dtype", "kind"),
    [
        ("llama", "lora", torch.bfloat16, "right"),
        ("stablelm", "two", torch.bfloat16, "whole"),
    ],
    ids=str,
)
def test_what_runs_on_a_gpu(
    name: str, adapters: str, dtype: torch.dtype, kind: str, interpreted: torch.device
) -> None:
    report = check(name, adapters, dtype, kind, interpreted, layers=1)
    assert not report.left, report
    on_triton = {e.operation for e in report.replaced if "Triton" in e.detail}
    own = {"layer_norm"} if name == "stablelm" else {"rms_norm", "attention + rope"}
    assert on_triton >= {"glu (silu)", "lora_linear", "linear_cross_entropy", *own}
