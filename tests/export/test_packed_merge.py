"""Adapters merged over packed bases, and merged weights put into packed bits."""

import json

import peft
import pytest
import torch
from safetensors.torch import load_file
from tiny_model import save_tiny_model

import lora_engine
from lora_engine.errors import UserError
from lora_engine.export.adapter import read_adapter
from lora_engine.export.merge import merge_folder
from lora_engine.export.packed import Packing, dense_folder, load_packed, pack_folder
from lora_engine.export.verify import TOLERANCES, compare, load_plain, packed_tolerance
from lora_engine.models.quantized.linear import QuantizedLinear

ROWS = [[3 + (7 * i + j) % 90 for j in range(40)] for i in range(3)]
SIZES = {"hidden_size": 64, "intermediate_size": 128, "initializer_range": 0.2}


@pytest.fixture(scope="module")
def dense(tmp_path_factory):
    return save_tiny_model(tmp_path_factory.mktemp("base") / "dense", dtype=torch.bfloat16, **SIZES)


@pytest.fixture(scope="module")
def adapter(dense, tmp_path_factory):
    folder = tmp_path_factory.mktemp("adapter") / "a"
    torch.manual_seed(1)
    config = peft.LoraConfig(task_type="CAUSAL_LM", r=4, target_modules="all-linear")
    wrapped = peft.get_peft_model(load_plain(dense), config)
    with torch.no_grad():
        for parameter in wrapped.parameters():
            if parameter.requires_grad:
                parameter.add_(0.05 * torch.randn(parameter.shape))
    wrapped.save_pretrained(folder)
    return read_adapter(folder)


def linears(model):
    return {n: m for n, m in model.named_modules() if isinstance(m, QuantizedLinear)}


@pytest.mark.parametrize("format", ["nf4", "int8", "fp8", "q8_0"])
def test_a_packed_merge_is_the_dense_merge_quantised(dense, adapter, tmp_path, format):
    merged, packed = tmp_path / "merged", tmp_path / "packed"
    merged.mkdir(), packed.mkdir()
    merge_folder(dense, [(adapter, 1.0)], merged)
    report = pack_folder(merged, packed, Packing(format))
    plain, found = load_file(merged / "model.safetensors"), linears(load_packed(packed))
    assert len(found) == report.linears == 14
    errors = []
    for name, linear in found.items():
        exact = plain[f"{name}.weight"]
        expected = lora_engine.quantize_weight(exact, format).dequantize()
        assert torch.equal(linear.quantized.dequantize().bfloat16(), expected), name
        errors.append(((expected.double() - exact.double()).norm() / exact.double().norm()).item())
    assert report.error_max == pytest.approx(max(errors), rel=0.05)
    assert report.error == pytest.approx(sum(errors) / len(errors), rel=0.2)
    assert report.bits == pytest.approx(
        {"nf4": 4.5, "int8": 8.4, "fp8": 8.4, "q8_0": 8.5}[format], abs=0.2
    )
    comparison = compare(dense, [(adapter, 1.0)], packed, ROWS, load=load_packed)
    assert comparison.problem(TOLERANCES["bfloat16"]) is not None  # packing costs, and it is seen
    most = {"nf4": 0.5, "int8": 0.005, "fp8": 0.05, "q8_0": 0.005}[format]
    assert most / 20 < comparison.kl < most
    # Of this small adapter four bits lose all that it changes, eight do not.
    lost = "of what the adapter changes is lost" in (comparison.problem(packed_tolerance(8)) or "")
    assert lost == (format == "nf4")


@pytest.mark.parametrize("format", ["nf4", "fp8"])
@pytest.mark.parametrize("tied", [False, True])
def test_an_adapter_over_a_packed_base_is_merged_into_what_its_bits_decode_to(
    adapter, tmp_path, format, tied
):
    dense = save_tiny_model(
        tmp_path / "dense", dtype=torch.bfloat16, tie_word_embeddings=tied, **SIZES
    )
    base, merged = tmp_path / "base", tmp_path / "merged"
    merged.mkdir()
    model, tokenizer = lora_engine.load_model(dense, dtype="bfloat16", quantize=format)
    model.save_pretrained(base)
    tokenizer.save_pretrained(base)
    decoded = {n: m.quantized.dequantize() for n, m in linears(model).items()}
    with dense_folder(base, tmp_path) as folder:
        merge_folder(folder, [(adapter, 1.0)], merged)
        comparison = compare(folder, [(adapter, 1.0)], merged, ROWS)
    assert not folder.exists()
    assert comparison.problem(TOLERANCES["bfloat16"]) is None
    ours = load_file(merged / "model.safetensors")
    assert set(ours) == set(load_file(dense / "model.safetensors"))
    assert "quantization_config" not in json.loads((merged / "config.json").read_text())
    for name, weight in decoded.items():
        low = adapter.low_rank[name]
        exact = weight.double() + low.scaling * low.b.double() @ low.a.double()
        step = torch.finfo(torch.bfloat16).eps / 2
        assert ((ours[f"{name}.weight"].double() - exact).abs() <= step * exact.abs() + 1e-6).all()


def test_a_dense_base_is_not_copied(dense, tmp_path):
    with dense_folder(dense, tmp_path) as folder:
        assert folder == dense
    assert not list(tmp_path.iterdir())


def test_packed_weights_that_cannot_be_read_are_refused(dense, tmp_path):
    base = tmp_path / "base"
    model, _ = lora_engine.load_model(dense, dtype="bfloat16", quantize="fp8")
    model.save_pretrained(base)
    config = json.loads((base / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "other"}
    (base / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match="other") as told, dense_folder(base, tmp_path):
        pass
    assert "\n" not in str(told.value)
    assert not (tmp_path / "unpacked").exists()
