"""GPTQ's and AWQ's words, and bitsandbytes' rows of INT8, by what their makers do."""

import pytest
import torch
from torch import Tensor

from lora_engine import QuantizedWeight
from lora_engine.ops.quantized_weight import encode_weight
from lora_engine.quantization.int4_group import Int4Group
from lora_engine.quantization.int8 import Int8

N, K, GROUP = 16, 64, 32


def numbers(bits: int = 4) -> tuple[Tensor, Tensor, Tensor]:
    """codes [N, K], zero [N, G] and scale [N, G]."""
    generator = torch.Generator().manual_seed(0)
    codes = torch.randint(0, 2**bits, (N, K), generator=generator)
    zero = torch.randint(1, 2**bits, (N, K // GROUP), generator=generator)
    scale = torch.rand(N, K // GROUP, generator=generator).half()
    return codes, zero, scale


def words(values: Tensor, bits: int, order: tuple[int, ...] | None = None) -> Tensor:
    """Words along the last dimension: value order[i] of each word's stands at place i."""
    each = 32 // bits
    order = order or tuple(range(each))
    out = torch.zeros(values.shape[0], values.shape[1] // each, dtype=torch.int64)
    for place, column in enumerate(order):
        out |= values[:, column::each] << place * bits
    return out.to(torch.int32)


def exact(codes: Tensor, zero: Tensor, scale: Tensor, of: Tensor) -> Tensor:
    """Values [N, K] float32; of [K]: each column's group."""
    return (codes - zero[:, of]).float() * scale.float()[:, of]


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("ordered", [False, True])
@pytest.mark.parametrize("packing", ["gptq", "gptq_v2"])
def test_gptq(packing: str, ordered: bool, bits: int) -> None:
    codes, zero, scale = numbers(bits)
    of = torch.arange(K) // GROUP
    if ordered:
        of = of[torch.randperm(K, generator=torch.Generator().manual_seed(1))]
    kept = zero - 1 if packing == "gptq" else zero
    tensors = {
        "codes": words(codes, bits).t().contiguous(),
        "scale": scale.t().contiguous(),
        "zero": words(kept.t().contiguous(), bits),
        "group_of": of.int(),
    }
    format = Int4Group(packing, GROUP, True, ordered, "float16", bits)
    packed = QuantizedWeight(format, tensors, (N, K), torch.float32)
    expected = exact(codes, zero, scale, of)
    assert torch.equal(packed.dequantize(), expected)
    assert torch.equal(packed.rows(3, 13), expected[3:13])


def test_awq() -> None:
    codes, zero, scale = numbers()
    order = (0, 2, 4, 6, 1, 3, 5, 7)
    tensors = {
        "codes": words(codes.t().contiguous(), 4, order),
        "scale": scale.t().contiguous(),
        "zero": words(zero.t().contiguous(), 4, order),
    }
    format = Int4Group("awq", GROUP, True, False, "float16")
    packed = QuantizedWeight(format, tensors, (N, K), torch.float32)
    expected = exact(codes, zero, scale, torch.arange(K) // GROUP)
    assert torch.equal(packed.dequantize(), expected)
    assert torch.equal(packed.rows(3, 13), expected[3:13])


def test_a_zero_point_of_gptq_wraps() -> None:
    """A word with all bits set is the zero point 0, less one."""
    tensors = {
        "codes": torch.zeros(1, 8, dtype=torch.int32),
        "scale": torch.ones(1, 8, dtype=torch.float16),
        "zero": torch.full((1, 1), -1, dtype=torch.int32),
    }
    format = Int4Group("gptq", 0, True, False, "float16")
    assert not QuantizedWeight(format, tensors, (8, 8), torch.float32).dequantize().any()


def test_bitsandbytes_int8() -> None:
    functional = pytest.importorskip("bitsandbytes").functional
    weight = torch.randn(32, 48, generator=torch.Generator().manual_seed(0))
    codes, absmax, _ = functional.int8_vectorwise_quant(weight.half())
    format = Int8(absmax=True)
    tensors = {"codes": codes, "scale": absmax.view(-1, 1)}
    packed = QuantizedWeight(format, tensors, (32, 48), torch.float32)
    expected = functional.int8_vectorwise_dequant(codes, absmax)
    assert torch.equal(packed.dequantize(), expected)
    ours = encode_weight(weight.half().float(), format)
    assert torch.equal(ours["scale"], tensors["scale"])
    assert (ours["codes"] != codes).float().mean() < 0.01  # theirs are rounded in float16


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"packing": "exl2"}, "packing 'exl2', expected compressed"),
        ({"group": -1}, "block -1"),
        ({"bits": 3}, "3 bits; expected 4 or 8"),
        ({"packing": "awq", "zeros": True, "ordered": True}, "AWQ has 4 bits"),
        ({"packing": "gptq"}, "gptq has zero points"),
        ({"scales": "int8"}, "scales of int8"),
    ],
)
def test_what_no_checkpoint_has_is_refused(options: dict[str, object], match: str) -> None:
    with pytest.raises(ValueError, match=match):
        Int4Group(**options)  # type: ignore[arg-type]


def test_a_weight_that_fills_no_words_is_refused() -> None:
    with pytest.raises(ValueError, match="gptq packs no weight"):
        Int4Group("gptq", zeros=True).layout((12, 64))
