"""Training over every format of packed bits is training over the weights that they stand for."""

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from whole_models import batch_of, model_of, training_results

import lora_engine
from lora_engine import ops
from lora_engine.models.peft.adapters import LoraConfig, add_adapters
from lora_engine.models.quantized.linear import QuantizedLinear
from lora_engine.ops import QuantizedWeight
from lora_engine.quantization.formats import WRITABLE, writable_format
from lora_engine.quantization.gguf import TYPES, Gguf
from lora_engine.quantization.int4_group import Int4Group
from lora_engine.testing import error, with_lora

READ = {
    "gptq": Int4Group("gptq", 32, True, False, "float16"),
    "gptq, ordered": Int4Group("gptq_v2", 32, True, True, "float16"),
    "awq": Int4Group("awq", 32, True, False, "float16"),
    "zero points": Int4Group("compressed", 32, True),
    "8 bits in words": Int4Group("compressed", 0, True, bits=8),
}
K_FORMATS = {name: Gguf(name) for name, of in TYPES.items() if of.encode is None}
FORMATS = (*WRITABLE, *READ, *K_FORMATS)


def some_weight(name: str, weight: Tensor) -> QuantizedWeight:
    """The weight in the format; of those that are only read, any codes at all."""
    if name in WRITABLE:
        return ops.quantize_weight(weight, name)
    format = READ.get(name) or K_FORMATS[name]
    size = (weight.shape[0], weight.shape[1])
    generator = torch.Generator().manual_seed(weight.numel())
    tensors = {}
    for part, (shape, dtype) in format.layout(size).items():
        if dtype.is_floating_point:
            scale = 0.002 if name == "8 bits in words" else 0.02
            tensors[part] = (torch.rand(shape, generator=generator) * scale).to(dtype)
        elif part == "group_of":
            order = torch.randperm(size[1], generator=generator)
            tensors[part] = (order // 32).to(dtype)
        else:
            info = torch.iinfo(dtype)
            random = torch.randint(info.min, info.max + 1, shape, generator=generator)
            tensors[part] = random.to(dtype)
    if isinstance(format, Gguf):
        of = TYPES[format.type]
        blocks = tensors["codes"].view(-1, of.bytes)
        for at in of.scales:
            blocks[:, at : at + 2] = torch.tensor([2e-5]).half().view(torch.uint8)
    return QuantizedWeight(format, tensors, size, weight.dtype)


def base_pair(name: str) -> tuple[Any, Any]:
    """A model whose layers' linears are in the format, and one with what they stand for."""
    packed = model_of("wide" if name in K_FORMATS else "llama_biases", layers=1)
    dense = copy.deepcopy(packed)
    for path, layer in list(dense.model.named_modules()):
        if type(layer) is nn.Linear:
            weight = some_weight(name, layer.weight.detach())
            packed.model.set_submodule(path, QuantizedLinear(weight, layer.bias))
            layer.weight.data = weight.dequantize()
    return packed, dense


@pytest.fixture(autouse=True)
def wide_model(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows of whole blocks of 256, as the K formats need them."""
    import transformers
    from whole_models import MODELS, SIZES

    sizes = {**SIZES, "hidden_size": 256, "intermediate_size": 256}
    monkeypatch.setitem(MODELS, "wide", lambda: transformers.LlamaConfig(**sizes))


@pytest.mark.parametrize("name", FORMATS)
def test_loss_and_gradients(name: str) -> None:
    packed, dense = (with_lora(model, r=4) for model in base_pair(name))
    given = batch_of("right", torch.device("cpu"))
    reports = [lora_engine.accelerate(model) for model in (packed, dense)]
    assert not reports[0].left and reports[0].weights == reports[1].weights
    results = [training_results(model, given) for model in (packed, dense)]
    assert results[0].keys() == results[1].keys() and len(results[0]) > 2 * 7
    for part, expected in results[1].items():
        assert error(results[0][part], expected) < 1e-6, part


def test_every_format_is_here() -> None:
    assert {writable_format(name, None, False).name for name in WRITABLE} <= {
        "nf4", "fp4", "int8", "int4", "fp8", "mxfp4", "nvfp4", *TYPES
    }  # fmt: skip
    assert set(TYPES) <= set(FORMATS)


@pytest.mark.parametrize("accelerated", [False, True])
@pytest.mark.parametrize("name", ["nf4", "int8", "nvfp4", "awq"])
def test_dora(name: str, accelerated: bool) -> None:
    """PEFT's norms are those of the weights that the bits stand for, and so are the engine's."""
    packed, dense = (with_lora(model, r=4, use_dora=True) for model in base_pair(name))
    given = batch_of("right", torch.device("cpu"))
    if accelerated:
        assert not any(lora_engine.accelerate(model).left for model in (packed, dense))
    results = [training_results(model, given) for model in (packed, dense)]
    for part, expected in results[1].items():
        assert error(results[0][part], expected) < 2e-6, part


@pytest.mark.parametrize("name", ["nf4", "int8", "fp8", "q4_1"])
@pytest.mark.parametrize("method", ["pissa", "olora"])
def test_initialisations_that_write_into_weights_are_refused(name: str, method: str) -> None:
    packed, _ = base_pair(name)
    with pytest.raises(TypeError):
        with_lora(packed, r=4, init_lora_weights=method)


def test_whole_training_of_packed_weights_is_refused() -> None:
    packed, _ = base_pair("int8")
    settings = {"target_modules": ["v_proj"], "modules_to_save": ["q_proj"]}
    with pytest.raises(lora_engine.UserError, match=r"modules_to_save: 'q_proj' names .*packed"):
        add_adapters(packed, LoraConfig(**settings))
    model = add_adapters(packed, LoraConfig(target_modules=["v_proj"], modules_to_save=["lm_head"]))
    assert not lora_engine.accelerate(model).left
