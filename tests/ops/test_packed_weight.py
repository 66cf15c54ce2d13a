"""Kernels decode packed weights to the bits that PyTorch's operations give."""

import pytest
import torch
from implementations import Backend
from torch import Tensor

from lora_engine.backends import launchers
from lora_engine.ops import QuantizedWeight
from lora_engine.quantization.format import Format, Scaled
from lora_engine.quantization.fp8 import Fp8
from lora_engine.quantization.gguf import TYPES, Gguf
from lora_engine.quantization.int4_group import Int4Group
from lora_engine.quantization.int8 import Int8
from lora_engine.quantization.mxfp4 import Mxfp4
from lora_engine.quantization.nvfp4 import Nvfp4

OPERATION = "packed_weight"
FORMATS: dict[str, Format] = {
    "int8": Int8(),
    "int8 of groups": Int8(group=48),
    "int8 of bitsandbytes": Int8(absmax=True),
    "int8, half scales": Int8(group=32, scales="float16"),
    "fp8": Fp8(),
    "fp8 of a weight": Fp8(0, 0),
    "fp8 of tiles": Fp8(128, 128, "bfloat16"),
    "mxfp4": Mxfp4(),
    "nvfp4": Nvfp4(),
    "nvfp4 of ModelOpt": Nvfp4(divides=False),
    "int4": Int4Group(),
    "int4 with zeros": Int4Group(group=32, zeros=True, scales="float16"),
    "int4 of rows": Int4Group(group=0),
    "int8 in words": Int4Group(bits=8, zeros=True),
    **{name: Gguf(name) for name in TYPES},
}
# Columns in whole blocks of every format, and such that strips, groups and tiles end inside.
SHAPES = [(1, 256), (8, 512), (24, 1280), (136, 768)]
RAGGED = {"int8": (3, 5), "int8 of groups": (5, 131), "fp8": (3, 515), "fp8 of tiles": (131, 201),
          "int4": (8, 203), "int8 in words": (4, 7)}  # fmt: skip


def random_weight(format: Format, shape: tuple[int, int], dtype: torch.dtype) -> QuantizedWeight:
    """Every byte that codes and scales can have, but for scales that are no numbers."""
    generator = torch.Generator().manual_seed(shape[0] * 10_000 + shape[1])
    tensors: dict[str, Tensor] = {}
    for name, (size, kind) in format.layout(shape).items():
        if kind.is_floating_point:
            tensors[name] = torch.randn(size, generator=generator).to(kind)
        else:
            info = torch.iinfo(kind)
            tensors[name] = torch.randint(
                info.min, info.max + 1, size, generator=generator, dtype=torch.int64
            ).to(kind)
    if isinstance(format, Gguf):
        of = TYPES[format.type]
        blocks = tensors["codes"].view(-1, of.bytes)
        for at in of.scales:  # subnormal, zero and ordinary numbers of both signs
            halves = torch.randn(len(blocks), 1, generator=generator).half()
            halves[::3] *= 1e-6
            halves[::7] = 0
            blocks[:, at : at + 2] = halves.view(torch.uint8)
    return QuantizedWeight(format, tensors, shape, dtype)


def bits(x: Tensor) -> Tensor:
    """x with one NaN for all."""
    return torch.where(x.isnan(), float("nan"), x.double()).view(torch.int64)


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("kept", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_decoded_bits(backend: Backend, name: str, kept: torch.dtype) -> None:
    shapes = [*SHAPES, *([RAGGED[name]] if name in RAGGED else [])]
    for shape in shapes:
        packed = random_weight(FORMATS[name], shape, kept)
        wide = torch.full((shape[0], shape[1] + 9), 7.0, dtype=kept)
        out = wide[:, 1 : shape[1] + 1]
        packed.rows(0, shape[0], out=out, impl=backend.impl)
        expected = packed.dequantize(impl="reference")
        assert torch.equal(bits(out), bits(expected)), shape
        assert (wide[:, 0] == 7).all() and (wide[:, shape[1] + 1 :] == 7).all()
        start, stop = shape[0] // 3, shape[0]
        assert torch.equal(bits(packed.rows(start, stop, impl=backend.impl)), bits(out[start:]))


def test_it_is_what_runs_where_there_is_a_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    called: list[str] = []
    kernels = launchers.packed_weight("cpu")

    class Watched:
        @staticmethod
        def decode_scaled(packed: Scaled, w: Tensor) -> None:
            called.append(packed.element)
            kernels.decode_scaled(packed, w)

    monkeypatch.setattr(launchers, "packed_weight", lambda impl: Watched)
    random_weight(Fp8(), (4, 64), torch.float32).dequantize()
    assert called == ["e4m3"]
    gptq = random_weight(Int4Group("gptq", zeros=True), (8, 128), torch.float32)
    gptq.dequantize()  # columns of words: PyTorch's operations alone
    assert called == ["e4m3"]
    with pytest.raises(ValueError, match="impl 'cpu'"):
        gptq.dequantize(impl="cpu")
