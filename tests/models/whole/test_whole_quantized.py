"""QLoRA: whole models over weights in packed bits, on every kind of device."""

import copy
import warnings
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from torch import nn
from whole_models import (
    ADAPTERS,
    assert_trains_as_well,
    batch_of,
    exact,
    model_of,
    training_results,
)

import lora_engine
from lora_engine import ops
from lora_engine.models.attach.linear_group import LinearGroup
from lora_engine.models.quantized.linear import QuantizedLinear
from lora_engine.models.quantized.stored import decoded_dtype, stored_weight, why_not_stored
from lora_engine.testing import error, with_lora


def packed(
    device: torch.device,
    dtype: torch.dtype = torch.float32,
    *,
    name: str = "llama",
    layers: int = 2,
    adapters: str = "lora",
    format: str = "nf4",
    double_quant: bool = True,
    **more: Any,
) -> Any:
    model = model_of(name, dtype, layers=layers)
    lora_engine.quantize_model(model, format, double_quant=double_quant, device=device)
    return with_lora(model.to(device), **{**ADAPTERS[adapters], **more})


def groups_of(model: Any) -> list[LinearGroup]:
    found = []
    for module in model.modules():
        parts = vars(vars(module).get("forward", object)).values()
        found += [part for part in parts if isinstance(part, LinearGroup)]
    return found


def check(model: Any, dtype: torch.dtype, device: torch.device) -> None:
    oracle = training_results(exact(model), batch_of("right", torch.device("cpu")))
    given = batch_of("right", device)
    theirs = {name: x.clone() for name, x in training_results(model, given).items()}
    report = lora_engine.accelerate(model)
    ours = training_results(model, given)
    assert {entry.operation for entry in report.left} <= {"attention"}
    groups = groups_of(model)
    assert groups and all(isinstance(g.lora.base, ops.QuantizedBase) for g in groups if g.lora)
    assert_trains_as_well(ours, theirs, oracle, dtype)


@pytest.mark.parametrize("double_quant", [False, True], ids=["plain", "nested"])
@pytest.mark.parametrize("format", ["nf4", "fp4"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_training(
    dtype: torch.dtype, format: str, double_quant: bool, device: torch.device
) -> None:
    model = packed(device, dtype, format=format, double_quant=double_quant)
    check(model, dtype, device)


@pytest.mark.parametrize("name", ["llama_biases", "qwen3"])
@pytest.mark.parametrize("adapters", ["some_linears", "lora_bias"])
def test_other_families_and_adapters(name: str, adapters: str, device: torch.device) -> None:
    check(packed(device, name=name, adapters=adapters), torch.float32, device)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_packed_weights_train_as_their_decoded_ones(
    dropout: float, dtype: torch.dtype, device: torch.device
) -> None:
    """And so does a model whose layers run again in the backward pass."""
    model = packed(device, dtype, lora_dropout=dropout)
    dense, given = decoded(model), batch_of("right", device)
    results, counted = [], set()
    for each, checkpointing in ((model, False), (model, True), (dense, False)):
        counted.add(lora_engine.accelerate(each).weights)
        if checkpointing:
            each.enable_input_require_grads()
            each.gradient_checkpointing_enable({"use_reentrant": False})
        torch.manual_seed(7)
        results.append({n: x.clone() for n, x in training_results(each, given).items()})
    assert len(counted) == 1
    tolerance = 2e-5 if dtype == torch.float32 else 2e-2
    for name, expected in results[2].items():
        for ours in results[:2]:
            assert error(ours[name], expected) < tolerance, name


def decoded(model: Any) -> Any:
    """A copy with plain linears."""
    dense = copy.deepcopy(model)
    for parent in list(dense.modules()):
        for name, layer in parent.named_children():
            if isinstance(layer, QuantizedLinear):
                plain = nn.Linear(layer.in_features, layer.out_features, bias=False)
                plain.weight = nn.Parameter(layer.quantized.dequantize(), requires_grad=False)
                setattr(parent, name, plain)
    return dense


def test_restore_gives_back_the_packed_weights(device: torch.device) -> None:
    model, given = packed(device), batch_of("whole", device)
    before = {n: (p.data_ptr(), p.clone()) for n, p in model.named_parameters()}
    expected = {n: x.clone() for n, x in training_results(model, given).items()}
    lora_engine.accelerate(model)
    lora_engine.restore(model)
    for name, parameter in model.named_parameters():
        assert parameter.data_ptr() == before[name][0] and torch.equal(parameter, before[name][1])
    for name, x in training_results(model, given).items():
        assert torch.equal(x, expected[name]), name


@pytest.mark.parametrize("double_quant", [False, True])
def test_other_weights_loaded_into_an_accelerated_model_count(
    double_quant: bool, device: torch.device
) -> None:
    model, given = packed(device, double_quant=double_quant), batch_of("right", device)
    with torch.random.fork_rng():
        torch.manual_seed(5)
        other = packed(device, double_quant=double_quant)
        state = other.state_dict()
        for name, tensor in state.items():
            if name.endswith(".weight.absmax"):
                tensor.copy_(tensor.roll(1))
    expected = {n: x.clone() for n, x in training_results(other, given).items()}
    lora_engine.accelerate(model)
    model.load_state_dict(state)
    for name, x in training_results(model, given).items():
        assert error(x, expected[name]) < 2e-5, name


def test_adapters_of_a_file_are_loaded(tmp_path: Path, device: torch.device) -> None:
    model, given = packed(device), batch_of("right", device)
    expected = {n: x.clone() for n, x in training_results(model, given).items()}
    lora_engine.accelerate(model)
    model.save_pretrained(tmp_path)
    base = packed(device).unload()
    read = peft.PeftModel.from_pretrained(base, tmp_path, is_trainable=True)
    lora_engine.accelerate(read)
    for name, x in training_results(read, given).items():
        assert error(x, expected[name]) < 2e-5, name


@pytest.fixture(scope="module")
def bnb() -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return pytest.importorskip("bitsandbytes")


def loaded(bnb: Any, device: torch.device, dtype: torch.dtype, **options: Any) -> Any:
    """As transformers loads a model with `load_in_4bit`, with PEFT's adapters."""
    torch.manual_seed(0)
    model = model_of("llama", dtype)
    for name, module in list(model.named_modules()):
        if type(module) is nn.Linear and name != "lm_head":
            model.set_submodule(name, linear_4bit(bnb, module, device, **options))
    model.is_loaded_in_4bit = True
    return with_lora(model.to(device), r=8)


def linear_4bit(bnb: Any, module: nn.Linear, device: torch.device, **options: Any) -> Any:
    options = {"compute_dtype": module.weight.dtype, "quant_type": "nf4", **options}
    # Rows of whole blocks: bitsandbytes on a CPU reads other scales where a row ends in one.
    layer = bnb.nn.Linear4bit(module.in_features, module.out_features, bias=False, **options)
    layer.weight = bnb.nn.Params4bit(
        module.weight.data,
        requires_grad=False,
        quant_type=options["quant_type"],
        blocksize=32,
        module=layer,
    )
    layer.support_avx512bf16_for_cpu = False  # else a CPU's weights are packed anew in eval
    return layer.to(device)


@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_training_over_bitsandbytes_linears(
    quant_type: str, dtype: torch.dtype, device: torch.device, bnb: Any
) -> None:
    model = loaded(bnb, device, dtype, quant_type=quant_type)
    layers = [m for m in model.modules() if isinstance(m, bnb.nn.Linear4bit)]
    pointers = [layer.weight.data_ptr() for layer in layers]
    for layer in layers:
        theirs = bnb.functional.dequantize_4bit(layer.weight.data, layer.weight.quant_state)
        ours = stored_weight(layer, torch.float32)
        assert isinstance(ours, ops.QuantizedWeight)
        assert torch.equal(ours.dequantize(), theirs)
        assert ours.tensors["codes"].data_ptr() == layer.weight.data_ptr()
    given = batch_of("right", device)
    theirs = {n: x.clone() for n, x in training_results(model, given).items()}
    report = lora_engine.accelerate(model)
    assert {entry.operation for entry in report.left} <= {"attention"}
    assert all(isinstance(g.lora.base, ops.QuantizedBase) for g in groups_of(model) if g.lora)
    ours = training_results(model, given)
    tolerance = 2e-5 if dtype == torch.float32 else 5e-2
    assert ours.keys() == theirs.keys() and len(ours) > 20
    for name, expected in theirs.items():
        assert error(ours[name], expected) < tolerance, name
    assert pointers == [layer.weight.data_ptr() for layer in layers]


def test_bitsandbytes_linears_that_compute_otherwise_are_left(
    bnb: Any, device: torch.device
) -> None:
    model = loaded(bnb, device, torch.float32, compute_dtype=torch.bfloat16)
    report = lora_engine.accelerate(model)
    reasons = {e.detail for e in report.left if e.operation == "linear"}
    assert reasons == {"it computes in torch.bfloat16, and decodes its weight to torch.float32"}


def test_a_try_does_not_have_bitsandbytes_pack_its_weights_anew(bnb: Any) -> None:
    """On a CPU with bfloat16's AVX-512 it does so in eval mode, and scales stay rounded."""
    model = loaded(bnb, torch.device("cpu"), torch.float32)
    layers = [m for m in model.modules() if isinstance(m, bnb.nn.Linear4bit)]
    for layer in layers:
        layer.support_avx512bf16_for_cpu = True
    before = [stored_weight(layer, torch.float32).dequantize() for layer in layers]
    report = lora_engine.accelerate(model)
    assert {entry.operation for entry in report.left} <= {"attention"}
    for layer, weight in zip(layers, before, strict=True):
        assert layer.support_avx512bf16_for_cpu
        assert torch.equal(stored_weight(layer, torch.float32).dequantize(), weight)


def test_scales_that_bitsandbytes_keeps_for_a_cpu_are_left_to_it(bnb: Any) -> None:
    layer = linear_4bit(bnb, nn.Linear(64, 32, bias=False), torch.device("cpu"))
    assert why_not_stored(layer) is None
    state = layer.weight.quant_state
    state.absmax, state.nested = torch.ones(2, 32, dtype=torch.bfloat16), False
    reason = why_not_stored(layer)
    assert reason is not None and "keeps its weight otherwise" in reason
    assert r"absmax is [2, 32] bfloat16" in reason
    assert decoded_dtype(layer, torch.bfloat16) == torch.float32
