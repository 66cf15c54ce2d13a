"""A weight in packed bits: its parts, its rows, where it is kept and what it costs."""

import copy
import pickle
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import lora_engine
from lora_engine.ops.quantized_weight import FORMATS, QuantizedWeight, quantize_weight


@pytest.fixture
def weight() -> torch.Tensor:
    torch.manual_seed(0)
    return torch.randn(48, 256, dtype=torch.bfloat16)


@pytest.mark.parametrize(
    ("format", "nested"), [*((name, False) for name in FORMATS), ("nf4", True), ("fp4", True)]
)
def test_rows_are_those_of_the_whole(weight: torch.Tensor, format: str, nested: bool) -> None:
    packed = lora_engine.quantize_weight(weight, format, double_quant=nested)
    whole = packed.dequantize()
    assert whole.shape == weight.shape
    assert whole.dtype == weight.dtype
    for start, stop in ((0, 48), (5, 6), (47, 48), (7, 7)):
        assert torch.equal(packed.rows(start, stop), whole[start:stop])
    out = torch.empty(3, 256, dtype=torch.float32)
    assert packed.rows(1, 4, out=out) is out
    assert torch.equal(out.bfloat16(), whole[1:4])


@pytest.mark.parametrize(
    ("format", "nested", "bits", "error"),
    [
        # Relative errors of N(0, 1) in blocks of 64; bits: 4 + 32 / 64, or 4 + (8 + 32/256) / 64.
        ("nf4", False, 4.5, 0.092),
        ("nf4", True, 4.127, 0.092),
        ("fp4", False, 4.5, 0.122),
        ("fp4", True, 4.127, 0.122),
    ],
)
def test_bits_and_error(format: str, nested: bool, bits: float, error: float) -> None:
    torch.manual_seed(0)
    exact = torch.randn(1024, 1024)
    packed = quantize_weight(exact, format, double_quant=nested)
    assert packed.bits_per_parameter == pytest.approx(bits, abs=0.01)
    assert packed.nbytes == sum(tensor.nbytes for tensor in packed.tensors.values())
    found = packed.error(exact)
    assert found.relative == pytest.approx(error, abs=0.003)
    assert found.largest == pytest.approx((packed.dequantize() - exact).abs().max().item())


def test_error_of_a_weight_of_zeros() -> None:
    zeros = torch.zeros(2, 64)
    assert quantize_weight(zeros).error(zeros) == (0.0, 0.0)


@pytest.mark.parametrize("nested", [False, True], ids=["plain", "nested"])
def test_through_a_safetensors_file(weight: torch.Tensor, nested: bool, tmp_path: Path) -> None:
    packed = quantize_weight(weight, double_quant=nested)
    save_file(packed.state_dict("layer.weight"), tmp_path / "w.safetensors")
    state = load_file(tmp_path / "w.safetensors")
    read = QuantizedWeight.from_state_dict(state, "layer.weight")
    assert (read.format, read.shape, read.dtype) == (packed.format, packed.shape, packed.dtype)
    assert torch.equal(read.dequantize(), packed.dequantize())
    del state["layer.weight.absmax"]
    with pytest.raises(ValueError, match=r"layer\.weight: the entry \.absmax is missing"):
        QuantizedWeight.from_state_dict(state, "layer.weight")


def test_weights_whose_names_begin_alike_are_kept_apart(weight: torch.Tensor) -> None:
    state = {
        **quantize_weight(weight).state_dict("a.weight"),
        **quantize_weight(-weight).state_dict("a.weight2"),
    }
    read = QuantizedWeight.from_state_dict(state, "a.weight")
    assert torch.equal(read.dequantize(), quantize_weight(weight).dequantize())


def test_to(weight: torch.Tensor) -> None:
    packed = quantize_weight(weight, double_quant=True)
    assert packed.to("cpu") is packed
    moved = packed.to("meta")
    assert moved.device.type == "meta"
    assert moved.bits_per_parameter == packed.bits_per_parameter


@pytest.mark.parametrize("nested", [False, True], ids=["plain", "nested"])
def test_it_can_be_copied_and_pickled(weight: torch.Tensor, nested: bool) -> None:
    packed = quantize_weight(weight, double_quant=nested)
    for other in (copy.deepcopy(packed), pickle.loads(pickle.dumps(packed))):
        assert (other.format, other.shape, other.dtype) == (
            packed.format,
            packed.shape,
            packed.dtype,
        )
        assert torch.equal(other.dequantize(), packed.dequantize())
        assert other.tensors["codes"].data_ptr() != packed.tensors["codes"].data_ptr()


def test_weights_of_one_file_share_no_memory(weight: torch.Tensor, tmp_path: Path) -> None:
    first, second = (quantize_weight(w, double_quant=True) for w in (weight, -weight))
    save_file({**first.state_dict("a"), **second.state_dict("b")}, tmp_path / "w.safetensors")
    read = QuantizedWeight.from_state_dict(load_file(tmp_path / "w.safetensors"), "b")
    assert torch.equal(read.dequantize(), second.dequantize())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_overwriting_what_a_gradient_needs_is_noticed(
    weight: torch.Tensor, dtype: torch.dtype
) -> None:
    out = torch.zeros(2, 256, dtype=dtype)
    y = torch.ones(2, 256, dtype=dtype, requires_grad=True) * out
    quantize_weight(weight).rows(0, 2, out=out)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


def test_it_is_frozen(weight: torch.Tensor) -> None:
    packed = quantize_weight(weight.requires_grad_())
    assert not packed.dequantize().requires_grad
    with pytest.raises(TypeError):
        packed.tensors["codes"] = torch.zeros(1)  # type: ignore[index]
    with pytest.raises(AttributeError):
        packed.shape = (1, 1)  # type: ignore[misc]


def test_tensors_that_do_not_fit_are_refused(weight: torch.Tensor) -> None:
    packed = quantize_weight(weight)
    parts = dict(packed.tensors)
    for name, changed in {
        "codes": parts["codes"][:-1],
        "absmax": parts["absmax"].double(),
    }.items():
        with pytest.raises(ValueError, match=f"nf4: {name} is .* expected"):
            QuantizedWeight(packed.format, {**parts, name: changed}, packed.shape, packed.dtype)
    with pytest.raises(ValueError, match="the tensor absmax is missing"):
        QuantizedWeight(packed.format, {"codes": parts["codes"]}, packed.shape, packed.dtype)
    with pytest.raises(ValueError, match="expected"):
        QuantizedWeight(packed.format, parts, (48, 257), packed.dtype)


def test_arguments_that_do_not_fit_are_refused(weight: torch.Tensor) -> None:
    packed = quantize_weight(weight)
    for start, stop in ((-1, 2), (3, 2), (0, 49)):
        with pytest.raises(ValueError, match="rows"):
            packed.rows(start, stop)
    for out in (
        torch.empty(2, 255),
        torch.empty(256, 2).t(),
        torch.empty(3, 256),
        torch.empty(2, 256, dtype=torch.int32),
        torch.empty(2, 256, device="meta"),
    ):
        with pytest.raises(ValueError, match="out is"):
            packed.rows(0, 2, out=out)
    with pytest.raises(ValueError, match="which requires a gradient"):
        packed.rows(0, 2, out=torch.empty(2, 256, requires_grad=True))
    with pytest.raises(ValueError, match="did you mean nf4"):
        quantize_weight(weight, "nf44")
    with pytest.raises(ValueError, match="block 10"):
        quantize_weight(weight, block=10)
    with pytest.raises(ValueError, match="the weight is"):
        packed.error(weight[1:])
