"""Whole models whose linears are other libraries' in 8 bits: bitsandbytes', transformers' FP8."""

import warnings
from collections.abc import Callable
from typing import Any

import peft
import pytest
import torch
from torch import nn
from transformers.integrations import finegrained_fp8
from whole_models import batch_of, model_of, training_results

import lora_engine
from lora_engine import ops
from lora_engine.models.quantized.stored import decoded_dtype, stored_weight, why_not_stored
from lora_engine.testing import error, with_lora


@pytest.fixture(scope="module")
def bnb() -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return pytest.importorskip("bitsandbytes")


def int8(module: nn.Linear, device: torch.device) -> nn.Linear:
    """As transformers' `load_in_8bit` has it."""
    import bitsandbytes as bnb

    layer = bnb.nn.Linear8bitLt(
        module.in_features, module.out_features, bias=False, has_fp16_weights=False, threshold=6.0
    )
    layer.weight = bnb.nn.Int8Params(module.weight.data, requires_grad=False)
    return layer.to(device)


def fp8(module: nn.Linear, device: torch.device, block: tuple[int, int] | None) -> nn.Linear:
    """As transformers' FineGrainedFP8Config has it."""
    weight = module.weight.detach().float()
    layer = finegrained_fp8.FP8Linear(module.in_features, module.out_features, block)
    layer.requires_grad_(False)
    rows, cols = block or weight.shape
    for i in range(0, weight.shape[0], rows):
        for j in range(0, weight.shape[1], cols):
            part = weight[i : i + rows, j : j + cols]
            scale = part.abs().max() / 448
            codes = (part / scale).to(torch.float8_e4m3fn)
            layer.weight[i : i + rows, j : j + cols] = codes
            if block is None:
                layer.weight_scale_inv.fill_(scale)
            else:
                layer.weight_scale_inv[i // rows, j // cols] = scale
    return layer.to(device)


@pytest.fixture(params=["int8", "fp8_tile", "fp8_tensor"])
def make(request: pytest.FixtureRequest, bnb: Any, monkeypatch: pytest.MonkeyPatch):
    """What makes a layer in 8 bits of a plain one."""
    if request.param == "int8":
        return int8

    def product(x, weight, scale, block, bias=None, activation_scale=None, allow_deepgemm=True):
        decoded = finegrained_fp8._dequantize_fp8_weight(weight, scale, block, torch.float32)
        return nn.functional.linear(x, decoded.to(x.dtype), bias)

    # Its kernels come from a hub of theirs and run on GPUs alone.
    monkeypatch.setattr(finegrained_fp8, "fp8_linear", product)
    block = (16, 24) if request.param == "fp8_tile" else None
    return lambda module, device: fp8(module, device, block)


Make = Callable[[nn.Linear, torch.device], nn.Linear]


def model_over(make: Make, device: torch.device, dtype: torch.dtype) -> Any:
    """A model whose linears, but for the head, are what `make` makes of them, and adapters."""
    model = model_of("llama", dtype)
    for name, module in list(model.named_modules()):
        if type(module) is nn.Linear and name != "lm_head":
            model.set_submodule(name, make(module, device))
    model.is_loaded_in_8bit = make is int8
    return with_lora(model.to(device), r=8)


def decoded(layer: nn.Linear, dtype: torch.dtype) -> torch.Tensor:
    """What the codes stand for, by other code than ours."""
    if isinstance(layer, finegrained_fp8.FP8Linear):
        scale = layer.weight_scale_inv
        weight = finegrained_fp8._dequantize_fp8_weight(
            layer.weight, scale, layer.block_size, torch.float32
        )
    else:
        scale = layer.weight.SCB if layer.state.SCB is None else layer.state.SCB
        weight = layer.weight.data.float() * scale[:, None] * (1 / 127)
    return weight.to(dtype)


def plain(make: Make, dtype: torch.dtype) -> Make:
    """Makes a plain linear of what a layer of `make` stands for."""

    def made_plain(module: nn.Linear, device: torch.device) -> nn.Linear:
        layer = nn.Linear(module.in_features, module.out_features, bias=False)
        layer.weight = nn.Parameter(decoded(make(module, device), dtype), requires_grad=False)
        return layer

    return made_plain


def layers_of(model: nn.Module) -> list[nn.Linear]:
    kinds = ("Linear8bitLt", "FP8Linear")
    modules = [m for m in model.modules() if type(m).__name__ in kinds and not hasattr(m, "lora_A")]
    assert len(modules) == 14
    return modules


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_training_is_that_over_the_decoded_weights(
    make: Make, dtype: torch.dtype, device: torch.device
) -> None:
    given = batch_of("right", device)
    model, dense = (model_over(kind, device, dtype) for kind in (make, plain(make, dtype)))
    # PEFT rounds the factors that it puts around weights in FP8 to FP8.
    peft.set_peft_model_state_dict(dense, peft.get_peft_model_state_dict(model))
    expected = {n: x.clone() for n, x in training_results(dense, given).items()}
    own = {n: x.clone() for n, x in training_results(model, given).items()}
    before = [(layer.weight.data_ptr(), layer.weight.clone()) for layer in layers_of(model)]
    for layer in layers_of(model):
        weight = stored_weight(layer, dtype)
        assert isinstance(weight, ops.QuantizedWeight)
        assert torch.equal(weight.dequantize(), decoded(layer, dtype))
        assert weight.tensors["codes"].data_ptr() == layer.weight.data_ptr()
        assert decoded_dtype(layer, dtype) == dtype
    report = lora_engine.accelerate(model)
    assert {entry.operation for entry in report.left} <= {"attention"}
    assert report.weights == lora_engine.accelerate(dense).weights
    ours = training_results(model, given)
    tolerance = 2e-5 if dtype == torch.float32 else 5e-2
    assert ours.keys() == expected.keys() and len(ours) > 20
    for name, x in expected.items():
        assert error(ours[name], x) < tolerance, name
    lora_engine.restore(model)
    for layer, (pointer, codes) in zip(layers_of(model), before, strict=True):
        assert layer.weight.data_ptr() == pointer and torch.equal(layer.weight, codes)
    for name, x in training_results(model, given).items():
        assert torch.equal(x, own[name]), name


def test_bitsandbytes_rounds_inputs_where_it_does_not_train_and_ours_never(
    bnb: Any, device: torch.device
) -> None:
    """Its logits are those of the same weights, to 8 bits of the inputs."""
    model = model_over(int8, device, torch.float32).eval()
    dense = model_over(plain(int8, torch.float32), device, torch.float32).eval()
    given = batch_of("whole", device)
    with torch.no_grad():
        theirs, exact = model(**given).logits, dense(**given).logits
        lora_engine.accelerate(model)
        ours = model(**given).logits
    assert error(ours, exact) < 2e-5
    assert 1e-4 < error(theirs, exact) < 0.1


def test_scales_are_found_where_the_first_call_puts_them(bnb: Any, device: torch.device) -> None:
    layer = int8(nn.Linear(32, 16, bias=False), device)
    before = stored_weight(layer, torch.float32).dequantize()
    assert layer.state.SCB is None
    layer(torch.randn(4, 32, device=device))
    assert layer.weight.SCB is None
    assert torch.equal(stored_weight(layer, torch.float32).dequantize(), before)


def test_what_is_stored_otherwise_is_left(bnb: Any) -> None:
    unpacked = bnb.nn.Linear8bitLt(16, 8, bias=False)
    assert why_not_stored(unpacked) == (
        "bitsandbytes has not quantised its weight, or does so at every call"
    )
    layer = int8(nn.Linear(16, 8, bias=False), torch.device("cpu"))
    layer.weight.SCB = layer.weight.SCB[:5]
    reason = why_not_stored(layer)
    assert reason is not None and "keeps its weight otherwise: int8: scale is [5, 1]" in reason
    layer.weight.SCB = None
    assert why_not_stored(layer) == "bitsandbytes keeps no scales of its weight"
    tile = fp8(nn.Linear(16, 8, bias=False), torch.device("cpu"), (8, 8))
    assert why_not_stored(tile) is None
    tile.weight_scale_inv.data = tile.weight_scale_inv.to(torch.float8_e8m0fnu)
    reason = why_not_stored(tile)
    assert reason is not None and "scales of float8_e8m0fnu" in reason
    tile.weight.data = tile.weight.data.float()
    assert why_not_stored(tile) == "its weight is stored otherwise: it is torch.float32"


def test_a_moved_layer_s_group_steps_aside(bnb: Any, device: torch.device) -> None:
    """`Module.to` gives the layer another parameter; what was taken would be stale."""
    model, given = model_over(int8, device, torch.float32), batch_of("right", device)
    own = {n: x.clone() for n, x in training_results(model, given).items()}
    lora_engine.accelerate(model)
    for layer in layers_of(model):
        codes = layer.weight.data.clone()
        layer.weight = bnb.nn.Int8Params(
            codes, requires_grad=False, CB=codes, SCB=layer.state.SCB.clone()
        )
    with pytest.warns(lora_engine.errors.EngineWarning):
        ours = training_results(model, given)
    for name, x in ours.items():
        assert error(x, own[name]) < 2e-5, name


def test_a_model_in_fp8_trains_where_its_own_kernels_do_not_run(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    device, dtype = torch.device("cpu"), torch.bfloat16

    def absent(*_: object) -> None:
        raise ImportError("no kernels")

    monkeypatch.setattr(finegrained_fp8, "fp8_linear", absent)

    def in_tiles(module: nn.Linear, device: torch.device) -> nn.Linear:
        return fp8(module, device, (16, 16))

    model, dense = (model_over(kind, device, dtype) for kind in (in_tiles, plain(in_tiles, dtype)))
    peft.set_peft_model_state_dict(dense, peft.get_peft_model_state_dict(model))
    given = batch_of("right", device)
    expected = {n: x.clone() for n, x in training_results(dense, given).items()}
    report = lora_engine.accelerate(model, strict=True)
    assert not report.left
    for name, x in training_results(model, given).items():
        assert error(x, expected[name]) < 5e-2, name
