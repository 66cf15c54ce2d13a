"""Which linears of a model are put in packed bits, and which models are refused."""

from typing import Any

import pytest
import torch
from torch import nn

import lora_engine
from lora_engine import UserError
from lora_engine.models.quantized.linear import QuantizedLinear
from lora_engine.testing import tiny_llama, with_lora


def kinds(model: nn.Module) -> dict[str, bool]:
    """Each linear, and whether it is packed."""
    return {
        name: isinstance(module, QuantizedLinear)
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear)
    }


@pytest.mark.parametrize("options", [{}, {"format": "fp4", "block": 128, "double_quant": True}])
def test_linears_of_the_layers_are_packed(options: dict[str, Any]) -> None:
    model = tiny_llama(dtype=torch.bfloat16)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    lora_engine.quantize_model(model, **options)
    found = kinds(model)
    assert not found.pop("lm_head") and len(found) == 14 and all(found.values())
    for name in found:
        layer = model.get_submodule(name)
        expected = lora_engine.quantize_weight(before[f"{name}.weight"], **options)
        assert torch.equal(layer.quantized.dequantize(), expected.dequantize())
        assert not layer.weight.requires_grad
    assert torch.equal(model.lm_head.weight, before["lm_head.weight"])
    assert torch.equal(model.model.norm.weight, before["model.norm.weight"])


def test_what_is_skipped() -> None:
    class Expert(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.gate, self.gate_proj = nn.Linear(8, 4), nn.Linear(8, 8)

    model = nn.ModuleDict({"mlp": Expert(), "score": nn.Linear(8, 2)})
    lora_engine.quantize_model(model, block=32)
    assert kinds(model) == {"mlp.gate": False, "mlp.gate_proj": True, "score": False}
    model = tiny_llama(layers=2)
    lora_engine.quantize_model(model, skip=["*.1.mlp.*", "q_proj"])
    left = [name for name, packed in kinds(model).items() if not packed]
    assert left == [
        "model.layers.0.self_attn.q_proj",
        "model.layers.1.self_attn.q_proj",
        *(f"model.layers.1.mlp.{part}_proj" for part in ("gate", "up", "down")),
        "lm_head",  # the head of a model stays whatever it is called
    ]


def test_each_weight_goes_to_the_device_alone() -> None:
    model = tiny_llama()
    lora_engine.quantize_model(model, device="cpu")
    assert all(p.device.type == "cpu" for p in model.parameters())


def test_what_cannot_be_packed_is_refused() -> None:
    model = tiny_llama()
    model.model.layers[1].mlp.up_proj.weight.data[3, 3] = float("nan")
    with pytest.raises(UserError, match=r"layers\.1\.mlp\.up_proj\.weight: .*not finite"):
        lora_engine.quantize_model(model)
    with pytest.raises(UserError, match="did you mean nf4"):
        lora_engine.quantize_model(tiny_llama(), "nf44")
    with pytest.raises(UserError, match="block 48"):
        lora_engine.quantize_model(tiny_llama(), block=48)
    with pytest.raises(UserError, match="has an adapter"):
        lora_engine.quantize_model(with_lora(tiny_llama()))
    accelerated = tiny_llama()
    lora_engine.accelerate(accelerated)
    with pytest.raises(UserError, match="a forward of its own"):
        lora_engine.quantize_model(accelerated)


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"format": None}, "format None: expected one of nf4, fp4"),
        ({"block": "64"}, "block '64', expected one of"),
        ({"block": 64.0}, r"block 64\.0, expected one of"),
        ({"device": "gpu"}, "device 'gpu' is unknown"),
        ({"device": "meta"}, r"layers\.0\..*is on meta"),
        ({"skip": ["q_prj"]}, "'q_prj' matches no linear; did you mean q_proj"),
        ({"skip": [1]}, "expected patterns of names"),
    ],
)
def test_what_no_option_means_is_refused(options: dict[str, Any], match: str) -> None:
    with pytest.raises(UserError, match=match):
        lora_engine.quantize_model(tiny_llama(), **options)


def test_a_model_in_which_nothing_is_quantised_is_refused() -> None:
    model = tiny_llama(layers=1)
    lora_engine.quantize_model(model)
    for given in (model, nn.Linear(64, 8), nn.Sequential(nn.Conv1d(4, 4, 1))):
        with pytest.raises(UserError, match="has no linear"):
            lora_engine.quantize_model(given)
    with pytest.raises(UserError, match="str is no model"):
        lora_engine.quantize_model("model")  # type: ignore[arg-type]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float8_e4m3fn], ids=str)
def test_a_dtype_that_no_file_can_hold_is_refused(dtype: torch.dtype) -> None:
    with pytest.raises(UserError, match=r"^quantize_model: 0\.weight is torch\.float"):
        lora_engine.quantize_model(nn.Sequential(nn.Linear(64, 8).to(dtype)))


def test_a_linear_with_hooks_is_refused() -> None:
    model = nn.Sequential(nn.Linear(64, 8))
    model[0].register_forward_hook(lambda *_: None)
    with pytest.raises(UserError, match="0 has hooks"):
        lora_engine.quantize_model(model)


def test_one_pattern_is_not_its_letters() -> None:
    model = nn.ModuleDict({"head": nn.Linear(64, 8), "proj": nn.Linear(64, 8)})
    lora_engine.quantize_model(model, skip="head")
    assert kinds(model) == {"head": False, "proj": True}


def test_linears_in_two_places() -> None:
    linear, embedding = nn.Linear(64, 64), nn.Embedding(64, 64)
    tied = nn.Linear(64, 64, bias=False)
    tied.weight = embedding.weight
    model = nn.Sequential(linear, linear, nn.Sequential(linear), embedding, tied)
    lora_engine.quantize_model(model)
    assert model[0] is model[1] is model[2][0] and isinstance(model[0], QuantizedLinear)
    assert model[4] is tied and tied.weight is embedding.weight


def test_what_a_class_keeps_in_float32_stays() -> None:
    """T5 casts what goes into such a linear to the dtype of its weight."""
    from transformers import T5Config, T5ForConditionalGeneration

    model = T5ForConditionalGeneration(
        T5Config(vocab_size=32, d_model=16, d_kv=8, d_ff=32, num_layers=1, num_heads=2)
    )
    lora_engine.quantize_model(model)
    left = {name.rpartition(".")[2] for name, packed in kinds(model).items() if not packed}
    assert left == {"wo", "lm_head"}


def test_a_packed_model_holds_fewer_bytes() -> None:
    model = tiny_llama(hidden_size=64, intermediate_size=128, dtype=torch.bfloat16)
    linears = [m for m in model.model.modules() if isinstance(m, nn.Linear)]
    dense = sum(m.weight.nbytes for m in linears)
    lora_engine.quantize_model(model, double_quant=True)
    packed = [m for m in model.modules() if isinstance(m, QuantizedLinear)]
    assert sum(m.quantized.nbytes - 1024 for m in packed) < 0.27 * dense  # all share one table
