"""GGUF's block formats against gguf-py, bit for bit."""

import numpy as np
import pytest
import torch
from torch import Tensor

from lora_engine import QuantizedWeight, quantize_weight
from lora_engine.quantization.gguf import TYPES, Gguf

gguf = pytest.importorskip("gguf")
WRITTEN = [name for name, of in TYPES.items() if of.encode is not None]


def weights() -> dict[str, Tensor]:
    """Weights [6, 512] whose blocks are unlike."""
    generator = torch.Generator().manual_seed(0)
    normal = torch.randn(6, 512, generator=generator)
    with_zeros = normal.clone()
    with_zeros[:, 32:96] = 0
    with_zeros[0] = 3.0
    return {
        "normal": normal,
        "heavy tails": normal**5,
        "zeros and constants": with_zeros,
        "one sign": normal.abs() + 1,
        "tiny": normal * 1e-7,
        "ties": (normal * 8).round() / 2,
    }


def numbered(name: str) -> "gguf.GGMLQuantizationType":
    return gguf.GGMLQuantizationType[name.upper()]


def random_blocks(name: str, rows: int, cols: int) -> Tensor:
    """Any codes at all under scales that are finite."""
    of = TYPES[name]
    generator = torch.Generator().manual_seed(1)
    shape = (rows * cols // of.values, of.bytes)
    blocks = torch.randint(0, 256, shape, generator=generator).to(torch.uint8)
    for at in of.scales:
        numbers = torch.randn(shape[0], 1, generator=generator).half()
        blocks[:, at : at + 2] = numbers.view(torch.uint8)
    return blocks.view(rows, -1)


@pytest.mark.parametrize("name", TYPES)
def test_every_code_is_decoded_as_gguf_does(name: str) -> None:
    codes = random_blocks(name, 12, 1024)
    packed = QuantizedWeight(Gguf(name), {"codes": codes}, (12, 1024), torch.float32)
    expected = torch.from_numpy(gguf.dequantize(codes.numpy(), numbered(name)))
    assert torch.equal(packed.dequantize(), expected)
    assert torch.equal(packed.rows(5, 9), expected[5:9])
    assert packed.bits_per_parameter == pytest.approx(
        8 * gguf.GGML_QUANT_SIZES[numbered(name)][1] / gguf.GGML_QUANT_SIZES[numbered(name)][0]
    )


@pytest.mark.parametrize("name", WRITTEN)
@pytest.mark.parametrize("kind", weights())
def test_weights_are_written_as_gguf_does(name: str, kind: str) -> None:
    weight = weights()[kind]
    packed = quantize_weight(weight, name)
    expected = gguf.quantize(weight.numpy().astype(np.float32), numbered(name))
    assert torch.equal(packed.tensors["codes"], torch.from_numpy(expected))


def test_what_cannot_be_written_is_refused() -> None:
    weight = torch.ones(2, 256)
    with pytest.raises(ValueError, match="q4_k: is read and trained on, but not written"):
        Gguf("q4_k").encode(weight, weight.amax())
    with pytest.raises(ValueError, match="q4_0: 40 columns are no whole number of blocks of 32"):
        quantize_weight(torch.ones(2, 40), "q4_0")
    with pytest.raises(ValueError, match="q8_0: a value is too large for the float16 scale"):
        quantize_weight(weight * 1e8, "q8_0")
    with pytest.raises(ValueError, match="GGUF type q2_k: expected one of"):
        Gguf("q2_k")


@pytest.mark.parametrize("name", ["q5_1", "q6_k"])
def test_a_scale_that_is_no_number_is_noticed(name: str) -> None:
    codes = random_blocks(name, 2, 512)
    packed = QuantizedWeight(Gguf(name), {"codes": codes}, (2, 512), torch.float32)
    assert packed.is_finite
    at = TYPES[name].scales[-1]
    codes[1, at : at + 2] = torch.tensor([torch.nan]).half().view(torch.uint8)
    assert not packed.is_finite
