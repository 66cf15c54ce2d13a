"""Folders whose weights are quantised load packed, whoever wrote them, without another rounding."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import lora_engine
from lora_engine import QuantizedWeight, UserError, quantize_weight
from lora_engine.models.quantized.linear import QuantizedLinear
from lora_engine.ops.quantized_weight import encode_weight
from lora_engine.quantization.format import Format
from lora_engine.quantization.fp8 import Fp8
from lora_engine.quantization.int4_group import Int4Group, pack
from lora_engine.quantization.int8 import Int8
from lora_engine.quantization.nvfp4 import Nvfp4
from lora_engine.testing import byte_tokenizer, tiny_llama

NAMES = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj")
LINEARS = (*NAMES, "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")
Made = tuple[dict[str, Tensor], Format, dict[str, Tensor]]


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of a dense model in bfloat16, whose linears have biases in part."""
    folder = tmp_path_factory.mktemp("dense")
    model = tiny_llama(
        vocab_size=300,
        hidden_size=64,
        intermediate_size=128,
        layers=1,
        attention_bias=True,
        dtype=torch.bfloat16,
    )
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            nn.init.normal_(parameter)
    model.save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return folder


def repacked(
    dense: Path, folder: Path, make: Callable[[Tensor], Made], config: dict[str, Any]
) -> dict[str, QuantizedWeight]:
    """Writes the dense model to `folder` with each linear's weight as `make` has it.

    Gives what each weight is expected to be.
    """
    shutil.copytree(dense, folder)
    state = load_file(dense / "model.safetensors")
    expected = {}
    for name in LINEARS:
        linear = f"model.layers.0.{name}"
        weight = state.pop(f"{linear}.weight")
        entries, format, tensors = make(weight)
        state |= {f"{linear}.{key}": tensor.contiguous() for key, tensor in entries.items()}
        tensors = {key: tensor.contiguous() for key, tensor in tensors.items()}
        expected[linear] = QuantizedWeight(format, tensors, tuple(weight.shape), torch.float32)
    save_file(state, folder / "model.safetensors")
    content = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**content, "quantization_config": config}))
    return expected


def int8_rows(weight: Tensor) -> Made:
    tensors = encode_weight(weight.float(), Int8(absmax=True))
    return (
        {"weight": tensors["codes"], "SCB": tensors["scale"].view(-1)},
        Int8(absmax=True),
        tensors,
    )


def fp8_tiles(weight: Tensor) -> Made:
    format = Fp8(32, 32)
    tensors = encode_weight(weight.float(), format)
    codes = tensors["codes"].view(torch.float8_e4m3fn)
    return {"weight": codes, "weight_scale_inv": tensors["scale"]}, format, tensors


def fp8_rows(weight: Tensor) -> Made:
    format = Fp8(scales="bfloat16")
    tensors = encode_weight(weight.float(), format)
    codes = tensors["codes"].view(torch.float8_e4m3fn)
    return {"weight": codes, "weight_scale": tensors["scale"]}, format, tensors


def compressed_int8(weight: Tensor) -> Made:
    format = Int8(scales="bfloat16")
    tensors = encode_weight(weight.float(), format)
    return {"weight": tensors["codes"], "weight_scale": tensors["scale"]}, format, tensors


def compressed_int4(weight: Tensor) -> Made:
    format = Int4Group(group=32)
    tensors = encode_weight(weight.float(), format)
    entries = {
        "weight_packed": tensors["codes"],
        "weight_scale": tensors["scale"],
        "weight_shape": torch.tensor(weight.shape),
    }
    return entries, format, tensors


def fp4(weight: Tensor, name: str) -> Made:
    packed = quantize_weight(weight, name)
    tensors = dict(packed.tensors)
    scale = tensors["scale"]
    entries = {"weight_packed": tensors["codes"]}
    if name == "mxfp4":
        entries["weight_scale"] = scale
    else:
        entries["weight_scale"] = scale.view(torch.float8_e4m3fn)
        entries["weight_global_scale"] = tensors["global_scale"].view(1)
    return entries, packed.format, tensors


def modelopt_nvfp4(weight: Tensor) -> Made:
    format = Nvfp4(divides=False)
    tensors = encode_weight(weight.float(), format)
    entries = {
        "weight": tensors["codes"],
        "weight_scale": tensors["scale"].view(torch.float8_e4m3fn),
        "weight_scale_2": tensors["global_scale"],
    }
    return entries, format, tensors


def integers(weight: Tensor, packing: str, ordered: bool = False) -> Made:
    """Codes of any kind at all, which GPTQ and AWQ choose by data."""
    generator = torch.Generator().manual_seed(0)
    n, k = weight.shape
    groups = k // 32
    codes = torch.randint(0, 16, (n, k), dtype=torch.int32, generator=generator)
    zeros = torch.randint(0, 16, (groups, n), dtype=torch.int32, generator=generator)
    tensors = {"scale": torch.rand(groups, n, generator=generator).half() / 100}
    order = [0, 2, 4, 6, 1, 3, 5, 7]
    if packing == "awq":
        tensors["codes"] = pack(codes.t().unflatten(1, (-1, 8))[:, :, order].flatten(1), 4)
        tensors["zero"] = pack(zeros.unflatten(1, (-1, 8))[:, :, order].flatten(1), 4)
    else:
        tensors["codes"] = pack(codes, 4).t()
        tensors["zero"] = pack(zeros, 4)
    entries = {
        "qweight": tensors["codes"],
        "qzeros": tensors["zero"],
        "scales": tensors["scale"],
    }
    if packing != "awq":
        of = torch.arange(k) // 32
        of = of[torch.randperm(k, generator=generator)] if ordered else of
        entries["g_idx"] = of.int()
        if ordered:
            tensors["group_of"] = of.int()
    return entries, Int4Group(packing, 32, True, ordered, "float16"), tensors


def compressed(format: str, **weights: Any) -> dict[str, Any]:
    """compressed-tensors' configuration, whose first group is of other linears."""
    other = {"targets": ["re:.*router.*"], "weights": {"num_bits": 8}}
    return {
        "quant_method": "compressed-tensors",
        "format": format,
        "config_groups": {"group_0": other, "group_1": {"targets": ["Linear"], "weights": weights}},
        "ignore": ["lm_head"],
    }


CHECKPOINTS: dict[str, tuple[Callable[[Tensor], Made], dict[str, Any]]] = {
    "bitsandbytes 8 bit": (int8_rows, {"quant_method": "bitsandbytes", "load_in_8bit": True}),
    "fp8 tiles": (fp8_tiles, {"quant_method": "fp8", "weight_block_size": [32, 32]}),
    "fp8 rows": (
        fp8_rows,
        compressed("float-quantized", num_bits=8, type="float", strategy="channel"),
    ),
    "int8": (compressed_int8, compressed("int-quantized", num_bits=8, strategy="channel")),
    "int4": (
        compressed_int4,
        compressed("pack-quantized", num_bits=4, strategy="group", group_size=32),
    ),
    "mxfp4": (lambda w: fp4(w, "mxfp4"), compressed("mxfp4-pack-quantized", num_bits=4)),
    "nvfp4": (lambda w: fp4(w, "nvfp4"), compressed("nvfp4-pack-quantized", num_bits=4)),
    "modelopt": (modelopt_nvfp4, {"quant_method": "modelopt", "quant_algo": "NVFP4"}),
    "gptq": (
        lambda w: integers(w, "gptq"),
        {"quant_method": "gptq", "bits": 4, "group_size": 32, "checkpoint_format": "gptq"},
    ),
    "gptq in order of activations": (
        lambda w: integers(w, "gptq_v2", ordered=True),
        {"quant_method": "gptq", "bits": 4, "group_size": 32, "checkpoint_format": "gptq_v2"},
    ),
    "awq": (
        lambda w: integers(w, "awq"),
        {"quant_method": "awq", "bits": 4, "group_size": 32, "version": "gemm"},
    ),
}


def loaded(folder: Path, **options: Any) -> Any:
    return lora_engine.load_model(folder, device="cpu", **{"dtype": "float32", **options})[0]


@pytest.mark.parametrize("kind", CHECKPOINTS)
def test_linears_keep_the_files_bits(kind: str, dense: Path, tmp_path: Path) -> None:
    make, config = CHECKPOINTS[kind]
    expected = repacked(dense, tmp_path / "packed", make, config)
    model, plain = loaded(tmp_path / "packed"), loaded(dense)
    for name, weight in expected.items():
        layer = model.get_submodule(name)
        assert isinstance(layer, QuantizedLinear)
        assert layer.format == weight.format
        for part, tensor in weight.tensors.items():
            assert torch.equal(layer.quantized.tensors[part], tensor), (name, part)
        if layer.bias is not None:
            assert torch.equal(layer.bias, plain.get_submodule(name).bias)
    assert torch.equal(model.lm_head.weight, plain.lm_head.weight)
    assert torch.equal(model.model.norm.weight, plain.model.norm.weight)
    for name, weight in expected.items():  # the dense model with what the bits stand for
        plain.get_submodule(name).weight.data = weight.dequantize()
    ids = torch.arange(20)[None]
    with torch.no_grad():
        torch.testing.assert_close(model(ids).logits, plain(ids).logits, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("name", "options"),
    [("nf4", {"double_quant": True}), ("fp4", {}), ("int8", {"block": 64}), ("mxfp4", {})],
)
def test_a_model_quantised_here_saves_and_loads(
    name: str, options: dict[str, Any], dense: Path, tmp_path: Path
) -> None:
    model = loaded(dense, quantize=name, quantize_skip=["down_proj"], **options)
    model.save_pretrained(tmp_path)
    byte_tokenizer().save_pretrained(tmp_path)
    again = loaded(tmp_path)
    assert type(again.model.layers[0].mlp.down_proj) is nn.Linear
    assert isinstance(again.model.layers[0].mlp.up_proj, QuantizedLinear)
    state, expected = again.state_dict(), model.state_dict()
    assert state.keys() == expected.keys()
    for key, tensor in expected.items():
        assert torch.equal(state[key], tensor), key


@pytest.mark.parametrize("name", ["nf4", "fp4"])
def test_bitsandbytes_and_transformers_read_and_write_the_same(
    name: str, dense: Path, tmp_path: Path
) -> None:
    pytest.importorskip("bitsandbytes")
    from transformers import AutoModelForCausalLM

    ours = loaded(dense, quantize=name, double_quant=True)
    ours.save_pretrained(tmp_path / "ours")
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "ours", device_map="cpu")
    shutil.copytree(dense, tmp_path / "theirs")
    shutil.copy(tmp_path / "ours" / "config.json", tmp_path / "theirs")
    state = {name: tensor.contiguous() for name, tensor in theirs.state_dict().items()}
    save_file(state, tmp_path / "theirs" / "model.safetensors")
    again = loaded(tmp_path / "theirs")
    for linear in LINEARS:
        layer, before = (m.get_submodule(f"model.layers.0.{linear}") for m in (again, ours))
        assert isinstance(layer, QuantizedLinear) and layer.format == before.format
        assert torch.equal(layer.quantized.dequantize(), before.quantized.dequantize())


def changed(folder: Path, change: Callable[[dict[str, Tensor]], None]) -> None:
    state = load_file(folder / "model.safetensors")
    change(state)
    save_file(state, folder / "model.safetensors")


Q = "model.layers.0.self_attn.q_proj"


@pytest.mark.parametrize(
    ("kind", "change", "match"),
    [
        (
            "fp8 tiles",
            lambda s: s.pop(f"{Q}.weight_scale_inv"),
            rf"model\.safetensors: {Q}\.weight: {Q}\.weight_scale_inv is missing",
        ),
        (
            "int4",
            lambda s: s.update({f"{Q}.weight_scale": s[f"{Q}.weight_scale"][1:].clone()}),
            rf"{Q}\.weight: int4: scale is \[63, 2\] bfloat16, expected \[64, 2\]",
        ),
        (
            "bitsandbytes 8 bit",
            lambda s: s[f"{Q}.SCB"].__setitem__(3, torch.nan),
            rf"{Q}\.weight: has values that are not finite",
        ),
        (
            "nvfp4",
            lambda s: s["model.norm.weight"].__setitem__(3, torch.inf),
            r"model\.norm\.weight has values that are not finite",
        ),
        ("awq", lambda s: s.pop(f"{Q}.bias"), rf"lack 1 .* such as {Q}\.bias"),
        (
            "gptq",
            lambda s: s[f"{Q}.g_idx"].__setitem__(0, 99),
            rf"{Q}\.g_idx does not name a group for each column",
        ),
        (
            "mxfp4",
            lambda s: s.update({"model.layers.7.mlp.up_proj.weight": torch.ones(3)}),
            "no place in the model of config.json",
        ),
        (
            "int8",
            lambda s: s.update({"model.norm.weight": torch.ones(3)}),
            r"model\.norm\.weight: \[3\], not \[64\]",
        ),
    ],
)
def test_files_that_do_not_fit_are_refused(
    kind: str,
    change: Callable[[dict[str, Tensor]], None],
    match: str,
    dense: Path,
    tmp_path: Path,
) -> None:
    make, config = CHECKPOINTS[kind]
    repacked(dense, tmp_path / "packed", make, config)
    changed(tmp_path / "packed", change)
    with pytest.raises(UserError, match=match) as caught:
        loaded(tmp_path / "packed")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("config", "match"),
    [
        ({"quant_method": "exl3"}, r"config\.json: quant_method 'exl3' is unknown; known are lora"),
        ({"quant_method": "awq", "version": "gemv"}, "AWQ's version gemv; only gemm is read"),
        (
            {"quant_method": "compressed-tensors", "config_groups": {}},
            r"_proj\.weight: is packed, but no group in config_groups",
        ),
        ({"quant_method": "lora_engine"}, "no quantization_config that says how"),
    ],
)
def test_configurations_that_do_not_fit_are_refused(
    config: dict[str, Any], match: str, dense: Path, tmp_path: Path
) -> None:
    make, _ = CHECKPOINTS["awq"]
    repacked(dense, tmp_path / "packed", make, config)
    with pytest.raises(UserError, match=match):
        loaded(tmp_path / "packed")


def test_what_is_quantised_is_not_quantised_again(dense: Path, tmp_path: Path) -> None:
    repacked(dense, tmp_path / "packed", *CHECKPOINTS["int4"])
    with pytest.raises(UserError, match="quantised already; leave quantize out"):
        loaded(tmp_path / "packed", quantize="nf4")
    shutil.copytree(dense, tmp_path / "said")
    content = json.loads((dense / "config.json").read_text())
    content["quantization_config"] = {"quant_method": "awq"}
    (tmp_path / "said" / "config.json").write_text(json.dumps(content))
    with pytest.raises(UserError, match="says it is quantised, but no linear of it is"):
        loaded(tmp_path / "said")
