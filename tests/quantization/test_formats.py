"""What every format that can be written holds to."""

import dataclasses
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from lora_engine import QuantizedWeight, quantize_weight
from lora_engine.quantization.formats import WRITABLE, format_from_json, format_to_json
from lora_engine.quantization.gguf import TYPES, Gguf
from lora_engine.quantization.int4_group import Int4Group
from lora_engine.quantization.packed_state import STATE

# Half of the widest step between neighbouring values of the format, over the largest magnitude of
# what shares a scale, and what rounding the scale itself may add.
BOUNDS = {
    "nf4": 0.152,
    "fp4": 1 / 6,
    "int8": 0.5 / 127,
    "int4": 0.5 / 7.5 + 2**-7,
    "fp8": 16 / 448,
    "fp8_tensor": 16 / 448,
    "fp8_block": 16 / 448,
    "mxfp4": 1 / 6 + 1 / 7,
    "nvfp4": 1 / 6 + 1 / 16,
    "q4_0": 1 / 8 + 2**-9,
    "q4_1": 1 / 15 + 2**-9,
    "q5_0": 1 / 16 + 2**-9,
    "q5_1": 1 / 31 + 2**-9,
    "q8_0": 0.5 / 127 + 2**-10,
}


@pytest.mark.parametrize(
    ("name", "options", "bits", "error"),
    [
        # Bits of a code, and of the scales over the values that share them; errors of N(0, 1).
        ("int8", {}, 8 + 32 / 512, 0.0075),
        ("int8", {"block": 64}, 8 + 32 / 64, 0.0059),
        ("fp8", {}, 8 + 32 / 512, 0.026),
        ("fp8_tensor", {}, 8, 0.026),
        ("fp8_block", {}, 8, 0.026),
        ("mxfp4", {}, 4 + 8 / 32, 0.112),
        ("nvfp4", {}, 4 + 8 / 16, 0.094),
        ("int4", {"block": 32}, 4 + 16 / 32, 0.094),
        ("int4", {}, 4 + 16 / 128, 0.111),
        ("q4_0", {}, 4.5, 0.086),
        ("q4_1", {}, 5, 0.078),
        ("q5_0", {}, 5.5, 0.043),
        ("q5_1", {}, 6, 0.038),
        ("q8_0", {}, 8.5, 0.0054),
    ],
    ids=str,
)
def test_bits_and_error(name: str, options: dict[str, Any], bits: float, error: float) -> None:
    exact = torch.randn(512, 512, generator=torch.Generator().manual_seed(0)).bfloat16()
    packed = quantize_weight(exact.float(), name, **options)
    if name == "int4":
        packed = quantize_weight(exact, name, **options)
    assert packed.bits_per_parameter == pytest.approx(bits, abs=0.01)
    assert packed.error(exact).relative == pytest.approx(error, rel=0.03)


@pytest.mark.parametrize("name", BOUNDS)
@settings(max_examples=12, deadline=None)
@given(seed=st.integers(0, 10**6), size=st.floats(-12, 4), spread=st.floats(0, 3))
def test_every_value_is_within_the_bound(name: str, seed: int, size: float, spread: float) -> None:
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(3, 128, generator=generator)
    weight = weight.sign() * weight.abs() ** (1 + spread) * 2.0**size
    packed = quantize_weight(weight, name)
    largest = weight.abs().amax() if name in ("fp8_tensor", "fp8_block") else None
    per_row = weight.abs().amax(dim=1, keepdim=True) if largest is None else largest
    # A float16 scale is off by up to 2^-25 where it is subnormal, and a code by its own size.
    slack = 128 * 2.0**-25 if name in TYPES else 0.0
    if name == "nvfp4":
        slack = 6 * 2.0**-10 / (448 * 6) * weight.abs().amax().item()
    off = (packed.dequantize() - weight).abs()
    assert bool((off <= BOUNDS[name] * per_row + slack).all())


@pytest.mark.parametrize("name", [n for n in WRITABLE if n not in ("q4_0", "q5_0")])
def test_larger_values_of_a_block_stay_the_larger(name: str) -> None:
    """Not of Q4_0 and Q5_0: where -8 d is a value and 8 d is none, the largest are clipped."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(4, 128, generator=generator)
    values = quantize_weight(weight, name).dequantize()
    for block in range(0, 128, 16):  # of the smallest of all formats' blocks
        w, v = weight[:, block : block + 16], values[:, block : block + 16]
        order = w.argsort(dim=1)
        assert bool((v.gather(1, order).diff(dim=1) >= 0).all())


@pytest.mark.parametrize("name", sorted(set(WRITABLE) - {"q4_1", "q5_1", "int4"}))
def test_what_was_decoded_is_packed_to_the_same(name: str) -> None:
    """Not of those whose largest value is not absmax: its scale is another the second time."""
    weight = torch.randn(4, 128, generator=torch.Generator().manual_seed(0)).bfloat16().float()
    once = quantize_weight(weight, name).dequantize()
    again = quantize_weight(once, name).dequantize()
    torch.testing.assert_close(again, once, rtol=0.01, atol=1e-3)


@pytest.mark.parametrize("name", WRITABLE)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_zeros_and_dtypes(name: str, dtype: torch.dtype) -> None:
    weight = torch.randn(8, 256, generator=torch.Generator().manual_seed(0)).to(dtype)
    weight[2:4] = 0
    packed = quantize_weight(weight, name)
    values = packed.dequantize()
    assert values.dtype == dtype and bool(values.isfinite().all()) and packed.is_finite
    assert not values[2:4].any()
    assert packed.error(weight).relative < 0.2
    assert not quantize_weight(torch.zeros(2, 256, dtype=dtype), name).dequantize().any()


@pytest.mark.parametrize("name", ["int8", "int4"])
def test_the_last_group_may_be_shorter(name: str) -> None:
    weight = torch.randn(3, 100, generator=torch.Generator().manual_seed(0))
    packed = quantize_weight(weight, name, block=64)
    assert packed.tensors["scale"].shape == (3, 2)
    parts = [quantize_weight(w, name, block=64) for w in (weight[:, :64], weight[:, 64:])]
    assert torch.equal(packed.dequantize(), torch.cat([p.dequantize() for p in parts], dim=1))


def test_tiles_may_be_cut_at_the_edges() -> None:
    weight = torch.randn(200, 300, generator=torch.Generator().manual_seed(0))
    packed = quantize_weight(weight, "fp8_block")
    assert packed.tensors["scale"].shape == (2, 3)
    corner = quantize_weight(weight[128:, 256:].contiguous(), "fp8_block")
    assert torch.equal(packed.dequantize()[128:, 256:], corner.dequantize())


@pytest.mark.parametrize("name", WRITABLE)
def test_through_a_safetensors_file(name: str, tmp_path: Path) -> None:
    weight = torch.randn(4, 64, generator=torch.Generator().manual_seed(0)).bfloat16()
    packed = quantize_weight(weight, name)
    save_file(packed.state_dict("a.weight"), tmp_path / "w.safetensors")
    read = QuantizedWeight.from_state_dict(load_file(tmp_path / "w.safetensors"), "a.weight")
    assert (read.format, read.shape, read.dtype) == (packed.format, packed.shape, packed.dtype)
    assert torch.equal(read.dequantize(), packed.dequantize())


@pytest.mark.parametrize("name", [n for n in WRITABLE if n not in ("nf4", "fp4")])
def test_states_that_say_something_else_are_refused(name: str) -> None:
    state = quantize_weight(torch.ones(4, 64), name).state_dict("w")
    for key in set(state) - {f"w{STATE}"}:
        rest = {k: v for k, v in state.items() if k != key}
        with pytest.raises(ValueError, match=r"^w: the entry .* is missing"):
            QuantizedWeight.from_state_dict(rest, "w")
    for said in (
        b"{",
        b"[]",
        b'{"format": {"kind": "int9"}, "shape": [4, 64], "dtype": "float32"}',
    ):
        with pytest.raises(ValueError, match=r"^w: "):
            changed = torch.tensor(list(said), dtype=torch.uint8)
            QuantizedWeight.from_state_dict({**state, f"w{STATE}": changed}, "w")


@pytest.mark.parametrize("name", ["int8", "fp8", "mxfp4", "nvfp4", "int4", "q8_0"])
def test_a_state_with_nan_is_refused(name: str) -> None:
    state = quantize_weight(torch.ones(4, 64), name).state_dict("w")
    bad = {
        "int8": (".scale", torch.nan),
        "int4": (".scale", torch.inf),
        "fp8": ("", 0x7F),
        "mxfp4": (".scale", 255),
        "nvfp4": (".scale", 0xFF),
    }
    if name == "q8_0":
        state["w"][1, :2] = torch.tensor([torch.inf]).half().view(torch.uint8)
    else:
        key, value = bad[name]
        state[f"w{key}"][1, 0] = value
    with pytest.raises(ValueError, match="w: has values that are not finite"):
        QuantizedWeight.from_state_dict(state, "w")


@pytest.mark.parametrize("format", [Gguf("q6_k"), Int4Group("awq", 64, True)], ids=str)
def test_formats_as_json(format: Any) -> None:
    content = format_to_json(format)
    assert format_from_json(content) == format
    option = next(iter(dataclasses.asdict(format)))
    for changed in ({**content, "other": 1}, {**content, option: 1.5}, {"kind": "zip"}):
        with pytest.raises(ValueError, match="format"):
            format_from_json(cast(dict[str, object], changed))


@pytest.mark.parametrize(
    ("name", "options", "match"),
    [
        ("int9", {}, "format 'int9': did you mean int8"),
        ("mxfp4", {"block": 64}, "mxfp4: the size of its blocks is fixed; leave block out"),
        ("int8", {"block": 1.5}, "block 1.5, expected a number of columns"),
        ("int4", {"double_quant": True}, "int4: double_quant is of nf4 and fp4 alone"),
        ("fp8", {"impl": "cpu"}, "fp8: impl 'cpu', expected reference"),
    ],
    ids=str,
)
def test_arguments_that_do_not_fit_are_refused(
    name: str, options: dict[str, Any], match: str
) -> None:
    with pytest.raises(ValueError, match=match):
        quantize_weight(torch.ones(4, 64), name, **options)


@pytest.mark.parametrize("name", ["int8", "mxfp4", "q4_0"])
def test_weights_that_no_format_takes_are_refused(name: str) -> None:
    for weight, match in (
        (torch.ones(64), "expected a matrix"),
        (torch.ones(2, 64, dtype=torch.int8), "expected a matrix of float32"),
        (torch.ones(2, 64, device="meta"), "on meta"),
        (torch.full((2, 64), torch.nan), "not finite in float32"),
    ):
        with pytest.raises(ValueError, match=match):
            quantize_weight(weight, name)


@pytest.mark.parametrize("name", WRITABLE)
def test_some_rows_at_a_time_give_the_same(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    weight = torch.randn(300, 64, generator=torch.Generator().manual_seed(0))
    whole = quantize_weight(weight, name)
    monkeypatch.setattr("lora_engine.ops.quantized_weight._VALUES_AT_A_TIME", 64 * 130)
    parts = quantize_weight(weight, name)
    for part, tensor in whole.tensors.items():
        assert torch.equal(parts.tensors[part], tensor)
    assert torch.equal(parts.dequantize(), whole.dequantize())
