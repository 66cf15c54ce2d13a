"""A linear over packed bits is the linear over what they stand for."""

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lora_engine.models.quantized.linear import QuantizedLinear
from lora_engine.ops import quantize_weight


def layer_of(
    dtype: torch.dtype = torch.float32, *, bias: bool = True, seed: int = 0, **options: Any
) -> QuantizedLinear:
    torch.manual_seed(seed)
    weight = torch.randn(24, 80).to(dtype)
    return QuantizedLinear(
        quantize_weight(weight, **{"double_quant": True, **options}),
        torch.randn(24).to(dtype) if bias else None,
    )


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_products_and_gradients(dtype: torch.dtype, bias: bool) -> None:
    layer = layer_of(dtype, bias=bias)
    x, dy = torch.randn(3, 5, 80).to(dtype).requires_grad_(), torch.randn(3, 5, 24).to(dtype)
    y = layer(x)
    (dx,) = torch.autograd.grad(y, x, dy)
    weight = layer.quantized.dequantize()
    expected = x @ weight.t() + (0 if layer.bias is None else layer.bias)
    assert torch.equal(y, expected) and torch.equal(dx, torch.autograd.grad(expected, x, dy)[0])


def test_the_input_s_dtype_is_kept() -> None:
    layer, x = layer_of(torch.bfloat16), torch.randn(4, 80)
    y = layer(x)
    exact = x @ layer.quantized.dequantize().float().t() + layer.bias.float()
    assert y.dtype == torch.float32
    torch.testing.assert_close(y, exact)


def test_nothing_decoded_is_kept_for_the_backward_pass() -> None:
    layer, x = layer_of(), torch.randn(3, 80, requires_grad=True)
    saved: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: (saved.append(t), t)[1], lambda t: t):
        y = layer(x)
    assert not saved
    y.sum().backward()


@pytest.mark.parametrize("double_quant", [False, True])
def test_another_dtype_leaves_weight_and_scales_as_they_are(double_quant: bool) -> None:
    layer = layer_of(double_quant=double_quant)
    before = layer.quantized.dequantize()
    layer.bfloat16()
    assert torch.equal(layer.quantized.dequantize(), before)
    assert layer.bias is not None and layer.bias.dtype == torch.bfloat16
    assert layer.to("meta").quantized.device.type == "meta"


@pytest.mark.parametrize("double_quant", [False, True])
def test_state_dict(double_quant: bool) -> None:
    layer, other = (layer_of(seed=seed, double_quant=double_quant) for seed in (0, 1))
    wrapped = nn.ModuleDict({"proj": layer})
    state = wrapped.state_dict()
    expected = layer.quantized.state_dict("proj.weight")
    assert state.keys() == {"proj.bias", *expected}
    assert all(torch.equal(state[key], tensor) for key, tensor in expected.items())
    nn.ModuleDict({"proj": other}).load_state_dict(state)
    x = torch.randn(2, 80)
    assert torch.equal(other(x), layer(x))


def test_states_that_do_not_fit_are_refused() -> None:
    layer = layer_of()
    with pytest.raises(RuntimeError, match=r"weight: is Blockwise4bit.*expected QuantizedLinear"):
        layer.load_state_dict(layer_of(block=32).state_dict())
    state = layer.state_dict()
    del state["weight.absmax"]
    with pytest.raises(RuntimeError, match=r"the entry \.absmax is missing"):
        layer.load_state_dict(state)


def test_a_copy_has_memory_of_its_own() -> None:
    layer = layer_of()
    other = copy.deepcopy(layer)
    assert torch.equal(other.quantized.dequantize(), layer.quantized.dequantize())
    other.weight.zero_()
    assert not torch.equal(other.quantized.dequantize(), layer.quantized.dequantize())


def test_it_says_what_it_is() -> None:
    expected = "in_features=80, out_features=24, bias=True, nf4, block=64, double_quant=True"
    assert str(layer_of()) == f"QuantizedLinear({expected})"


def test_a_state_without_the_weight_leaves_it() -> None:
    """As of an adapter's file, which is loaded with `strict=False`."""
    layer = layer_of()
    before = layer.quantized.dequantize()
    found = layer.load_state_dict({"bias": torch.zeros(24)}, strict=False)
    assert found.missing_keys == ["weight"] and not found.unexpected_keys
    assert torch.equal(layer.quantized.dequantize(), before) and not layer.bias.any()
    with pytest.raises(RuntimeError, match=r'Missing key.*"weight"'):
        layer.load_state_dict({"bias": torch.zeros(24)})


@pytest.mark.parametrize("double_quant", [False, True])
def test_a_state_is_written_into_the_memory_that_others_hold(double_quant: bool) -> None:
    layer, other = (layer_of(seed=seed, double_quant=double_quant) for seed in (0, 1))
    held = layer.quantized
    layer.load_state_dict(other.state_dict())
    assert torch.equal(held.dequantize(), other.quantized.dequantize())
    layer.load_state_dict(layer_of(double_quant=double_quant).state_dict(), assign=True)
    assert torch.equal(held.dequantize(), other.quantized.dequantize())
    expected = layer_of(double_quant=double_quant).quantized
    assert torch.equal(layer.quantized.dequantize(), expected.dequantize())


def test_another_table_of_scales_is_refused() -> None:
    layer, state = layer_of(), layer_of().state_dict()
    state["weight.nested_quant_map"] = state["weight.nested_quant_map"] / 2
    with pytest.raises(RuntimeError, match="nested_quant_map is another table"):
        layer.load_state_dict(state)


def test_tensors_of_a_state_are_no_parts_of_larger_ones() -> None:
    """safetensors' `save_model` writes no others."""
    for name, tensor in layer_of().state_dict().items():
        assert tensor.untyped_storage().nbytes() == tensor.nbytes, name


def test_an_input_that_was_cast_to_the_codes_dtype_is_refused() -> None:
    layer = layer_of()
    with pytest.raises(ValueError, match=r"input of QuantizedLinear.*is torch\.uint8"):
        layer(torch.randn(3, 80).to(layer.weight.dtype))
