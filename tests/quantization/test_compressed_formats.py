"""INT8, FP8, MXFP4, NVFP4 and integers in groups against compressed-tensors, bit for bit."""

from typing import Any

import pytest
import torch
from torch import Tensor

from lora_engine import QuantizedWeight, quantize_weight
from lora_engine.ops.quantized_weight import encode_weight
from lora_engine.quantization.format import Format
from lora_engine.quantization.fp8 import Fp8
from lora_engine.quantization.int4_group import Int4Group, pack, unpack
from lora_engine.quantization.int8 import Int8

pytest.importorskip("compressed_tensors")
from compressed_tensors.compressors import BaseCompressor
from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
from compressed_tensors.quantization.utils import (
    calculate_qparams,
    generate_gparam,
)

SHAPE = (48, 256)


def weight_of(dtype: torch.dtype = torch.float32) -> Tensor:
    weight = torch.randn(SHAPE, generator=torch.Generator().manual_seed(0))
    weight[3] *= 100  # rows and blocks of very unlike sizes
    weight[:, 64:96] *= 0.01
    return weight.to(dtype)


def written_by(
    name: str, weight: Tensor, groups: tuple[int, ...], reduced: tuple[int, ...], **options: Any
) -> tuple[dict[str, Tensor], Tensor]:
    """A weight's tensors, and what they stand for, as the library's compressor `name` has them.

    groups: the shape in which the weight's groups stand along `reduced`.
    """
    args = QuantizationArgs(**options)
    scheme = QuantizationScheme(targets=["Linear"], weights=args)
    grouped = weight.view(groups)
    least, most = grouped.amin(dim=reduced), grouped.amax(dim=reduced)
    state = {"weight": weight}
    if name == "nvfp4-pack-quantized":
        state["weight_global_scale"] = generate_gparam(weight.min(), weight.max())
    whole = state.get("weight_global_scale")
    scale, zero = calculate_qparams(least, most, args, whole)
    state["weight_scale"] = scale.unsqueeze(-1) if scale.dim() == 1 and len(groups) == 2 else scale
    if not args.symmetric:
        state["weight_zero_point"] = zero
    compressor = BaseCompressor.get_value_from_registry(name)
    packed = compressor.compress(state, scheme)
    return packed, compressor.decompress(packed, scheme)["weight"]


def same_as(format: Format, tensors: dict[str, Tensor], expected: Tensor) -> None:
    """`tensors` decode to `expected`, whole and from a row that begins no block."""
    packed = QuantizedWeight(format, tensors, SHAPE, expected.dtype)
    assert torch.equal(packed.dequantize(), expected)
    assert torch.equal(packed.rows(5, 40), expected[5:40])


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_int8_of_rows(dtype: str) -> None:
    weight = weight_of(getattr(torch, dtype))
    tensors, expected = written_by("int-quantized", weight, SHAPE, (1,), num_bits=8)
    read = {"codes": tensors["weight"], "scale": tensors["weight_scale"]}
    same_as(Int8(scales=dtype), read, expected)


@pytest.mark.parametrize(
    ("format", "groups", "reduced", "options"),
    [
        (Fp8(0, 0), (1, 48 * 256), (1,), {"strategy": "tensor"}),
        (Fp8(1, 0), SHAPE, (1,), {"strategy": "channel"}),
        (
            Fp8(16, 128),
            (3, 16, 2, 128),
            (1, 3),
            {"strategy": "block", "block_structure": [16, 128]},
        ),
    ],
    ids=["tensor", "row", "tile"],
)
def test_fp8(format: Fp8, groups: Any, reduced: Any, options: dict[str, Any]) -> None:
    weight = weight_of()
    tensors, expected = written_by(
        "float-quantized", weight, groups, reduced, num_bits=8, type="float", **options
    )
    scale = tensors["weight_scale"].view(tuple(format.layout(SHAPE)["scale"].shape))
    read = {"codes": tensors["weight"].view(torch.uint8), "scale": scale}
    same_as(format, read, expected)
    ours = encode_weight(weight, format)
    torch.testing.assert_close(ours["scale"], scale, rtol=1e-6, atol=0)
    off = ours["codes"] != read["codes"]  # where the scale's last bit decides
    assert off.float().mean() < 1e-3


def test_mxfp4() -> None:
    weight = weight_of()
    options = {"num_bits": 4, "type": "float", "group_size": 32, "scale_dtype": torch.uint8}
    tensors, expected = written_by(
        "mxfp4-pack-quantized", weight, (48, 8, 32), (2,), strategy="group", **options
    )
    ours = quantize_weight(weight, "mxfp4")
    assert torch.equal(ours.tensors["scale"], tensors["weight_scale"])
    assert torch.equal(ours.tensors["codes"], tensors["weight_packed"])
    assert torch.equal(ours.dequantize().to(expected.dtype), expected)


def test_nvfp4() -> None:
    weight = weight_of()
    options = {"num_bits": 4, "type": "float", "group_size": 16}
    tensors, _ = written_by(
        "nvfp4-pack-quantized",
        weight,
        (48, 16, 16),
        (2,),
        strategy="tensor_group",
        scale_dtype=torch.float8_e4m3fn,
        **options,
    )
    ours = quantize_weight(weight, "nvfp4")
    assert torch.equal(ours.tensors["global_scale"], tensors["weight_global_scale"][0])
    assert torch.equal(ours.tensors["scale"], tensors["weight_scale"].view(torch.uint8))
    assert torch.equal(ours.tensors["codes"], tensors["weight_packed"])


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("symmetric", [True, False], ids=["no zero points", "zero points"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_integers_in_groups(dtype: str, symmetric: bool, bits: int) -> None:
    weight = weight_of(getattr(torch, dtype))
    options = {"num_bits": bits, "group_size": 64, "symmetric": symmetric, "strategy": "group"}
    tensors, expected = written_by("pack-quantized", weight, (48, 4, 64), (2,), **options)
    format = Int4Group("compressed", 64, not symmetric, False, dtype, bits)
    read = {"codes": tensors["weight_packed"], "scale": tensors["weight_scale"]}
    if not symmetric:
        read["zero"] = tensors["weight_zero_point"]
    same_as(format, read, expected)


def test_written_integers_are_theirs() -> None:
    weight = weight_of(torch.bfloat16)
    options = {"num_bits": 4, "group_size": 128, "strategy": "group"}
    tensors, expected = written_by("pack-quantized", weight, (48, 2, 128), (2,), **options)
    ours = quantize_weight(weight, "int4")
    torch.testing.assert_close(ours.tensors["scale"], tensors["weight_scale"], rtol=2**-7, atol=0)
    torch.testing.assert_close(ours.dequantize(), expected, rtol=0.2, atol=0.3)


@pytest.mark.parametrize("bits", [4, 8])
def test_words_hold_what_was_packed(bits: int) -> None:
    codes = torch.randint(0, 2**bits, (5, 24), dtype=torch.int32)
    assert torch.equal(unpack(pack(codes, bits), bits), codes)
