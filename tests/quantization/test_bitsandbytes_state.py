"""4-bit weights under bitsandbytes' keys: written as it writes them, and read back."""

import json
import warnings
from types import ModuleType

import pytest
import torch
from torch import Tensor

from lora_engine import ops
from lora_engine.quantization.bitsandbytes_state import from_bitsandbytes, to_bitsandbytes


@pytest.fixture(scope="module")
def bnb() -> ModuleType:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import bitsandbytes

    return bitsandbytes


def entries(nested: bool = True, format: str = "nf4") -> dict[str, Tensor]:
    w = ops.quantize_weight(torch.randn(24, 96), format, double_quant=nested)
    return to_bitsandbytes(w.tensors, w.format, w.shape, w.dtype)


@pytest.mark.parametrize("nested", [False, True], ids=["plain", "nested"])
@pytest.mark.parametrize("format", ["nf4", "fp4"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_state_dict_is_that_of_linear4bit(
    format: str, dtype: torch.dtype, nested: bool, bnb: ModuleType
) -> None:
    weight = torch.randn(40, 128, dtype=dtype)
    linear = bnb.nn.Linear4bit(
        128, 40, bias=False, quant_type=format, compress_statistics=nested, compute_dtype=dtype
    )
    linear.weight = bnb.nn.Params4bit(
        weight, requires_grad=False, quant_type=format, compress_statistics=nested
    )
    theirs = linear.to("cpu").state_dict()
    ours = ops.quantize_weight(weight, format, double_quant=nested).state_dict("weight")
    assert ours.keys() == theirs.keys()
    for key, tensor in theirs.items():
        if "quant_state" in key:  # JSON, whose spaces are free
            assert json.loads(bytes(ours[key].tolist())) == json.loads(bytes(tensor.tolist()))
        else:
            assert torch.equal(ours[key], tensor), key
            assert ours[key].shape == tensor.shape

    read = ops.QuantizedWeight.from_state_dict(theirs, "weight")
    assert (read.shape, read.dtype, read.format.nested) == ((40, 128), dtype, nested)
    state = linear.weight.quant_state
    assert torch.equal(read.dequantize(), bnb.functional.dequantize_4bit(linear.weight.data, state))


@pytest.mark.parametrize(
    "missing",
    [
        "",
        ".absmax",
        ".quant_map",
        ".nested_absmax",
        ".nested_quant_map",
        ".quant_state.bitsandbytes__nf4",
    ],
)
def test_a_missing_entry_is_named(missing: str) -> None:
    without = {name: tensor for name, tensor in entries().items() if name != missing}
    with pytest.raises(ValueError, match=rf"{missing or 'itself'} is missing|found 0"):
        from_bitsandbytes(without)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("quant_type", "nf5"),
        ("blocksize", "64"),
        ("blocksize", 48),
        ("dtype", "int8"),
        ("shape", [24]),
        ("shape", "24, 96"),
        ("shape", [-24, -96]),
        ("nested_blocksize", 128),
        ("nested_offset", None),
    ],
)
def test_what_the_format_cannot_mean_is_refused(key: str, value: object) -> None:
    changed = entries()
    name = ".quant_state.bitsandbytes__nf4"
    rest = json.loads(bytes(changed[name].tolist())) | {key: value}
    changed[name] = torch.tensor(list(json.dumps(rest).encode()), dtype=torch.uint8)
    with pytest.raises(ValueError, match=r"quant_state|block 48"):
        from_bitsandbytes(changed)


@pytest.mark.parametrize("text", [b"\xff\xfe", b"{", b"[1]"])
def test_a_broken_state_is_refused(text: bytes) -> None:
    changed = entries()
    changed[".quant_state.bitsandbytes__nf4"] = torch.tensor(list(text), dtype=torch.uint8)
    with pytest.raises(ValueError, match="is no JSON"):
        from_bitsandbytes(changed)


@pytest.mark.parametrize("dtype", [torch.float32, torch.uint8], ids=str)
def test_a_state_that_is_no_string_of_bytes_is_refused(dtype: torch.dtype) -> None:
    changed = entries()
    name = ".quant_state.bitsandbytes__nf4"
    changed[name] = changed[name].to(dtype).view(1, -1)
    with pytest.raises(ValueError, match="is no JSON"):
        from_bitsandbytes(changed)


@pytest.mark.parametrize(
    ("nested", "name"), [(False, ".absmax"), (True, ".nested_absmax"), (True, ".nested_quant_map")]
)
def test_scales_that_are_not_finite_are_refused(nested: bool, name: str) -> None:
    changed = entries(nested)
    changed[name] = changed[name].clone()
    changed[name][-1] = float("nan")
    with pytest.raises(ValueError, match="not finite"):
        from_bitsandbytes(changed)


def test_an_offset_may_be_written_as_an_integer() -> None:
    changed = entries()
    name = ".quant_state.bitsandbytes__nf4"
    rest = json.loads(bytes(changed[name].tolist())) | {"nested_offset": 1}
    changed[name] = torch.tensor(list(json.dumps(rest).encode()), dtype=torch.uint8)
    assert from_bitsandbytes(changed)[1]["offset"].item() == 1.0


def test_another_code_is_refused() -> None:
    changed = entries()
    changed[".quant_map"] = changed[".quant_map"] + 0.01
    with pytest.raises(ValueError, match="not the values of nf4"):
        from_bitsandbytes(changed)


def test_a_dtype_that_bitsandbytes_does_not_know_is_refused() -> None:
    w = ops.quantize_weight(torch.randn(4, 64, dtype=torch.float64))
    with pytest.raises(ValueError, match="float64"):
        w.state_dict("weight")
